"""What the doctor reads of processor, memory, board and driver."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from doctor_fakes import host, put

from id3pm_deploy.doctor.cuda_driver import DriverError, cuda_facts, nvml_facts
from id3pm_deploy.doctor.host import Host
from id3pm_deploy.doctor.machine import (
    cpu_facts,
    cpu_quota,
    jetson_facts,
    memory_facts,
    memory_limit,
    nvidia_cards,
    system_name,
)
from id3pm_deploy.doctor.probe import Probe, run_probe

CPUINFO = "processor : 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx avx2 fma\n"
ORIN = "processor : 0\nFeatures : fp asimd asimddp\nCPU implementer : 0x41\n"
ORIN += "CPU part : 0xd42\n"
RELEASE = "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64\n"


def topology(*siblings: str) -> dict[str, str]:
    name = "sys/devices/system/cpu/cpu{}/topology/core_cpus_list"
    return {name.format(index): f"{text}\n" for index, text in enumerate(siblings)}


def test_cpu_of_a_desktop_with_two_threads_a_core(tmp_path: Path) -> None:
    here = host(tmp_path, affinity=3, environment={"OMP_NUM_THREADS": "2"})
    put(here.root, {"proc/cpuinfo": CPUINFO, **topology("0,2", "1,3", "0,2", "1,3")})
    facts = cpu_facts(here)
    assert facts["model"] == "Some CPU @ 2 GHz"
    assert (facts["logical"], facts["physical"]) == (4, 2)
    assert (facts["affinity"], facts["quota"], facts["usable"]) == (3, None, 3)
    assert facts["omp_num_threads"] == "2"
    assert facts["features"]["avx2"] is True
    assert facts["features"]["amx_bf16"] is False


def test_cpu_of_a_jetson_is_named_by_its_part(tmp_path: Path) -> None:
    here = host(tmp_path, machine="aarch64")
    put(here.root, {"proc/cpuinfo": ORIN})
    facts = cpu_facts(here)
    assert facts["model"] == "Arm Cortex-A78AE"
    assert facts["features"]["asimddp"] is True
    assert facts["features"]["sve"] is False
    assert "avx2" not in facts["features"]


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    here = host(tmp_path, machine="")
    facts = cpu_facts(here)
    assert (facts["model"], facts["physical"], facts["features"]) == (
        "unknown",
        None,
        {},
    )
    assert memory_facts(here) == {"total": None, "available": None, "limit": None}
    assert (system_name(here), jetson_facts(here), nvidia_cards(here)) == (
        "Linux",
        None,
        0,
    )


V2 = "0::/pod/box\n"
V1 = "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({}, None, None),
        ({"proc/self/cgroup": V2}, None, None),
        (
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/pod/box/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/pod/box/memory.max": "1073741824\n",
            },
            1.5,
            1 << 30,
        ),
        (  # the limit of a group above counts as well
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/pod/box/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/pod/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/pod/box/memory.max": "max\n",
                "sys/fs/cgroup/pod/memory.max": "4096\n",
            },
            3.0,
            4096,
        ),
        (  # a container that is shown its own group as the top
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/memory.max": "8192\n",
            },
            2.0,
            8192,
        ),
        (  # outside its own tree: what is there still holds
            {
                "proc/self/cgroup": "0::/../..\n",
                "sys/fs/cgroup/cpu.max": "200000 100000\n",
            },
            2.0,
            None,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "2048\n",
            },
            2.5,
            2048,
        ),
        (  # version 1 in a container: the group's path does not exist there
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "1024\n",
            },
            1.0,
            1024,
        ),
        (  # version 1 without limits
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            None,
            None,
        ),
        (
            {
                "proc/self/cgroup": "nonsense\n0::\n::\n",
                "sys/fs/cgroup/cpu.max": "many cores\n",
                "sys/fs/cgroup/memory.max": "\n",
            },
            None,
            None,
        ),
    ],
)
def test_control_groups(
    tmp_path: Path,
    files: Mapping[str, str],
    cores: float | None,
    memory: int | None,
) -> None:
    here = host(tmp_path)
    put(here.root, files)
    assert cpu_quota(here) == cores
    assert memory_limit(here) == memory


@pytest.mark.parametrize(
    ("quota", "usable"), [("50000", 1), ("250000", 2), ("900000", 4)]
)
def test_usable_cores_are_whole_and_at_least_one(
    tmp_path: Path, quota: str, usable: int
) -> None:
    here = host(tmp_path)
    files = {"proc/self/cgroup": "0::/\n"}
    put(here.root, {**files, "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"})
    assert cpu_facts(here)["usable"] == usable


def test_memory_is_in_bytes(tmp_path: Path) -> None:
    here = host(tmp_path)
    put(here.root, {"proc/meminfo": "MemTotal:  100 kB\nMemAvailable:   40 kB\n"})
    assert memory_facts(here) == {"total": 102400, "available": 40960, "limit": None}


def test_jetson(tmp_path: Path) -> None:
    here = host(tmp_path, machine="aarch64")
    model = "NVIDIA Jetson AGX Orin Developer Kit\0"
    put(here.root, {"proc/device-tree/model": model, "etc/nv_tegra_release": RELEASE})
    assert jetson_facts(here) == {
        "model": "NVIDIA Jetson AGX Orin Developer Kit",
        "l4t": "36.4.3",
        "jetpack": "6",
    }


def test_another_board_is_no_jetson(tmp_path: Path) -> None:
    here = host(tmp_path, machine="aarch64")
    put(here.root, {"proc/device-tree/model": "Raspberry Pi 5 Model B\0"})
    assert jetson_facts(here) is None


def test_cards_are_counted_on_the_bus(tmp_path: Path) -> None:
    here = host(tmp_path)
    put(
        here.root,
        {
            "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
            "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
            "sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n",  # its sound
            "sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n",
            "sys/bus/pci/devices/0000:02:00.0/vendor": "0x1002\n",
            "sys/bus/pci/devices/0000:02:00.0/class": "0x030000\n",
        },
    )
    assert nvidia_cards(here) == 1


class FakeDriver:
    """``libcuda`` and NVML; ``fails`` maps a call to the status it returns."""

    capabilities = ((8, 6), (12, 0))

    def __init__(self, **fails: int) -> None:
        self.fails = fails

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(("cu", "nvml")):
            raise AttributeError(name)
        function = getattr(FakeDriver, f"_{name}")

        def call(*arguments: Any) -> int:
            if name in self.fails:
                return self.fails[name]
            function(self, *arguments)
            return 0

        return call

    def _cuInit(self, flags: ctypes.c_uint) -> None:
        assert flags.value == 0

    def _cuDriverGetVersion(self, where: Any) -> None:
        where._obj.value = 12040

    def _cuDeviceGetCount(self, where: Any) -> None:
        where._obj.value = len(self.capabilities)

    def _cuDeviceGet(self, where: Any, index: ctypes.c_int) -> None:
        where._obj.value = 7 + index.value

    def _cuDeviceGetName(self, text: Any, size: ctypes.c_int, device: Any) -> None:
        name = f"NVIDIA Fake {device.value}".encode()
        assert len(name) < size.value == len(text)
        text.value = name

    def _cuDeviceTotalMem_v2(self, where: Any, device: Any) -> None:
        where._obj.value = 24 << 30

    def _cuDeviceGetAttribute(self, where: Any, number: Any, device: Any) -> None:
        major, minor = self.capabilities[device.value - 7]
        values = {16: 82, 18: 1, 75: major, 76: minor}
        where._obj.value = values[number.value]

    def _cuGetErrorName(self, status: ctypes.c_int, where: Any) -> None:
        where._obj.value = {100: b"CUDA_ERROR_NO_DEVICE"}.get(status.value)

    def _nvmlInit_v2(self) -> None: ...

    def _nvmlShutdown(self) -> None: ...

    def _nvmlSystemGetDriverVersion(self, text: Any, size: Any) -> None:
        text.value = b"580.65.06"


def test_the_driver_tells_of_its_gpus() -> None:
    facts = cuda_facts(FakeDriver())
    assert facts["cuda"] == "12.4"
    assert [gpu["compute_capability"] for gpu in facts["devices"]] == ["8.6", "12.0"]
    assert facts["devices"][1] == {
        "name": "NVIDIA Fake 8",
        "compute_capability": "12.0",
        "multiprocessors": 82,
        "memory": 24 << 30,
        "integrated": True,
    }
    assert nvml_facts(FakeDriver()) == {"driver": "580.65.06"}


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ({"cuInit": 100}, r"cuInit returned CUDA_ERROR_NO_DEVICE \(100\)"),
        ({"cuInit": 77}, r"cuInit returned an unknown error \(77\)"),
        ({"cuInit": 77, "cuGetErrorName": 1}, r"an unknown error \(77\)"),
        ({"cuDeviceGetAttribute": 100}, "cuDeviceGetAttribute returned"),
    ],
)
def test_an_error_of_the_driver_is_named(fails: dict[str, int], message: str) -> None:
    with pytest.raises(DriverError, match=message):
        cuda_facts(FakeDriver(**fails))


@pytest.mark.parametrize("call", ["nvmlInit_v2", "nvmlSystemGetDriverVersion"])
def test_an_error_of_the_management_library(call: str) -> None:
    with pytest.raises(DriverError, match=f"{call} returned 9"):
        nvml_facts(FakeDriver(**{call: 9}))


LIBCUDA = r"""
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) { return flags; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = 40 + i; return 0; }
int cuDeviceGetName(char *s, int n, int d) {
    if (n < 16 || d != 40) return 1;
    strcpy(s, "NVIDIA in C"); return 0;
}
int cuDeviceTotalMem_v2(size_t *m, int d) {
    *m = (size_t)96 << 30; return d == 40 ? 0 : 1;
}
int cuDeviceGetAttribute(int *v, int a, int d) {
    *v = a == 75 ? 8 : a == 76 ? 9 : a == 16 ? 128 : 0; return d == 40 ? 0 : 1;
}
int cuGetErrorName(int e, const char **s) { *s = "CUDA_ERROR_TEST"; return 0; }
"""


def _with_library(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Probe, Host]:
    """Compile ``source`` to libcuda.so.1 where a child's loader finds it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler")
    (tmp_path / "cuda.c").write_text(source)
    library = tmp_path / "lib" / "libcuda.so.1"
    library.parent.mkdir()
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-o",
        str(library),
        str(tmp_path / "cuda.c"),
    ]
    subprocess.run(command, check=True)
    before = os.environ.get("LD_LIBRARY_PATH")
    paths = [str(library.parent), *([before] if before else [])]
    monkeypatch.setenv("LD_LIBRARY_PATH", os.pathsep.join(paths))
    here = host(tmp_path, search=tuple(filter(None, sys.path)))
    return Probe("cuda", (), "asking the NVIDIA driver"), here


def test_a_driver_in_c_is_called_rightly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, here = _with_library(tmp_path, LIBCUDA, monkeypatch)
    outcome = run_probe(probe, here, 60)
    assert outcome.ok, outcome.problem
    assert json.loads(json.dumps(outcome.facts)) == {
        "cuda": "13.0",
        "devices": [
            {
                "name": "NVIDIA in C",
                "compute_capability": "8.9",
                "multiprocessors": 128,
                "memory": 96 << 30,
                "integrated": False,
            }
        ],
    }


def test_a_driver_that_crashes_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "int cuInit(unsigned f) { return *(volatile int *)8; }\n"
    probe, here = _with_library(tmp_path, source, monkeypatch)
    outcome = run_probe(probe, here, 60)
    assert outcome.problem == "asking the NVIDIA driver died of SIGSEGV"
    assert outcome.broken


def test_a_driver_without_a_call_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, here = _with_library(
        tmp_path, "int nothing(void) { return 0; }", monkeypatch
    )
    outcome = run_probe(probe, here, 60)
    assert "undefined symbol: cuInit" in outcome.problem
    assert outcome.broken
    assert str(tmp_path) not in outcome.problem
