"""Does an engine still compute what PyTorch computed? Random vectors tell.

Golden data holds inputs of the step graph made of random numbers, and PyTorch's
outputs; no person's identity is in it.
"""

from __future__ import annotations

import io
import zipfile
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from .backends.base import STEP_INPUTS, Engine
from .bundle import Bundle, GraphEntry
from .compare import Comparison, compare
from .errors import BundleError, ParityError
from .guidance import GuidanceTable

Arrays = dict[str, npt.NDArray[Any]]

_MAX_GOLDEN_BYTES = 1 << 30


def golden_bytes(arrays: Arrays) -> bytes:
    """Golden data as an uncompressed .npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **cast(Any, arrays))
    return buffer.getvalue()


def load_golden(bundle: Bundle, graph: GraphEntry) -> Arrays:
    """Golden data of a step graph, from a verified file.

    Raises:
        BundleError: It is damaged or lacks an array.
    """
    data = bundle.read(graph.golden)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(item.file_size for item in archive.infolist()) > _MAX_GOLDEN_BYTES:
                raise ValueError("it unpacks to more than 1 GiB")
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BundleError(
            "the bundle's golden data is damaged", why=str(error)
        ) from error
    wanted = {*STEP_INPUTS, "expected.state_next", "expected.x0", "expected.finite"}
    if missing := sorted(wanted - set(arrays)):
        raise BundleError(f"the bundle's golden data lacks {', '.join(missing)}")
    return arrays


def run_golden(engine: Engine, golden: Arrays) -> Comparison:
    """Run the golden step in ``engine`` and compare the state it makes.

    Raises:
        EngineError: The golden data does not fit the engine.
    """
    guidance = GuidanceTable(golden["row"], golden["identity"], golden["mix"])
    engine.begin(np.ascontiguousarray(golden["state"][0]), guidance)
    engine.load_state(golden["state"])
    engine.run_row(golden["step"], golden["noise"])
    return compare(engine.state(), golden["expected.state_next"])


def self_test(engine: Engine, bundle: Bundle, graph: GraphEntry) -> float:
    """Check an engine of ``graph`` against the bundle's golden data.

    Returns:
        max|a-b|/max|b| of the state after one step.

    Raises:
        ParityError: It is above the graph's tolerance of a step.
    """
    found = run_golden(engine, load_golden(bundle, graph))
    if not found.passes(graph.tolerance_step):
        raise ParityError(
            "the engine does not compute what PyTorch computed",
            why=f"relative error {found.max_rel:.2e} in one step, tolerance "
            f"{graph.tolerance_step:.0e}",
            fix="rebuild the engine; if it stays so, report it with `inspect --json`",
        )
    return found.max_rel
