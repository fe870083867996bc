"""Which plans may be loaded: a plan is native code, and loading it is running it.

It is loaded only if this user built it on this machine (the ledger), if the bundle is
signed by a key the user trusts, or if the user says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import TrustError
from .ledger import why_not_built_here
from .manifest import EngineEntry
from .reader import Bundle
from .signing import SignatureState, bundle_signature


@dataclass(frozen=True)
class PlanTrust:
    """Whether a plan may be loaded, and why or why not."""

    trusted: bool
    reason: str


def plan_trust(
    bundle: Bundle, entry: EngineEntry, signature: SignatureState | None = None
) -> PlanTrust:
    """Whether the plan of ``entry`` may be loaded without ``--trust``.

    It goes by the plan's SHA-256 in the manifest; :meth:`Bundle.read` then holds the
    plan's bytes against that.

    Args:
        bundle: Where the entry is from.
        entry: An engine with a plan.
        signature: The state of the bundle's signature, where it is known already.

    Raises:
        BundleError: The manifest does not list the plan.
    """
    why = why_not_built_here(bundle.manifest.file_entry(entry.file).sha256)
    if not why:
        return PlanTrust(True, "built on this machine by you")
    state = bundle_signature(bundle) if signature is None else signature
    if state.vouches:
        return PlanTrust(True, f"signed by {state.key}, which you trust")
    return PlanTrust(False, f"{why}, and {_signature_text(state)}")


def _signature_text(state: SignatureState) -> str:
    if state.state == "none":
        return "the bundle is not signed"
    if state.state == "good":
        return f"the bundle is signed by {state.key}, which you do not trust"
    if state.state == "unchecked":
        return f"the bundle's signature cannot be checked: {state.why}"
    return f"the bundle's signature is not good: {state.why}"


def check_plan_trusted(
    bundle: Bundle, entry: EngineEntry, *, trust: bool = False
) -> None:
    """Raise unless the plan of ``entry`` may be loaded.

    Args:
        bundle: Where the entry is from.
        entry: An engine with a plan.
        trust: The user answers for the plan.

    Raises:
        TrustError: Nobody does.
        BundleError: The manifest does not list the plan.
    """
    found = plan_trust(bundle, entry)
    if not found.trusted and not trust:
        raise TrustError(
            f"the plan of the engine {entry.label!r:.80} in {bundle.folder} is not "
            "trusted",
            why=f"a plan is native code; {found.reason}",
            fix="build it here with `build-engine`, trust the signer's key with "
            "`bundle trust KEY.pub`, or give --trust if you know where it is from",
        )
