"""The smallest set of islands that passes, from coarse modules down to single layers.

Nothing heavy is imported: what is searched is a tree of names, and how a set of them
is judged is the caller's function. The search is delta debugging (Zeller & Hildebrandt
2002) with an order to try things in: what does most harm alone comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

Islands = frozenset[str]

Measure = Callable[[Islands], float]
"""The error with these islands as a multiple of what is allowed: at most 1 passes,
infinity is an overflow."""

WORTHWHILE = 0.9
"""An island gives way to several smaller ones where these cost at most this share."""


@dataclass(frozen=True)
class Candidate:
    """What may become an island.

    Attributes:
        name: Its name.
        cost: What it costs in float32, in any unit; of the whole with all it holds.
        parts: What it holds. All of them together may pass less than the whole: what
            goes from one to the other is rounded.
    """

    name: str
    cost: float
    parts: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Trial:
    """One set that was measured, in the order of the search."""

    islands: tuple[str, ...]
    excess: float

    @property
    def passed(self) -> bool:
        """Whether it is inside the tolerance."""
        return self.excess <= 1


@dataclass(frozen=True)
class Found:
    """What the search found.

    Attributes:
        islands: Sorted names; None where even everything in float32 does not pass.
        minimal: Whether removing any one of them was seen to fail. False where the
            budget ended before.
        trials: All sets that were measured.
    """

    islands: tuple[str, ...] | None
    minimal: bool
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The set with the smallest error."""
        return min(self.trials, key=lambda trial: trial.excess)


class _BudgetSpent(Exception):
    """No evaluation is left."""


def smallest_islands(
    candidates: Sequence[Candidate],
    measure: Measure,
    *,
    budget: int,
    suspects: Collection[str] = (),
) -> Found:
    """Search for the smallest set of islands that passes.

    The result is locally minimal: without any one of its islands it does not pass, and
    none of them could be replaced by cheaper parts of itself.

    Args:
        candidates: The coarsest modules; their parts are looked at where a module
            turns out to be needed.
        measure: Judges a set. It is asked once for each.
        budget: Most sets to measure; at least 2.
        suspects: Names, of any level, that are tried first.
    """
    search = _Search(candidates, measure, budget)
    try:
        return search.run(suspects)
    except _BudgetSpent:
        return search.found(search.cheapest_passed(), minimal=False)


class _Search:
    def __init__(
        self, candidates: Sequence[Candidate], measure: Measure, budget: int
    ) -> None:
        self.top = tuple(candidates)
        self.measure = measure
        self.budget = budget
        self.known = {one.name: one for one in every_candidate(candidates)}
        self.parents = {
            part.name: one for one in every_candidate(candidates) for part in one.parts
        }
        self.excess: dict[Islands, float] = {}

    def run(self, suspects: Collection[str]) -> Found:
        everything = _names(self.top)
        if self.passes(frozenset()):
            return self.found(frozenset(), minimal=True)
        if not self.passes(everything):
            return self.found(None, minimal=False)
        chosen = self.suspected(suspects)
        if chosen is None:
            chosen = self.select(self.top, frozenset(), suspects)
        else:
            chosen = self.reduced(chosen, self.by_cost(chosen))
        chosen = self.refined(chosen, suspects)
        return self.found(self.reduced(chosen, self.by_cost(chosen)), minimal=True)

    def found(self, islands: Islands | None, *, minimal: bool) -> Found:
        trials = tuple(
            Trial(tuple(sorted(tried)), excess) for tried, excess in self.excess.items()
        )
        listed = None if islands is None else tuple(sorted(islands))
        return Found(listed, minimal, trials)

    def score(self, islands: Islands) -> float:
        if islands not in self.excess:
            if len(self.excess) >= self.budget:
                raise _BudgetSpent
            self.excess[islands] = self.measure(islands)
        return self.excess[islands]

    def passes(self, islands: Islands) -> bool:
        return self.score(islands) <= 1

    def cost(self, islands: Iterable[str]) -> float:
        return sum(self.known[name].cost for name in islands)

    def by_cost(self, islands: Iterable[str]) -> list[str]:
        """The most expensive first."""
        return sorted(islands, key=lambda name: (-self.known[name].cost, name))

    def cheapest_passed(self) -> Islands | None:
        passed = [islands for islands, excess in self.excess.items() if excess <= 1]
        return min(passed, key=lambda s: (self.cost(s), len(s)), default=None)

    def suspected(self, suspects: Collection[str]) -> Islands | None:
        """The suspects, or the smallest modules around them, as soon as they pass."""
        now = frozenset(name for name in suspects if name in self.known)
        while now:
            now = frozenset(name for name in now if not self.inside(name, now))
            if self.passes(now):
                return now
            wider = frozenset(self.wider(name) for name in now)
            if wider == now:
                return None
            now = wider
        return None

    def wider(self, name: str) -> str:
        return self.parents[name].name if name in self.parents else name

    def inside(self, name: str, islands: Islands) -> bool:
        """Whether one of ``islands`` holds ``name``."""
        while name in self.parents:
            name = self.parents[name].name
            if name in islands:
                return True
        return False

    def select(
        self, parts: Sequence[Candidate], base: Islands, suspects: Collection[str]
    ) -> Islands:
        """Fewest of ``parts`` that pass beside ``base``; all of them do, none does not.

        Each part's harm is the error where it alone is in half precision. The shortest
        passing prefix of the parts in this order is found by bisection, and what it
        holds in vain is taken out again.
        """
        if len(parts) == 1:
            return base | _names(parts)
        whole = base | _names(parts)
        harm = {one.name: self.score(whole - {one.name}) for one in parts}
        accused = {one.name for one in parts if self.holds(one, suspects)}
        order = sorted(
            parts,
            key=lambda one: (-harm[one.name], one.name not in accused, one.cost),
        )
        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            if self.passes(base | _names(order[:middle])):
                high = middle
            else:
                low = middle
        names = [one.name for one in order[:high]]
        return self.reduced(base | frozenset(names), names[::-1])

    def holds(self, one: Candidate, suspects: Collection[str]) -> bool:
        return any(each.name in suspects for each in every_candidate([one]))

    def reduced(self, islands: Islands, order: Sequence[str]) -> Islands:
        """Take out what is not needed, tried in this order, until nothing is."""
        again = True
        while again:
            again = False
            for name in order:
                if name in islands and self.passes(islands - {name}):
                    islands, again = islands - {name}, True
        return islands

    def refined(self, islands: Islands, suspects: Collection[str]) -> Islands:
        """Replace islands by parts of themselves where that is cheaper."""
        settled: set[str] = set()
        while waiting := [n for n in self.by_cost(islands) if n not in settled]:
            name = waiting[0]
            settled.add(name)
            one = self.known[name]
            rest = islands - {name}
            if self.passes(rest):
                islands = rest
            elif one.parts and self.passes(rest | _names(one.parts)):
                chosen = self.select(one.parts, rest, suspects)
                if self.cost(chosen - rest) <= WORTHWHILE * one.cost:
                    islands = chosen
        return islands


def _names(candidates: Iterable[Candidate]) -> Islands:
    return frozenset(one.name for one in candidates)


def every_candidate(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Candidates with all their parts, each after what holds it."""
    for one in candidates:
        yield one
        yield from every_candidate(one.parts)
