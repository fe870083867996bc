"""An evaluation from files to figures: what the command calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import __version__
from ..defaults import MAX_BATCH_SIZE
from ..errors import InputError
from ..generate import (
    Conditions,
    Pictures,
    SampleSettings,
    conditions,
    make_pictures,
)
from ..guidance import guidance_scales
from ..identity.alignment import FaceDetector
from ..identity.embedders import Embedder, load_embedder
from ..identity.vectors import check_identities, identity_file
from ..images import Pixels
from ..marks import PictureMark
from ..models import Model
from ..parity.machine import machine_facts
from ..parity.sides import Side, SideRequest, check_same_function, open_side
from ..progress import progress
from ..solvers import solver_table
from ..spec import DiffusionSpec
from ..training.pictures import picture_paths
from .measure import Measured, Subject, Yardstick, measured
from .people import Cut, Photos, people_in, read_faces
from .result import Evaluation

MARGIN = 1.15
"""The crop margin that ``train`` takes."""
_NOISE_SEED = 0
_BATCH = 32

Say = Callable[[str], None]


@dataclass(frozen=True)
class EvaluationRequest:
    """What is evaluated, and by whom.

    Attributes:
        models: At least one; all of them the same function. The first is what the
            others are compared with.
        faces: Folder of photos; see :func:`.people.people_in`.
        judges: Specs of the FR models that judge, at least one.
        settings: How pictures are made; ``count`` of each person.
        embedder: Spec of the FR model that the models are conditioned on.
        training: Folders of the pictures that they were trained on, if nearest ones
            are to be looked for.
        limit: Take that many people; 0: all.
        margin: How much of a photo the model shows around a face.
        skip_bad: Leave out photos that cannot be used.
    """

    models: tuple[SideRequest, ...]
    faces: Path
    judges: tuple[str, ...]
    settings: SampleSettings
    embedder: str = "sface"
    training: tuple[Path, ...] = ()
    limit: int = 0
    margin: float = MARGIN
    skip_bad: bool = False


@dataclass(frozen=True)
class Shown:
    """Pictures for a sheet; person by person, ``count`` each.

    Attributes:
        photos: [m, S, S, 3] uint8, what the model could show at best.
        pictures: Of each model, [m * count, S, S, 3] uint8.
        count: Pictures of each person.
        mark: Of one picture, for the sheet's own.
    """

    photos: Pixels
    pictures: dict[str, Pixels]
    count: int
    mark: PictureMark


@dataclass(frozen=True)
class Made:
    """What one model made, and what it says of itself."""

    name: str
    facts: str
    pictures: Pictures


def evaluate(
    request: EvaluationRequest, say: Say = lambda _: None
) -> tuple[Evaluation, Shown]:
    """Make pictures of people from their photos, and measure them.

    Every picture counts: seeds are fixed, and none is picked or left out.

    Args:
        request: What to do.
        say: Called with a line for what is left out or cannot be measured.

    Raises:
        InputError: The request contradicts itself, or there are too few people.
        ParityError: The models are not the same function.
        IdentityError: The embedder is not the one the models are conditioned on.
        FaceError: A photo cannot be used.
        Id3pmError: A model cannot be opened or run.
    """
    sides = open_sides(request)
    models = [side.model for side in sides]
    spec = models[0].spec
    own, judges = load_embedder(request.embedder), load_judges(request.judges)
    check_embedder(spec, own)
    sizes = frozenset(one.size for one in (own, *judges))
    cut = Cut(sizes, spec.model.image_size, request.margin)
    detector = FaceDetector()
    photos = read_people(request, detector, cut, say)
    training = training_pictures(request.training, detector, cut)
    vectors = own.embed(photos.crops[own.size])
    file = identity_file(vectors, own.name, own.sha256)
    wanted = conditions(spec, file, request.settings.count)
    made = distinct([pictures_of(side, request.settings, wanted) for side in sides])
    noise = noise_like(photos.small)
    yardstick = Yardstick(detector, tuple(judges), photos, noise, training)
    owner = np.repeat(np.arange(len(photos)), request.settings.count)
    subjects = [Subject(one.name, one.pictures.pixels, owner) for one in made]
    found = measured(yardstick, subjects, say)
    evaluation = _evaluation(request, models[0], own, made, yardstick, found)
    shown = Shown(
        photos.small,
        {one.name: one.pictures.pixels for one in made},
        request.settings.count,
        made[0].pictures.marks[0],
    )
    return evaluation, shown


def check_models(models: Sequence[Model]) -> DiffusionSpec:
    """The facts that all models share.

    Raises:
        InputError: They take no identity, or enlarge pictures.
        ParityError: They are not the same function.
    """
    first = models[0]
    for other in models[1:]:
        check_same_function(other, first)
    if not first.spec.identity.dim or first.spec.model.low_res_size is not None:
        raise InputError(
            f"{first.path} cannot be evaluated",
            why="its pictures are of nobody in particular"
            if not first.spec.identity.dim
            else "it enlarges pictures that are given to it",
            fix="give a model that makes pictures of identities",
        )
    return first.spec


def check_embedder(spec: DiffusionSpec, own: Embedder) -> None:
    """Refuse another FR model than the models' own, before a photo is read.

    Raises:
        IdentityError: It is another one.
    """
    check_identities(
        identity_file(np.ones((1, own.dim), np.float32), own.name, own.sha256),
        dim=spec.identity.dim,
        model_name=spec.identity.model_name,
        model_sha256=spec.identity.model_sha256,
    )


def load_judges(specs: Sequence[str]) -> list[Embedder]:
    """The FR models that judge, each under a name of its own.

    Raises:
        InputError: There is none, or two are the same.
    """
    judges = [load_embedder(spec) for spec in specs]
    if not judges:
        raise InputError(
            "no FR model is there to judge",
            fix="name one with --judge, best another than the model's own",
        )
    known = [(one.name, one.sha256) for one in judges]
    if len(set(known)) < len(known):
        raise InputError("two judges are the same FR model", fix="leave one out")
    for number, judge in enumerate(judges):
        if judge.name in [one.name for one in judges[:number]]:
            judge.name = f"{judge.name} ({number + 1})"
    return judges


def open_sides(request: EvaluationRequest) -> list[Side]:
    """Every model with its engine, not yet entered, and settings that fit them: what
    is wrong with these is said before a photo is read.

    Raises:
        InputError, ParityError: See :func:`check_models`; or the settings do not fit.
        Id3pmError: A model cannot be opened.
    """
    models = [one.open_model() for one in request.models]
    table = solver_table(check_models(models), request.settings.solver)
    guidance_scales(request.settings.guidance, table.timesteps)
    return [open_side(one) for one in request.models]


def read_people(
    request: EvaluationRequest,
    detector: FaceDetector,
    cut: Cut,
    say: Say,
    most: int = 1,
) -> Photos:
    """The first ``most`` photos of each person."""
    people = [paths[:most] for paths in people_in(request.faces, request.limit)]
    with progress(sum(map(len, people)), "photos") as tick:
        return read_faces(
            people, detector, cut, skip_bad=request.skip_bad, say=say, on_done=tick
        )


def pictures_of(side: Side, settings: SampleSettings, wanted: Conditions) -> Made:
    """One model's pictures of every condition."""
    settings = dataclasses.replace(settings, batch_size=min(_BATCH, MAX_BATCH_SIZE))
    table = solver_table(side.model.spec, settings.solver)
    rows = len(table) * -(-len(wanted.ids) // settings.batch_size)
    with side.engine, progress(rows, side.info.backend) as tick:
        made = make_pictures(
            side.engine, side.model, settings, wanted, lambda _: tick()
        )
    return Made(side.name, side.facts, made)


def distinct(made: Sequence[Made]) -> list[Made]:
    """The same with names of their own."""
    found: list[Made] = []
    for one in made:
        same = sum(other.name.startswith(one.name) for other in found)
        name = f"{one.name}, {same + 1}" if same else one.name
        found.append(dataclasses.replace(one, name=name))
    return found


def noise_like(photos: Pixels) -> Pixels:
    """Pictures of noise with the photos' mean and spread at every pixel."""
    mean, spread = photos.mean(axis=0), photos.std(axis=0)
    drawn = np.random.default_rng(_NOISE_SEED).normal(mean, spread, photos.shape)
    return np.clip(np.rint(drawn), 0, 255).astype(np.uint8)


def training_pictures(
    folders: Sequence[Path], detector: FaceDetector, cut: Cut
) -> Photos | None:
    """The faces of the pictures in ``folders``; what ``train`` would have skipped is
    skipped here. None where there are no folders."""
    if not folders:
        return None
    paths = [[path] for folder in folders for path in picture_paths(folder)]
    none = dataclasses.replace(cut, sizes=frozenset())
    with progress(len(paths), "training pictures") as tick:
        return read_faces(paths, detector, none, skip_bad=True, on_done=tick)


def _evaluation(
    request: EvaluationRequest,
    model: Model,
    own: Embedder,
    made: Sequence[Made],
    yardstick: Yardstick,
    found: Measured,
) -> Evaluation:
    photos, settings = yardstick.photos, request.settings
    count = settings.count
    facts = {
        "Model": f"{model.title} (weights {model.weights_sha256[:12]})",
        "Conditioned on": described(own),
        "Judged by": "; ".join(described(one) for one in yardstick.judges),
        "People": f"{len(photos)}, one photo each"
        + (f"; {photos.skipped} photos left out" if photos.skipped else ""),
        "Pictures": f"{count} of each person, none picked or left out",
        "Solver": f"{settings.solver.solver}, {settings.solver.steps} steps",
        "Guidance": f"{settings.guidance.scale:g}",
        "Noise": f"seed {settings.seed}, the same for all models",
        **{one.name: one.facts for one in made},
        **found.facts,
    }
    return Evaluation(
        title=f"{model.title}: pictures of {len(photos)} people",
        models=tuple(one.name for one in made),
        judges=tuple(one.name for one in yardstick.judges),
        people=len(photos),
        pictures=len(photos) * count,
        figures=found.figures,
        changes=found.changes,
        spreads=found.spreads,
        facts=facts | machine_facts(),
        settings={
            "tool_version": __version__,
            "checkpoint_sha256": model.weights_sha256,
            "embedder": own.name,
            "embedder_sha256": own.sha256,
            "judge_sha256": [one.sha256 for one in yardstick.judges],
            "solver": dataclasses.asdict(settings.solver),
            "guidance": dataclasses.asdict(settings.guidance),
            "seed": settings.seed,
            "count": count,
            "margin": request.margin,
        },
        notes=(*_notes(own, yardstick, made), *found.notes),
    )


def described(embedder: Embedder) -> str:
    """An FR model's name and hash."""
    return f"{embedder.name} ({(embedder.sha256 or 'no hash')[:12]})"


def _notes(own: Embedder, yardstick: Yardstick, made: Sequence[Made]) -> list[str]:
    notes = [
        f"{judge.name} is the FR model that the pictures were made for: what it says "
        "shows that the model does as it was trained, not that the face is the person."
        for judge in yardstick.judges
        if (judge.sha256 or judge.name) == (own.sha256 or own.name)
    ]
    notes += [
        f"{failed} pictures of {one.name} were not finite; they are black and count as "
        "pictures without a face."
        for one in made
        if (failed := int(one.pictures.failed.sum()))
    ]
    return notes
