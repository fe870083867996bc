"""Writing a report: the same findings in four files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, OutputError
from ..files import json_text, make_folder, output_error, remove, write_together
from ..images import encode_png
from .findings import ParityReport
from .markdown import parity_markdown
from .page import parity_page
from .pictures import PicturePairs, comparison_sheet, sheet_mark, shown_pictures

JSON_NAME = "parity.json"
MARKDOWN_NAME = "parity.md"
SHEET_NAME = "parity.png"
PAGE_NAME = "index.html"
_OURS = re.compile(r"(parity\.md|parity\.png|index\.html)|\.(parity|index)\..+\.tmp")


@dataclass(frozen=True)
class ReportPaths:
    """Where :func:`save_report` put things; ``sheet`` is None without pictures."""

    json: Path
    markdown: Path
    sheet: Path | None
    page: Path


def check_report_folder(out: Path) -> None:
    """Refuse a folder that holds something else than an earlier report.

    Raises:
        InputError: It is a file, or holds no parity.json and more than the parts of a
            report whose writing was interrupted.
    """
    if not out.exists() or (out / JSON_NAME).is_file():
        return
    if not out.is_dir() or not all(map(_OURS.fullmatch, os.listdir(out))):
        raise InputError(
            f"{out} holds something else than an earlier report",
            fix="choose another --out",
        )


def save_report(
    folder: Path, report: ParityReport, pictures: Sequence[PicturePairs]
) -> ReportPaths:
    """Write the report; nothing is replaced before all is on disk, the JSON last.

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
    page = parity_page(report, [shown_pictures(one) for one in pictures])
    text = parity_markdown(report, SHEET_NAME if sheet else "")
    new = not folder.exists()
    make_folder(folder)
    paths = ReportPaths(
        json=folder / JSON_NAME,
        markdown=folder / MARKDOWN_NAME,
        sheet=folder / SHEET_NAME if sheet else None,
        page=folder / PAGE_NAME,
    )
    files = {
        paths.json: json_text(report.to_json()).encode(),
        paths.markdown: text.encode(),
        paths.page: page.encode(),
    }
    if paths.sheet is not None:
        files[paths.sheet] = sheet
    else:
        _remove(folder / SHEET_NAME)
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
