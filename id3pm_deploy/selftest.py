"""Does an engine still compute what PyTorch computed? Random vectors tell.

Golden data holds inputs of the step graph made of random numbers, and PyTorch's
outputs; no person's identity is in it.
"""

from __future__ import annotations

import io
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from .backends.base import STEP_INPUTS, Engine, Float32
from .bundle import GraphEntry
from .compare import Comparison, compare
from .errors import BundleError, ParityError
from .guidance import GuidanceTable
from .npz import NpzError, NpzReader, open_npz
from .solvers import STATE_SLOTS, STEP_WIDTH, STEP_WIDTHS
from .tolerances import CEILINGS

Arrays = dict[str, npt.NDArray[Any]]

_NOT_ALWAYS = ("identity", "low_res")
"""Inputs that some models do not have."""
_EXPECTED = ("expected.state_next", "expected.x0", "expected.finite")
_FIX = "copy the bundle again or rebuild it; do not use this file"


class Readable(Protocol):
    """Where checked files come from: a Bundle, or a writer that is not done yet."""

    def read(self, name: str, /) -> bytes:
        """The bytes of a file, after size and SHA-256 were checked."""


def golden_bytes(arrays: Arrays) -> bytes:
    """Golden data as an uncompressed .npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **cast(Any, arrays))
    return buffer.getvalue()


def load_golden(bundle: Readable, graph: GraphEntry) -> Arrays:
    """Golden data of a step graph, from a verified file; nothing in it is trusted.

    Returns:
        The graph's inputs, and its outputs as ``expected.NAME``: int32 ``row``, all
        others float32, of sizes B and R that agree. ``identity`` and ``low_res`` are
        there if the file has them.

    Raises:
        BundleError: It is damaged, or lacks an array, or one is of a wrong shape.
    """
    data = bundle.read(graph.golden)
    try:
        # It is not compressed, so what it unpacks to is no longer than the file.
        with open_npz(data, len(data)) as reader:
            arrays = _read_arrays(reader)
    except NpzError as error:
        raise BundleError(
            "the bundle's golden data is damaged", why=str(error), fix=_FIX
        ) from error
    _check_shapes(arrays)
    return arrays | {"step": _full_width(arrays["step"])}


def _read_arrays(reader: NpzReader) -> Arrays:
    wanted = (*STEP_INPUTS, *_EXPECTED)
    absent = [name for name in wanted if name not in reader.names]
    if missing := [name for name in absent if name not in _NOT_ALWAYS]:
        raise BundleError(
            f"the bundle's golden data lacks {', '.join(missing)}", fix=_FIX
        )
    return {name: reader.read(name) for name in wanted if name not in absent}


def _check_shapes(arrays: Arrays) -> None:
    state, row = arrays["state"], arrays["row"]
    if state.ndim != 5 or row.ndim != 1 or not row.size:
        raise _unfit("state or row", state.shape, row.shape)
    samples, rows, picture = state.shape[1], len(row), state.shape[1:]
    shapes: dict[str, tuple[int, ...]] = {
        "state": (STATE_SLOTS, *picture),
        "noise": picture,
        "row": (rows,),
        "mix": (2, samples, rows),
        "step": (samples, _width(arrays["step"])),
        "expected.state_next": (STATE_SLOTS, *picture),
        "expected.x0": picture,
        "expected.finite": (rows,),
    }
    if "identity" in arrays:
        shapes["identity"] = (rows, *arrays["identity"].shape[1:2])
    if "low_res" in arrays:
        small = arrays["low_res"].shape[2:]
        shapes["low_res"] = (samples, picture[1], *small[:1], *small[:1])
    for name, shape in shapes.items():
        kind = np.int32 if name == "row" else np.float32
        if arrays[name].shape != shape or arrays[name].dtype != kind or 0 in shape:
            raise _unfit(name, arrays[name].dtype, arrays[name].shape)


def _width(step: npt.NDArray[Any]) -> int:
    """Numbers in a table row of golden data: this release's, or those of a graph that
    was exported before the last of them came."""
    return next((w for w in STEP_WIDTHS if step.shape[-1:] == (w,)), STEP_WIDTH)


def _full_width(step: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Table rows with the neutral 0 in the columns they lack."""
    return np.pad(step, ((0, 0), (0, STEP_WIDTH - step.shape[1])))


def _unfit(name: str, *found: object) -> BundleError:
    return BundleError(
        f"the bundle's golden data has a wrong shape or type in {name}",
        why=f"found {', '.join(map(str, found))}",
        fix=_FIX,
    )


def run_golden(engine: Engine, golden: Arrays) -> Comparison:
    """Run the golden step in ``engine`` and compare the state it makes.

    Raises:
        EngineError: The golden data does not fit the engine.
    """
    begin_golden(engine, golden)
    engine.load_state(golden["state"])
    engine.run_row(golden["step"], golden["noise"])
    return compare(engine.state(), golden["expected.state_next"])


def begin_golden(engine: Engine, golden: Arrays) -> None:
    """Begin a trajectory with the golden data's inputs.

    Raises:
        EngineError: The golden data does not fit the engine.
    """
    row: npt.NDArray[np.int32] = golden["row"]
    nobody: Float32 = np.zeros((len(row), 0), np.float32)
    guidance = GuidanceTable(row, golden.get("identity", nobody), golden["mix"])
    x_t = np.ascontiguousarray(golden["state"][0])
    engine.begin(x_t, guidance, golden.get("low_res"))


def self_test(engine: Engine, bundle: Readable, graph: GraphEntry) -> float:
    """Check an engine of ``graph`` against the bundle's golden data.

    Returns:
        max|a-b|/max|b| of the state after one step.

    Raises:
        ParityError: It is above the graph's tolerance of a step, or above the ceiling
            where a manifest states more.
    """
    found = run_golden(engine, load_golden(bundle, graph))
    ceiling = CEILINGS[graph.precision].step if graph.precision in CEILINGS else 0.0
    allowed = min(graph.tolerance_step, ceiling)
    if not found.passes(allowed):
        raise ParityError(
            "the engine does not compute what PyTorch computed",
            why=f"relative error {found.max_rel:.2e} in one step, tolerance "
            f"{allowed:.0e}",
            fix="rebuild the engine; if it stays so, report it with `inspect --json`",
        )
    return found.max_rel
