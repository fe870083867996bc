"""An audit: do FR models accept pictures that were made from a template as the person?

The template of each person is the FR model's vector of one photo. A model that was
trained on such vectors makes pictures of it, and these are shown to the FR model, and
to others, which decide as a system in use would: one picture, no mirror image, no mean
subtracted, a threshold chosen beforehand. Against the photo that the template was made
of that is a type I attack, against another photo of the person type II (Mai et al.
2019, "On the Reconstruction of Face Images from Deep Face Templates").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import __version__
from ..benchmark.rounds import Interval
from ..errors import IdentityError
from ..generate import SampleSettings, conditions
from ..identity.alignment import FaceDetector
from ..identity.embedders import Embedder
from ..identity.vectors import identity_file
from ..images import Pixels
from ..parity.machine import machine_facts
from ..progress import progress
from .figures import FARS, Mask, Scores, rank1, threshold_at
from .intervals import Indices, bootstrap
from .people import Cut, Photos
from .result import flat
from .run import (
    EvaluationRequest,
    Made,
    Say,
    Shown,
    check_embedder,
    described,
    load_judges,
    open_sides,
    pictures_of,
    read_people,
)
from .similarity import Float64, cosines, face_crops, face_vectors, find_faces

FORMAT, FORMAT_VERSION = "id3pm-audit", 1
ENROLLED, ANOTHER = "enrolled", "another"
"""Which photo a picture is held against: the template's own, or one more of them."""
_FEWEST = 2
"""People with a second photo."""


@dataclass(frozen=True)
class Acceptance:
    """How often one FR model takes pictures for the person of the template.

    Attributes:
        system: The FR model that decides.
        photo: :data:`ENROLLED` or :data:`ANOTHER`.
        far: Share of pairs of different people's photos that it accepts.
        threshold: The cosine above which it accepts, for that.
        accepted: Share of pictures; one without a face is not accepted.
        reached: Share of people of whom one picture at least is.
        chance: Share of pictures accepted as somebody else among the people.
        ceiling: The same of photos: of the enrolled ones at the model's resolution, or
            of another photo of the person.
    """

    system: str
    photo: str
    far: float
    threshold: float
    accepted: Interval
    reached: Interval
    chance: float
    ceiling: Interval

    def to_json(self) -> dict[str, Any]:
        """One flat record."""
        return {
            "system": self.system,
            "photo": self.photo,
            "far": self.far,
            "threshold": float(f"{self.threshold:.6g}"),
            **flat("accepted", self.accepted),
            **flat("reached", self.reached),
            "chance": float(f"{self.chance:.6g}"),
            **flat("ceiling", self.ceiling),
        }


@dataclass(frozen=True)
class Audit:
    """Everything that was found.

    Attributes:
        title: What was audited.
        systems: FR models that decided; the first is the audited one.
        people: How many.
        pictures: How many.
        detected: Share of pictures in which the detector finds a face.
        acceptances: At every rate that there are enough pairs for.
        rank1: Of each system: share of pictures most alike to their own template.
        facts: What ran where, for people.
        settings: The same for scripts.
        notes: What a reader has to know.
    """

    title: str
    systems: tuple[str, ...]
    people: int
    pictures: int
    detected: Interval
    acceptances: tuple[Acceptance, ...]
    rank1: dict[str, Interval]
    facts: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, system: str, photo: str) -> list[Acceptance]:
        """By one system, against one kind of photo."""
        wanted = (system, photo)
        return [one for one in self.acceptances if (one.system, one.photo) == wanted]

    def to_json(self) -> dict[str, Any]:
        """The audited FR model's figures flat, then every acceptance as one record."""
        first = self.systems[0]
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "title": self.title,
            "people": self.people,
            "pictures": self.pictures,
            "systems": list(self.systems),
            **flat("detected", self.detected),
            **flat("rank1", self.rank1[first]),
            "rank1_chance": 1 / self.people,
            "rank1_of": {name: flat("rank1", v) for name, v in self.rank1.items()},
            "acceptances": [one.to_json() for one in self.acceptances],
            "settings": self.settings,
            "facts": self.facts,
            "notes": list(self.notes),
        }


def audit(request: EvaluationRequest, say: Say = lambda _: None) -> tuple[Audit, Shown]:
    """Invert the templates of people, and let FR models decide.

    Args:
        request: ``embedder`` is audited, ``judges`` decide beside it; one model.
        say: Called with a line for each photo that is left out.

    Raises:
        InputError: There are too few people.
        IdentityError: The model is conditioned on another FR model.
        FaceError: A photo cannot be used.
        Id3pmError: The model cannot be opened or run.
    """
    (side,) = open_sides(request)
    model, spec = side.model, side.model.spec
    own, *rest = load_judges((request.embedder, *request.judges))
    systems = [own, *rest]
    try:
        check_embedder(spec, own)
    except IdentityError as error:
        raise IdentityError(
            f"{own.name} cannot be audited with this model",
            why=error.why or error.what,
            fix="train a model on its vectors (id3pm-deploy train FACES --model "
            "FR-MODEL --out CHECKPOINT), and give it with --model",
        ) from error
    detector, settings = FaceDetector(), request.settings
    sizes = frozenset(one.size for one in systems)
    cut = Cut(sizes, spec.model.image_size, request.margin)
    photos = read_people(request, detector, cut, say, most=2)
    enrolled = np.unique(photos.own, return_index=True)[1]
    templates = own.embed(photos.crops[own.size][enrolled])
    file = identity_file(templates, own.name, own.sha256)
    wanted = conditions(spec, file, settings.count)
    made = pictures_of(side, settings, wanted)
    owner = np.repeat(np.arange(len(enrolled)), settings.count)
    found = _decided(systems, photos, made, detector, owner)
    mark = made.pictures.marks[0]
    shown = {made.name: made.pictures.pixels}
    result = Audit(
        title=f"{own.name}: templates of {len(enrolled)} people, inverted",
        systems=tuple(one.name for one in systems),
        people=len(enrolled),
        pictures=len(owner),
        facts=_facts(request, systems, photos, made),
        settings=_settings(settings, systems, model.weights_sha256),
        notes=_notes(found.acceptances, len(enrolled)),
        **vars(found),
    )
    return result, Shown(photos.small[enrolled], shown, settings.count, mark)


@dataclass(frozen=True)
class Views:
    """What one FR model sees: unit vectors [n, D], NaN where there is no face.

    Attributes:
        photos: Of every photo.
        pictures: Of every picture.
        small: Of every photo at the model's resolution.
    """

    photos: Float64
    pictures: Float64
    small: Float64


@dataclass(frozen=True)
class _Decided:
    """The measured part of an :class:`Audit`."""

    detected: Interval
    acceptances: tuple[Acceptance, ...]
    rank1: dict[str, Interval]


def _decided(
    systems: Sequence[Embedder],
    photos: Photos,
    made: Made,
    detector: FaceDetector,
    owner: Indices,
) -> _Decided:
    """Show everything to every FR model."""
    pixels, small = list(made.pictures.pixels), list(photos.small)
    with progress(len(pixels) + len(small), "finding faces") as tick:
        faces = find_faces(pixels, detector, tick)
        small_faces = find_faces(small, detector, tick)
    enrolled = np.unique(photos.own, return_index=True)[1]
    acceptances: list[Acceptance] = []
    ranks: dict[str, Interval] = {}
    total = (len(pixels) + len(small) + len(photos)) * len(systems)
    with progress(total, "deciding") as tick:
        for system in systems:

            def seen(crops: Sequence[Pixels | None], by: Embedder = system) -> Float64:
                return face_vectors(crops, by, mirrored=False, on_done=tick)

            size = system.size
            views = Views(
                seen(list(photos.crops[size])),
                seen(face_crops(pixels, faces, size)),
                seen(face_crops(small, small_faces, size)),
            )
            acceptances += decisions(system.name, views, photos.own, owner)
            scores = Scores(cosines(views.pictures, views.photos[enrolled]), owner)
            ranks[system.name] = _rank1(scores)
    detected = _share(np.array([points is not None for points in faces], float), owner)
    return _Decided(detected, tuple(acceptances), ranks)


def _rank1(scores: Scores) -> Interval:
    return bootstrap(lambda rows: {"it": rank1(scores.take(rows))}, scores.own)["it"]


def decisions(
    system: str, views: Views, photo_of: Indices, picture_of: Indices
) -> list[Acceptance]:
    """What one FR model decides, at every rate that can be set.

    Args:
        system: Its name.
        views: What it sees.
        photo_of: [p], the person of each photo; the first of each is enrolled.
        picture_of: [n], the person of each picture.
    """
    enrolled = np.unique(photo_of, return_index=True)[1]
    rest = np.setdiff1d(np.arange(len(photo_of)), enrolled)
    another = rest[np.unique(photo_of[rest], return_index=True)[1]]
    templates = views.photos[enrolled]
    pairs = cosines(templates, templates)[np.triu_indices(len(enrolled), 1)]
    enrolled_again = np.diag(cosines(views.small[enrolled], templates))
    other_photo = np.diag(cosines(views.photos[another], templates[photo_of[another]]))
    found = []
    for far in FARS:
        limit = threshold_at(pairs, far)
        if np.isnan(limit):
            continue
        passed = cosines(views.pictures, templates) > limit
        everybody = np.arange(len(enrolled))
        shares = _shares(passed, everybody, picture_of, enrolled_again > limit)
        found.append(Acceptance(system, ENROLLED, far, limit, **shares))
        if len(another) >= _FEWEST:
            passed = cosines(views.pictures, views.photos[another]) > limit
            people = photo_of[another]
            shares = _shares(passed, people, picture_of, other_photo > limit)
            found.append(Acceptance(system, ANOTHER, far, limit, **shares))
    return found


def _shares(passed: Mask, people: Indices, picture_of: Indices, real: Mask) -> Any:
    """The measured part of an :class:`Acceptance`.

    Args:
        passed: [n, m], whether each picture is accepted as each of m people.
        people: [m], who these are; pictures of others are left out.
        picture_of: [n], the person of each picture.
        real: [m], whether a photo of each is accepted.
    """
    mine = picture_of[:, None] == people[None, :]
    known = mine.any(axis=1)
    owner, own = picture_of[known], passed[known][mine[known]]
    reached = np.array([own[owner == one].any() for one in people], float)
    return {
        "accepted": _share(own.astype(float), owner),
        "reached": _share(reached, people),
        "chance": float(passed[known][~mine[known]].mean()),
        "ceiling": _share(real.astype(float), people),
    }


def _share(values: Float64, owner: Indices) -> Interval:
    return bootstrap(lambda rows: {"it": float(values[rows].mean())}, owner)["it"]


def _facts(
    request: EvaluationRequest, systems: list[Embedder], photos: Photos, made: Made
) -> dict[str, str]:
    settings = request.settings
    return {
        "Audited": described(systems[0]),
        "Beside it": "; ".join(described(one) for one in systems[1:]) or "nobody",
        "Photos": f"{len(photos)}"
        + (f"; {photos.skipped} left out" if photos.skipped else ""),
        "Pictures": f"{settings.count} of each person, none picked or left out",
        "Solver": f"{settings.solver.solver}, {settings.solver.steps} steps",
        "Guidance": f"{settings.guidance.scale:g}",
        "Noise": f"seed {settings.seed}",
        made.name: made.facts,
        **machine_facts(),
    }


def _settings(
    settings: SampleSettings, systems: list[Embedder], weights: str
) -> dict[str, Any]:
    return {
        "tool_version": __version__,
        "checkpoint_sha256": weights,
        "system_sha256": [one.sha256 for one in systems],
        "solver": dataclasses.asdict(settings.solver),
        "guidance": dataclasses.asdict(settings.guidance),
        "seed": settings.seed,
        "count": settings.count,
    }


def _notes(found: Sequence[Acceptance], people: int) -> tuple[str, ...]:
    rates = sorted({one.far for one in found}, reverse=True)
    notes = [
        "A low share does not show that templates are safe: another model, more "
        "pictures of each template or one trained on people like these may reach more.",
        "Thresholds are set on the photos of these people alone; a system in use has "
        "its own.",
    ]
    if missing := [f"{far:g}" for far in FARS if far not in rates]:
        notes.append(
            f"False acceptance rates of {', '.join(missing)} need more people than "
            f"{people}."
        )
    if not any(one.photo == ANOTHER for one in found):
        notes.append(
            "Only one photo of each person is there: whether pictures pass against "
            "another photo of the person was not measured."
        )
    return tuple(notes)
