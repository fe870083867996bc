"""What all tests share: the neighbouring folder, GPU skips and a closed network."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
_GPU_DEVICES = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/dxg")

# The machine may be busy, so no example has a deadline; the examples are the same in
# every run, so that a failure is everybody's failure.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
hypothesis.settings.load_profile("project")

# Model hubs are never asked, in this process or in those that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"


# A shell that starts tests in the background has them ignore Ctrl-C, and so would the
# programs that tests send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository, with `golden/` and `data/`.

    It is not part of the project; a test that asks for it is skipped where it is
    absent.
    """
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder 'shared' beside the repository")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no NVIDIA device."""
    if any(Path(device).exists() for device in _GPU_DEVICES):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CHECKPOINT of random weights: 16x16, learned variance, v-prediction."""
    from models import tiny_network, tiny_spec

    from id3pm_deploy.reference.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    spec = tiny_spec(learned_variance=True, prediction_type="v", title="tiny")
    save_checkpoint(folder, spec, tiny_network(spec).state_dict())
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its BUNDLE with the float32 graph and the cpu engine; do not change it."""
    from id3pm_deploy.builders.build import build_engine

    folder = tmp_path_factory.mktemp("tiny-bundle") / "bundle"
    build_engine(tiny_checkpoint, "cpu", folder)
    return folder


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A BUNDLE of the test's own."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


@pytest.fixture(scope="session", autouse=True)
def _own_user_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The ledger, trusted keys and stamps of tests are not the user's."""
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("CACHE", "STATE", "CONFIG"):
            patch.setenv(f"XDG_{kind}_HOME", str(folder / kind.lower()))
        yield


@pytest.fixture(scope="session", autouse=True)
def _closed_network() -> Iterator[None]:
    """Refuse connections that leave this machine."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        local = {"127.0.0.1", "::1", "localhost"}
        if self.family != socket.AF_UNIX and address[0] not in local:
            raise OSError(f"tests must not need a network: {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_locally)
        yield
