"""``id3pm-deploy sample --replay``: the pictures of an earlier run again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from .options import flags, given

if TYPE_CHECKING:
    from ..identity.vectors import IdentityFile
    from ..models import Model
    from ..sampler import Limits

_ALLOWED = (
    *("model", "identity", "unconditional", "out", "low_res", "super_resolution"),
    *("replay", "deadline", "force", "as_json", "backend", "precision", "threads"),
    *("others", "directions", "device", "compiled", "replay_rows", "trust"),
)
"""All else stands in the record."""


def run_again(
    ctx: click.Context, record: Path, engine: dict[str, Any], limits: Limits
) -> dict[str, Any]:
    """Make the pictures of a run record again, in the folder of ``--out``.

    Args:
        ctx: The command's context, with its options.
        record: A ``record.json``, or the folder of its run.
        engine: Options of the engine, by their names in ``load``.
        limits: When to give up.

    Returns the new run's record.

    Raises:
        InputError: An option contradicts the record, or it cannot be repeated.
        IdentityError: The identities are not the record's.
    """
    from ..api import load
    from ..batch import joined
    from ..generate import check_output
    from ..replaying import read_record

    values = ctx.params
    if others := [n for n in values if n not in _ALLOWED and given(ctx, n)]:
        raise InputError(
            f"{flags(ctx, others)} cannot go with --replay",
            why="the record says how its pictures were made",
            fix="leave it out, or sample without --replay",
        )
    out, force = values["out"], values["force"]
    check_output(out, force=force)
    wanted = read_record(record)
    second = values["super_resolution"]
    with load(values["model"], super_resolution=second, **engine) as sampler:
        pixels = _low_res(values["low_res"], sampler.model)
        batches = sampler.replay(
            wanted,
            _identities(values["identity"], values["others"]),
            directions=values["directions"],
            low_res=pixels,
            limits=limits,
        )
        joined(list(batches)).save(out, force=force)
    return dict(read_record(out))


def _identities(*paths: Path | None) -> IdentityFile | None:
    from ..control.resolve import together
    from ..identity.vectors import load_identities

    return together(*(load_identities(path) for path in paths if path is not None))


def _low_res(path: Path | None, model: Model) -> Any:
    """What was enlarged, [n, h, w, 3] uint8; None where nothing was."""
    if path is None:
        return None
    from ..enlarging import read_pictures
    from ..generate import SHEET_NAME, is_run
    from ..images import to_uint8

    if model.spec.model.low_res_size is None:
        raise InputError(
            "--low-res is for a super-resolution model, which MODEL is not"
        )
    sheet = SHEET_NAME if is_run(path) else ""
    return to_uint8(read_pictures(path, model.spec, sheet).low_res)
