"""A recipe's profiles and settings, put into TensorRT's builder configuration.

Called in the process that builds. ``trt`` is the module, ``tensorrt`` or
``tensorrt_rtx``; what only some releases have is looked for by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import BuildError
from .precision import InputShapes
from .recipe import CURRENT_GPU, EngineRecipe, Profile
from .tensorrt_events import Messages

if TYPE_CHECKING:
    import tensorrt


def input_shapes(
    network: tensorrt.INetworkDefinition, samples: int, rows: int
) -> InputShapes:
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
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    config: tensorrt.IBuilderConfig,
    profile: Profile,
    messages: Messages,
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
    trt: Any,
    config: Any,
    recipe: EngineRecipe,
    free_bytes: int | None,
) -> None:
    """Put the recipe's settings, and no TF32, into an ``IBuilderConfig``.

    Every setting is read back: TensorRT drops some that it does not like with no more
    than a message in its log.

    Args:
        trt: The TensorRT module.
        config: Its ``IBuilderConfig``.
        recipe: What is asked for.
        free_bytes: Free memory of the device that builds; None where there is none
            or it is unknown.

    Raises:
        BuildError: The library lacks a setting that the recipe asks for, or does not
            take its value.
    """
    tf32 = getattr(trt.BuilderFlag, "TF32", None)
    if tf32 is not None:
        config.clear_flag(tf32)
    _set_workspace(trt, config, recipe, free_bytes)
    for key, name in _ATTRIBUTES.items():
        value = getattr(recipe, key)
        if value is not None:
            _set_attribute(trt, config, key, name, value)
    for key, name in _FLAGS.items():
        if getattr(recipe, key):
            _set_flag(trt, config, key, name)
    if recipe.hardware_compatibility != "none":
        _set_compatibility(trt, config, recipe.hardware_compatibility)
    if recipe.compute_capabilities and recipe.flavour == "tensorrt_rtx":
        _set_capabilities(trt, config, recipe.compute_capabilities)


_ATTRIBUTES = {
    "optimization_level": "builder_optimization_level",
    "auxiliary_streams": "max_aux_streams",
}
"""Key of a recipe to the builder configuration's attribute."""

_FLAGS = {
    "version_compatible": "VERSION_COMPATIBLE",
    "weight_streaming": "WEIGHT_STREAMING",
    "user_allocation": "REQUIRE_USER_ALLOCATION",
}
"""Key of a recipe to the name of its ``BuilderFlag``."""


def _set_workspace(
    trt: Any,
    config: tensorrt.IBuilderConfig,
    recipe: EngineRecipe,
    free_bytes: int | None,
) -> None:
    limit = recipe.workspace_limit(free_bytes)
    if limit is None:
        return
    pool = trt.MemoryPoolType.WORKSPACE
    config.set_memory_pool_limit(pool, limit)
    found = config.get_memory_pool_limit(pool)
    if found != limit:
        raise _dropped(trt, "workspace", limit, found)


def _set_attribute(
    trt: Any, config: tensorrt.IBuilderConfig, key: str, name: str, value: int
) -> None:
    if not hasattr(config, name):
        raise _lacking(trt, key, name)
    setattr(config, name, value)
    found = getattr(config, name)
    if found != value:
        raise _dropped(trt, key, value, found)


def _set_flag(trt: Any, config: tensorrt.IBuilderConfig, key: str, name: str) -> None:
    flag = getattr(trt.BuilderFlag, name, None)
    if flag is None:
        raise _lacking(trt, key, f"BuilderFlag.{name}")
    config.set_flag(flag)
    if not config.get_flag(flag):
        raise _dropped(trt, key, True, False)


def _set_compatibility(trt: Any, config: tensorrt.IBuilderConfig, wanted: str) -> None:
    key, name = "hardware_compatibility", wanted.upper()
    levels = getattr(trt, "HardwareCompatibilityLevel", None)
    level = getattr(levels, name, None)
    attribute = "hardware_compatibility_level"
    if level is None or not hasattr(config, attribute):
        raise _lacking(trt, key, f"HardwareCompatibilityLevel.{name}")
    setattr(config, attribute, level)
    found = getattr(config, attribute)
    if found != level:
        fix = "name the GPUs in compute_capabilities instead, for TensorRT-RTX"
        raise _dropped(trt, key, wanted, found, fix)


def _lacking(trt: Any, key: str, name: str) -> BuildError:
    return BuildError(
        f"{trt.__name__} {trt.__version__} lacks the setting {key}",
        why=f"it has no {name}, which the recipe asks for",
        fix=f"remove {key} from the recipe, or build with a library that has it",
    )


def _dropped(
    trt: Any, key: str, wanted: object, found: object, fix: str = ""
) -> BuildError:
    return BuildError(
        f"{trt.__name__} {trt.__version__} does not take {key} = {wanted}",
        why=f"afterwards it is {found}",
        fix=fix or f"change {key} in the recipe",
    )


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
