"""``id3pm-deploy verify-mark``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import PATH, printable

if TYPE_CHECKING:
    from ..mark_check import MarkCheck

_PIXELS = {
    "unchanged": "the pixels are those that were marked",
    "changed": "the pixels are not those that were marked",
    "not stated": "the mark does not say of which pixels",
    "not read": "the pixels cannot be read",
}


@click.command(name="verify-mark")
@click.argument("files", nargs=-1, required=True, type=PATH, metavar="FILE...")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.pass_context
def command(ctx: click.Context, /, files: tuple[Path, ...], as_json: bool) -> None:
    """Say whether pictures are marked as made by this tool, and unchanged since.

    Every picture this tool writes is marked in its metadata (XMP) as made by a trained
    model. PNG files and any other format that keeps XMP are read. The exit status is 1
    unless all FILEs are marked and none was changed.

    A mark is neither signed nor hidden in the pixels: it can be removed, so a picture
    without one may be generated all the same, and it can be forged.
    """
    from ..mark_check import check_mark

    found = {path: check_mark(path) for path in files}
    if as_json:
        facts = [{"file": str(path), **one.to_json()} for path, one in found.items()]
        click.echo(json.dumps(facts, indent=2))
    else:
        for path, one in found.items():
            click.echo(printable(f"{path}: {_sentence(one)}"))
    if not all(one.ok for one in found.values()):
        ctx.exit(1)


def _sentence(found: MarkCheck) -> str:
    mark = found.mark
    if mark is None:
        return f"no mark of id3pm-deploy ({found.why}), which shows nothing"
    what = "generated, put together with a photo" if mark.composite else "generated"
    by = f"id3pm-deploy {mark.tool_version}, seed {mark.seed}"
    if mark.sample is not None:
        by += f", sample {mark.sample}"
    return f"marked as {what} ({by}); {_PIXELS[found.pixels]}"
