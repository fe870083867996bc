"""Fork servers and sandboxes for the tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sandbox import BUILD, DEVICE, ForkServer, Sandbox, check_done


@pytest.fixture(scope="session")
def device_server() -> Iterator[ForkServer]:
    """Runs commands of the device tier and `embed`; torch is not imported."""
    server = ForkServer(DEVICE)
    yield server
    server.close()


@pytest.fixture(scope="session")
def build_server() -> Iterator[ForkServer]:
    """Runs commands that need torch, which is imported already."""
    server = ForkServer(BUILD)
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_weights(
    build_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The weights file of the CHECKPOINT that ``crafted.config`` describes."""
    folder = tmp_path_factory.mktemp("weights")
    sandbox = Sandbox(build_server, folder, before=("makers:write_checkpoint",))
    check_done(sandbox.run("--version"))
    return sandbox.work / "model" / "model.safetensors"


@pytest.fixture
def device(device_server: ForkServer, tmp_path: Path) -> Sandbox:
    """A sandbox for commands of the device tier."""
    return Sandbox(device_server, tmp_path)


@pytest.fixture
def build(build_server: ForkServer, tmp_path: Path) -> Sandbox:
    """A sandbox for commands that need torch."""
    return Sandbox(build_server, tmp_path)


@pytest.fixture
def secret(device: Sandbox) -> Sandbox:
    """A sandbox with a file in the working folder, and a link to one outside it."""
    (device.work / "secret.bin").write_bytes(np.ones(32, np.float32).tobytes())
    (device.work / "link.bin").symlink_to("/etc/passwd")
    return device
