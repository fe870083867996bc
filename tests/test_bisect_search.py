"""The search for the smallest set of islands, on functions whose answer is known."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from id3pm_deploy.bisect.search import (
    Candidate,
    Found,
    Islands,
    every_candidate,
    smallest_islands,
)


def tree(blocks: int = 4, parts: int = 3, layers: int = 3) -> tuple[Candidate, ...]:
    """Blocks "a", "b", ... of parts "a.0", ... of layers "a.0.0", ...; each layer
    costs 1."""
    return tuple(
        Candidate(
            block,
            parts * layers,
            tuple(
                Candidate(
                    f"{block}.{i}",
                    layers,
                    tuple(Candidate(f"{block}.{i}.{j}", 1) for j in range(layers)),
                )
                for i in range(parts)
            ),
        )
        for block in "abcdefghijkl"[:blocks]
    )


LEAVES = [one.name for one in every_candidate(tree()) if not one.parts]


def covered(name: str, islands: Islands) -> bool:
    """Whether an island is this module or holds it."""
    return any(f"{name}.".startswith(f"{island}.") for island in islands)


def harmful(harm: Mapping[str, float]) -> Callable[[Islands], float]:
    """Errors that add up over the modules that are in no island."""

    def measure(islands: Islands) -> float:
        return sum(h for name, h in harm.items() if not covered(name, islands))

    return measure


def search(
    measure: Callable[[Islands], float],
    budget: int = 400,
    suspects: Collection[str] = (),
    candidates: tuple[Candidate, ...] | None = None,
) -> Found:
    """Search, and check what always has to hold."""
    asked: list[Islands] = []

    def counted(islands: Islands) -> float:
        asked.append(islands)
        return measure(islands)

    one = tree() if candidates is None else candidates
    found = smallest_islands(one, counted, budget=budget, suspects=suspects)
    assert len(asked) == len(set(asked)) <= budget, "a set was measured twice"
    assert [frozenset(trial.islands) for trial in found.trials] == asked
    if found.islands is not None:
        islands = frozenset(found.islands)
        assert measure(islands) <= 1
        if found.minimal:
            for name in islands:
                assert measure(islands - {name}) > 1, f"{name} is not needed"
    return found


def test_nothing_is_needed() -> None:
    found = search(harmful({"a.0.0": 0.4, "b.1.1": 0.4}))
    assert (found.islands, found.minimal, len(found.trials)) == ((), True, 1)


def test_nothing_helps() -> None:
    found = search(lambda islands: 7.0 - len(islands))
    assert found.islands is None
    assert (len(found.best.islands), found.best.excess) == (4, 3.0)


def test_nothing_helps_and_all_is_infinite() -> None:
    found = search(lambda islands: math.inf)
    assert (found.islands, len(found.trials)) == (None, 2)


@pytest.mark.parametrize("harm", [3.0, math.inf])
@pytest.mark.parametrize("culprit", LEAVES)
def test_a_single_layer_is_found(culprit: str, harm: float) -> None:
    found = search(harmful(dict.fromkeys(LEAVES[::5], 0.01) | {culprit: harm}))
    assert found.islands == (culprit,)
    assert len(found.trials) <= 18


def test_a_suspect_that_is_guilty_is_found_at_once() -> None:
    found = search(harmful({"c.1.2": math.inf}), suspects=["c.1.2"])
    assert found.islands == ("c.1.2",)
    assert len(found.trials) == 3


def test_a_suspect_that_is_innocent_does_no_harm() -> None:
    found = search(harmful({"c.1.2": math.inf}), suspects=["a.0.1", "no such module"])
    assert found.islands == ("c.1.2",)


def test_a_suspect_whose_surroundings_are_guilty() -> None:
    """A layer that overflows does so at its border, too: its block is the island."""
    found = search(
        lambda islands: 0.5 if covered("b.2", islands) else math.inf,
        suspects=["b.2.0"],
    )
    assert found.islands == ("b.2",)
    assert len(found.trials) <= 8


def test_several_suspects_of_one_block_become_one() -> None:
    found = search(
        lambda islands: 0.5 if covered("b.2", islands) else math.inf,
        suspects=["b.2.0", "b.2.1", "b.2"],
    )
    assert found.islands == ("b.2",)


@pytest.mark.parametrize(
    ("one", "other"), [("a.0.0", "d.2.2"), ("b.1.0", "b.1.2"), ("c.0.1", "c.2.1")]
)
@pytest.mark.parametrize("harm", [2.0, math.inf])
def test_two_culprits_that_must_both_be_in(one: str, other: str, harm: float) -> None:
    found = search(harmful({one: harm, other: harm}))
    assert found.islands == tuple(sorted([one, other]))


@pytest.mark.parametrize(("one", "other"), [("a.0.0", "d.2.2"), ("b.1.0", "b.1.2")])
def test_two_that_only_harm_together(one: str, other: str) -> None:
    """Either one in float32 is enough, and alone neither shows."""

    def measure(islands: Islands) -> float:
        alone = covered(one, islands) or covered(other, islands)
        return 0.5 if alone else 7.0

    found = search(measure)
    assert found.islands in ((one,), (other,))


def test_a_whole_whose_parts_are_not_enough_stays_whole() -> None:
    """What goes from part to part is rounded, and that may be the harm."""
    found = search(lambda islands: 0.0 if islands & {"b", "b.1"} else math.inf)
    assert found.islands == ("b.1",)
    found = search(lambda islands: 0.0 if "b" in islands else math.inf)
    assert found.islands == ("b",)


def test_many_small_errors_take_the_largest_ones_first() -> None:
    harm = dict.fromkeys(LEAVES, 0.01) | {"a.1.1": 0.5, "d.0.2": 0.4}
    found = search(harmful(harm))
    assert found.islands == ("a.1.1",)


def test_a_split_that_saves_next_to_nothing_is_not_made() -> None:
    """One name is better than three that cost the same."""
    found = search(harmful(dict.fromkeys(("b.1.0", "b.1.1", "b.1.2"), 2.0)))
    assert found.islands == ("b.1",)


def test_errors_that_do_not_grow_with_what_is_in_half() -> None:
    """Islands can do harm, too; the result passes and is minimal all the same."""

    def measure(islands: Islands) -> float:
        errors = harmful({"a.0.0": 2.0, "c.1.0": 2.0})(islands)
        return errors + (1.5 if covered("b", islands) and len(islands) < 4 else 0.0)

    assert search(measure).islands == ("a.0.0", "c.1.0")


def test_the_budget_ends_the_search_with_a_set_that_passes() -> None:
    measure = harmful({"a.0.0": 2.0, "d.2.2": 2.0})
    full = search(measure)
    for budget in range(2, len(full.trials)):
        found = search(measure, budget=budget)
        assert found.islands is not None
        assert not found.minimal
        assert len(found.trials) == budget
    assert search(measure, budget=len(full.trials)).minimal


def test_without_candidates_there_is_nothing_to_find() -> None:
    assert search(lambda islands: 2.0, candidates=()).islands is None


@given(
    st.dictionaries(st.sampled_from(LEAVES), st.floats(0, 3), max_size=8),
    st.sets(st.sampled_from(LEAVES), max_size=3),
)
def test_any_harm_ends_in_a_minimal_set_that_passes(
    harm: dict[str, float], suspects: set[str]
) -> None:
    found = search(harmful(harm), suspects=suspects)
    assert found.islands is not None
    assert found.minimal


@given(st.integers(0, 2**32), st.integers(2, 6))
def test_any_function_at_all_ends_in_a_minimal_set_that_passes(
    seed: int, blocks: int
) -> None:
    """Even where more islands may be worse: only the two ends are fixed."""
    whole = frozenset(one.name for one in tree(blocks))

    def measure(islands: Islands) -> float:
        if not islands or islands == whole:
            return 9.0 if not islands else 0.0
        return hash((seed, *sorted(map(hash_of, islands)))) % 1000 / 500

    found = search(measure, budget=5000, candidates=tree(blocks))
    assert found.islands is not None
    assert found.minimal


def hash_of(name: str) -> int:
    """The same in every process, unlike ``hash``."""
    return int.from_bytes(name.encode(), "big") % (2**31 - 1)


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, id3pm_deploy.bisect.search;"
        "print(*{'torch', 'numpy', 'diffusers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
