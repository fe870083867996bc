"""A recipe's settings in TensorRT's builder configuration."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from id3pm_deploy.builders.recipe import EngineRecipe
from id3pm_deploy.builders.tensorrt_config import set_options
from id3pm_deploy.errors import BuildError

RTX = EngineRecipe(
    summary="a test",
    backend="tensorrt",
    flavour="tensorrt_rtx",
    export="float16",
    precision="float16",
    dynamic_samples=(1, 2, 3),
)
PLAIN = dataclasses.replace(RTX, flavour="tensorrt")
MIB = 1 << 20


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX")


@pytest.fixture
def config(trt: Any) -> Any:
    return trt.Builder(trt.Logger(trt.ILogger.INTERNAL_ERROR)).create_builder_config()


class Pools:
    """An ``IBuilderConfig`` that has a workspace, attributes and flags."""

    def __init__(self, most: int = 1 << 60) -> None:
        self.most = most
        self.limits: dict[str, int] = {}
        self.flags: set[str] = set()

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.limits[pool] = min(size, self.most)

    def get_memory_pool_limit(self, pool: str) -> int:
        return self.limits[pool]

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def get_flag(self, flag: str) -> bool:
        return flag in self.flags


class Deaf(Pools):
    """One that takes no flag and no level."""

    hardware_compatibility_level = property(lambda self: "level none", lambda *_: None)

    def set_flag(self, flag: str) -> None:
        pass


def library(**more: Any) -> Any:
    return SimpleNamespace(
        __name__="tensorrt",
        __version__="10.3",
        BuilderFlag=SimpleNamespace(**more.pop("flags", {})),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        **more,
    )


def with_(recipe: EngineRecipe, **changes: Any) -> EngineRecipe:
    return dataclasses.replace(recipe, **changes)


def test_tf32_is_off_and_options_are_set(trt: Any, config: Any) -> None:
    assert config.get_flag(trt.BuilderFlag.TF32)
    recipe = with_(
        RTX,
        workspace_bytes=256 * MIB,
        optimization_level=1,
        auxiliary_streams=2,
        compute_capabilities=("8.6", "12.0"),
    )
    set_options(trt, config, recipe, None)
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 256 * MIB
    assert (config.builder_optimization_level, config.max_aux_streams) == (1, 2)
    assert config.num_compute_capabilities == 2
    last = config.get_compute_capability(1)
    assert last == trt.ComputeCapability.SM120


def test_nothing_else_is_changed(trt: Any, config: Any) -> None:
    fresh = trt.Builder(trt.Logger(trt.ILogger.INTERNAL_ERROR)).create_builder_config()
    pool = trt.MemoryPoolType.WORKSPACE
    set_options(trt, config, RTX, 1 << 30)
    assert config.flags == fresh.flags & ~(1 << int(trt.BuilderFlag.TF32))
    for name in ("builder_optimization_level", "max_aux_streams"):
        assert getattr(config, name) == getattr(fresh, name)
    assert config.get_memory_pool_limit(pool) == fresh.get_memory_pool_limit(pool)
    assert config.num_compute_capabilities == fresh.num_compute_capabilities


@pytest.mark.parametrize(
    ("key", "flag"),
    [
        ("weight_streaming", "WEIGHT_STREAMING"),
        ("user_allocation", "REQUIRE_USER_ALLOCATION"),
        ("version_compatible", "VERSION_COMPATIBLE"),
    ],
)
def test_flags_are_set_by_name(trt: Any, config: Any, key: str, flag: str) -> None:
    assert not config.get_flag(getattr(trt.BuilderFlag, flag))
    set_options(trt, config, with_(RTX, **{key: True}), None)
    assert config.get_flag(getattr(trt.BuilderFlag, flag))


@pytest.mark.parametrize(
    ("share", "ceiling", "free", "limit"),
    [
        (0.5, 0, 1000 * MIB, 500 * MIB),
        (0.5, 200 * MIB, 1000 * MIB, 200 * MIB),
        (0.25, 800 * MIB, 1000 * MIB, 250 * MIB),
        (0.5, 200 * MIB, None, 200 * MIB),
        (0.0, 300 * MIB, 100 * MIB, 300 * MIB),
        (0.5, 0, None, None),
        (0.0, 0, 100 * MIB, None),
    ],
)
def test_the_workspace_is_a_share_under_a_ceiling(
    share: float, ceiling: int, free: int | None, limit: int | None
) -> None:
    recipe = with_(PLAIN, workspace_share=share, workspace_bytes=ceiling)
    pools = Pools()
    set_options(library(), pools, recipe, free)
    assert pools.limits == ({} if limit is None else {"workspace": limit})


def test_a_share_of_too_little_is_refused() -> None:
    recipe = with_(PLAIN, workspace_share=0.25)
    set_options(library(), Pools(), recipe, 64 * MIB)
    with pytest.raises(BuildError, match="too little memory is free") as caught:
        set_options(library(), Pools(), recipe, 63 * MIB)
    assert "0.25" in caught.value.why
    assert "raise workspace_share" in caught.value.fix


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"weight_streaming": True}, "BuilderFlag.WEIGHT_STREAMING"),
        ({"user_allocation": True}, "BuilderFlag.REQUIRE_USER_ALLOCATION"),
        ({"version_compatible": True}, "BuilderFlag.VERSION_COMPATIBLE"),
        (
            {"hardware_compatibility": "same_compute_capability"},
            "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
        ),
        ({"optimization_level": 3}, "builder_optimization_level"),
        ({"auxiliary_streams": 0}, "max_aux_streams"),
    ],
)
def test_a_setting_that_the_library_lacks_is_named(
    change: dict[str, Any], name: str
) -> None:
    with pytest.raises(BuildError) as caught:
        set_options(library(), Pools(), with_(PLAIN, **change), None)
    key = next(iter(change))
    assert caught.value.what == f"tensorrt 10.3 lacks the setting {key}"
    assert name in caught.value.why
    assert key in caught.value.fix


def test_a_setting_that_the_library_drops_is_named() -> None:
    levels = SimpleNamespace(AMPERE_PLUS="level ampere")
    known = library(
        flags={"WEIGHT_STREAMING": "streaming"}, HardwareCompatibilityLevel=levels
    )
    for change in (
        {"weight_streaming": True},
        {"hardware_compatibility": "ampere_plus"},
    ):
        with pytest.raises(BuildError, match=f"does not take {next(iter(change))}"):
            set_options(known, Deaf(), with_(PLAIN, **change), None)
    recipe = with_(PLAIN, workspace_bytes=20 * MIB)
    with pytest.raises(BuildError, match="does not take workspace") as caught:
        set_options(known, Pools(most=MIB), recipe, None)
    assert str(MIB) in caught.value.why


def test_tensorrt_rtx_drops_hardware_compatibility_and_we_say_so(
    trt: Any, config: Any
) -> None:
    """It does so with no more than a message in its log."""
    recipe = with_(RTX, hardware_compatibility="ampere_plus")
    with pytest.raises(BuildError, match="hardware_compatibility") as caught:
        set_options(trt, config, recipe, None)
    assert "tensorrt_rtx" in caught.value.what
    assert "compute_capabilities" in caught.value.fix


def test_plain_tensorrt_is_told_its_compatibility() -> None:
    levels = SimpleNamespace(AMPERE_PLUS="level ampere")
    pools: Any = Pools()
    pools.hardware_compatibility_level = "level none"
    recipe = with_(PLAIN, hardware_compatibility="ampere_plus")
    set_options(library(HardwareCompatibilityLevel=levels), pools, recipe, None)
    assert pools.hardware_compatibility_level == "level ampere"


def test_capabilities_are_told_to_tensorrt_rtx_alone() -> None:
    """Plain TensorRT builds for the GPU that is there, which is looked at elsewhere."""
    set_options(library(), object(), with_(PLAIN, compute_capabilities=("8.7",)), None)
    recipe = with_(RTX, compute_capabilities=("8.9",))
    with pytest.raises(BuildError, match="for the GPU of this machine only"):
        set_options(library(), object(), recipe, None)


def test_a_capability_that_tensorrt_rtx_lacks(trt: Any, config: Any) -> None:
    recipe = with_(RTX, compute_capabilities=("8.6", "9.0"))
    with pytest.raises(BuildError, match=r"compute capability 9\.0") as caught:
        set_options(trt, config, recipe, None)
    assert "8.9" in caught.value.fix
