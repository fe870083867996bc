"""The parity report as Markdown, for a change's description or a wiki."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import words
from .findings import ParityReport, Trajectory, summary

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>#|&~"})


def parity_markdown(report: ParityReport, sheet: str) -> str:
    """The whole file, as text.

    Args:
        report: What it says.
        sheet: Name of the picture that lies beside it; empty for none.
    """
    several = len(report.trajectories) > 1
    checks = summary(report)
    parts = [
        f"# {words.word(report)}: {_escaped(report.title)}",
        _escaped(words.verdict_sentence(report)),
        "\n".join(f"- {_escaped(failure)}" for failure in report.failures),
        "## Verdicts",
        _table(words.VERDICT_HEAD, words.verdict_rows(checks)),
        _escaped(words.METHOD),
        "## Distribution of the errors",
        _table(words.DISTRIBUTION_HEAD, words.distribution_rows(checks)),
        _escaped(words.DISTRIBUTION),
    ]
    if sheet:
        parts += ["## Pictures", f"![Generated pictures]({sheet})"]
    for one in report.trajectories:
        parts += _trajectory(one, several)
    if report.not_checked:
        parts.append("## Not compared")
        parts.append("\n".join(f"- {_escaped(item)}" for item in report.not_checked))
    parts += ["## What ran where", _table(("", ""), report.subject.items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def _trajectory(one: Trajectory, several: bool) -> Iterable[str]:
    after = f": {_escaped(one.name)}" if several else ""
    yield f"{_escaped(one.name)}: {_escaped(words.grey_levels(one))}"
    if one.identity and one.identity.reference:
        yield f"## Identity{after}"
        yield _table(words.IDENTITY_HEAD, words.identity_rows(one.identity))
        yield _escaped(words.identity_note(one.identity))
    if one.per_step:
        yield f"## Table rows{after}"
        if one.steps_against != "reference":
            yield f"Compared with {_escaped(one.steps_against)}."
        yield _table(*words.step_table(one))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_line(head), "|" + "---|" * len(head), *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    """``text`` on one line, with nothing in it that Markdown or HTML would act on."""
    return " ".join(text.split()).translate(_SPECIAL)
