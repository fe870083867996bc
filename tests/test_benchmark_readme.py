"""README's latency table is what the results say, of columns that the product has."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from id3pm_deploy.errors import InputError

_FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(_FOLDER))
latency_table: Any = importlib.import_module("latency_table")
readme_table: Any = importlib.import_module("readme_table")

GOLDEN = Path(__file__).parent / "golden" / "benchmark-1.json"


def _result(folder: Path, **settings: Any) -> Path:
    """The golden benchmark as a result of 20 rounds, in ``folder``."""
    found = json.loads(GOLDEN.read_text("utf-8"))
    found["settings"] |= {"rounds": 20, **settings}
    folder.mkdir(exist_ok=True)
    path = folder / "latency-golden.json"
    path.write_text(json.dumps(found))
    return path


def _readme(folder: Path) -> Path:
    path = folder / "README.md"
    begin, end = readme_table.BEGIN, readme_table.END
    path.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    return path


def _run(mode: str, readme: Path, results: Path) -> int:
    words = [mode, "--readme", str(readme), "--results", str(results)]
    code: int = CliRunner().invoke(readme_table.main, words).exit_code
    return code


def test_the_projects_readme_agrees_with_its_results() -> None:
    done = CliRunner().invoke(readme_table.main, ["--check"])
    assert done.exit_code == 0, done.output or done.exception


def test_the_table_is_written_and_then_agrees(tmp_path: Path) -> None:
    readme, results = _readme(tmp_path), tmp_path / "results"
    path = _result(results)
    assert _run("--check", readme, results) == 1
    assert _run("--write", readme, results) == 0
    assert _run("--check", readme, results) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "engine, ONNX Runtime on the CPU | 51.5" in text
    assert "no NVIDIA driver" in text
    found = json.loads(path.read_text())
    found["columns"]["onnxruntime"]["batches"]["1"]["row_ms"]["p50"]["value"] = 40.0
    path.write_text(json.dumps(found))
    assert _run("--check", readme, results) == 1


def test_without_results_it_says_so(tmp_path: Path) -> None:
    readme = _readme(tmp_path)
    assert _run("--write", readme, tmp_path / "none") == 0
    assert "No latency has been measured" in readme.read_text()


def test_a_result_of_columns_that_are_gone_is_refused(tmp_path: Path) -> None:
    path = _result(tmp_path / "results")
    for change in ("name", "title"):
        found = json.loads(GOLDEN.read_text("utf-8"))
        found["settings"]["rounds"] = 20
        if change == "name":
            found["columns"]["gone"] = found["columns"].pop("onnxruntime")
        else:
            found["columns"]["onnxruntime"]["title"] = "another thing"
        path.write_text(json.dumps(found))
        with pytest.raises(InputError, match="does not have"):
            readme_table.loaded(path.parent)


def test_a_dry_run_is_refused(tmp_path: Path) -> None:
    path = _result(tmp_path / "results", rounds=4)
    with pytest.raises(InputError, match="dry run"):
        readme_table.loaded(path.parent)


def test_a_readme_without_the_comments_is_refused(tmp_path: Path) -> None:
    for text in ("", readme_table.BEGIN, readme_table.END + readme_table.BEGIN):
        with pytest.raises(InputError, match="two comments"):
            readme_table.replaced(text, "new")


@pytest.mark.parametrize(
    ("rounds", "others", "kept"),
    [(19, 0.0, False), (20, 0.5, False), (20, 0.01, True), (20, None, True)],
)
def test_only_what_is_worth_it_is_kept(
    rounds: int, others: float | None, kept: bool, tmp_path: Path
) -> None:
    found = json.loads(GOLDEN.read_text("utf-8"))
    found["settings"]["rounds"] = rounds
    found["load"]["others"] = others
    out, results = tmp_path / "out", tmp_path / "results"
    out.mkdir()
    (out / "benchmark.json").write_text(json.dumps(found))
    said = latency_table.keep(out, "here", results)
    path = results / "latency-here.json"
    assert path.is_file() == kept == ("not kept" not in said)
    if kept:
        assert "commit" in json.loads(path.read_text())
