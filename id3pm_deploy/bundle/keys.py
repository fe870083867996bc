"""Public keys: the PEM form, and which of them this user trusts.

Each trusted key is a file of its own in the user's settings. A folder or a file that
others may write to is not believed.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
from pathlib import Path

from ..errors import Id3pmError, InputError, OutputError
from ..files import open_plain, write_bytes
from ..user_folders import make_private, settings_folder, why_not_ours

MAX_KEY_BYTES = 4096
_PEM = re.compile(
    r"-----BEGIN PUBLIC KEY-----\s+([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----\s*"
)
_SPKI = bytes.fromhex("302a300506032b6570032100")
"""What stands before the 32 bytes of an Ed25519 key in its DER form (RFC 8410)."""
_TRUSTED = "trusted-keys"


def public_pem(key: bytes) -> bytes:
    """The PEM file of an Ed25519 public key of 32 bytes."""
    text = base64.b64encode(_SPKI + key).decode()
    return f"-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n".encode()


def read_public_key(path: Path) -> str:
    """The Ed25519 public key in a PEM file, as 64 hexadecimal digits.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    try:
        with open_plain(path, follow=True) as handle:
            text = handle.read(MAX_KEY_BYTES).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the key {path}", why=str(error)) from error
    der = b""
    if found := _PEM.fullmatch(text):
        with contextlib.suppress(binascii.Error):
            der = base64.b64decode("".join(found[1].split()), validate=True)
    if len(der) != len(_SPKI) + 32 or not der.startswith(_SPKI):
        raise InputError(
            f"{path} holds no Ed25519 public key",
            why="it is a private key" if "PRIVATE KEY" in text else "",
            fix="give the .pub file that `id3pm-deploy bundle keygen` made",
        )
    return der[len(_SPKI) :].hex()


def trust_key(path: Path) -> str:
    """Trust the public key in ``path``; returns its digits.

    Raises:
        InputError: It is no public key.
        OutputError: The user's settings cannot be written.
    """
    key = read_public_key(path)
    folder = _trusted_folder()
    try:
        make_private(folder)
    except OSError as error:
        raise OutputError(
            f"cannot keep trusted keys in {folder}",
            why=error.strerror or str(error),
            fix="repair that folder, or set XDG_CONFIG_HOME to another",
        ) from error
    write_bytes(folder / f"{key}.pub", public_pem(bytes.fromhex(key)), mode=0o600)
    return key


def trusted_keys() -> list[str]:
    """The keys that this user trusts, sorted.

    Raises:
        InputError: Others may write to where they are kept.
    """
    folder = _trusted_folder()
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    if reason := why_not_ours(folder):
        raise InputError(
            f"the trusted keys in {folder} cannot be believed",
            why=reason,
            fix="look at what is in it, then make it yours alone: chmod 700",
        )
    return [name[:64] for name in names if _is_kept(folder / name)]


def is_trusted(key: str) -> bool:
    """Whether the user trusts a key; not if others may write to where they are kept."""
    try:
        return key in trusted_keys()
    except Id3pmError:
        return False


def forget_key(key: str) -> None:
    """Trust a key no longer.

    Raises:
        InputError: It was not trusted.
        OutputError: It cannot be removed.
    """
    if key not in trusted_keys():
        raise InputError(
            f"{key!r:.80} is not a trusted key",
            fix="see `id3pm-deploy bundle trust --list`",
        )
    path = _trusted_folder() / f"{key}.pub"
    try:
        path.unlink()
    except OSError as error:
        raise OutputError(
            f"cannot remove {path}", why=error.strerror or str(error)
        ) from error


def _is_kept(path: Path) -> bool:
    """Whether a file is a key under its own name, ours alone."""
    try:
        return not why_not_ours(path) and path.name == f"{read_public_key(path)}.pub"
    except (OSError, InputError):
        return False


def _trusted_folder() -> Path:
    folder = settings_folder()
    if folder is None:
        raise OutputError(
            "there is no home folder to keep trusted keys in",
            fix="set HOME or XDG_CONFIG_HOME",
        )
    return folder / _TRUSTED
