"""``id3pm-deploy import``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from .options import PATH, option

_GIBIBYTE = 1 << 30


def _identity(model: str | None, sha256: str | None) -> tuple[str | None, str | None]:
    """Name and SHA-256 of the FR model; those of a file are its own."""
    from ..identity.preprocessing import SFACE_SHA256

    if model == "sface":
        return model, sha256 or SFACE_SHA256
    if model is None or not (model.endswith(".onnx") or Path(model).is_file()):
        return model, sha256
    if sha256 is not None:
        raise InputError(
            "--identity-sha256 cannot be given beside a file",
            fix="give the FR model's name instead, or leave the hash out",
        )
    from ..files import sha256_of_file

    return Path(model).stem, sha256_of_file(Path(model))


@click.command(name="import")
@click.argument("source", type=PATH)
@click.option("--out", type=PATH, required=True, help="CHECKPOINT folder to write.")
@click.option(
    "--flags",
    metavar="FILE|TEXT",
    help="What the model was trained with: JSON, or the original command line.",
)
@click.option(
    "--defaults",
    is_flag=True,
    help="Flags that are not stated were left at guided-diffusion's defaults.",
)
@click.option(
    "--identity-model",
    metavar="NAME|FILE",
    help="FR model whose vectors condition it: its name, or its ONNX file.",
)
@click.option(
    "--identity-sha256", metavar="HEX", help="That model's SHA-256, as embed prints it."
)
@click.option(
    "--normalisation",
    type=click.Choice(["raw", "unit", "unit_sqrt_dim"]),
    help="How identity vectors are scaled: not at all, to length 1, or to √D.",
)
@click.option(
    "--projection",
    type=PATH,
    metavar="FILE",
    help="Of a UNet2DModel with class_embed_type identity: the linear layer before it.",
)
@click.option("--title", help="What the model is called.")
@click.option("--force", is_flag=True, help="Replace the CHECKPOINT if it exists.")
@option(
    "--memory-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="Most memory for reading a .pt or .bin.  [default: twice the file + 0.5]",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Most time for it.  [default: 120, and 1 for each 10 MiB]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(source: Path, out: Path, as_json: bool, **values: Any) -> None:
    """Import SOURCE, trained by other code, as a CHECKPOINT.

    SOURCE is a state dict of guided-diffusion (.pt or .safetensors), a folder of
    diffusers' UNet2DModel, or a CHECKPOINT, which is checked and written anew. It
    computes the same function afterwards, or is refused with the flag that cannot be
    represented. Nothing in the file is run.
    """
    from ..importing.flag_text import load_flags
    from ..importing.pickle_file import ImportLimits
    from ..importing.run import ImportSettings, import_checkpoint

    memory = values["memory_limit"]
    name, digest = _identity(values["identity_model"], values["identity_sha256"])
    settings = ImportSettings(
        flags=None if values["flags"] is None else load_flags(values["flags"]),
        defaults=values["defaults"],
        identity_model=name,
        identity_sha256=digest,
        normalisation=values["normalisation"],
        projection=values["projection"],
        title=values["title"],
        limits=ImportLimits(
            memory=None if memory is None else int(memory * _GIBIBYTE),
            seconds=values["time_limit"],
        ),
    )
    made = import_checkpoint(source, out, settings, force=values["force"])
    for warning in made.warnings:
        click.echo(f"warning: {warning}", err=True)
    _show(out, made, as_json)


def _show(out: Path, made: Any, as_json: bool) -> None:
    spec = made.spec
    if as_json:
        summary = {
            "checkpoint": str(out),
            "imported_from": made.kind,
            "parameters": made.parameters,
            "warnings": list(made.warnings),
            "config": spec.to_json(),
        }
        click.echo(json.dumps(summary, indent=2))
        return
    from ..attributes import described

    model = spec.model
    plural = "" if model.num_heads == 1 else "s"
    heads = f"{model.num_heads} head{plural} at every level"
    if model.num_heads is None:
        heads = f"{model.num_head_channels} channels a head"
    size = f"{model.image_size}×{model.image_size}"
    if model.low_res_size is not None:
        size += f" from {model.low_res_size}×{model.low_res_size}"
    identity = "none"
    if spec.identity.dim:
        identity = (
            f"{spec.identity.dim} numbers of {spec.identity.model_name}, "
            f"{spec.identity.normalisation}"
        )
    click.echo(f"checkpoint  {out} (from {made.kind})")
    click.echo(f"model       {size}, {made.parameters / 1e6:.1f} M parameters, {heads}")
    click.echo(
        f"diffusion   {spec.prediction_type}-prediction, {spec.schedule.name} schedule "
        f"of {spec.schedule.timesteps} timesteps"
        + (", learned variance" if model.learned_variance else "")
    )
    click.echo(f"identity    {identity}")
    if spec.attributes:
        click.echo(f"attributes  {', '.join(map(described, spec.attributes))}")
