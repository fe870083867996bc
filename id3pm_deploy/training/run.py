"""A whole run: checks, faces, and one process or several that train."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing

from ..errors import TrainingError
from ..files import make_folder, output_error, write_json
from ..identity.embedders import Embedder
from .batches import face_weights
from .config import TrainingConfig
from .devices import join_fellows, open_accelerator
from .faces import TrainingFaces, load_faces
from .loop import TrainingResult, run_steps
from .start import (
    SETTINGS_NAME,
    check_run,
    initial_weights,
    settings_of,
)
from .trainer import Plan, Trainer
from .work import CACHE_NAME, work_folder

_OUR_ERROR = re.compile(r"^id3pm_deploy\.errors\.\w+: (.*)", re.MULTILINE | re.DOTALL)


def train(
    folders: Sequence[Path],
    out: Path,
    config: TrainingConfig,
    embedder: Embedder,
    *,
    resume: bool = False,
    initial: Path | None = None,
    threads: int = 0,
    tables: Sequence[Path] = (),
    skip_bad: bool = False,
    tell: Callable[[str], object] = lambda _: None,
) -> TrainingResult:
    """Train a CHECKPOINT on the faces in ``folders``.

    Args:
        folders: Folders or tar shards of pictures with one person each.
        out: The CHECKPOINT folder; state, log and contact sheets go to
            ``OUT.training`` beside it.
        config: Settings.
        embedder: The black-box FR model whose vectors condition the network.
        resume: Go on from the state in ``OUT.training``.
        initial: A CHECKPOINT of the same kind whose weights to start from; a resumed
            run has its own.
        threads: CPU threads a process; 0 leaves torch's choice to one process and
            means 1 each to several.
        tables: CSV tables that state attributes of the pictures.
        skip_bad: Leave out pictures that cannot be used instead of refusing them.
        tell: Called with each line about pictures that are left out.

    Raises:
        InputError: Unusable faces or settings, or ``out`` is in use. Everything that
            does not depend on the faces is found before they are looked at.
        CheckpointError: The settings contradict each other, or ``initial`` is damaged.
        IdentityError: The FR model's answer is unusable.
        TrainingError: The state cannot be resumed, or the loss is not finite.
        OutputError: A file cannot be written.
    """
    spec = check_run(folders, out, config, embedder, resume=resume, threads=threads)
    weights = None if initial is None else initial_weights(initial, spec)
    work = make_folder(work_folder(out))
    try:
        os.chmod(work, 0o700)
    except OSError as error:
        raise output_error(work, error) from error
    faces = load_faces(
        folders,
        embedder,
        size=config.image_size,
        margin=config.crop_margin,
        jitter=config.identity_jitter,
        seed=config.seed,
        cache=work / CACHE_NAME,
        attributes=config.attribute_specs,
        tables=tables,
        skip_bad=skip_bad,
        tell=tell,
    )
    face_weights(faces.folders, config.shares)  # or an error, before anything starts
    write_json(work / SETTINGS_NAME, settings_of(config, embedder))
    plan = Plan(config, spec, out, resume, weights, threads)
    if config.processes == 1:
        return _run_here(plan, faces)
    return _run_processes(plan, faces)


def _run_here(plan: Plan, faces: TrainingFaces) -> TrainingResult:
    """Train in this process, alone or with the fellows it has joined."""
    with open_accelerator(plan.config, plan.threads) as accelerator:
        return run_steps(Trainer(plan, accelerator), faces)


def _run_processes(plan: Plan, faces: TrainingFaces) -> TrainingResult:
    """Run one process a share of the batch; they meet in a file, on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "result.json"
        meeting = f"file://{folder}/meeting"
        try:
            torch.multiprocessing.spawn(  # type: ignore[no-untyped-call, attr-defined]
                _process, (plan, faces, meeting, answer), plan.config.processes
            )
        except Exception as error:  # it carries a child's traceback as text
            ours = _OUR_ERROR.search(str(error))
            if ours:
                raise TrainingError(ours[1].strip()) from error
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise TrainingError(
                "a training process failed", why=lines[-1] if lines else str(error)
            ) from error
        return TrainingResult(**json.loads(answer.read_text()))


def _process(
    rank: int, plan: Plan, faces: TrainingFaces, meeting: str, answer: Path
) -> None:
    join_fellows(meeting, rank, plan.config)
    result = _run_here(replace(plan, threads=plan.threads or 1), faces)
    if rank == 0:
        write_json(answer, asdict(result))
    torch.distributed.destroy_process_group()
