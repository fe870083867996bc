"""Writing a report: the same findings in four files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, OutputError
from ..files import json_text, make_folder, output_error, remove, write_together
from ..images import encode_png
from .findings import ParityReport
from .markdown import parity_markdown
from .page import parity_page
from .pictures import PicturePairs, comparison_sheet, sheet_mark, shown_pictures

PARITY = "parity"
PAGE_NAME = "index.html"


@dataclass(frozen=True)
class ReportPaths:
    """Where a report was put; ``sheet`` is None without pictures."""

    json: Path
    markdown: Path
    sheet: Path | None
    page: Path


@dataclass(frozen=True)
class ReportFiles:
    """What a report is written as.

    Attributes:
        kind: What its files are called, but for the page's.
        record: For scripts.
        markdown: As text.
        page: HTML, as text.
        sheet: PNG, marked; empty without pictures.
    """

    kind: str
    record: Mapping[str, Any]
    markdown: str
    page: str
    sheet: bytes = b""


def sheet_name(kind: str) -> str:
    """The sheet of such a report, which lies beside its Markdown."""
    return f"{kind}.png"


def check_report_folder(out: Path, kind: str = PARITY) -> None:
    """Refuse a folder that holds something else than an earlier report.

    Raises:
        InputError: It is a file, or holds no JSON of this kind of report and more than
            the parts of one whose writing was interrupted.
    """
    if not out.exists() or (out / f"{kind}.json").is_file():
        return
    ours = re.compile(
        rf"({kind}\.md|{kind}\.png|index\.html)|\.({kind}|index)\..+\.tmp"
    )
    if not out.is_dir() or not all(map(ours.fullmatch, os.listdir(out))):
        raise InputError(
            f"{out} holds something else than an earlier report",
            fix="choose another --out",
        )


def save_report(
    folder: Path, report: ParityReport, pictures: Sequence[PicturePairs]
) -> ReportPaths:
    """Write a parity report.

    Args:
        folder: Made if it is not there.
        report: What to write.
        pictures: Those of each trajectory.

    Raises:
        InputError: There are more or fewer pictures than trajectories.
        OutputError: Something cannot be written.
    """
    names = [one.name for one in report.trajectories]
    if len(pictures) != len(names):
        raise InputError(
            f"{len(names)} trajectories need as many sets of pictures",
            why=f"there are {len(pictures)}",
        )
    sheet = b""
    if pictures:
        title = f"{'PASS' if report.passed else 'FAIL'}: {report.title}"
        drawn = comparison_sheet(pictures, names, f"{title} (generated pictures)")
        sheet = encode_png(drawn, sheet_mark(pictures))
    return write_report(
        folder,
        ReportFiles(
            PARITY,
            report.to_json(),
            parity_markdown(report, sheet_name(PARITY) if sheet else ""),
            parity_page(report, [shown_pictures(one) for one in pictures]),
            sheet,
        ),
    )


def write_report(folder: Path, report: ReportFiles) -> ReportPaths:
    """Write a report; nothing is replaced before all is on disk, the JSON last.

    Args:
        folder: Made if it is not there.
        report: What to write.

    Raises:
        OutputError: Something cannot be written.
    """
    new = not folder.exists()
    make_folder(folder)
    sheet = folder / sheet_name(report.kind)
    paths = ReportPaths(
        json=folder / f"{report.kind}.json",
        markdown=folder / f"{report.kind}.md",
        sheet=sheet if report.sheet else None,
        page=folder / PAGE_NAME,
    )
    files = {
        paths.json: json_text(dict(report.record)).encode(),
        paths.markdown: report.markdown.encode(),
        paths.page: report.page.encode(),
    }
    if paths.sheet is not None:
        files[paths.sheet] = report.sheet
    else:
        _remove(sheet)
    try:
        write_together(files)
    except OutputError:
        if new:
            remove(folder)
        raise
    return paths


def _remove(path: Path) -> None:
    """Take away what an earlier report left and this one does not replace."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise output_error(path, error) from error
