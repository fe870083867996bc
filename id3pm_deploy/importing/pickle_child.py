"""The process in which a pickled state dict is read: once, with nothing to gain.

``pickle_file.tensors_of_pickle`` starts it with a request in its arguments, no standard
input and an empty environment. It reads the file with torch's weights-only unpickler,
which calls nothing but a fixed list of torch's own functions, and leaves ``tensors``, a
safetensors file, and ``report``, JSON, in its working folder. There is no other way to
read a pickle here, and none to ask for one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, Id3pmError, first_line
from ..files import atomic_path, write_json

TENSORS, REPORT = "tensors", "report"
FORBIDDEN_STATUS = 97
"""Exit status of a process that was asked for something that no weights need."""
MAX_TENSORS = 20_000
_MAX_PICKLE = 64 << 20
_MAX_NAME = 256
_LOCAL_HEADER = 30
_PARENT_DEATH_SIGNAL = 1
_NO_NEW_PRIVILEGES = 38
_FIX = "take a state dict as torch.save or safetensors wrote it, from a trusted source"
_GLOBAL = re.compile(r"(?:GLOBAL |class |global )([\w.<>]+)")
_NO_MEMORY = ("allocate memory", "Cannot allocate", "not enough memory")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty"),
    *("subprocess.Popen", "socket.connect", "socket.bind", "socket.sendto"),
    *("os.remove", "os.rmdir", "os.chmod", "os.symlink", "os.link", "shutil.rmtree"),
)


def refused(name: str, why: str) -> CheckpointError:
    """A file that is no plain state dict. Its name is all that is said of its place."""
    return CheckpointError(f"{name} cannot be imported", why=why, fix=_FIX)


def limit_process(memory: int, seconds: int, file_size: int) -> None:
    """Take what this process may use, beyond what it has, and end it with its parent.

    Args:
        memory: Bytes of address space beyond what is mapped now.
        seconds: CPU time in all.
        file_size: Bytes of the largest file that it may write.
    """
    with contextlib.suppress(OSError, AttributeError):  # Linux
        system = ctypes.CDLL(None)
        system.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        system.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    most = {
        resource.RLIMIT_AS: _mapped_bytes() + memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_CORE: 0,
    }
    for kind, wanted in most.items():
        hard = resource.getrlimit(kind)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (value, value))


def _mapped_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def forbid_all_but_reading(work: Path) -> None:
    """End this process if it begins a program, a connection or a change of files
    outside ``work``: a second line behind the unpickler, which lets none of it happen.
    """
    sys.dont_write_bytecode = True
    inside = os.fspath(work) + os.sep

    def hook(event: str, values: tuple[Any, ...]) -> None:
        bad = event in _FORBIDDEN
        if event == "open" and isinstance(values[0], str | bytes):
            bad = bool((values[2] or 0) & _WRITING)
        if bad:
            path = values[0] if values and isinstance(values[0], str | bytes) else ""
            if not os.path.abspath(os.fsdecode(path)).startswith(inside):
                os._exit(FORBIDDEN_STATUS)

    sys.addaudithook(hook)


def record_sizes(path: Path, name: str) -> list[int] | None:
    """Sizes of the storages in a zip archive of torch's, after its directory was
    checked; None for a file of the older kind, a row of pickles.

    Raises:
        CheckpointError: The archive is not as torch.save writes it: compressed,
            overlapping, longer than the file, or with names that lead elsewhere.
    """
    size = path.stat().st_size
    with open(path, "rb") as handle:
        if handle.read(4) != b"PK\x03\x04":
            return None
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        why = f"its zip directory is damaged or cut off: {first_line(error)}"
        raise refused(name, why) from error
    end = 0
    for member in sorted(members, key=lambda one: one.header_offset):
        parts = member.filename.split("/")
        if ".." in parts or parts[0] == "" or not member.filename.isprintable():
            raise refused(name, f"it holds the name {member.filename!r:.80}")
        if member.compress_type or member.compress_size != member.file_size:
            raise refused(name, f"{member.filename!r:.80} is compressed")
        if member.flag_bits & 1 or (not end and member.header_offset):
            raise refused(name, "it is no archive of torch's")
        if member.header_offset < end:
            raise refused(name, f"{member.filename!r:.80} overlaps another member")
        end = member.header_offset + _LOCAL_HEADER + member.file_size
    names = [member.filename for member in members]
    if end > size or len(set(names)) != len(names) or len(names) > 2 * MAX_TENSORS:
        raise refused(name, "its zip directory does not fit the file")
    root = names[0].split("/")[0]
    pickles = [one for one in members if one.filename == f"{root}/data.pkl"]
    if not pickles or pickles[0].file_size > _MAX_PICKLE:
        raise refused(name, f"it has no data.pkl of at most {_MAX_PICKLE} bytes")
    start = f"{root}/data/"
    return [one.file_size for one in members if one.filename.startswith(start)]


def load_pickle(path: Path, name: str, *, mapped: bool) -> Any:
    """What torch's weights-only unpickler makes of the file.

    Args:
        path: The file.
        name: What it is called.
        mapped: Leave the numbers in the file until they are used.

    Raises:
        CheckpointError: It refuses.
        MemoryError: There is not enough memory.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:
        text = str(error)
        if any(part in text for part in _NO_MEMORY):
            raise MemoryError from error
        found = _GLOBAL.search(text)
        why = "it is truncated, or no pickle of tensors"
        if found is not None:
            why = f"it asks for {found[1]:.80}, which is not needed for weights"
        elif "legacy" in text or "TorchScript" in text:
            why = "it is a TorchScript archive or a tar of torch's first releases"
        elif text:
            why += f": {_last_line(text)}"
        raise refused(name, why) from error


def _last_line(text: str) -> str:
    """What was wrong, without the advice to load the file with full unpickling."""
    text = text.split("Check the documentation of torch.load")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rpartition("WeightsUnpickler error: ")[2][:200] if lines else ""


def checked_tensors(
    found: Any, sizes: list[int] | None, most: int, file: str
) -> dict[str, tuple[Any, bool]]:
    """The tensors of a flat state dict, each with whether another lies in its storage.

    Args:
        found: What was unpickled.
        sizes: Bytes of the storages in the file; None where only their sum is known.
        most: Bytes of the file.
        file: What it is called.

    Raises:
        CheckpointError: It is no flat dictionary of plain, dense tensors that lie
            apart from each other in storages of the size they have in the file; the
            entry is named.
    """
    import torch

    if type(found) not in (dict, OrderedDict):
        kind = type(found).__name__
        raise refused(file, f"it holds {kind}, not a dictionary of tensors")
    if not 0 < len(found) <= MAX_TENSORS:
        raise refused(file, f"it holds {len(found)} entries")
    for name, tensor in found.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > _MAX_NAME:
            raise refused(file, f"an entry is called {name!r:.80}")
        why = _why_not_plain(tensor)
        if why:
            raise refused(file, f"the entry {name} {why}")
    storages = {t.untyped_storage().data_ptr(): t for t in found.values() if t.numel()}
    there = [tensor.untyped_storage().nbytes() for tensor in storages.values()]
    if sum(there) > most or (sizes is not None and Counter(there) - Counter(sizes)):
        raise refused(file, "its storages are of other sizes than it says")
    _check_apart(found, file)
    users = Counter(t.untyped_storage().data_ptr() for t in found.values())
    with torch.no_grad():
        return {
            name: (t.detach(), users[t.untyped_storage().data_ptr()] > 1)
            for name, t in found.items()
        }


def _why_not_plain(tensor: Any) -> str:
    """What is wrong with an entry; empty if it is a plain dense tensor."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"is {type(tensor).__name__}, not a tensor"
    if vars(tensor):
        return f"has attributes: {', '.join(map(str, vars(tensor)))[:80]}"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "is a sparse or nested tensor"
    if tensor.is_quantized:
        return "is a quantised tensor"
    if tensor.device.type != "cpu":
        return f"is on the device {tensor.device.type}, without numbers"
    if tensor.is_complex() or tensor.is_neg() or tensor.is_conj():
        return f"is {tensor.dtype}; only real numbers are weights"
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < extent:
            return f"uses numbers twice: its strides are {tuple(tensor.stride())}"
        extent += stride * max(size - 1, 0)
    return ""


def _check_apart(found: Mapping[str, Any], file: str) -> None:
    """Refuse tensors that share some numbers; sharing all of them is a tie."""
    places = sorted(_places(found))
    following = iter(places)
    next(following, None)
    for (first, end, how, one), other in zip(places, following, strict=False):
        if other[0] < end and (first, how) != (other[0], other[2]):
            raise refused(file, f"the entries {one} and {other[3]} overlap")


def _places(found: Mapping[str, Any]) -> Iterator[tuple[int, int, str, str]]:
    """First byte, end, form and name of each tensor that has numbers."""
    for name, tensor in found.items():
        if tensor.numel():
            pairs = zip(tensor.stride(), tensor.shape, strict=True)
            last = sum(stride * (size - 1) for stride, size in pairs)
            size = tensor.element_size()
            start = tensor.data_ptr()
            how = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}"
            yield start, start + (last + 1) * size, how, name


def convert(path: Path, work: Path) -> None:
    """Read a pickled state dict and write ``work/tensors``.

    Raises:
        CheckpointError: See :func:`checked_tensors`.
        MemoryError: The limit is reached.
    """
    from safetensors.torch import save_file

    # torch.load goes by a path's suffix; a descriptor's has none, and stays one file.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    here = Path(f"/proc/self/fd/{descriptor}")
    size = os.fstat(descriptor).st_size
    sizes = record_sizes(here, path.name)
    found = load_pickle(here, path.name, mapped=sizes is not None)
    kept = {}
    for name, (tensor, shared) in checked_tensors(
        found, sizes, size, path.name
    ).items():
        whole = tensor.contiguous()
        kept[name] = whole.clone() if shared and whole is tensor else whole
    try:
        with atomic_path(work / TENSORS, 0o600) as temporary:
            save_file(kept, str(temporary))
    except (KeyError, ValueError, RuntimeError) as error:
        why = f"safetensors does not take it: {first_line(error)}"
        raise refused(path.name, why) from error


def main() -> None:
    """Serve the request in the second argument and end the process."""
    request = json.loads(sys.argv[2])
    work, path = Path(request["work"]), Path(request["path"])
    import safetensors.torch  # noqa: F401 - all of it, before limits and the hook
    import torch

    torch.set_num_threads(1)
    report: dict[str, Any] = {"done": True}
    try:
        limit_process(request["memory"], request["seconds"], request["file_size"])
        forbid_all_but_reading(work)
        convert(path, work)
    except Id3pmError as error:
        report = {"what": error.what, "why": error.why, "fix": error.fix}
        report["kind"] = type(error).__name__
    except MemoryError:
        report = {"memory": True}
    except Exception as error:
        # Whatever else a hostile file makes of torch: it is not imported.
        said = f"{type(error).__name__}: {first_line(error)}"
        if any(part in said for part in _NO_MEMORY):
            report = {"memory": True}
        else:
            report = {"what": f"{path.name} cannot be imported", "why": said}
            report["fix"] = _FIX
    write_json(work / REPORT, report, 0o600)
    os._exit(0)
