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
    checks, drop = summary(report), report.identity_drop
    parts = [
        f"# {words.word(report)}: {escaped(report.title)}",
        escaped(words.verdict_sentence(report)),
        "\n".join(f"- {escaped(failure)}" for failure in report.failures),
        "## Verdicts",
        markdown_table(words.VERDICT_HEAD, words.verdict_rows(report)),
        escaped(words.METHOD),
        escaped(words.identity_drop_note(drop)) if drop else "",
        "## Distribution of the errors",
        markdown_table(words.DISTRIBUTION_HEAD, words.distribution_rows(checks)),
        escaped(words.DISTRIBUTION),
    ]
    if sheet:
        parts += ["## Pictures", f"![Generated pictures]({sheet})"]
    for one in report.trajectories:
        parts += _trajectory(one, several)
    if report.not_checked:
        parts.append("## Not compared")
        parts.append("\n".join(f"- {escaped(item)}" for item in report.not_checked))
    parts += ["## What ran where", markdown_table(("", ""), report.subject.items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def _trajectory(one: Trajectory, several: bool) -> Iterable[str]:
    after = f": {escaped(one.name)}" if several else ""
    yield f"{escaped(one.name)}: {escaped(words.grey_levels(one))}"
    if one.identity and one.identity.reference:
        yield f"## Identity{after}"
        yield markdown_table(words.IDENTITY_HEAD, words.identity_rows(one.identity))
        yield escaped(words.identity_note(one.identity))
    if one.per_step:
        yield f"## Table rows{after}"
        if one.steps_against != "reference":
            yield f"Compared with {escaped(one.steps_against)}."
        yield markdown_table(*words.step_table(one))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are plain text."""
    lines = [_line(head), "|" + "---|" * len(head), *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def escaped(text: str) -> str:
    """``text`` on one line, with nothing in it that Markdown or HTML would act on."""
    return " ".join(text.split()).translate(_SPECIAL)
