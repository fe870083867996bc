"""Signatures, trusted keys and the ledger: which plans may be loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from bundles import GOLDEN, SEED, new_engine, new_writer, plan_builder, with_plan
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from fakes import pretend_here

from id3pm_deploy import __version__
from id3pm_deploy.builders import tensorrt as tensorrt_module
from id3pm_deploy.builders.build import build_engine
from id3pm_deploy.bundle import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    EngineEntry,
    open_bundle,
)
from id3pm_deploy.bundle.keys import trust_key, trusted_keys
from id3pm_deploy.bundle.ledger import record_plan, why_not_built_here
from id3pm_deploy.bundle.migrate import migrate_bundle
from id3pm_deploy.bundle.signing import (
    bundle_signature,
    make_key,
    sign_bundle,
)
from id3pm_deploy.bundle.trust import check_plan_trusted, plan_trust
from id3pm_deploy.bundle.writer import BundleWriter
from id3pm_deploy.cli import main
from id3pm_deploy.errors import (
    InputError,
    OutputError,
    TrustError,
)
from id3pm_deploy.inspection import self_tests
from id3pm_deploy.models import open_engine, open_model
from id3pm_deploy.preflight import Gpu, Here

PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8
PLAIN = serialization.NoEncryption()
NO_DRIVER = re.compile("no NVIDIA driver|Python module 'cuda")
PLAN_SHA = hashlib.sha256(b"plan").hexdigest()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own: empty ledger, no trusted key."""
    folder = tmp_path / "home"
    for kind in ("CACHE", "STATE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(folder / kind.lower()))
    return folder


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_key(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    """A bundle with a plan that nobody vouches for."""
    with_plan(tmp_path / "b")
    return tmp_path / "b"


def plan_of(folder: Path) -> EngineEntry:
    (entry,) = open_bundle(folder).manifest.plans
    return entry


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def verify(path: Path, *options: str, status: int = 0) -> str:
    result = run("bundle", "verify", path, *options)
    assert result.exit_code == status, result.output + result.stderr
    return result.stdout + result.stderr


def test_a_key_pair_is_private_and_never_overwritten(tmp_path: Path, key: Path) -> None:
    public = tmp_path / "key.pub"
    assert key.stat().st_mode & 0o777 == 0o600
    before = (key.read_bytes(), public.read_bytes())
    for path in (key, tmp_path / "dangling"):
        if path != key:
            path.symlink_to(tmp_path / "nowhere")
        with pytest.raises(OutputError):
            make_key(path)
    assert (key.read_bytes(), public.read_bytes()) == before
    key.rename(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match=r"key\.pub exists already"):
        make_key(key)
    assert not key.exists()
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "dangling.pub").exists()


def test_the_public_key_is_what_openssl_and_cryptography_write(
    tmp_path: Path, key: Path
) -> None:
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    pem = private.public_key().public_bytes(PEM, form)
    assert (tmp_path / "key.pub").read_bytes() == pem


def test_sign_verify_trust_and_trust_no_longer(planned: Path, key: Path) -> None:
    assert "signature  none" in verify(planned)
    assert "not signed" in verify(planned, "--require-trusted", status=1)
    result = run("bundle", "sign", planned, "--key", key)
    assert result.exit_code == 0, result.stderr
    digits = result.stdout.split()[-1]
    assert f"good, by {digits}, which you do not trust" in verify(planned)
    assert "NOT TRUSTED" in verify(planned)
    verify(planned, "--require-trusted", status=1)
    assert run("bundle", "trust", f"{key}.pub").stdout == f"trusted: {digits}\n"
    assert f"good, by {digits}, which you trust" in verify(planned, "--require-trusted")
    assert f"rtx: trusted: signed by {digits}" in verify(planned)
    check_plan_trusted(open_bundle(planned), plan_of(planned))
    assert run("bundle", "trust", "--list").stdout == f"{digits}\n"
    assert run("bundle", "trust", "--remove", digits).exit_code == 0
    assert run("bundle", "trust", "--list").stdout == ""
    assert "is not a trusted key" in run("bundle", "trust", "--remove", digits).stderr
    verify(planned, "--require-trusted", status=1)
    for arguments in ([], [f"{key}.pub", "--list"]):
        assert run("bundle", "trust", *arguments).exit_code == 2


def test_a_signature_in_a_tar(planned: Path, key: Path, tmp_path: Path) -> None:
    sign_bundle(planned, key)
    trust_key(Path(f"{key}.pub"))
    tar = tmp_path / "b.tar"
    assert run("bundle", "pack", planned, tar).exit_code == 0
    assert "which you trust" in verify(tar, "--require-trusted")
    assert run("bundle", "unpack", tar, tmp_path / "c").exit_code == 0
    check_plan_trusted(open_bundle(tmp_path / "c"), plan_of(tmp_path / "c"))


def test_one_changed_byte_of_the_manifest_breaks_it(planned: Path, key: Path) -> None:
    sign_bundle(planned, key)
    trust_key(Path(f"{key}.pub"))
    path = planned / MANIFEST_NAME
    path.write_bytes(path.read_bytes().replace(b'"threads": 0', b'"threads": 1'))
    assert "NOT GOOD: it is not of this manifest" in verify(planned, status=1)
    with pytest.raises(TrustError, match="is not trusted") as caught:
        check_plan_trusted(open_bundle(planned), plan_of(planned))
    assert "not of this manifest" in caught.value.why


def test_another_plan_under_a_signed_manifest_is_not_read(
    planned: Path, key: Path
) -> None:
    sign_bundle(planned, key)
    trust_key(Path(f"{key}.pub"))
    (planned / plan_of(planned).file).write_bytes(b"evil")
    verify(planned, status=1)
    with pytest.raises(Exception, match="not the file that the manifest describes"):
        open_bundle(planned).read(plan_of(planned).file)


def test_a_signature_by_another_key_under_a_trusted_name(
    planned: Path, key: Path, tmp_path: Path
) -> None:
    sign_bundle(planned, key)
    trust_key(Path(f"{key}.pub"))
    path = planned / SIGNATURE_NAME
    mine = json.loads(path.read_bytes())
    make_key(tmp_path / "other")
    sign_bundle(planned, tmp_path / "other")
    theirs = json.loads(path.read_bytes())
    assert not plan_trust(open_bundle(planned), plan_of(planned)).trusted
    path.write_text(json.dumps({**theirs, "public_key": mine["public_key"]}))
    assert "NOT GOOD" in verify(planned, status=1)
    path.write_text(json.dumps(mine))
    verify(planned, "--require-trusted")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "none"}, "is of the algorithm 'none'"),
        ({"format_version": 2}, "format version 2"),
        ({"format": "id3pm-bundle"}, "does not describe a bundle's signature"),
        ({"signature": ""}, "no 128 hexadecimal digits"),
        ({"signature": "0" * 128}, "not of this manifest"),
        ({"public_key": "F" * 64}, "no 64 hexadecimal digits"),
        ({"public_key": "f" * 64}, "not of this manifest"),
        ({"extra": 1}, "unknown keys: extra"),
        ({"signature": 7}, "must be str"),
    ],
)
def test_damaged_signatures_are_not_good(
    planned: Path, key: Path, change: dict[str, object], message: str
) -> None:
    sign_bundle(planned, key)
    path = planned / SIGNATURE_NAME
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    assert message in verify(planned, status=1)


def test_signature_files_that_are_no_plain_small_files(
    planned: Path, tmp_path: Path
) -> None:
    path = planned / SIGNATURE_NAME
    path.symlink_to("/dev/zero")
    assert "not a plain file" in verify(planned, status=1)
    assert run("bundle", "pack", planned, tmp_path / "b.tar").exit_code == 1
    path.unlink()
    path.write_bytes(b" " * 5000)
    assert "too large to be a signature" in verify(planned, status=1)


def test_without_the_library_it_says_what_to_install(
    planned: Path, key: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sign_bundle(planned, key)
    trust_key(Path(f"{key}.pub"))
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.setitem(sys.modules, name, None)
    text = verify(planned, status=1)
    assert "as the manifest says" in text
    assert "not checked" in text
    assert "id3pm-deploy[sign]" in text
    with pytest.raises(TrustError, match="is not trusted") as caught:
        check_plan_trusted(open_bundle(planned), plan_of(planned))
    assert "id3pm-deploy[sign]" in caught.value.why
    for arguments in (["sign", planned, "--key", key], ["keygen", tmp_path / "k"]):
        result = run("bundle", *arguments)
        assert result.exit_code == 1
        assert "id3pm-deploy[sign]" in result.stderr
    assert not (tmp_path / "k").exists()
    assert len(trusted_keys()) == 1
    (planned / SIGNATURE_NAME).unlink()
    verify(planned)


def _key_file(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_private_keys_that_are_refused(
    planned: Path, key: Path, tmp_path: Path
) -> None:
    private = ed25519.Ed25519PrivateKey.from_private_bytes(SEED)
    locked = serialization.BestAvailableEncryption(b"secret")
    other = rsa.generate_private_key(65537, 2048)
    mine = tmp_path / "mine"
    cases = [
        (key.read_bytes(), 0o640, "others may read"),
        (key.read_bytes(), 0o604, "others may read"),
        (private.private_bytes(PEM, PKCS8, locked), 0o600, "no private key"),
        (other.private_bytes(PEM, PKCS8, PLAIN), 0o600, "of another kind"),
        (Path(f"{key}.pub").read_bytes(), 0o600, "no private key"),
        (b"", 0o600, "no private key"),
    ]
    for data, mode, message in cases:
        with pytest.raises(InputError, match=message):
            sign_bundle(planned, _key_file(mine, data, mode))
    with pytest.raises(InputError, match="cannot read the key"):
        sign_bundle(planned, tmp_path / "absent")
    assert not (planned / SIGNATURE_NAME).exists()
    sign_bundle(planned, _key_file(mine, key.read_bytes()))


def test_public_keys_that_are_refused(key: Path, tmp_path: Path) -> None:
    good = Path(f"{key}.pub").read_text()
    other = rsa.generate_private_key(65537, 2048).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    mine = tmp_path / "mine.pub"
    for text in (
        "",
        good[:60],
        good + good,
        good.replace("MC", "MD"),
        good.replace("M", "!"),
        other.public_bytes(PEM, form).decode(),
        key.read_text(),
    ):
        mine.write_text(text)
        with pytest.raises(InputError, match="no Ed25519 public key"):
            trust_key(mine)
    with pytest.raises(InputError, match="cannot read"):
        trust_key(tmp_path / "absent")
    assert trusted_keys() == []
    mine.write_text(good)
    assert trust_key(mine) == trusted_keys()[0]


def test_trusted_keys_that_others_could_have_put_there(
    planned: Path, key: Path, home: Path
) -> None:
    sign_bundle(planned, key)
    trust_key(Path(f"{key}.pub"))
    folder = home / "config" / "id3pm-deploy" / "trusted-keys"
    (kept,) = folder.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in (folder, kept):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        assert not plan_trust(open_bundle(planned), plan_of(planned)).trusted
        path.chmod(mode)
    folder.chmod(0o770)
    result = run("bundle", "trust", "--list")
    assert result.exit_code == 2
    assert "others may write to it" in result.stderr
    assert run("bundle", "trust", f"{key}.pub").exit_code == 1
    folder.chmod(0o700)
    assert plan_trust(open_bundle(planned), plan_of(planned)).trusted
    kept.rename(folder / f"{'a' * 64}.pub")
    assert trusted_keys() == []


def test_a_changed_bundle_is_no_longer_signed(
    planned: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_bundle(planned, key)
    failing = BundleWriter(planned, open_bundle(planned).manifest)
    failing.add_engine(new_engine("late", "absent.onnx"))
    with pytest.raises(Exception, match="no longer in"):
        failing.commit()
    assert bundle_signature(open_bundle(planned)).state == "good"
    writer = BundleWriter(planned, open_bundle(planned).manifest)
    writer.add_engine(new_engine("cpu", writer.manifest.graphs[0].file))
    writer.commit()
    assert bundle_signature(open_bundle(planned)).state == "none"
    assert not (planned / SIGNATURE_NAME).exists()
    with pytest.raises(Exception, match="is not a bundle"):
        sign_bundle(tmp_path / "absent", key)
    assert not (tmp_path / "absent").exists()


def test_a_damaged_bundle_is_not_signed(planned: Path, key: Path) -> None:
    (planned / plan_of(planned).file).write_bytes(b"plam")
    with pytest.raises(Exception, match="not the file that the manifest describes"):
        sign_bundle(planned, key)
    assert not (planned / SIGNATURE_NAME).exists()


def test_a_plan_needs_the_ledger_a_trusted_signature_or_the_user(
    planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu("NVIDIA Test", "8.6", 16)
    pretend_here(monkeypatch, Here((gpu,), "13.0", versions={"tensorrt_rtx": "1"}))
    bundle, entry = open_bundle(planned), plan_of(planned)
    with pytest.raises(TrustError, match="the engine 'rtx'") as caught:
        check_plan_trusted(bundle, entry)
    assert "not built on this machine by you" in caught.value.why
    assert "--trust" in caught.value.fix
    check_plan_trusted(bundle, entry, trust=True)
    model = open_model(planned)
    with pytest.raises(TrustError):
        open_engine(model, "tensorrt")
    open_engine(model, "tensorrt", trust=True)
    sample = ["sample", planned, "--unconditional", "--out", tmp_path / "out"]
    sample += ["--backend", "tensorrt"]
    assert "is not trusted" in run(*sample).stderr
    assert NO_DRIVER.search(run(*sample, "--trust").stderr)
    assert "is not trusted" in self_tests(planned).not_run["rtx"]
    assert NO_DRIVER.search(self_tests(planned, trust=True).not_run["rtx"])
    assert record_plan(PLAN_SHA) == ""
    assert "built on this machine by you" in verify(planned)
    open_engine(model, "tensorrt")


def test_an_onnx_file_listed_as_a_plan_is_a_plan(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    graph = writer.commit().manifest.graphs[0].file
    writer.add_engine(new_engine("rtx", graph, graph))
    with pytest.raises(TrustError):
        check_plan_trusted(writer.commit(), plan_of(tmp_path))


def test_the_ledger_is_private_and_says_little(home: Path) -> None:
    old = os.umask(0)
    try:
        assert record_plan(PLAN_SHA) == ""
    finally:
        os.umask(old)
    folder = home / "state" / "id3pm-deploy" / "plans"
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    for above in (folder, folder.parent, folder.parent.parent):
        assert above.stat().st_mode & 0o777 == 0o700
    values = json.loads(path.read_bytes())
    digest = path.stem
    assert values.pop("built_at").endswith("Z")
    assert values == {
        "format": "id3pm-built-plan",
        "format_version": 1,
        "sha256": digest,
        "tool_version": __version__,
    }
    assert why_not_built_here(digest) == ""
    assert why_not_built_here("0" * 64)


def test_a_ledger_that_cannot_be_believed(home: Path) -> None:
    record_plan(PLAN_SHA)
    folder = home / "state" / "id3pm-deploy" / "plans"
    (path,) = folder.iterdir()
    good, digest = path.read_bytes(), path.stem
    for place in (folder, path):
        mode = place.stat().st_mode
        place.chmod(mode | 0o020)
        assert "others may write to it" in why_not_built_here(digest)
        place.chmod(mode)
    for data, message in (
        (b"", "damaged"),
        (good.replace(b"1,", b"2,"), "damaged"),
        (good.replace(digest.encode(), b"0" * 64), "of another plan"),
        (b" " * 5000, "damaged"),
    ):
        path.write_bytes(data)
        assert message in why_not_built_here(digest)
    path.unlink()
    path.symlink_to(folder.parent / "elsewhere")
    (folder.parent / "elsewhere").write_bytes(good)
    assert "symbolic link" in why_not_built_here(digest)
    path.unlink()
    path.write_bytes(good)
    path.chmod(0o600)
    assert why_not_built_here(digest) == ""


def _spoil(home: Path, how: str, patch: pytest.MonkeyPatch) -> None:
    if how == "a file":
        home.mkdir()
        (home / "state").write_text("mine")
    elif how == "open to others":
        (home / "state" / "id3pm-deploy" / "plans").mkdir(parents=True)
        (home / "state" / "id3pm-deploy" / "plans").chmod(0o777)
    elif how == "no home":
        patch.delenv("XDG_STATE_HOME")
        patch.setenv("HOME", "not/absolute")
    else:
        patch.setenv("XDG_STATE_HOME", "/proc/nothing here")


@pytest.mark.parametrize("how", ["a file", "open to others", "no home", "nowhere"])
def test_a_spoilt_home_never_loses_a_build(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(tensorrt_module, "build_plan", plan_builder())
    folder = Path(shutil.copytree(GOLDEN / "bundle-v1", tmp_path / "old"))
    migrate_bundle(folder)
    recipe = tmp_path / "gpu.toml"
    recipe.write_text(
        'summary = "s"\nbackend = "tensorrt"\nflavour = "tensorrt_rtx"\n'
        'export = "float32"\nprecision = "float32"\ndynamic_samples = [1, 2, 4]\n'
    )
    good = build_engine(folder, str(recipe), None)
    assert good.notes == ()
    assert plan_trust(good.bundle, good.entry).trusted
    shutil.rmtree(home)
    _spoil(home, how, monkeypatch)
    result = run("build-engine", folder, "--target", recipe)
    assert result.exit_code == 0, result.stderr
    assert "warning: the plan could not be noted as built by you" in result.stderr
    assert "--trust" in result.stderr
    bundle = open_bundle(folder)
    bundle.verify()
    assert not plan_trust(bundle, bundle.manifest.plans[0]).trusted
    assert not Path("not").exists()


def test_building_into_a_signed_bundle_says_that_it_is_signed_no_longer(
    tmp_path: Path, key: Path
) -> None:
    folder = Path(shutil.copytree(GOLDEN / "bundle-v1", tmp_path / "old"))
    migrate_bundle(folder)
    sign_bundle(folder, key)
    result = run("build-engine", folder)
    assert result.exit_code == 0
    assert "signature was removed" in result.stderr
    assert "signature  none" in verify(folder)


def test_a_spoilt_home_has_no_trusted_keys(
    planned: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_bundle(planned, key)
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "not/absolute")
    assert "which you do not trust" in verify(planned)
    result = run("bundle", "trust", f"{key}.pub")
    assert result.exit_code == 1
    assert "set HOME or XDG_CONFIG_HOME" in result.stderr
