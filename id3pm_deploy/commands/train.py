"""``id3pm-deploy train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import PATH, option, printable

if TYPE_CHECKING:
    from ..training.config import TrainingConfig


def _numbers(kind: type) -> Any:
    def parse(ctx: click.Context, option: click.Parameter, value: str) -> Any:
        try:
            return tuple(kind(part) for part in value.split(",") if part)
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is not a list like 1,2,4") from error

    return parse


def _config(recipe: str | None, settings: dict[str, Any]) -> TrainingConfig:
    """The options; of a recipe, only those that were given replace what it says."""
    from ..training.config import TrainingConfig
    from ..training.recipe import config_from_recipe

    if recipe is None:
        return TrainingConfig(**settings)
    ctx, default = click.get_current_context(), click.core.ParameterSource.DEFAULT
    given = {
        name: value
        for name, value in settings.items()
        if ctx.get_parameter_source(name) != default
    }
    return config_from_recipe(recipe, given)


@click.command()
@click.argument("faces", nargs=-1, required=True, type=PATH)
@click.option("--out", required=True, type=PATH, help="CHECKPOINT folder to write.")
@click.option(
    "--model", "fr_model", default="sface", show_default=True, help="FR model."
)
@click.option("--resume", is_flag=True, help="Go on from OUT.training.")
@click.option("--init", "initial", type=PATH, help="CHECKPOINT to start from.")
@click.option(
    "--recipe",
    metavar="NAME",
    help="Defaults of the options below: paper64, small64, enlarge128 or a TOML file.",
)
@click.option("--dry-run", is_flag=True, help="Print the settings as a recipe.")
@option("--steps", default=4000, help="Optimizer steps in all.")
@option("--batch-size", default=16)
@option("--image-size", default=32, help="Side of the pictures, in pixels.")
@option(
    "--low-res-size", default=0, help="Train a second stage that enlarges this; 0: no."
)
@option("--low-res-noise", default=0.0, help="Most noise on what it enlarges.")
@option("--base-channels", default=32)
@option("--channel-multipliers", default="1,2,4", callback=_numbers(int))
@option("--residual-blocks", default=2)
@option("--attention-resolutions", default="8", callback=_numbers(int))
@option("--num-head-channels", default=32)
@option("--norm-groups", default=32, help="Groups of the group normalisation.")
@option("--resblock-updown/--conv-updown", default=False, help="Resampling.")
@option("--model-dropout", default=0.0)
@option("--prediction-type", default="v", type=click.Choice(["epsilon", "x0", "v"]))
@option(
    "--learned-variance/--fixed-variance",
    default=False,
    help="Learn the variance too, with the hybrid loss.",
)
@option("--vlb-weight", default=0.001, help="Weight of its variational part.")
@option("--min-snr-gamma", default=0.0, help="Min-SNR weighting, 5 say; 0: none.")
@option(
    "--normalisation",
    default="unit_sqrt_dim",
    type=click.Choice(["raw", "unit", "unit_sqrt_dim"]),
    help="How identity vectors are scaled.",
)
@option("--schedule", default="cosine", type=click.Choice(["cosine", "linear"]))
@option("--learning-rate", default=5e-4)
@option("--final-learning-rate", default=5e-5)
@option("--warmup-steps", default=200)
@option("--weight-decay", default=0.01)
@option("--gradient-clip", default=1.0, help="Largest norm of the gradient.")
@option("--ema-decay", default=0.9995, help="Of the average that CHECKPOINT holds.")
@option(
    "--ema-decays",
    default="",
    callback=_numbers(float),
    help="Decays of further averages, kept in OUT.training.",
)
@option("--condition-dropout", default=0.1, help="Share trained without identity.")
@option(
    "--attribute",
    "attributes",
    default=(),
    multiple=True,
    metavar="NAME=LOW..HIGH",
    help="Condition on it as well, or on NAME=ONE|OTHER; may be repeated.",
)
@option("--attribute-dropout", default=0.1, help="Share trained without each.")
@option("--joint-dropout", default=0.05, help="Share without identity or any of them.")
@click.option(
    "--attributes-from",
    "tables",
    multiple=True,
    type=PATH,
    metavar="FILE.csv",
    help="Table with a column `file`, relative to it, and one for each attribute.",
)
@click.option("--skip-bad", is_flag=True, help="Leave out pictures that are damaged.")
@option("--identity-noise", default=0.0, help="Noise on the vector, per entry.")
@option("--identity-jitter", default=1, help="Shifted crops embedded a face.")
@option("--crop-margin", default=1.15, help="How much to show around the face.")
@option("--shares", default="", callback=_numbers(float), help="Share a folder.")
@option("--seed", default=0)
@option("--save-every", default=250, help="Steps between saves.")
@option("--sheet-every", default=1000, help="Steps between contact sheets.")
@option("--tensorboard/--no-tensorboard", default=False, help="Log for TensorBoard.")
@option("--compile/--no-compile", default=False, help="Use torch.compile.")
@option("--device", default="cpu", help="cpu, cuda, cuda:1, mps or xpu.")
@option(
    "--processes",
    default=1,
    help="Processes that share each batch: of a CPU, or with --device cuda a GPU each.",
)
@option("--accumulation", default=1, help="Pieces of each process's share of a batch.")
@option(
    "--precision",
    default="float32",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the network's arithmetic (mixed precision by accelerate).",
)
@option(
    "--threads",
    default=0,
    help="Threads a process; 0: torch's choice, or 1 each of several processes.",
)
@option(
    "--storage",
    default="float32",
    type=click.Choice(["float32", "float16"]),
    help="How CHECKPOINT keeps its weights; the state is float32.",
)
@click.option("--title", default="", help="Title in CHECKPOINT.  [default: none]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    faces: tuple[Path, ...],
    out: Path,
    fr_model: str,
    resume: bool,
    initial: Path | None,
    threads: int,
    tables: tuple[Path, ...],
    skip_bad: bool,
    recipe: str | None,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a CHECKPOINT on FACES, pictures with one person each.

    FACES are folders, or tar shards as WebDataset has them: KEY.jpg or KEY.png, and
    KEY.json with attributes. Faces are found, aligned and embedded once. State, log and
    contact sheets go to OUT.training, which holds personal data: `wipe OUT` removes it.
    """
    from dataclasses import asdict

    from ..optional import require

    require("torch", extra="train")
    require("diffusers", extra="train")
    require("accelerate", extra="train")
    from ..identity.embedders import load_embedder
    from ..training.recipe import config_text
    from ..training.run import train
    from ..training.start import check_run
    from ..training.work import work_folder

    config = _config(recipe, settings)
    embedder = load_embedder(fr_model)
    if embedder.notice:
        click.echo(f"warning: {embedder.notice}", err=True)
    if dry_run:
        spec = check_run(faces, out, config, embedder, resume=resume, threads=threads)
        click.echo(config_text(config, spec), nl=False)
        return
    result = train(
        list(faces),
        out,
        config,
        embedder,
        resume=resume,
        initial=initial,
        threads=threads,
        tables=tables,
        skip_bad=skip_bad,
        tell=lambda line: click.echo(printable(line), err=True),
    )
    if as_json:
        click.echo(json.dumps(asdict(result)))
        return
    loss = "nothing left to do" if result.loss is None else f"loss {result.loss:.4f}"
    click.echo(f"checkpoint   {out}")
    click.echo(
        f"trained      {result.steps} steps on {result.faces} faces "
        f"({result.skipped} pictures skipped), {loss}"
    )
    click.echo(f"work folder  {work_folder(out)} (personal data: wipe it when done)")
