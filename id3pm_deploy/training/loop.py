"""The training loop: conditional diffusion loss, condition dropout, EMA, resume."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor

from ..errors import InputError, TrainingError
from ..files import atomic_path, make_folder, write_json
from ..identity.embedders import Embedder
from ..identity.vectors import normalise_identities
from ..progress import progress
from ..reference.checkpoint import save_checkpoint
from ..reference.unet import IdentityUNet
from ..schedule import noise_schedule
from ..spec import DiffusionSpec, IdentitySpec, ModelSpec, ScheduleSpec
from .config import TrainingConfig
from .faces import TrainingFaces, load_faces
from .sheet import save_training_sheet
from .state import STATE_NAME, Ema, load_state, save_state

LOG_NAME = "log.jsonl"
SETTINGS_NAME = "settings.json"
CACHE_NAME = "faces.npz"


@dataclass(frozen=True)
class TrainingResult:
    """What a run did: steps in all, the last smoothed loss, seconds of this call."""

    steps: int
    loss: float
    seconds: float
    faces: int
    skipped: int


def work_folder(checkpoint: Path) -> Path:
    """Where a run keeps its state, log, sheets and face cache: beside the output."""
    return checkpoint.with_name(checkpoint.name + ".training")


def diffusion_spec(config: TrainingConfig, embedder: Embedder) -> DiffusionSpec:
    """The facts of the model that ``config`` and ``embedder`` make."""
    model = ModelSpec(
        image_size=config.image_size,
        base_channels=config.base_channels,
        channel_multipliers=config.channel_multipliers,
        residual_blocks=config.residual_blocks,
        attention_resolutions=config.attention_resolutions,
        num_head_channels=config.num_head_channels,
        dropout=config.model_dropout,
        resblock_updown=config.resblock_updown,
    )
    identity = IdentitySpec(
        dim=embedder.dim,
        model_name=embedder.name,
        model_sha256=embedder.sha256,
        normalisation=config.normalisation,
    )
    schedule = ScheduleSpec(name=config.schedule)  # type: ignore[arg-type]
    return DiffusionSpec(
        model=model,
        identity=identity,
        schedule=schedule,
        prediction_type=config.prediction_type,
    )


class Batches:
    """Random training batches, a pure function of (seed, step).

    Args:
        faces: The data.
        config: Batch size, noise and dropout of the condition, shares of the folders.
    """

    def __init__(self, faces: TrainingFaces, config: TrainingConfig) -> None:
        self.config = config
        self.pictures = faces.pictures
        n, flips, jitter, dim = faces.vectors.shape
        flat = normalise_identities(
            faces.vectors.reshape(-1, dim), config.normalisation
        )
        self.vectors = flat.reshape(n, flips, jitter, dim)
        self.weights = _face_weights(faces.folders, config.shares)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Pictures [N, 3, S, S] in [-1, 1] and conditions [N, D] of ``step``."""
        config = self.config
        rng = np.random.default_rng([config.seed, step])
        count, (n, _, jitter, dim) = config.batch_size, self.vectors.shape
        rows = rng.choice(n, size=count, p=self.weights)
        flip = rng.integers(0, 2, size=count)
        pictures = self.pictures[rows, flip].astype(np.float32) / 127.5 - 1.0
        which = rng.integers(0, jitter, size=count)
        vectors = self.vectors[rows, flip, which].astype(np.float64)
        if config.identity_noise:
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            spread = norms / np.sqrt(dim) * config.identity_noise
            vectors = vectors + spread * rng.standard_normal(vectors.shape)
            vectors *= norms / np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors[rng.random(count) < config.condition_dropout] = 0.0
        x0 = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
        return x0, torch.from_numpy(vectors.astype(np.float32))


def _face_weights(folders: Any, shares: Sequence[float]) -> Any:
    """Probability of each face, so that folder i is drawn with share i."""
    counts = np.bincount(folders)
    wanted = np.array(shares or counts, dtype=np.float64)
    if len(wanted) < len(counts) or (wanted < 0).any() or wanted.sum() == 0:
        raise InputError(
            f"{len(counts)} folders of faces need {len(counts)} shares",
            why=f"given: {list(shares)}",
            fix="give one share of at least 0 for each folder",
        )
    weights = (wanted[: len(counts)] / np.maximum(counts, 1))[folders]
    return weights / weights.sum()


def diffusion_loss(
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    x0: Tensor,
    identity: Tensor,
    alphas: Tensor,
    prediction_type: str,
) -> Tensor:
    """Mean squared error of the prediction at random timesteps.

    ε: Ho et al. 2020, eq. 14; v = √ᾱ·ε - √(1-ᾱ)·x0: Salimans & Ho 2022, app. D.

    Args:
        network: Predicts from (x_t [N, C, H, W], timesteps [N], identity [N, D]).
        x0: [N, C, H, W] in [-1, 1].
        identity: [N, D], normalised.
        alphas: [T], ᾱ of the noise schedule.
        prediction_type: ``epsilon``, ``x0`` or ``v``.
    """
    t = torch.randint(0, len(alphas), (len(x0),), device=x0.device)
    noise = torch.randn_like(x0)
    signal = alphas[t].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
    target = {
        "epsilon": noise,
        "x0": x0,
        "v": signal * noise - sigma * x0,
    }[prediction_type]
    out = network(signal * x0 + sigma * noise, t.float(), identity)
    return (out - target).square().mean()


@dataclass(frozen=True)
class Plan:
    """What every process of a run is told."""

    config: TrainingConfig
    spec: DiffusionSpec
    out: Path
    resume: bool = False
    initial: dict[str, Tensor] | None = None
    threads: int = 0


class Trainer:
    """One process of a run: network, average, optimizer and where they are kept.

    Every process holds the same weights and takes its share of each batch.
    """

    def __init__(self, plan: Plan, rank: int = 0) -> None:
        config = plan.config
        self.config, self.spec, self.out, self.rank = config, plan.spec, plan.out, rank
        self.work = work_folder(plan.out)
        if plan.threads:
            torch.set_num_threads(plan.threads)
        torch.manual_seed(config.seed)
        network = IdentityUNet(plan.spec.model, plan.spec.identity.dim)
        self.network = network.to(config.device).train()
        if plan.initial is not None:
            self.network.load_state_dict(plan.initial)
        self.ema = Ema(self.network)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        schedule = noise_schedule(plan.spec.schedule)
        self.alphas = torch.tensor(
            schedule.alphas_cumprod, dtype=torch.float32, device=config.device
        )
        self.forward: Any = (
            torch.compile(self.network) if config.compile else self.network
        )
        self.step = 0
        if plan.resume:
            self.step = load_state(self.work, self.network, self.ema, self.optimizer)

    def train_step(self, x0: Tensor, identity: Tensor) -> float:
        """One optimizer step on this process's share of a batch; returns its loss."""
        config = self.config
        torch.manual_seed(hash((config.seed, self.step, self.rank)) & (1 << 62) - 1)
        rate = config.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        mine = slice(self.rank, None, config.processes)
        loss = diffusion_loss(
            self.forward,
            x0[mine].to(config.device),
            identity[mine].to(config.device),
            self.alphas,
            self.spec.prediction_type,
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if config.processes > 1:
            _average_gradients(self.network, config.processes)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.gradient_clip)
        self.optimizer.step()
        self.ema.update(self.network, config.ema_decay_at(self.step))
        self.step += 1
        return float(loss.detach())

    def save(self, origin: dict[str, Any]) -> None:
        """Write the resumable state, and the averaged weights as a CHECKPOINT."""
        save_state(self.work, self.step, self.network, self.ema, self.optimizer)
        spec = replace(self.spec, title=self.out.name, origin=origin)
        save_checkpoint(self.out, spec, self.ema.tensors)


def _average_gradients(network: torch.nn.Module, processes: int) -> None:
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = torch.split(flat / processes, [g.numel() for g in gradients])
    for gradient, mean in zip(gradients, parts, strict=True):
        gradient.copy_(mean.view_as(gradient))


def train(
    folders: Sequence[Path],
    out: Path,
    config: TrainingConfig,
    embedder: Embedder,
    *,
    resume: bool = False,
    initial: dict[str, Tensor] | None = None,
    threads: int = 0,
) -> TrainingResult:
    """Train a CHECKPOINT on the faces in ``folders``.

    Args:
        folders: Folders of pictures with one person each.
        out: The CHECKPOINT folder; state, log and contact sheets go to
            ``OUT.training`` beside it.
        config: Settings.
        embedder: The black-box FR model whose vectors condition the network.
        resume: Go on from the state in ``OUT.training``.
        initial: Weights to start from, by tensor name.
        threads: CPU threads a process; 0 leaves torch's choice.

    Raises:
        InputError: Unusable faces or settings, or ``out`` is in use.
        TrainingError: The state cannot be resumed, or the loss is not finite.
    """
    _check_start(out, config, resume=resume)
    work = make_folder(work_folder(out))
    os.chmod(work, 0o700)
    faces = load_faces(
        folders,
        embedder,
        size=config.image_size,
        margin=config.crop_margin,
        jitter=config.identity_jitter,
        seed=config.seed,
        cache=work / CACHE_NAME,
    )
    write_json(work / SETTINGS_NAME, asdict(config))
    plan = Plan(config, diffusion_spec(config, embedder), out, resume, initial, threads)
    if config.processes == 1:
        return _run(Trainer(plan), faces)
    return _run_processes(plan, faces)


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
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise TrainingError(
                "a training process failed", why=lines[-1] if lines else str(error)
            ) from error
        return TrainingResult(**json.loads(answer.read_text()))


def _process(
    rank: int, plan: Plan, faces: TrainingFaces, meeting: str, answer: Path
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=plan.config.processes
    )
    torch.set_num_threads(plan.threads or 1)
    result = _run(Trainer(plan, rank), faces)
    if rank == 0:
        write_json(answer, asdict(result))
    torch.distributed.destroy_process_group()


def _check_start(out: Path, config: TrainingConfig, *, resume: bool) -> None:
    work = work_folder(out)
    begun = (work / STATE_NAME).exists()
    if resume and not begun:
        raise TrainingError(
            f"there is nothing to resume in {work}", fix="leave out --resume"
        )
    if not resume and (begun or (out.exists() and any(out.iterdir()))):
        raise InputError(
            f"{out} already holds a checkpoint or a run",
            fix="use --resume to go on, or choose another --out",
        )
    if resume and (work / SETTINGS_NAME).exists():
        kept = json.loads((work / SETTINGS_NAME).read_text())
        free = {"steps", "shares", "save_every", "sheet_every"}
        free |= {"compile", "device", "processes"}
        now = json.loads(json.dumps(asdict(config)))
        changed = sorted(k for k in kept if k not in free and kept[k] != now.get(k))
        if changed:
            raise InputError(
                f"the run in {work} has other settings: {', '.join(changed)}",
                fix="give the same settings again to resume",
            )


def _run(trainer: Trainer, faces: TrainingFaces) -> TrainingResult:
    config, begun = trainer.config, time.monotonic()
    batches = Batches(faces, config)
    smooth, leads = float("nan"), trainer.rank == 0
    left = config.steps - trainer.step
    with progress(left, "training", enabled=None if leads else False) as tick:
        while trainer.step < config.steps:
            loss = trainer.train_step(*batches.at(trainer.step))
            if not np.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {trainer.step}",
                    fix="lower --learning-rate; the last saved state is intact",
                )
            smooth = loss if np.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            tick(note=f"loss {smooth:.4f}")
            if leads:
                _keep(trainer, faces, batches, smooth, time.monotonic() - begun)
    seconds = time.monotonic() - begun
    return TrainingResult(config.steps, smooth, seconds, len(faces), faces.skipped)


def _keep(
    trainer: Trainer,
    faces: TrainingFaces,
    batches: Batches,
    loss: float,
    seconds: float,
) -> None:
    config, step = trainer.config, trainer.step
    last = step >= config.steps
    if last or step % config.save_every == 0:
        _log(trainer.work, {"step": step, "loss": loss, "seconds": round(seconds, 1)})
        origin = {
            "made_by": "id3pm-deploy train",
            "steps": step,
            "faces": len(faces),
            "batch_size": config.batch_size,
            "seed": config.seed,
            "torch": torch.__version__,
        }
        trainer.save(origin)
    if last or step % config.sheet_every == 0:
        save_training_sheet(
            trainer.work / f"sheet-{step:07d}.png",
            trainer.network,
            trainer.ema.tensors,
            trainer.spec,
            faces.pictures[:, 0],
            batches.vectors[:, 0, 0],
            step,
        )


def _log(work: Path, entry: dict[str, Any]) -> None:
    path = work / LOG_NAME
    kept = path.read_text() if path.exists() else ""
    with atomic_path(path) as temporary:
        temporary.write_text(kept + json.dumps(entry) + "\n")
