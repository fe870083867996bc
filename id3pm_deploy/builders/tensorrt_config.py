"""A recipe's profiles and settings, put into TensorRT's builder configuration.

Called in the process that builds. ``trt`` is the module, ``tensorrt`` or
``tensorrt_rtx``; what only some releases have is looked for by name.
"""

from __future__ import annotations

from typing import Any

from ..errors import BuildError
from .precision import InputShapes
from .recipe import CURRENT_GPU, EngineRecipe, Profile
from .tensorrt_events import Messages


def input_shapes(network: Any, samples: int, rows: int) -> InputShapes:
    """Shapes of the network's inputs for B samples and R UNet rows.

    The graph names its dynamic dimensions B and R.

    Raises:
        BuildError: It has a dynamic dimension of another name, or none.
    """
    sizes = {"B": samples, "R": rows}
    shapes: InputShapes = {}
    dynamic = 0
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = [int(size) for size in tensor.shape]
        for axis, size in enumerate(shape):
            if size >= 0:
                continue
            name = tensor.get_dimension_name(axis)
            if name not in sizes:
                raise BuildError(
                    f"the graph's input {tensor.name!r} has a dynamic dimension that "
                    "is neither B nor R",
                    why=f"dimension {axis} is called {name!r}",
                    fix="build from a graph that id3pm-deploy exported",
                )
            shape[axis] = sizes[name]
            dynamic += 1
        shapes[tensor.name] = tuple(shape)
    if not dynamic:
        raise BuildError(
            "the sizes of the graph are fixed",
            fix="export it with dynamic numbers of samples and UNet rows",
        )
    return shapes


def add_profile(
    builder: Any, network: Any, config: Any, profile: Profile, messages: Messages
) -> None:
    """Add one optimisation profile.

    Raises:
        BuildError: TensorRT refuses it.
    """
    made = builder.create_optimization_profile()
    low, usual, high = (
        input_shapes(network, b, r)
        for b, r in zip(profile.samples, profile.rows, strict=True)
    )
    try:
        for name in low:
            made.set_shape(name, low[name], usual[name], high[name])
        accepted = config.add_optimization_profile(made) >= 0
    except (ValueError, RuntimeError) as error:
        messages.errors.append(str(error))
        accepted = False
    if not accepted:
        raise messages.error(f"TensorRT refuses the profile {profile.to_json()}")


def set_options(
    trt: Any, config: Any, recipe: EngineRecipe, free_bytes: int | None
) -> None:
    """Put the recipe's settings, and no TF32, into an ``IBuilderConfig``.

    Args:
        trt: The TensorRT module.
        config: Its ``IBuilderConfig``.
        recipe: What is asked for.
        free_bytes: Free memory of the device that builds; None where there is none
            or it is unknown.

    Raises:
        BuildError: The library lacks a setting that the recipe asks for.
    """
    tf32 = getattr(trt.BuilderFlag, "TF32", None)
    if tf32 is not None:
        config.clear_flag(tf32)
    if recipe.workspace_bytes:
        pool = trt.MemoryPoolType.WORKSPACE
        config.set_memory_pool_limit(pool, recipe.workspace_bytes)
    if recipe.optimization_level is not None:
        config.builder_optimization_level = recipe.optimization_level
    if recipe.auxiliary_streams is not None:
        config.max_aux_streams = recipe.auxiliary_streams
    if recipe.compute_capabilities:
        _set_capabilities(trt, config, recipe.compute_capabilities)


def _set_capabilities(trt: Any, config: Any, wanted: tuple[str, ...]) -> None:
    kinds = getattr(trt, "ComputeCapability", None)
    if kinds is None or not hasattr(config, "set_compute_capability"):
        raise BuildError(
            f"{trt.__name__} {trt.__version__} builds for the GPU of this machine only",
            why=f"the recipe names the compute capabilities {', '.join(wanted)}",
            fix="remove compute_capabilities from the recipe",
        )
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        name = f"SM{capability.replace('.', '')}"
        name = "CURRENT" if capability == CURRENT_GPU else name
        kind = getattr(kinds, name, None)
        if kind is None or not config.set_compute_capability(kind, index):
            known = [n.removeprefix("SM") for n in kinds.__members__ if n[-1].isdigit()]
            raise BuildError(
                f"{trt.__name__} {trt.__version__} cannot build for compute capability "
                f"{capability}",
                fix=f"use {', '.join(f'{n[:-1]}.{n[-1]}' for n in known)}",
            )
