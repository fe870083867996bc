"""Golden bytes: what BUNDLE_FORMAT.md says is what is read and written, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import (
    ATTRIBUTES,
    GOLDEN,
    SEED,
    SHA,
    chain_specs,
    edit_manifest,
    files_in,
    write_chain,
    write_golden,
)
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from id3pm_deploy.builders.build import build_engine
from id3pm_deploy.bundle import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    EngineEntry,
    FileEntry,
    GraphEntry,
    Manifest,
    SecondStage,
    open_bundle,
)
from id3pm_deploy.bundle import manifest as manifest_module
from id3pm_deploy.bundle.archive import pack_bundle, unpack_bundle
from id3pm_deploy.bundle.migrate import migrate_bundle
from id3pm_deploy.bundle.signing import (
    SIGNATURE,
    bundle_signature,
    signature_bytes,
)
from id3pm_deploy.bundle.writer import bundle_writer, locked
from id3pm_deploy.cli import main
from id3pm_deploy.errors import BundleError, EngineError, Id3pmError
from id3pm_deploy.inspection import self_tests
from id3pm_deploy.models import open_engine, open_model
from id3pm_deploy.selftest import load_golden, run_golden
from id3pm_deploy.solvers import RESCALE_COLUMN
from id3pm_deploy.spec import AttributeSpec, DiffusionSpec

V1, V2, V3, V4 = (GOLDEN / f"bundle-v{version}" for version in (1, 2, 3, 4))
V5 = GOLDEN / "bundle-v5.json"
TAR = GOLDEN / "bundle-v4.tar"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the golden bundle of format version 1; its graph runs."""
    return Path(shutil.copytree(V1, tmp_path / "old"))


def test_the_golden_bundle_is_written_to_the_byte(tmp_path: Path) -> None:
    bundle = write_golden(tmp_path / "b")
    key = Ed25519PrivateKey.from_private_bytes(SEED)
    (tmp_path / "b" / SIGNATURE_NAME).write_bytes(signature_bytes(bundle.data, key))
    assert files_in(tmp_path / "b") == files_in(V4)


def test_the_golden_bundle_is_read(tmp_path: Path) -> None:
    bundle = open_bundle(V4)
    bundle.verify()
    written = write_golden(tmp_path / "b").manifest
    assert dataclasses.asdict(bundle.manifest) == dataclasses.asdict(written)
    assert bundle.manifest.engines[1].profiles[0] == {
        "samples": [1, 4, 8],
        "rows": [1, 8, 16],
    }
    signature = bundle_signature(bundle)
    assert (signature.state, signature.trusted) == ("good", False)


def test_the_golden_tar_is_packed_and_unpacked(tmp_path: Path) -> None:
    size = pack_bundle(V4, tmp_path / "b.tar")
    assert (tmp_path / "b.tar").read_bytes() == TAR.read_bytes()
    assert size == TAR.stat().st_size
    unpack_bundle(TAR, tmp_path / "b").verify()
    assert files_in(tmp_path / "b") == files_in(V4)


def test_attributes_make_version_5_to_the_byte(tmp_path: Path) -> None:
    """The manifest of version 4 and the attributes; the files are the same."""
    bundle = write_golden(tmp_path / "b", ATTRIBUTES)
    written = files_in(tmp_path / "b")
    plain = {name: data for name, data in files_in(V4).items() if name in written}
    assert written == {**plain, MANIFEST_NAME: V5.read_bytes()}
    open_bundle(tmp_path / "b").verify()
    stages = open_bundle(tmp_path / "b").manifest.stages
    assert stages == bundle.manifest.stages
    found = {name: stage.diffusion.attributes for name, stage in stages.items()}
    assert found == {"base": ATTRIBUTES, "super_resolution": ATTRIBUTES[:1]}
    assert migrate_bundle(tmp_path / "b") == 5
    assert files_in(tmp_path / "b") == written
    values, older = (json.loads(one.read_bytes()) for one in (V5, V4 / MANIFEST_NAME))
    assert values.pop("format_version") == 5
    for part in (values, values["super_resolution"]):
        del part["diffusion"]["attributes"]
    del older["format_version"]
    assert values == older


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format_version=4), "not of format version 4"),
        (lambda v: v["diffusion"].pop("attributes"), "does not fit behind its base"),
        (lambda v: attributes(v)[0].update(low=1), "does not fit behind its base"),
        (lambda v: attributes(v)[0].update(low=200), "low before high"),
        (lambda v: attributes(v)[0].update(high=None), "low before high"),
        (lambda v: attributes(v)[0].update(low="0"), "low must be float"),
        (lambda v: attributes(v)[0].update(kind="text"), "must be one of"),
        (lambda v: attributes(v)[0].update(categories=["a", "b"]), "no categories"),
        (lambda v: attributes(v)[1].update(low=1), "has no range"),
        (lambda v: attributes(v)[1].update(categories=["a"]), "from 2 to 1000"),
        (lambda v: attributes(v)[1].update(categories=["a", "a"]), "there twice"),
        (lambda v: attributes(v)[1].update(categories=["a", 1]), "must be str"),
        (lambda v: attributes(v)[1].update(name="a=b"), "without '='"),
        (lambda v: attributes(v)[1].update(name="age"), "have the same name"),
        (lambda v: attributes(v)[1].update(unit="years"), "unknown keys: unit"),
    ],
)
def test_wrong_attributes_are_refused(
    tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    write_golden(tmp_path / "b", ATTRIBUTES)
    edit_manifest(tmp_path / "b", change)
    with pytest.raises(Id3pmError) as caught:
        open_bundle(tmp_path / "b")
    assert message in str(caught.value)


def attributes(values: Any) -> Any:
    """The base's attributes in a parsed manifest."""
    return values["diffusion"]["attributes"]


def test_golden_files_are_small() -> None:
    found = [path for path in GOLDEN.rglob("bundle-v*/*") if path.is_file()]
    sizes = [path.stat().st_size for path in (*found, *GOLDEN.glob("bundle-v*.*"))]
    assert sum(sizes) < 150_000


def test_version_1_says_how_to_migrate(old: Path) -> None:
    with pytest.raises(BundleError, match="format version 1; this release") as caught:
        open_bundle(old)
    assert caught.value.fix == f"id3pm-deploy bundle migrate {old}"
    result = CliRunner().invoke(main, ["bundle", "verify", str(old)])
    assert result.exit_code == 1
    assert "bundle migrate" in result.stderr


def test_version_1_is_migrated_to_the_byte_and_runs(old: Path) -> None:
    before = files_in(old)
    result = CliRunner().invoke(main, ["bundle", "migrate", str(old)])
    assert result.exit_code == 0, result.stderr
    assert "format version 1 is now 4" in result.stdout
    wanted = (GOLDEN / "bundle-v1-migrated.json").read_bytes()
    assert files_in(old) == {**before, MANIFEST_NAME: wanted}
    tested = self_tests(old)
    assert tested.not_run == {}
    assert tested.errors["cpu"] is not None
    assert tested.errors["cpu"] <= 1e-5
    stamp = (old / MANIFEST_NAME).stat().st_mtime_ns
    assert migrate_bundle(old) == 4
    assert (old / MANIFEST_NAME).stat().st_mtime_ns == stamp


def test_version_2_is_migrated_to_the_byte(tmp_path: Path) -> None:
    old = Path(shutil.copytree(V2, tmp_path / "old"))
    before = files_in(old)
    with pytest.raises(BundleError, match="format version 2; this release"):
        open_bundle(old)
    assert migrate_bundle(old) == 2
    wanted = (GOLDEN / "bundle-v2-migrated.json").read_bytes()
    del before[SIGNATURE_NAME]  # it was of the other manifest
    assert files_in(old) == {**before, MANIFEST_NAME: wanted}
    manifest = open_bundle(old).manifest
    assert list(manifest.stages) == ["base"]
    assert {graph.stage for graph in manifest.graphs} == {"base"}
    assert [graph.body for graph in manifest.graphs] == [{}, {}]
    assert manifest.diffusion.model.low_res_size is None


def test_version_3_is_migrated_to_the_byte(tmp_path: Path) -> None:
    old = Path(shutil.copytree(V3, tmp_path / "old"))
    before = files_in(old)
    with pytest.raises(BundleError, match="format version 3; this release"):
        open_bundle(old)
    assert migrate_bundle(old) == 3
    wanted = (GOLDEN / "bundle-v3-migrated.json").read_bytes()
    del before[SIGNATURE_NAME]  # it was of the other manifest
    assert files_in(old) == {**before, MANIFEST_NAME: wanted}
    manifest = open_bundle(old).manifest
    assert list(manifest.stages) == ["base", "super_resolution"]
    for engine in manifest.engines:
        assert (engine.hardware_compatibility, engine.plan_key) == ("none", "")
        assert (engine.version_compatible, engine.settings) == (False, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hardware_compatibility", "none"),
        ("version_compatible", False),
        ("plan_types", {}),
        ("peak_device_memory_bytes", None),
        ("settings", {}),
        ("plan_key", ""),
    ],
)
@pytest.mark.parametrize("golden", [V1, V2, V3])
def test_an_older_version_with_keys_of_version_4_is_not_migrated(
    tmp_path: Path, golden: Path, key: str, value: Any
) -> None:
    old = Path(shutil.copytree(golden, tmp_path / "old"))
    edit_manifest(old, lambda v: v["engines"][-1].update({key: value}))
    before = files_in(old)
    with pytest.raises(BundleError, match="is not of format version"):
        migrate_bundle(old)
    assert files_in(old) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["graphs"][0].update(stage="base"),
        lambda v: v["graphs"][0].update(body={}),
        lambda v: v["engines"][0].update(stage="base"),
        lambda v: v.update(super_resolution=None),
        lambda v: v["diffusion"]["model"].update(low_res_size=None),
        lambda v: v.update(diffusion=[]),
        lambda v: v.update(graphs=None),
    ],
)
def test_a_version_2_with_later_keys_is_not_migrated(
    tmp_path: Path, change: Callable[[Any], Any]
) -> None:
    old = Path(shutil.copytree(V2, tmp_path / "old"))
    edit_manifest(old, change)
    before = files_in(old)
    with pytest.raises(BundleError):
        migrate_bundle(old)
    assert files_in(old) == before


def test_engines_are_built_from_a_migrated_graph(old: Path) -> None:
    migrate_bundle(old)
    built = build_engine(old, "cpu", None)
    assert built.graph.step_width == RESCALE_COLUMN == 31
    assert built.notes == ()
    assert set(built.entry.made_with) == {"id3pm-deploy"}
    built.bundle.verify()
    golden = load_golden(built.bundle, built.graph)
    with open_engine(open_model(old)) as engine:
        run_golden(engine, golden)
        golden["step"][:, RESCALE_COLUMN] = 0.5
        with pytest.raises(EngineError, match="before guidance rescale"):
            engine.run_row(golden["step"], golden["noise"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format_version=0), "format version 0"),
        (lambda v: v.update(format_version=5), "format version 5"),
        (lambda v: v.update(format_version="1"), "format version '1'"),
        (lambda v: v.update(format_version=True), "format version True"),
        (lambda v: v.pop("format_version"), "format version None"),
        (lambda v: v.update(format="id3pm-checkpoint"), "does not describe"),
        (lambda v: v["graphs"][0].update(made_with={}), "not of format version 1"),
        (lambda v: v["engines"][0].update(cuda=None), "not of format version 1"),
        (lambda v: v["engines"].append(7), "not of format version 1"),
        (lambda v: v.pop("graphs"), "not of format version 1"),
        (lambda v: v["graphs"][0].update(stage="base"), "not of format version 1"),
        (lambda v: v.update(super_resolution=None), "not of format version 1"),
        (lambda v: v["engines"][0].update(plan_key=""), "not of format version 1"),
        (lambda v: v["graphs"][0].update(file="../x"), "names the file '../x'"),
        (lambda v: v["files"].clear(), "does not describe the file"),
    ],
)
def test_what_cannot_be_migrated_stays_as_it_is(
    old: Path, change: Callable[[Any], Any], message: str
) -> None:
    edit_manifest(old, change)
    before = files_in(old)
    with pytest.raises(BundleError, match=message):
        migrate_bundle(old)
    assert files_in(old) == before


def test_a_migration_waits_for_the_lock_and_fails_whole(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_in(old)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(Exception, match="cannot write"):
            migrate_bundle(old)
    assert files_in(old) == before
    thread = threading.Thread(target=migrate_bundle, args=(old,))
    with locked(old):
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert files_in(old) == before
    thread.join(60)
    open_bundle(old).verify()


def second(values: Any) -> Any:
    """The second stage's model in a parsed manifest."""
    return values["super_resolution"]["diffusion"]["model"]


def test_a_bundle_of_two_stages(tmp_path: Path) -> None:
    bundle = write_chain(tmp_path / "b")
    again = open_bundle(tmp_path / "b")
    again.verify()
    assert again.manifest == bundle.manifest
    assert list(again.manifest.stages) == ["base", "super_resolution"]
    base, large = (again.graph("step", "float32", s) for s in again.manifest.stages)
    assert base is not None
    assert large is not None
    assert again.graph("step", "float32") == base
    assert (again.read(base.file), again.read(large.file)) == (
        b"base",
        b"super_resolution",
    )
    assert [e.label for e in again.manifest.engines] == [
        "cpu",
        "cpu (super_resolution)",
    ]
    pack_bundle(tmp_path / "b", tmp_path / "b.tar")
    unpack_bundle(tmp_path / "b.tar", tmp_path / "c").verify()
    assert files_in(tmp_path / "c") == files_in(tmp_path / "b")


def test_a_second_stage_comes_later_and_stays(tmp_path: Path) -> None:
    """Writers that know of one stage keep the other."""
    base, large = chain_specs()
    write_chain(tmp_path / "b")
    writer = bundle_writer(tmp_path / "b", base, SHA, "0")
    added = writer.add_file("unet-float32", ".onnx", b"unet")
    entry = open_bundle(tmp_path / "b").manifest.graphs[0]
    writer.add_graph(dataclasses.replace(entry, file=added, kind="unet"))
    manifest = writer.commit().manifest
    assert manifest.super_resolution == SecondStage(large, "1" * 64)
    kinds = [(graph.stage, graph.kind) for graph in manifest.graphs]
    assert kinds == [("base", "step"), ("super_resolution", "step"), ("base", "unet")]
    late = bundle_writer(tmp_path / "c", base, SHA, "0")
    late.commit()
    assert open_bundle(tmp_path / "c").manifest.super_resolution is None
    stage = SecondStage(large, "1" * 64)
    bundle_writer(tmp_path / "c", base, SHA, "0", stage).commit()
    assert open_bundle(tmp_path / "c").manifest.super_resolution == stage
    other = SecondStage(large, "2" * 64)
    with pytest.raises(BundleError, match="another checkpoint") as caught:
        bundle_writer(tmp_path / "c", base, SHA, "0", other)
    assert caught.value.why == "these differ: super_resolution.weights"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["graphs"][0].update(stage="third"), "no stage 'third'"),
        (lambda v: v["graphs"][0].update(stage=1), "stage must be str"),
        (lambda v: v["graphs"][0].update(body=[]), "body must be dict"),
        (lambda v: v["graphs"][0].update(stage="super_resolution"), "two entries"),
        (lambda v: v["engines"][0].update(stage="super_resolution"), "two entries"),
        (lambda v: v["engines"][0].update(graph=v["graphs"][1]["file"]), "its stage"),
        (lambda v: v.update(super_resolution=None), "no stage 'super_resolution'"),
        (lambda v: v.pop("super_resolution"), "no stage 'super_resolution'"),
        (lambda v: v.update(super_resolution={}), "lacks diffusion"),
        (lambda v: v.update(super_resolution=[]), "must be a table"),
        (lambda v: v["super_resolution"].update(third=1), "unknown keys: third"),
        (
            lambda v: v["super_resolution"].update(checkpoint_sha256="0"),
            "64 hexadecimal digits",
        ),
        (lambda v: second(v).update(low_res_size=None), "does not fit behind"),
        (lambda v: second(v).update(low_res_size=8), "does not fit behind"),
        (lambda v: second(v).update(low_res_size=64), "from 1 to its image_size"),
        (lambda v: second(v).update(low_res_size=True), "low_res_size must be int"),
        (lambda v: second(v).update(low_res_size=-1), "from 1 to its image_size"),
        (lambda v: second(v).update(image_channels=1), "does not fit behind"),
        (
            lambda v: v["diffusion"]["model"].update(low_res_size=4),
            "does not fit behind",
        ),
        (
            lambda v: v["super_resolution"]["diffusion"]["identity"].update(dim=4),
            "does not fit behind",
        ),
        (lambda v: v["diffusion"]["identity"].update(dim=-1), "from 0 to 65536"),
    ],
)
def test_a_wrong_second_stage_is_refused(
    tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    write_chain(tmp_path / "b")
    edit_manifest(tmp_path / "b", change)
    with pytest.raises(Id3pmError) as caught:
        open_bundle(tmp_path / "b")
    assert message in str(caught.value)


def test_the_specification_names_every_key_and_limit(root: Path) -> None:
    text = (root / "BUNDLE_FORMAT.md").read_text("utf-8")
    kinds: tuple[type[Any], ...] = (Manifest, FileEntry, GraphEntry, EngineEntry)
    kinds += (SecondStage, DiffusionSpec, AttributeSpec)
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    for part in dataclasses.asdict(open_bundle(V4).manifest.diffusion).values():
        names |= set(part) - {"steps", "σ"} if isinstance(part, dict) else set()
    names |= set(json.loads((V4 / SIGNATURE_NAME).read_text()))
    assert {name for name in names if f"`{name}`" not in text} == set()
    limits = [
        manifest_module.MAX_FILES,
        manifest_module.MAX_FILE_BYTES,
        manifest_module.MAX_TOTAL_BYTES,
        manifest_module.MAX_GRAPHS,
        manifest_module.MAX_ENGINES,
        manifest_module.MANIFEST.max_bytes,
        SIGNATURE.max_bytes,
    ]
    plain = text.replace(",", "")
    assert [limit for limit in limits if f" {limit} " not in plain] == []
    assert manifest_module._NAME.pattern in text
