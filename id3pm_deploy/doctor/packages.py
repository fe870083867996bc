"""What is installed and what this package asks for, from metadata alone.

No module is imported: a package that is broken or takes seconds to import costs the
same as any other.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from .host import Host
from .requirements import Requirement, parse_requirement, satisfies

PACKAGE = "id3pm-deploy"
CORE = "core"
"""How the requirements that stand under no extra are called."""

SAME_MODULE = (
    (
        "onnxruntime",
        "onnxruntime-gpu",
        "onnxruntime-openvino",
        "onnxruntime-directml",
        "onnxruntime-training",
        "onnxruntime-qnn",
    ),
    (
        "opencv-python-headless",
        "opencv-python",
        "opencv-contrib-python",
        "opencv-contrib-python-headless",
    ),
)
"""Packages that install the same module: the later one overwrites the earlier. The
first of each is the one this package asks for, and any of them has what it needs."""

UNKNOWN = "unknown"
_TORCH_CUDA = re.compile(r"^cuda\b[^=]*=\s*['\"]([0-9.]+)['\"]", re.MULTILINE)


@dataclass(frozen=True)
class Found:
    """A requirement and what is installed for it.

    Attributes:
        requirement: The requirement.
        version: Installed version; None if there is none, ``unknown`` if its metadata
            is damaged.
        by: Name of the installed package: another one may stand in.
    """

    requirement: Requirement
    version: str | None
    by: str

    @property
    def ok(self) -> bool:
        """Whether it is installed in a version that will do."""
        return self.version is not None and satisfies(
            self.requirement.specifier or ">=0", self.version
        )

    def to_json(self) -> dict[str, Any]:
        """``requirement``, ``found``, ``by`` and ``ok``."""
        return {
            "requirement": str(self.requirement),
            "found": self.version,
            "by": self.by if self.version else "",
            "ok": self.ok,
        }


@dataclass(frozen=True)
class Packages:
    """Installed packages as one interpreter sees them, and this package's own wishes.

    Attributes:
        host: The interpreter.
        checkout: Folder of the repository, read where the package is not installed;
            None to look for it beside the package.
    """

    host: Host
    checkout: Path = field(
        default_factory=lambda: Path(__file__).resolve().parent.parent.parent
    )
    _versions: dict[str, str | None] = field(default_factory=dict, repr=False)

    def distribution(self, name: str) -> Distribution | None:
        """The package's metadata; None where it is not installed."""
        return next(iter(distributions(name=name, path=list(self.host.search))), None)

    def version(self, name: str) -> str | None:
        """Installed version; ``unknown`` if the metadata is damaged."""
        if name not in self._versions:
            self._versions[name] = self._version(name)
        return self._versions[name]

    def _version(self, name: str) -> str | None:
        distribution = self.distribution(name)
        if distribution is None:
            return None
        try:
            version: object = distribution.version
        except (KeyError, AttributeError, TypeError, OSError, ValueError):
            version = None
        return version if isinstance(version, str) and version else UNKNOWN

    @functools.cached_property
    def origin(self) -> str:
        """``wheel``, ``folder`` (from a checkout), ``editable``, ``checkout`` (not
        installed at all), or ``unknown``."""
        distribution = self.distribution(PACKAGE)
        if distribution is None:
            here = (self.checkout / "pyproject.toml").is_file()
            return "checkout" if here else UNKNOWN
        try:
            text = distribution.read_text("direct_url.json")  # PEP 610
            folder = json.loads(text or "{}").get("dir_info")
        except (OSError, ValueError, AttributeError):
            folder = None
        if folder is None:
            return "wheel"
        return "editable" if folder.get("editable") else "folder"

    @functools.cached_property
    def declared(self) -> Mapping[str, tuple[Requirement, ...]]:
        """Requirements by extra, ``core`` first; of this Python and machine alone.

        An extra of this package that another one contains is unfolded.
        """
        raw = self._from_metadata() or self._from_checkout()
        environment = self.environment()
        own = {name: list(_applicable(lines, environment)) for name, lines in raw}
        return {name: tuple(_unfolded(name, own)) for name in own}

    def environment(self) -> dict[str, str]:
        """Values of environment markers (PEP 508)."""
        return {
            "python_version": ".".join(self.host.python.split(".")[:2]),
            "python_full_version": self.host.python,
            "implementation_version": self.host.python,
            "implementation_name": sys.implementation.name,
            "platform_python_implementation": "CPython",
            "platform_machine": self.host.machine,
            "platform_system": self.host.system,
            "platform_release": "",
            "platform_version": "",
            "sys_platform": self.host.system.lower(),
            "os_name": "posix",
            "extra": "",
        }

    def _from_metadata(self) -> list[tuple[str, list[str]]]:
        distribution = self.distribution(PACKAGE)
        if distribution is None:
            return []
        lines = distribution.requires or []
        extras = distribution.metadata.get_all("Provides-Extra") or []
        found = [(CORE, [line for line in lines if "extra" not in _marker(line)])]
        for extra in extras:
            environment = {**self.environment(), "extra": extra}
            mine = [
                _without_marker(line)
                for line in lines
                if "extra" in _marker(line) and _holds(line, environment)
            ]
            found.append((extra, mine))
        return found

    def _from_checkout(self) -> list[tuple[str, list[str]]]:
        try:
            if sys.version_info >= (3, 11):
                import tomllib
            else:
                import tomli as tomllib
            text = (self.checkout / "pyproject.toml").read_text(encoding="utf-8")
            project = tomllib.loads(text)["project"]
            extras = dict(project.get("optional-dependencies", {}))
            return [(CORE, list(project.get("dependencies", []))), *extras.items()]
        except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return []

    def found(self, extra: str) -> tuple[Found, ...]:
        """Every requirement of ``extra`` with what is installed for it."""
        return tuple(self._find(one) for one in self.declared.get(extra, ()))

    def find(self, name: str, extra: str) -> Found:
        """The package ``name`` held against what ``extra`` asks of it."""
        for requirement in self.declared.get(extra, ()):
            if requirement.name == name:
                return self._find(requirement)
        return self._find(Requirement(name, (), "", ""))

    def _find(self, requirement: Requirement) -> Found:
        found = Found(requirement, self.version(requirement.name), requirement.name)
        for group in SAME_MODULE:
            if found.version is None and group[0] == requirement.name:
                for other in self.rivals(requirement.name):
                    return Found(requirement, self.version(other), other)
        return found

    def rivals(self, name: str) -> tuple[str, ...]:
        """Installed packages with the same module as ``name``, itself left out."""
        group: tuple[str, ...] = next((g for g in SAME_MODULE if name in g), ())
        return tuple(n for n in group if n != name and self.version(n) is not None)

    def torch_cuda(self) -> str | None:
        """The CUDA version that the installed torch was built for, read, not run."""
        distribution = self.distribution("torch")
        if distribution is None:
            return None
        try:
            path = Path(str(distribution.locate_file("torch/version.py")))
            found = _TORCH_CUDA.search(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found[1] if found else None

    def install_command(self, extra: str, lacking: tuple[Requirement, ...] = ()) -> str:
        """The one command that installs an extra.

        Without a checkout to install from, it names the lacking packages: this package
        is on no index.
        """
        removed = [r for one in lacking for r in self.rivals(one.name)]
        first = f"pip uninstall -y {' '.join(removed)} && " if removed else ""
        where = "." if extra == CORE else f"'.[{extra}]'"
        if self.origin in ("editable", "checkout"):
            return f"{first}pip install -e {where} -c constraints.txt"
        if self.origin == "folder" or not lacking:
            return f"{first}pip install {where} -c constraints.txt"
        names = " ".join(shlex.quote(str(one)) for one in lacking)
        return f"{first}pip install {names}"


def _marker(line: str) -> str:
    return line.partition(";")[2]


def _without_marker(line: str) -> str:
    return line.partition(";")[0].strip()


def _holds(line: str, environment: Mapping[str, str]) -> bool:
    requirement = parse_requirement(line)
    return requirement is not None and requirement.applies(environment)


def _applicable(
    lines: list[str], environment: Mapping[str, str]
) -> Iterator[Requirement]:
    for line in lines:
        requirement = parse_requirement(line)
        if requirement is not None and requirement.applies(environment):
            yield requirement


def _unfolded(
    extra: str, own: Mapping[str, list[Requirement]], above: tuple[str, ...] = ()
) -> list[Requirement]:
    found: dict[Requirement, None] = {}
    for requirement in own.get(extra, []):
        if requirement.name != PACKAGE:
            found[requirement] = None
            continue
        for inner in requirement.extras:
            if inner not in (*above, extra):
                found.update(dict.fromkeys(_unfolded(inner, own, (*above, extra))))
    return list(found)
