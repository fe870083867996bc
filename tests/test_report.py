"""Parity reports: judged as their tolerances say, whole, and readable alone."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from id3pm_deploy.compare import Comparison, compare
from id3pm_deploy.errors import InputError, OutputError
from id3pm_deploy.images import PictureMark, Pixels, read_mark
from id3pm_deploy.report import (
    IdentitySimilarity,
    ParityReport,
    ReportPaths,
    StepComparison,
    Tolerances,
    difference_pixels,
    save_report,
)

TOLERANCES = Tolerances(step=1e-5, trajectory=1e-4)
STEPS = 7


def comparison(error: float, seed: int = 0) -> Comparison:
    """A comparison whose ``max_rel`` is about ``error``; NaN for a broken one."""
    rng = np.random.default_rng(seed)
    expected = rng.uniform(-1, 1, 64)
    expected[0] = 1.0
    actual = expected.copy()
    actual[5] += error
    return compare(actual, expected)


def report(
    *,
    state: float = 1e-6,
    single: float | None = 1e-7,
    x0: float = 1e-6,
    final: float = 1e-6,
    unsaturated: float | None = 1e-6,
    bad_row: int = 3,
    **changes: Any,
) -> ParityReport:
    """A report with good rows, and one with the errors asked for."""
    good = 1e-8
    rows = [
        StepComparison(
            table_row=row,
            timestep=995.0 - 100 * row,
            state=comparison(state if row == bad_row else good, row),
            x0=comparison(x0 if row == bad_row else good, row),
            single=(
                None
                if single is None
                else comparison(single if row == bad_row else good, row)
            ),
        )
        for row in range(STEPS)
    ]
    options: dict[str, Any] = {
        "title": "ONNX Runtime against PyTorch",
        "subject": {"reference": "torch", "engine": "onnxruntime", "seed": "7"},
        "per_step": rows,
        "final": comparison(final),
        "final_unsaturated": None if unsaturated is None else comparison(unsaturated),
        "uint8_max": 1,
        "tolerances": TOLERANCES,
    }
    return ParityReport.build(**(options | changes))


def mark(sample: int) -> PictureMark:
    return PictureMark("0.1.0", 7, sample, "ddim", 25, 2.0, "onnxruntime", "fp32")


def pixels(count: int, seed: int = 0) -> Pixels:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)


def save(folder: Path, found: ParityReport, count: int = 3) -> ReportPaths:
    reference = pixels(count)
    engine = reference.copy()
    engine[0, 0, 0] += 1
    return save_report(folder, found, reference, engine, [*map(mark, range(count))])


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_within_the_tolerances_it_passes() -> None:
    found = report()
    assert found.passed
    assert found.failures == ()


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ({"final": 2e-4}, "final pictures: error 2.00e-04"),
        ({"unsaturated": 2e-4}, "unsaturated pixels: error 2.00e-04"),
        ({"state": 2e-4}, "table row 3 (t = 695), state: error 2.00e-04"),
        ({"single": 2e-5}, "table row 3 (t = 695), one step: error 2.00e-05"),
        ({"x0": math.nan}, "table row 3 (t = 695), x0: 1 values of the engine"),
        ({"state": math.nan}, "state: 1 values of the engine and 0 of the reference"),
        ({"final": math.inf}, "final pictures: 1 values of the engine"),
        ({"single": math.nan}, "one step: 1 values"),
    ],
)
def test_each_part_is_held_to_its_own_tolerance(
    errors: dict[str, Any], said: str
) -> None:
    found = report(**errors)
    assert not found.passed
    assert len(found.failures) == 1
    assert said in found.failures[0]


def test_a_step_above_the_step_tolerance_is_fine_along_a_trajectory() -> None:
    assert report(state=5e-5).passed
    assert report(x0=1e-2).passed


def test_an_oracle_of_zeros_fails_and_is_said_to() -> None:
    found = report(final_unsaturated=compare(np.ones(3), np.zeros(3)))
    assert "error not finite" in found.failures[0]


def test_senseless_input_is_refused() -> None:
    for step, trajectory in ((1e-5, math.nan), (-1.0, 1.0), (math.inf, 1.0)):
        with pytest.raises(InputError, match="tolerance"):
            Tolerances(step, trajectory)
    with pytest.raises(InputError, match="identity"):
        report(identity=IdentitySimilarity("SFace", (0.5,), ()))


def test_the_worst_step_is_one_that_is_not_finite_if_there_is_one() -> None:
    assert report(state=1e-5).worst_step == report(state=1e-5).per_step[3]
    worst = report(state=math.nan, bad_row=2).worst_step
    assert worst is not None
    assert worst.table_row == 2
    assert report(per_step=[]).worst_step is None


def test_the_json_has_these_keys(tmp_path: Path) -> None:
    figures = list(comparison(0).to_json())
    identity = IdentitySimilarity("SFace", (0.5, math.nan), (0.4, 0.3))
    bare = save(tmp_path / "a", report(unsaturated=None, single=None))
    full = save(tmp_path / "b", report(identity=identity, final=math.nan))
    a, b = (json.loads(paths.json.read_text()) for paths in (bare, full))
    assert list(a) == list(b)
    assert list(a) == [
        "format_version",
        "title",
        "passed",
        "failures",
        "tolerance_step",
        "tolerance_trajectory",
        "subject",
        "uint8_max",
        "worst_table_row",
        "worst_max_rel",
        *(f"final_{key}" for key in figures),
        *(f"final_unsaturated_{key}" for key in figures),
        *(f"oracle_{key}" for key in figures),
        "identity_name",
        "identity_reference",
        "identity_engine",
        "steps",
    ]
    assert [list(step) for step in a["steps"]] == [list(s) for s in b["steps"]]
    assert list(a["steps"][0]) == [
        "table_row",
        "timestep",
        *(f"state_{key}" for key in figures),
        *(f"x0_{key}" for key in figures),
        *(f"single_{key}" for key in figures),
    ]
    assert a["format_version"] == 1
    assert (a["passed"], b["passed"]) == (True, False)
    assert b["failures"] == list(report(final=math.nan).failures)
    assert a["final_unsaturated_max_rel"] is a["steps"][0]["single_max_rel"] is None
    assert a["final_max_rel"] == pytest.approx(1e-6)
    assert b["final_max_rel"] is None
    assert b["identity_reference"] == [0.5, None]
    assert len(a["steps"]) == STEPS
    assert a["steps"][6]["timestep"] == 395.0


def test_an_oracle_past_its_tolerance_fails_the_report() -> None:
    expected = np.linspace(-1, 1, 12)
    for error, passes in ((5e-5, True), (5e-4, False)):
        found = ParityReport.build(
            title="t",
            subject={},
            per_step=(),
            final=compare(expected, expected),
            final_unsaturated=None,
            uint8_max=0,
            tolerances=Tolerances(1e-5, 1e-4),
            oracle=compare(expected + error, expected),
            oracle_tolerance=1e-4,
        )
        assert found.passed is passes
        assert found.to_json()["oracle_max_rel"] == pytest.approx(error, rel=1e-6)
    assert "diffusers" in found.failures[0]


def test_differences_are_amplified_as_far_as_nothing_is_cut_off() -> None:
    a = np.full((1, 2, 2, 3), 100, np.uint8)
    for error, factor in ((0, 64), (1, 64), (3, 64), (4, 32), (100, 2), (155, 1)):
        b = a.copy()
        b[0, 0, 0, 0] += error
        for one, other in ((a, b), (b, a)):
            shown, found = difference_pixels(one, other)
            assert found == factor
            assert shown.max() == shown[0, 0, 0, 0] == error * factor


def test_the_sheet_is_marked_and_holds_three_rows(tmp_path: Path) -> None:
    paths = save(tmp_path / "new" / "folder", report())
    assert read_mark(paths.sheet) == replace(mark(0), sample=None)
    with Image.open(paths.sheet) as sheet:
        assert sheet.width > 3 * 128
        assert sheet.height > 3 * 128
    names = sorted(p.name for p in paths.page.parent.iterdir())
    assert names == ["index.html", "parity.json", "parity.png"]


def test_the_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    source = save(tmp_path, report()).page.read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "background"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:"), (tag, value)
        assert not [name for name in attributes if name.startswith("on")]
    bare = re.sub("base64,[A-Za-z0-9+/=]+", "", source)
    assert not re.search(r"https?:|url\(|@import|//", bare)
    policy = [a for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in str(policy[0]["content"])


def test_the_pictures_of_the_page_are_the_pictures_and_marked(tmp_path: Path) -> None:
    page = Page(save(tmp_path, report()).page.read_text(encoding="utf-8"))
    images = [a for tag, a in page.tags if tag == "img"]
    assert len(images) == 3 * 3
    files = [
        base64.b64decode(str(a["src"]).removeprefix("data:image/png;base64,"))
        for a in images
    ]
    for data, expected in zip(files, pixels(3), strict=False):
        with Image.open(BytesIO(data)) as image:
            assert (np.asarray(image) == expected).all()
    for index, (backend, sample) in {1: ("torch", 1), 5: ("onnxruntime", 2)}.items():
        (tmp_path / "one.png").write_bytes(files[index])
        expected_mark = replace(mark(sample), backend=backend)
        assert read_mark(tmp_path / "one.png") == expected_mark


def test_pass_and_fail_are_said_first_with_the_tolerance(tmp_path: Path) -> None:
    good = Page(save(tmp_path / "a", report()).page.read_text(encoding="utf-8")).text
    bad_report = report(final=3e-2, state=3e-2)
    bad = Page(save(tmp_path / "b", bad_report).page.read_text(encoding="utf-8")).text
    assert "FAIL" not in good
    assert good.index("PASS") < good.index("Pictures")
    assert "PASS" not in bad
    assert bad.index("FAIL") < bad.index("final pictures: error 3.00e-02")
    assert bad.index("final pictures: error 3.00e-02") < bad.index("Pictures")
    for text in (good, bad):
        assert "1e-04 along a trajectory" in text
        assert "1e-05 for one step" in text


def test_many_failures_are_counted_on_the_page(tmp_path: Path) -> None:
    tight = report(tolerances=Tolerances(0, 0))
    text = Page(save(tmp_path, tight).page.read_text(encoding="utf-8")).text
    assert f"and {len(tight.failures) - 8} more" in text


def test_the_plot_has_a_point_for_each_row_and_curve(tmp_path: Path) -> None:
    found = report(state=math.nan, x0=0.0)
    page = Page(save(tmp_path, found).page.read_text(encoding="utf-8"))
    circles = [a for tag, a in page.tags if tag == "circle"]
    for curve in ("state", "x0", "single"):
        mine = [a for a in circles if a["class"] == curve]
        assert len(mine) == STEPS
        xs = [float(str(a["cx"])) for a in mine]
        assert xs == sorted(set(xs))
    heights = {a["class"]: float(str(a["cy"])) for a in circles[3::STEPS]}
    assert heights["state"] < heights["single"] < heights["x0"]  # up is larger
    assert "not finite" in page.text
    assert "tolerance" in page.text
    assert "table row" in page.text
    assert "10⁻⁶" in page.text
    assert len([a for tag, a in page.tags if a.get("class") == "limit"]) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"per_step": []},
        {"single": None, "unsaturated": None},
        {"state": 0.0, "x0": 0.0, "final": 0.0, "tolerances": Tolerances(0.0, 1.0)},
        {"identity": IdentitySimilarity("SFace", (), ())},
        {"identity": IdentitySimilarity("SFace", (0.5, math.nan), (0.5, 0.4))},
        {"subject": {}},
    ],
)
def test_a_report_with_less_in_it_is_still_a_page(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    page = Page(save(tmp_path, report(**changes)).page.read_text(encoding="utf-8"))
    assert page.open == []
    assert "nan" not in page.text.lower()


def test_one_row_can_be_plotted(tmp_path: Path) -> None:
    one = report(per_step=report().per_step[:1])
    page = Page(save(tmp_path, one).page.read_text(encoding="utf-8"))
    assert len([1 for tag, _ in page.tags if tag == "circle"]) == 3


def test_what_comes_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>&amp;<img src=x>'
    found = report(
        title=evil,
        subject={evil: evil},
        identity=IdentitySimilarity(evil, (0.5,), (0.5,)),
    )
    page = Page(save(tmp_path, found).page.read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert len([1 for tag, _ in page.tags if tag == "img"]) == 9
    assert page.text.count("<script>alert(1)</script>&amp;") == 5


def test_the_identity_table_has_the_mean_and_each_picture(tmp_path: Path) -> None:
    identity = IdentitySimilarity("SFace", (0.5, 0.75), (0.5, 0.25))
    page = Page(save(tmp_path, report(identity=identity)).page.read_text("utf-8"))
    for number in ("0.6250", "0.3750", "0.7500", "0.2500", "-0.5000", "SFace"):
        assert number in page.text


def test_a_picture_without_a_face_is_said_to_have_none(tmp_path: Path) -> None:
    identity = IdentitySimilarity("SFace", (0.5, math.nan), (0.25, 0.125))
    page = Page(save(tmp_path, report(identity=identity)).page.read_text("utf-8"))
    for words in ("no face", "mean of 1", "-0.2500", "0.1250"):
        assert words in page.text


def test_only_the_first_of_many_pictures_are_shown(tmp_path: Path) -> None:
    paths = save(tmp_path, report(), count=30)
    page = Page(paths.page.read_text(encoding="utf-8"))
    assert len([1 for tag, _ in page.tags if tag == "img"]) == 3 * 12
    assert "The first 12 of 30." in page.text


def test_pictures_and_marks_have_to_fit(tmp_path: Path) -> None:
    a, marks = pixels(2), [mark(0), mark(1)]
    cases: list[tuple[Any, Any, list[PictureMark]]] = [
        (a, a[:1], marks),
        (a, a, marks[:1]),
        (a[:0], a[:0], []),
        (a.astype(np.float32), a, marks),
        (a[..., :1], a[..., :1], marks),
    ]
    for reference, engine, given in cases:
        with pytest.raises(InputError):
            save_report(tmp_path / "r", report(), reference, engine, given)
    assert not (tmp_path / "r").exists()


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save(tmp_path / "file" / "report", report())


def test_the_json_comes_last_and_a_failure_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = save(tmp_path, report())
    before = paths.json.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OutputError("cannot write")

    monkeypatch.setattr("id3pm_deploy.report.write_text", full)
    with pytest.raises(OutputError):
        save(tmp_path, report(final=1.0))
    assert paths.json.read_bytes() == before
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["index.html", "parity.json", "parity.png"]


def test_no_file_of_a_report_names_where_it_lies(tmp_path: Path) -> None:
    paths = save(tmp_path, report())
    for path in (paths.json, paths.page, paths.sheet):
        assert str(tmp_path).encode() not in path.read_bytes()
