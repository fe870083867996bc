"""A parity report: what was compared, by how much it differs, and whether that passes.

Four files hold the same findings: ``parity.json`` for scripts, ``parity.md`` for a
change's description, ``parity.png`` to look at, ``index.html`` to read. The page stands
alone and loads nothing; every picture is marked as generated.
"""

from .findings import (
    FORMAT,
    FORMAT_VERSION,
    PARTS,
    Check,
    IdentityDrop,
    IdentitySimilarity,
    ParityReport,
    StepComparison,
    Trajectory,
    summary,
)
from .markdown import parity_markdown
from .page import parity_page
from .pictures import PicturePairs, difference_pixels, shown_pictures
from .save import ReportPaths, check_report_folder, save_report

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "PARTS",
    "Check",
    "IdentityDrop",
    "IdentitySimilarity",
    "ParityReport",
    "PicturePairs",
    "ReportPaths",
    "StepComparison",
    "Trajectory",
    "check_report_folder",
    "difference_pixels",
    "parity_markdown",
    "parity_page",
    "save_report",
    "shown_pictures",
    "summary",
]
