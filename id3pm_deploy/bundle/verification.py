"""Everything that can be said of a bundle without running it, as folder or as tar."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BundleError, MissingPackageError, TrustError
from ..progress import progress
from .archive import opened_tar
from .manifest import MANIFEST_NAME, SIGNATURE_NAME
from .reader import Bundle, open_bundle
from .signing import SignatureState, bundle_signature, signature_state
from .trust import PlanTrust, plan_trust


@dataclass(frozen=True)
class Verification:
    """What :func:`verify_path` found; every listed file is as the manifest says.

    Attributes:
        kind: ``folder`` or ``tar``.
        format_version: The manifest's.
        files: Number of listed files.
        size: Bytes in them.
        signature: Whose, and whether it is good.
        plans: By its engine's label, whether each plan may be loaded.
        unlisted: Names in the folder that the manifest does not list; nothing reads
            them.
    """

    kind: str
    format_version: int
    files: int
    size: int
    signature: SignatureState
    plans: dict[str, PlanTrust]
    unlisted: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        signature = {
            "state": self.signature.state,
            "key": self.signature.key or None,
            "trusted": self.signature.trusted,
            "why": self.signature.why,
        }
        plans = {
            target: {"trusted": plan.trusted, "reason": plan.reason}
            for target, plan in self.plans.items()
        }
        return {
            "kind": self.kind,
            "format_version": self.format_version,
            "files": self.files,
            "bytes": self.size,
            "signature": signature,
            "plans": plans,
            "unlisted": list(self.unlisted),
        }

    def check_signature(self, *, require_trusted: bool = False) -> None:
        """Raise unless the signature is good, or there is none and none is required.

        Args:
            require_trusted: A trusted key must have signed.

        Raises:
            BundleError: It is not of this manifest.
            MissingPackageError: It cannot be checked here.
            TrustError: No trusted key signed, and one is required.
        """
        found = self.signature
        if found.state == "bad":
            raise BundleError(
                "the bundle's signature is not good",
                why=found.why,
                fix="get the bundle again, or sign it again if it is yours",
            )
        if found.state == "unchecked":
            raise MissingPackageError(
                "the bundle's signature cannot be checked here", fix=found.why
            )
        if require_trusted and not found.vouches:
            raise TrustError(
                "no key that you trust signed this bundle",
                why=f"it is signed by {found.key}" if found.key else "it is not signed",
                fix="trust the signer's key with `id3pm-deploy bundle trust KEY.pub`",
            )


def verify_path(path: Path) -> Verification:
    """Hash everything in a bundle, whatever is known of it from before.

    Args:
        path: A bundle's folder, or the tar that ``bundle pack`` made of one.

    Raises:
        InputError: There is nothing at ``path``.
        BundleError: Something is not as the format or the manifest says.
    """
    if path.is_file():
        return _verified_tar(path)
    bundle = open_bundle(path)
    with progress(len(bundle.manifest.files), "verifying") as tick:
        bundle.verify(lambda _: tick())
    known = {*bundle.manifest.files, MANIFEST_NAME, SIGNATURE_NAME, ".lock"}
    unlisted = sorted(set(os.listdir(path)) - known)
    return _verification("folder", bundle, bundle_signature(bundle), tuple(unlisted))


def _verified_tar(path: Path) -> Verification:
    with opened_tar(path) as (handle, archive):
        with progress(len(archive.members), "verifying") as tick:
            for member in archive.members:
                for _ in archive.stream(handle, member):
                    pass
                tick()
        bundle = Bundle(path, archive.manifest, archive.data)
        signature = signature_state(archive.data, archive.signature)
    return _verification("tar", bundle, signature, ())


def _verification(
    kind: str, bundle: Bundle, signature: SignatureState, unlisted: tuple[str, ...]
) -> Verification:
    manifest = bundle.manifest
    sizes = [manifest.file_entry(name).size for name in manifest.files]
    plans = {e.label: plan_trust(bundle, e, signature) for e in manifest.plans}
    version = manifest.format_version
    return Verification(
        kind, version, len(sizes), sum(sizes), signature, plans, unlisted
    )
