"""Requirements of packages as ``Requires-Dist`` lines state them, read by packaging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from packaging.markers import Marker, UndefinedComparison, UndefinedEnvironmentName
from packaging.requirements import InvalidRequirement
from packaging.requirements import Requirement as _Parsed
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version


def satisfies(specifier: str, version: str) -> bool:
    """Whether ``version`` meets every clause of ``specifier``, as ``>=1.2,<2``.

    Pre-releases count like any other version. What cannot be read is not met.
    """
    try:
        return SpecifierSet(specifier).contains(Version(version), prereleases=True)
    except (InvalidSpecifier, InvalidVersion):
        return False


@dataclass(frozen=True)
class Requirement:
    """One dependency; ``extras`` are those that it asks of the package."""

    name: str
    extras: tuple[str, ...]
    specifier: str
    marker: str

    def __str__(self) -> str:
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        return f"{self.name}{extras}{self.specifier}"

    def applies(self, environment: Mapping[str, str]) -> bool:
        """Whether the marker holds; one that cannot be evaluated does."""
        if not self.marker:
            return True
        try:
            return Marker(self.marker).evaluate(dict(environment))
        except (UndefinedComparison, UndefinedEnvironmentName):
            return True


def parse_requirement(text: str) -> Requirement | None:
    """A dependency as ``Requires-Dist`` has it, or None for a line that is none."""
    try:
        found = _Parsed(text)
    except InvalidRequirement:
        return None
    return Requirement(
        canonicalize_name(found.name),
        tuple(sorted(found.extras)),
        str(found.specifier),
        str(found.marker or ""),
    )
