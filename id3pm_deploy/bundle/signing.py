"""Ed25519 signatures over a bundle's manifest.

``manifest.sig`` lies beside the manifest and signs its exact bytes; the manifest has
the SHA-256 of everything else. This module alone needs the package cryptography, and
only where a signature is made or checked.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import BundleError, InputError, MissingPackageError, OutputError
from ..files import json_text, open_plain, write_bytes, write_new
from ..optional import require
from ..versioned_json import JsonFormat
from .keys import MAX_KEY_BYTES, is_trusted, public_pem
from .manifest import SIGNATURE_NAME
from .reader import Bundle, open_bundle
from .writer import locked

SIGNATURE = JsonFormat(
    name="id3pm-signature",
    version=1,
    what="a bundle's signature",
    noun="signature",
    max_bytes=4096,
    error=BundleError,
)
_ALGORITHM = "ed25519"
_HEX = re.compile(r"[0-9a-f]+")
State = Literal["none", "good", "bad", "unchecked"]


@dataclass(frozen=True)
class SignatureState:
    """What can be said of a bundle's signature.

    Attributes:
        state: ``none``; ``good``; ``bad``: not of this manifest, or damaged;
            ``unchecked``: the package cryptography is not installed.
        key: The signer's public key, 64 hexadecimal digits.
        trusted: Whether the user trusts that key.
        why: More about ``bad`` and ``unchecked``.
    """

    state: State
    key: str = ""
    trusted: bool = False
    why: str = ""

    @property
    def vouches(self) -> bool:
        """Whether a trusted key signed this very manifest."""
        return self.state == "good" and self.trusted


@dataclass(frozen=True)
class _Signature:
    algorithm: str
    public_key: str
    signature: str


def make_key(path: Path) -> tuple[Path, str]:
    """Make a key pair: ``path``, for its owner alone, and ``path`` + ``.pub``.

    Returns:
        Path of the public key, and the key as 64 hexadecimal digits.

    Raises:
        OutputError: One of the files exists, or cannot be written.
        MissingPackageError: cryptography is not installed.
    """
    ed25519 = _library("hazmat.primitives.asymmetric.ed25519")
    kinds = _library("hazmat.primitives.serialization")
    public = path.with_name(f"{path.name}.pub")
    if os.path.lexists(public):
        raise OutputError(
            f"{public} exists already", fix="choose another name for the key"
        )
    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        kinds.Encoding.PEM, kinds.PrivateFormat.PKCS8, kinds.NoEncryption()
    )
    raw: bytes = key.public_key().public_bytes_raw()
    write_new(path, pem, mode=0o600)
    try:
        write_new(public, public_pem(raw))
    except BaseException:
        path.unlink()
        raise
    return public, raw.hex()


def sign_bundle(folder: Path, key_file: Path) -> str:
    """Sign the manifest as it is now, under the bundle's lock; returns the public key.

    Raises:
        BundleError: ``folder`` is no bundle, or a file is not what it lists.
        InputError: The key cannot be used, or others can read it.
        MissingPackageError: cryptography is not installed.
        OutputError: The signature cannot be written.
    """
    private = _private_key(key_file)
    open_bundle(folder)
    with locked(folder):
        bundle = open_bundle(folder)
        bundle.verify()
        write_bytes(folder / SIGNATURE_NAME, signature_bytes(bundle.data, private))
    raw: bytes = private.public_key().public_bytes_raw()
    return raw.hex()


def signature_bytes(manifest: bytes, private: Any) -> bytes:
    """What ``manifest.sig`` holds for these manifest bytes and Ed25519PrivateKey."""
    values = {
        "format": SIGNATURE.name,
        "format_version": SIGNATURE.version,
        "algorithm": _ALGORITHM,
        "public_key": private.public_key().public_bytes_raw().hex(),
        "signature": private.sign(manifest).hex(),
    }
    return json_text(values).encode()


def bundle_signature(bundle: Bundle) -> SignatureState:
    """The state of the signature that lies in a bundle's folder."""
    try:
        return signature_state(bundle.data, read_signature(bundle.folder))
    except BundleError as error:
        return _bad(error)


def read_signature(folder: Path) -> bytes | None:
    """The bytes of ``manifest.sig``, not yet parsed; None where there is none.

    Raises:
        BundleError: It is no plain file, unreadable or too large.
    """
    path = folder / SIGNATURE_NAME
    if not os.path.lexists(path):
        return None
    try:
        return SIGNATURE.read(path)
    except OSError as error:
        raise BundleError(
            f"cannot read {path}", why=error.strerror or str(error)
        ) from error


def signature_state(manifest: bytes, signature: bytes | None) -> SignatureState:
    """The state of a signature, given as the bytes of its file; None: no file."""
    if signature is None:
        return SignatureState("none")
    try:
        found = _parsed(signature)
    except BundleError as error:
        return _bad(error)
    trusted = is_trusted(found.public_key)
    try:
        good = _is_good(found, manifest)
    except MissingPackageError as error:
        return SignatureState("unchecked", found.public_key, trusted, error.fix)
    if good:
        return SignatureState("good", found.public_key, trusted)
    return SignatureState(
        "bad",
        found.public_key,
        trusted,
        "it is not of this manifest: the bundle was changed after it was signed",
    )


def _bad(error: BundleError) -> SignatureState:
    return SignatureState("bad", why=": ".join(filter(None, (error.what, error.why))))


def _parsed(data: bytes) -> _Signature:
    where = SIGNATURE_NAME
    body = SIGNATURE.body(SIGNATURE.values(data, where), where)
    found = SIGNATURE.into(_Signature, body, where)
    if found.algorithm != _ALGORITHM:
        raise BundleError(f"{where} is of the algorithm {found.algorithm!r:.40}")
    for text, digits in ((found.public_key, 64), (found.signature, 128)):
        if len(text) != digits or not _HEX.fullmatch(text):
            raise BundleError(f"{where} holds no {digits} hexadecimal digits")
    return found


def _is_good(found: _Signature, manifest: bytes) -> bool:
    ed25519 = _library("hazmat.primitives.asymmetric.ed25519")
    invalid = _library("exceptions").InvalidSignature
    key = bytes.fromhex(found.public_key)
    try:
        public = ed25519.Ed25519PublicKey.from_public_bytes(key)
        public.verify(bytes.fromhex(found.signature), manifest)
    except (invalid, ValueError):
        return False
    return True


def _library(module: str) -> Any:
    return require(f"cryptography.{module}", extra="sign")


def _private_key(path: Path) -> Any:
    ed25519 = _library("hazmat.primitives.asymmetric.ed25519")
    kinds = _library("hazmat.primitives.serialization")
    fix = "make a key with `id3pm-deploy bundle keygen FILE`"
    try:
        with open_plain(path, follow=True) as handle:
            exposed = os.fstat(handle.fileno()).st_mode & 0o077
            data = handle.read(MAX_KEY_BYTES)
    except OSError as error:
        raise InputError(
            f"cannot read the key {path}", why=error.strerror or str(error), fix=fix
        ) from error
    if exposed:
        raise InputError(
            f"others may read or write the private key {path}",
            fix=f"if nobody has: chmod 600 {path}",
        )
    try:
        key = kinds.load_pem_private_key(data, password=None)
    except (
        ValueError,
        TypeError,
        _library("exceptions").UnsupportedAlgorithm,
    ) as error:
        raise InputError(f"{path} holds no private key", fix=fix) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InputError(f"{path} holds a key of another kind than Ed25519", fix=fix)
    return key
