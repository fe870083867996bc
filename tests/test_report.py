"""Parity reports: judged as their tolerances say, whole, and readable alone."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import files_in
from PIL import Image

from id3pm_deploy.compare import Comparison, compare
from id3pm_deploy.errors import InputError, OutputError
from id3pm_deploy.images import PictureMark, Pixels, read_mark
from id3pm_deploy.report import (
    PARTS,
    IdentitySimilarity,
    ParityReport,
    PicturePairs,
    ReportPaths,
    StepComparison,
    Trajectory,
    check_report_folder,
    difference_pixels,
    save_report,
    summary,
)
from id3pm_deploy.tolerances import Tolerances

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


def rows(**errors: Any) -> list[StepComparison]:
    """Good table rows, and number 3 with the errors asked for; None leaves it out."""
    bad = {"state": 1e-6, "single": 1e-7, "x0": 1e-6, "oracle": None} | errors
    made = []
    for row in range(STEPS):
        error = {k: v if row == errors.get("at", 3) else 1e-8 for k, v in bad.items()}
        parts = {
            name: None if bad[name] is None else comparison(error[name], row)
            for name in ("state", "single", "x0", "oracle")
        }
        made.append(StepComparison(row, 995.0 - 100 * row, **parts))
    return made


def trajectory(name: str = "ddim, 7 steps", **changes: Any) -> Trajectory:
    """A good trajectory, but for what is asked for."""
    kept = {
        k: changes.pop(k)
        for k in ("state", "single", "x0", "oracle", "at")
        if k in changes
    }
    final = changes.pop("final", 1e-6)
    unsaturated = changes.pop("unsaturated", 1e-6)
    options: dict[str, Any] = {
        "final": comparison(final),
        "final_unsaturated": None if unsaturated is None else comparison(unsaturated),
        "uint8_max": 1,
        "per_step": tuple(rows(**kept)),
    }
    return Trajectory(name, **(options | changes))


def report(**changes: Any) -> ParityReport:
    """A report on one trajectory; what it does not know goes to :func:`trajectory`."""
    names = {item.name for item in fields(ParityReport)}
    own = {key: changes.pop(key) for key in list(changes) if key in names}
    options: dict[str, Any] = {
        "title": "ONNX Runtime against PyTorch",
        "subject": {"Reference": "torch", "Engine": "onnxruntime", "Noise": "seed 7"},
        "tolerances": TOLERANCES,
        "engine_name": "ONNX Runtime (float32)",
        "reference_name": "PyTorch (float32)",
    }
    if "trajectories" not in own:
        options["trajectories"] = (trajectory(**changes),)
    return ParityReport(**(options | own))


def mark(sample: int) -> PictureMark:
    return PictureMark("0.1.0", 7, sample, "ddim", 25, 2.0, "onnxruntime", "fp32")


def pixels(count: int, seed: int = 0) -> Pixels:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)


def pairs(count: int = 3, seed: int = 0) -> PicturePairs:
    reference = pixels(count, seed)
    engine = reference.copy()
    engine[0, 0, 0] += 1
    ours = [*map(mark, range(count))]
    theirs = [replace(one, backend="torch") for one in ours]
    error = np.abs(engine.astype(np.float32) - reference)
    return PicturePairs(reference, engine, error, theirs, ours)


def save(folder: Path, found: ParityReport, count: int = 3) -> ReportPaths:
    return save_report(folder, found, [pairs(count) for _ in found.trajectories])


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
        if tag not in ("meta", "link", "img", "br"):
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
    assert all(check.passed for check in found.checks)


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ({"final": 2e-4}, "final pictures: error 2.00e-04"),
        ({"unsaturated": 2e-4}, "unsaturated pixels: error 2.00e-04"),
        ({"state": 2e-4}, "table row 3 (t = 695), state: error 2.00e-04"),
        ({"single": 2e-5}, "table row 3 (t = 695), one step: error 2.00e-05"),
        ({"oracle": 2e-4}, "reference against diffusers' scheduler: error 2.00e-04"),
        ({"x0": math.nan}, "table row 3 (t = 695), x0: 1 values of the engine"),
        ({"state": math.nan}, "state: 1 values of the engine and 0 of the reference"),
        ({"final": math.inf}, "final pictures: 1 values of the engine"),
        ({"single": math.nan}, "one step: 1 values"),
        ({"failed_engine": 2}, "network of the engine made NaN or infinity in 2"),
        ({"failed_reference": 1}, "network of the reference made NaN or infinity in 1"),
    ],
)
def test_each_part_is_held_to_its_own_tolerance(
    errors: dict[str, Any], said: str
) -> None:
    found = report(**errors)
    assert not found.passed
    assert len(found.failures) == 1
    assert said in found.failures[0]


def test_a_forward_pass_is_held_to_the_step_tolerance() -> None:
    for error, passes in ((5e-6, True), (5e-5, False), (math.nan, False)):
        found = report(forward=(("forward passes", comparison(error)),))
        assert found.passed is passes
    assert "forward passes" in found.failures[0]


def test_a_step_above_the_step_tolerance_is_fine_along_a_trajectory() -> None:
    assert report(state=5e-5).passed
    assert report(x0=1e-2).passed
    assert report(oracle=5e-5).passed


def test_a_reference_of_zeros_fails_and_is_said_to() -> None:
    zeros = compare(np.ones(3), np.zeros(3))
    found = report(final_unsaturated=zeros)
    assert "error not finite" in found.failures[0]


def test_senseless_input_is_refused() -> None:
    for step, limit in ((1e-5, math.nan), (-1.0, 1.0), (math.inf, 1.0)):
        with pytest.raises(InputError, match="tolerance"):
            Tolerances(step, limit)
    with pytest.raises(InputError, match="identity"):
        IdentitySimilarity("SFace", (0.5,), ())
    with pytest.raises(InputError, match="compare something"):
        report(trajectories=())


def test_the_worst_step_is_one_that_is_not_finite_if_there_is_one() -> None:
    assert trajectory(state=1e-5).worst_step == trajectory(state=1e-5).per_step[3]
    worst = trajectory(state=math.nan, at=2).worst_step
    assert worst is not None
    assert worst.table_row == 2
    assert trajectory(per_step=()).worst_step is None
    assert trajectory(state=None).worst_step is None


def test_the_json_has_these_keys(tmp_path: Path) -> None:
    identity = IdentitySimilarity("SFace", (0.5, math.nan), (0.4, 0.3))
    bare = save(tmp_path / "a", report(unsaturated=None, single=None))
    full = save(tmp_path / "b", report(identity=identity, final=math.nan))
    a, b = (json.loads(paths.json.read_text()) for paths in (bare, full))
    assert list(a) == list(b)
    assert list(a) == [
        "format",
        "format_version",
        "title",
        "passed",
        "failures",
        "not_checked",
        "tolerance_step",
        "tolerance_trajectory",
        "tolerance_oracle",
        *(f"{part}_max_rel" for part in PARTS),
        "uint8_max",
        "failed_engine",
        "failed_reference",
        "identity_name",
        "identity_reference",
        "identity_engine",
        "identity_pairs",
        "identity_drop",
        "identity_drop_upper",
        "identity_drop_limit",
        "trajectories",
        "subject",
        "comparisons",
    ]
    assert (a["format"], a["format_version"]) == ("id3pm-parity", 3)
    assert (a["passed"], b["passed"]) == (True, False)
    assert b["failures"] == list(report(final=math.nan).failures)
    assert a["single_max_rel"] is a["unsaturated_max_rel"] is None
    assert a["final_max_rel"] == pytest.approx(1e-6)
    assert b["final_max_rel"] is None
    assert b["identity_reference"] == [0.5, None]


def test_the_json_has_every_comparison_with_its_verdict() -> None:
    found = report(single=2e-5).to_json()
    records = found["comparisons"]
    assert len(records) == 2 + 3 * STEPS
    for record in records:
        assert list(record) == [
            "trajectory",
            "part",
            "table_row",
            "timestep",
            "tolerance",
            "passed",
            *comparison(0).to_json(),
        ]
        assert record["trajectory"] == "ddim, 7 steps"
    bad = [record for record in records if not record["passed"]]
    assert [(r["part"], r["table_row"], r["timestep"]) for r in bad] == [
        ("single", 3, 695.0)
    ]
    assert bad[0]["tolerance"] == 1e-5
    limits = {record["part"]: record["tolerance"] for record in records}
    assert limits == {
        "final": 1e-4,
        "unsaturated": 1e-4,
        "single": 1e-5,
        "state": 1e-4,
        "x0": None,
    }


def test_several_trajectories_are_told_apart() -> None:
    two = (trajectory("a"), trajectory("b", state=2e-4))
    found = report(trajectories=two)
    assert found.failures[0].startswith("b: table row 3")
    assert {check.trajectory for check in found.checks} == {"a", "b"}
    assert found.to_json()["trajectories"] == ["a", "b"]
    worst = [c for c in summary(found) if c.part == "state"]
    assert [c.trajectory for c in worst] == ["a", "b"]


def test_differences_are_amplified_as_far_as_nothing_is_cut_off() -> None:
    cases = ((1, 128), (3, 64), (4, 32), (100, 2), (155, 1), (255, 1), (0.01, 16384))
    for error, factor in cases:
        field = np.zeros((1, 2, 2, 3), np.float32)
        field[0, 0, 0, 0] = error
        shown, found = difference_pixels(field)
        assert found == factor
        assert shown.max() == shown[0, 0, 0, 0] == round(error * factor)
        assert (shown > 0).sum() == 1
    nothing, _ = difference_pixels(np.zeros((1, 2, 2, 3), np.float32))
    assert not nothing.any()
    tiny, factor = difference_pixels(np.full((1, 1, 1, 3), 1e-30, np.float32))
    assert (factor, tiny.max()) == (1 << 24, 0)


def test_the_sheet_is_marked_and_holds_three_rows(tmp_path: Path) -> None:
    paths = save(tmp_path / "new" / "folder", report())
    assert paths.sheet is not None
    assert read_mark(paths.sheet) == replace(mark(0), sample=None)
    with Image.open(paths.sheet) as sheet:
        assert sheet.width > 3 * 128
        assert sheet.height > 3 * 128
    names = sorted(p.name for p in paths.page.parent.iterdir())
    assert names == ["index.html", "parity.json", "parity.md", "parity.png"]


def test_a_report_without_pictures_takes_an_old_sheet_away(tmp_path: Path) -> None:
    save(tmp_path, report())
    forward = (("forward passes", comparison(1e-6)),)
    paths = save(tmp_path, report(trajectories=(), forward=forward))
    assert paths.sheet is None
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["index.html", "parity.json", "parity.md"]
    assert "parity.png" not in paths.markdown.read_text()


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
    assert all(str(a["alt"]).startswith("generated") for a in images)
    files = [
        base64.b64decode(str(a["src"]).removeprefix("data:image/png;base64,"))
        for a in images
    ]
    for data, expected in zip(files, pixels(3), strict=False):
        with Image.open(BytesIO(data)) as image:
            assert (np.asarray(image) == expected).all()
    for index, data in enumerate(files):
        (tmp_path / "one.png").write_bytes(data)
        backend = "torch" if index < 3 else "onnxruntime"
        expected_mark = replace(mark(index % 3), backend=backend)
        assert read_mark(tmp_path / "one.png") == expected_mark


def test_pass_and_fail_are_said_first_with_the_tolerance(tmp_path: Path) -> None:
    bad_report = report(final=3e-2, state=3e-2)
    found = {}
    for name, one in (("good", report()), ("bad", bad_report)):
        paths = save(tmp_path / name, one)
        found[name] = Page(paths.page.read_text(encoding="utf-8")).text
        markdown = paths.markdown.read_text(encoding="utf-8")
        assert markdown.startswith("# PASS:" if name == "good" else "# FAIL:")
    good, bad = found["good"], found["bad"]
    assert "FAIL" not in good
    assert good.index("PASS") < good.index("Pictures")
    assert "agree in all 23 comparisons" in good
    assert "PASS" not in bad
    assert "do not agree" in bad
    assert bad.index("FAIL") < bad.index("final pictures: error 3.00e-02")
    assert bad.index("final pictures: error 3.00e-02") < bad.index("Pictures")
    for text in (good, bad):
        assert "1e-04" in text
        assert "1e-05" in text


def test_what_was_not_compared_is_said(tmp_path: Path) -> None:
    gap = "diffusers' scheduler: neither side is PyTorch"
    paths = save(tmp_path, report(not_checked=(gap,)))
    assert gap in Page(paths.page.read_text(encoding="utf-8")).text
    assert gap in paths.markdown.read_text(encoding="utf-8")
    assert json.loads(paths.json.read_text())["not_checked"] == [gap]


def test_many_failures_are_counted_on_the_page(tmp_path: Path) -> None:
    tight = report(tolerances=Tolerances(0, 0))
    text = Page(save(tmp_path, tight).page.read_text(encoding="utf-8")).text
    assert f"and {len(tight.failures) - 8} more" in text


def test_the_plot_has_a_point_for_each_row_and_curve(tmp_path: Path) -> None:
    found = report(state=math.nan, x0=0.0, oracle=1e-6)
    page = Page(save(tmp_path, found).page.read_text(encoding="utf-8"))
    circles = [a for tag, a in page.tags if tag == "circle"]
    for curve in ("state", "x0", "single", "oracle"):
        mine = [a for a in circles if a["class"] == curve]
        assert len(mine) == STEPS
        xs = [float(str(a["cx"])) for a in mine]
        assert xs == sorted(set(xs))
    heights = {str(a["class"]): float(str(a["cy"])) for a in circles[3::STEPS]}
    # Up is larger: infinity, 1e-6, 1e-7, nothing.
    assert sorted(heights, key=lambda name: heights[name]) == [
        "state",
        "oracle",
        "single",
        "x0",
    ]
    for words in ("not finite", "tolerance", "table row", "10⁻⁶", "diffusers"):
        assert words in page.text
    assert len([a for tag, a in page.tags if a.get("class") == "limit"]) == 2


def test_quantiles_cosine_and_psnr_are_on_the_page_and_in_the_markdown(
    tmp_path: Path,
) -> None:
    paths = save(tmp_path, report())
    page = Page(paths.page.read_text(encoding="utf-8")).text
    for text in (page, paths.markdown.read_text(encoding="utf-8")):
        for words in ("50 %", "90 %", "99 %", "99.9 %", "max", "cosine", "PSNR", "dB"):
            assert words in text


@pytest.mark.parametrize(
    "changes",
    [
        {"per_step": ()},
        {"single": None, "unsaturated": None},
        {"state": None, "x0": None, "single": None, "oracle": 1e-6},
        {"state": 0.0, "x0": 0.0, "final": 0.0, "tolerances": Tolerances(0.0, 1.0)},
        {"identity": IdentitySimilarity("SFace", (), ())},
        {"identity": IdentitySimilarity("SFace", (0.5, math.nan), (0.5, 0.4))},
        {"subject": {}},
        {"trajectories": (), "forward": (("forward", comparison(1e-6)),)},
        {"trajectories": (trajectory("a"), trajectory("b", per_step=()))},
    ],
)
def test_a_report_with_less_in_it_is_still_a_page(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    paths = save(tmp_path, report(**changes))
    page = Page(paths.page.read_text(encoding="utf-8"))
    assert page.open == []
    assert "nan" not in page.text.lower()
    assert "nan" not in paths.markdown.read_text(encoding="utf-8").lower()


def test_one_row_can_be_plotted(tmp_path: Path) -> None:
    one = report(per_step=trajectory().per_step[:1])
    page = Page(save(tmp_path, one).page.read_text(encoding="utf-8"))
    assert len([1 for tag, _ in page.tags if tag == "circle"]) == 3


def test_what_comes_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>&amp;<img src=x>'
    found = report(
        title=evil,
        name=evil,
        subject={evil: evil},
        not_checked=(evil,),
        engine_name=evil,
        identity=IdentitySimilarity(evil, (0.5,), (0.5,)),
    )
    paths = save(tmp_path, found)
    page = Page(paths.page.read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert len([1 for tag, _ in page.tags if tag == "img"]) == 9
    assert page.text.count("<script>alert(1)</script>&amp;") == 8
    markdown = paths.markdown.read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)[<&]", markdown)


def test_markdown_tables_are_whole(tmp_path: Path) -> None:
    found = report(
        subject={"a|b": "c\nd"}, identity=IdentitySimilarity("S", (1,), (1,))
    )
    lines = save(tmp_path, found).markdown.read_text(encoding="utf-8").splitlines()
    width = 0
    for line in lines:
        cells = len(re.findall(r"(?<!\\)\|", line))
        if line.startswith("|"):
            assert width in (0, cells), line
            width = cells
        else:
            width = 0
    assert "| a\\|b | c d |" in lines


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
    error = np.zeros(a.shape, np.float32)
    cases: list[tuple[Any, Any, Any, list[PictureMark], list[PictureMark]]] = [
        (a, a[:1], error, marks, marks),
        (a, a, error, marks[:1], marks),
        (a, a, error, marks, marks[:1]),
        (a, a, error[:1], marks, marks),
        (a[:0], a[:0], error[:0], [], []),
        (a.astype(np.float32), a, error, marks, marks),
        (a[..., :1], a[..., :1], error[..., :1], marks, marks),
    ]
    PicturePairs(a, a, error, marks, marks)
    for case in cases:
        with pytest.raises(InputError):
            PicturePairs(*case)
    with pytest.raises(InputError, match="1 trajectories"):
        save_report(tmp_path / "r", report(), [])
    assert not (tmp_path / "r").exists()


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save(tmp_path / "file" / "report", report())


@pytest.mark.parametrize("at", range(4))
def test_a_failure_leaves_all_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    save(tmp_path, report())
    before = files_in(tmp_path)
    write, calls = Path.write_bytes, iter(range(4))

    def full(path: Path, data: bytes) -> int:
        if next(calls) == at:
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="free some space"):
        save(tmp_path, report(final=1.0))
    assert files_in(tmp_path) == before
    assert sorted(before) == ["index.html", "parity.json", "parity.md", "parity.png"]


def test_what_an_interrupted_report_left_is_no_obstacle(tmp_path: Path) -> None:
    save(tmp_path, report())
    (tmp_path / "parity.json").unlink()
    (tmp_path / ".parity.json.0123456789ab.tmp").touch()
    check_report_folder(tmp_path)
    save(tmp_path, report())
    assert len(files_in(tmp_path)) == 4
    (tmp_path / "parity.json").unlink()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match="something else"):
        check_report_folder(tmp_path)


def test_no_file_of_a_report_names_where_it_lies(tmp_path: Path) -> None:
    paths = save(tmp_path, report())
    assert paths.sheet is not None
    for path in (paths.json, paths.markdown, paths.page, paths.sheet):
        assert str(tmp_path).encode() not in path.read_bytes()
