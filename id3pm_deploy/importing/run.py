"""Checkpoints of other code, and our own, as a CHECKPOINT folder."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import safetensors
import torch
from torch import Tensor

from ..checkpoint_config import load_spec
from ..errors import CheckpointError, InputError
from ..files import sha256_of_file, temporary_folder
from ..reference.checkpoint import load_checkpoint, save_checkpoint
from ..reference.guided_diffusion import Converted, convert_guided_diffusion
from ..reference.guided_flags import with_defaults
from ..spec import NO_IDENTITY, DiffusionSpec, IdentitySpec, Normalisation
from ..staging import staged_folder
from .diffusers_folder import convert_diffusers
from .pickle_file import ImportLimits
from .source import Source, find_source, load_tensors

_PROJECTION = "image_emb.0"
_MAX_NAME = 200
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class ImportSettings:
    """What is known of a checkpoint beside its file.

    Attributes:
        flags: The flags it was trained with; None for our own, which says it all.
        defaults: Whether flags that are not there have guided-diffusion's defaults.
        identity_model: Name of the FR model whose vectors condition it.
        identity_sha256: SHA-256 of that model's file, as ``embed`` states it.
        normalisation: How its vectors are scaled.
        projection: For a UNet2DModel: the file of the layer that identity vectors go
            through before they are its ``class_labels``.
        title: What it is called; None keeps our own checkpoint's.
        limits: Of the process that reads a pickle.
    """

    flags: Mapping[str, Any] | None = None
    defaults: bool = False
    identity_model: str | None = None
    identity_sha256: str | None = None
    normalisation: Normalisation | None = None
    projection: Path | None = None
    title: str | None = None
    limits: ImportLimits = dataclasses.field(default_factory=ImportLimits)


@dataclass(frozen=True)
class Imported:
    """A CHECKPOINT that was written.

    Attributes:
        spec: Its facts.
        kind: What it was imported from.
        parameters: Numbers in its tensors.
        warnings: What the user should know.
    """

    spec: DiffusionSpec
    kind: str
    parameters: int
    warnings: tuple[str, ...]


def import_checkpoint(
    path: Path, out: Path, settings: ImportSettings, *, force: bool = False
) -> Imported:
    """Write a CHECKPOINT that computes the function of another checkpoint.

    Args:
        path: A state dict of guided-diffusion, a folder of diffusers' UNet2DModel, or
            a CHECKPOINT.
        out: The folder to write.
        settings: What the file does not say.
        force: Replace ``out`` if it exists.

    Raises:
        InputError: ``out`` exists, or a setting is missing or of no use here.
        CheckpointError: The checkpoint cannot be read, is not what the flags describe
            or computes a function that cannot be represented; flag, key or tensor is
            named.
        OutputError: ``out`` cannot be written.
    """
    if os.path.lexists(out) and not force:
        raise InputError(
            f"{out} exists already", fix="choose another name, or give --force"
        )
    source = find_source(path)
    if source.kind == "checkpoint":
        return _resave(source, out, settings)
    with temporary_folder(out) as work:
        tensors = load_tensors(source.weights, work, settings.limits)
        made = _converted(source, tensors, settings, work)
        digest = sha256_of_file(source.weights)
        origin = {**made.spec.origin, "source_sha256": digest}
        spec = dataclasses.replace(made.spec, origin=origin)
        with staged_folder(out) as staging:
            save_checkpoint(staging, spec, made.tensors)
    return Imported(spec, source.kind, _parameters(tensors), source.warnings)


def _parameters(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _converted(
    source: Source,
    tensors: dict[str, Tensor],
    settings: ImportSettings,
    work: Path,
) -> Converted:
    flags, title = settings.flags or {}, settings.title or ""
    if source.kind == "diffusers":
        tensors.update(_projection(settings, work))
        identity = _identity(tensors.get("identity_projection.weight"), settings)
        return convert_diffusers(
            source.config, source.scheduler, flags, tensors, identity, title
        )
    if settings.flags is None:
        raise InputError(
            "a state dict does not say what network it is of",
            fix="give --flags with what the model was trained with",
        )
    if settings.projection is not None:
        raise InputError("--projection is for a folder of diffusers' UNet2DModel")
    if settings.defaults:
        flags = with_defaults(flags)
    identity = _identity(tensors.get(f"{_PROJECTION}.weight"), settings)
    return convert_guided_diffusion(flags, tensors, identity, title)


def _projection(settings: ImportSettings, work: Path) -> dict[str, Tensor]:
    """The layer before a UNet2DModel's class_labels, under our names."""
    if settings.projection is None:
        return {}
    place = work / "projection"
    place.mkdir(mode=0o700)
    found = load_tensors(settings.projection, place, settings.limits)
    made = {
        f"identity_projection.{name.rpartition('.')[2]}": found[name] for name in found
    }
    if set(made) != {"identity_projection.weight", "identity_projection.bias"} or len(
        made
    ) != len(found):
        raise CheckpointError(
            f"{settings.projection.name} is no linear layer",
            why=f"it holds {len(found)} tensors, not weight and bias",
            fix="save the state dict of that layer alone",
        )
    return made


def _identity(weight: Tensor | None, settings: ImportSettings) -> IdentitySpec:
    """The FR model, as the user says; its dimension is that of the projection."""
    given = {
        "--identity-model": settings.identity_model,
        "--normalisation": settings.normalisation,
    }
    if weight is None or weight.dim() != 2:
        stated = [name for name, value in given.items() if value is not None]
        if stated or settings.identity_sha256:
            raise InputError(
                f"{' and '.join(stated) or '--identity-sha256'} cannot be used here",
                why="the network has no projection of an identity",
                fix="leave it out",
            )
        return NO_IDENTITY
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} must be given",
            why=f"the network takes identity vectors of {weight.shape[1]} numbers, and "
            "nothing in the file says of which face recognition model, or how scaled",
            fix="name the FR model it was trained with, and one of raw, unit and "
            "unit_sqrt_dim",
        )
    name, digest = settings.identity_model or "", settings.identity_sha256
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise InputError(f"{name!r:.80} is no name of an FR model")
    if digest is not None and not _SHA256.fullmatch(digest):
        raise InputError(
            f"{digest!r:.80} is no SHA-256", fix="give its 64 hexadecimal digits"
        )
    return IdentitySpec(
        dim=weight.shape[1],
        model_name=name,
        model_sha256=digest,
        normalisation=cast(Normalisation, settings.normalisation),
    )


def _resave(source: Source, out: Path, settings: ImportSettings) -> Imported:
    """Our own: everything is checked as it is loaded, and written anew."""
    useless = {
        "--flags": settings.flags is not None,
        "--defaults": settings.defaults,
        "--identity-model": settings.identity_model is not None,
        "--identity-sha256": settings.identity_sha256 is not None,
        "--normalisation": settings.normalisation is not None,
        "--projection": settings.projection is not None,
    }
    stated = [name for name, given in useless.items() if given]
    if stated:
        raise InputError(
            f"{' and '.join(stated)} cannot be used here",
            why="this is a CHECKPOINT, whose config.json says all of it",
            fix="leave it out",
        )
    folder = source.weights.parent
    spec = load_spec(folder)
    if settings.title is not None:
        spec = dataclasses.replace(spec, title=settings.title)
    network = load_checkpoint(folder).network
    tensors = network.state_dict()
    with staged_folder(out) as staging:
        save_checkpoint(staging, spec, tensors, _storage(source.weights))
    return Imported(spec, source.kind, _parameters(tensors), ())


def _storage(weights: Path) -> Literal["float32", "float16"]:
    """float16 where all weights are stored so, for that loses nothing."""
    with safetensors.safe_open(weights, framework="pt") as handle:
        names = list(handle.keys())
        halves = all(handle.get_tensor(name).dtype == torch.float16 for name in names)
    return "float16" if halves else "float32"
