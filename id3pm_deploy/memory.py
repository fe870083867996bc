"""How much memory a model takes, from what its bundle says of it, before it is loaded.

The largest set of activations that is alive at one time follows from the UNet's shape:
:func:`live_numbers` walks through the blocks as they are executed. What ONNX Runtime
adds to that, and what a process costs that does nothing yet, are constants which were
fitted to runs; ``benchmarks/memory_check.py`` holds them against new ones.

All sizes are in bytes, and are the most that one process holds at any time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .backends.memory_limit import available_memory
from .bundle import Bundle, EngineEntry, GraphEntry
from .errors import EngineError
from .spec import DiffusionSpec, ModelSpec

MIB = 1 << 20

BASE = 75 * MIB
"""Python, NumPy, ONNX Runtime and this package, without a model (x86-64 Linux)."""
WEIGHTS_HELD = 2.4
"""Times the float32 weights, in a session on a CPU: as they are in the file and as its
convolutions want them, and what its parser freed and the C library kept."""
WEIGHTS_LOADING = 2.8
"""The same while the session is made, which the file's bytes outlive."""
ACTIVATIONS = 1.1
"""Times the live numbers."""
PICTURES = 28
"""float32 pictures a sample beside the UNet: both states of four slots, noise as it is
made in float64, x0, and what becomes of the result."""
PLAINLY = 0.5
"""A run is refused where not even this share of the estimate is free; above that it is
warned of: an estimate can be wrong."""

_FLOAT = 4
_MEMINFO = Path("/proc/meminfo")


class _Walk:
    """The UNet's blocks in the order of their execution; remembers the most numbers
    that are alive at one time, for one UNet row."""

    def __init__(self, model: ModelSpec, cast: bool) -> None:
        self.model, self.cast = model, cast
        self.skips: list[int] = []
        self.most = 0

    def _see(self, numbers: int) -> None:
        self.most = max(self.most, sum(self.skips) + numbers)

    def residual(self, before: int, after: int, size: int, size_after: int) -> None:
        """From ``before`` channels at ``size`` to ``after`` channels."""
        given, made = before * size**2, after * size_after**2
        # Beside the input: the norm's output, its sigmoid and their product.
        self._see(4 * given)
        self._see(given + before * size_after**2 + made)
        self._see(given + 4 * made)

    def attention(self, channels: int, size: int) -> None:
        """Scores, then their softmax beside them; x, queries, keys and values. Of a
        float16 graph that is computed in float32, scores are alive in both."""
        heads = self.model.num_heads
        heads = heads or channels // (self.model.num_head_channels or channels)
        values, scores = channels * size**2, heads * size**4
        self._see(4 * values + scores)
        self._see(2 * values + (3 if self.cast else 2) * scores)

    def level(self, level: int, before: int) -> None:
        """A residual block at a level, and the attention behind it."""
        channels, size = self.model.level_channels[level], self.model.image_size
        self.residual(before, channels, size >> level, size >> level)
        if size >> level in self.model.attention_resolutions:
            self.attention(channels, size >> level)

    def keep(self, channels: int, size: int) -> None:
        """Keep what the way up will be given."""
        self.skips.append(channels * size**2)


def live_numbers(model: ModelSpec, *, cast: bool = False) -> int:
    """The most numbers of one UNet row that are alive at one time, skip connections
    included.

    Args:
        model: The UNet.
        cast: Whether its graph is of a smaller precision than what computes it.
    """
    walk, widths, size = _Walk(model, cast), model.level_channels, model.image_size
    last = len(widths) - 1
    now = widths[0]
    walk.keep(now, size)
    for level, channels in enumerate(widths):
        for _ in range(model.residual_blocks):
            walk.level(level, now)
            now = channels
            walk.keep(channels, size >> level)
        if level < last:
            small = size >> (level + 1)
            walk.residual(channels, channels, size >> level, small)
            walk.keep(channels, small)
    walk.residual(now, now, size >> last, size >> last)
    walk.attention(now, size >> last)
    for level in range(last, -1, -1):
        here = size >> level
        for _ in range(model.residual_blocks + 1):
            joined = now + walk.skips.pop() // here**2
            walk.level(level, joined)
            now = widths[level]
        if level:
            walk.residual(now, now, here, 2 * here)
    return walk.most


@dataclass(frozen=True)
class Memory:
    """An estimate, by part.

    Attributes:
        base: The process without a model.
        weights: As the runtime holds them.
        loading: As it holds them while it loads them.
        activations: Of all UNet rows.
        buffers: State, noise and pictures of all samples.
    """

    base: int
    weights: int
    loading: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """The most at any time: while the model is loaded, or while it runs."""
        running = self.weights + self.activations + self.buffers
        return self.base + max(self.loading, running)

    def to_json(self) -> dict[str, int]:
        """The parts and the total."""
        return {**asdict(self), "total": self.total}


def cpu_memory(
    spec: DiffusionSpec,
    file_bytes: int,
    precision: str,
    samples: int,
    unet_rows: int,
) -> Memory:
    """What ONNX Runtime's CPU provider takes, which computes every graph in float32.

    Args:
        spec: The model.
        file_bytes: Of the graph, which is next to all weights.
        precision: Of the graph.
        samples: B.
        unet_rows: R that run at once, of which a guided sample has two.
    """
    model, cast = spec.model, precision != "float32"
    weights = file_bytes * (2 if cast else 1)
    picture = model.image_channels * model.image_size**2 * _FLOAT
    live = live_numbers(model, cast=cast) * _FLOAT
    return Memory(
        base=BASE,
        weights=int(WEIGHTS_HELD * weights),
        loading=int(WEIGHTS_LOADING * weights),
        activations=int(ACTIVATIONS * live) * unet_rows,
        buffers=PICTURES * picture * samples,
    )


def graph_memory(
    bundle: Bundle, graph: GraphEntry, samples: int, unet_rows: int
) -> Memory:
    """:func:`cpu_memory` of a bundle's graph."""
    size = bundle.manifest.file_entry(graph.file).size
    spec = bundle.manifest.stages[graph.stage].diffusion
    return cpu_memory(spec, size, graph.precision, samples, unet_rows)


def rows_at_once(spec: DiffusionSpec, samples: int, *, parallel: bool = True) -> int:
    """UNet rows of guided samples; those of a model without conditions are not guided.

    Args:
        spec: The model.
        samples: B.
        parallel: Whether both rows of a sample run at once.
    """
    return samples * (2 if spec.condition_dim and parallel else 1)


def memory_facts(bundle: Bundle, samples: int) -> list[dict[str, Any]]:
    """Memory of every step graph on a CPU and of every plan, for ``samples`` guided
    samples at once.

    Of a plan there are only its size and what its build took: where it computes in is
    known to its runtime alone.
    """
    manifest, found = bundle.manifest, list[dict[str, Any]]()
    for graph in manifest.graphs:
        if graph.kind != "step":
            continue
        rows = rows_at_once(manifest.stages[graph.stage].diffusion, samples)
        memory = graph_memory(bundle, graph, samples, rows).to_json()
        what = {"backend": "onnxruntime", "stage": graph.stage}
        found.append(
            {
                **what,
                "precision": graph.precision,
                "samples": samples,
                "unet_rows": rows,
                **memory,
            }
        )
    return found + [_plan_facts(bundle, entry) for entry in manifest.plans]


def _plan_facts(bundle: Bundle, entry: EngineEntry) -> dict[str, Any]:
    return {
        "backend": entry.backend,
        "engine": entry.label,
        "plan": bundle.manifest.file_entry(entry.file).size,
        "build_peak_device_memory": entry.peak_device_memory_bytes,
        "build_peak_memory": entry.peak_memory_bytes,
    }


def check_memory(
    needed: Memory, say: Callable[[str], None], less: Sequence[str] = ()
) -> None:
    """Warn of a run that may not find the memory it needs, and refuse one that
    plainly cannot.

    Args:
        needed: The estimate.
        say: Called with the warning.
        less: Options that would take less memory.

    Raises:
        EngineError: Not even :data:`PLAINLY` of it is free, swap included.
    """
    free = available_memory()
    if free is None or free >= needed.total:
        return
    why = f"it needs about {needed.total // MIB} MiB, {free // MIB} MiB are free"
    fix = f"use {' or '.join(less)}"
    if not less or needed.base + max(needed.loading, needed.weights) > free:
        fix = "end other programs, or use a smaller model"
    if free + free_swap() < PLAINLY * needed.total:
        raise EngineError(
            "there is far too little memory for this run", why=why, fix=fix
        )
    say(f"warning: this run may lack memory: {why}; {fix}")


def free_swap() -> int:
    """Bytes of swap that nobody uses; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _MEMINFO.read_text("utf-8").splitlines():
            if line.startswith("SwapFree:"):
                return int(line.split()[1]) * 1024
    return 0
