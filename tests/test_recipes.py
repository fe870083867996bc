"""Mappings into dataclasses, and where recipes are found."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from id3pm_deploy import recipes
from id3pm_deploy.errors import InputError, RecipeError
from id3pm_deploy.recipes import (
    dataclass_from_mapping,
    load_recipe,
    recipe_folder,
    recipe_names,
)


@dataclass(frozen=True)
class Inner:
    """A table in a table."""

    size: int
    label: str = "none"


@dataclass(frozen=True)
class Outer:
    """One field of every kind a recipe may have."""

    name: str
    count: int
    ratio: float = 0.5
    flag: bool = False
    kind: Literal["one", "two"] = "one"
    sizes: tuple[int, ...] = ()
    inner: Inner = field(default_factory=lambda: Inner(1))
    several: tuple[Inner, ...] = ()
    limit: int | None = None
    free: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Words:
    """One that has a list of words."""

    name: str
    count: int
    inner: Inner
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fussy:
    """One that checks itself."""

    name: str
    count: int
    inner: Inner

    def __post_init__(self) -> None:
        if self.count > 9:
            raise RecipeError("too many", why=f"it is {self.count}", fix="take fewer")


SMALL = {"name": "a", "count": 3}
WHOLE: dict[str, Any] = {
    "name": "b",
    "count": -1,
    "ratio": 0.25,
    "flag": True,
    "kind": "two",
    "sizes": [1, 2, 3],
    "inner": {"size": 4, "label": "x"},
    "several": [{"size": 5}, {"size": 6, "label": "y"}],
    "limit": 7,
    "free": {"anything": [1, {"deep": None}]},
}


def build(values: Any) -> Outer:
    return dataclass_from_mapping(Outer, values, "the test")


def test_defaults_are_the_dataclasses() -> None:
    assert build(SMALL) == Outer("a", 3)
    assert build(SMALL).inner == Inner(1)


def test_every_kind_of_value() -> None:
    found = build(WHOLE)
    assert found == Outer(
        name="b",
        count=-1,
        ratio=0.25,
        flag=True,
        kind="two",
        sizes=(1, 2, 3),
        inner=Inner(4, "x"),
        several=(Inner(5), Inner(6, "y")),
        limit=7,
        free={"anything": [1, {"deep": None}]},
    )
    assert isinstance(found.sizes, tuple)
    assert build({**SMALL, "limit": None}).limit is None


def test_a_whole_number_is_a_float_but_not_the_reverse() -> None:
    found = build({**SMALL, "ratio": 2}).ratio
    assert (type(found), found) == (float, 2.0)
    with pytest.raises(RecipeError, match="count must be int"):
        build({**SMALL, "count": 2.0})


def test_a_round_trip_through_plain_values() -> None:
    outer = build(WHOLE)
    assert build(dataclasses.asdict(outer)) == outer


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"colour": 1}, "the test has unknown keys: colour"),
    ({"zeta": 1, "alpha": 2}, "unknown keys: alpha, zeta"),
    ({"inner": {"size": 1, "colour": 2}}, "the test, inner has unknown keys: colour"),
    ({"several": [{"size": 1}, {"size": 1, "x": 2}]}, "several has unknown keys: x"),
    ({"inner": {"label": "x"}}, "the test, inner lacks size"),
    ({"inner": [1]}, "the test, inner must be a table"),
    ({"name": 1}, "the test, name must be str"),
    ({"name": None}, "name must be str"),
    ({"count": "3"}, "count must be int"),
    ({"count": True}, "count must be int"),
    ({"flag": 1}, "flag must be bool"),
    ({"ratio": "0.5"}, "ratio must be float"),
    ({"ratio": True}, "ratio must be float"),
    ({"ratio": math.nan}, "ratio must be a finite number"),
    ({"ratio": -math.inf}, "ratio must be a finite number"),
    ({"ratio": 10**400}, "ratio must be a finite number"),
    ({"kind": "three"}, "kind must be one of 'one', 'two'"),
    ({"kind": ["one"]}, "kind must be one of"),
    ({"sizes": 3}, "sizes must be a list"),
    ({"sizes": "123"}, "sizes must be a list"),
    ({"sizes": [1, "2"]}, "sizes must be int"),
    ({"limit": "none"}, "limit must be int"),
    ({"free": []}, "free must be dict"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=str)
def test_values_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build({**SMALL, **change})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the test lacks name, count"),
        ({"name": "a"}, "the test lacks count"),
        ([1], "the test must be a table"),
        (None, "the test must be a table"),
        ("name", "the test must be a table"),
    ],
)
def test_mappings_that_are_none(values: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(values)


def test_an_error_lists_what_would_be_right() -> None:
    with pytest.raises(RecipeError) as caught:
        build({**SMALL, "colour": 1})
    for name in ("name", "count", "several"):
        assert name in caught.value.fix
    assert isinstance(caught.value, InputError)
    assert caught.value.exit_status == 2


def test_an_error_does_not_repeat_a_novel() -> None:
    for change in ({"count": "x" * 10_000}, {"kind": "x" * 10_000}):
        with pytest.raises(RecipeError) as caught:
            build({**SMALL, **change})
        assert len(str(caught.value)) < 300


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with two recipes of the kind `engines`."""
    package = tmp_path / "id3pm_deploy"
    folder = tmp_path / "engines"
    for made in (package, folder):
        made.mkdir()
    (folder / "small.toml").write_text('name = "s"\ncount = 1\n')
    (folder / "large.toml").write_text('name = "l"\ncount = 2\n[inner]\nsize = 9\n')
    (folder / "README.md").write_text("not a recipe")
    monkeypatch.setattr(recipes, "__file__", str(package / "recipes.py"))
    return folder


class TestLoading:
    def test_by_name(self, shelf: Path) -> None:
        assert recipe_folder("engines") == shelf
        assert recipe_names("engines") == ["large", "small"]
        assert load_recipe("engines", "small", Outer) == Outer("s", 1)
        large = load_recipe("engines", "large", Outer)
        assert large == Outer("l", 2, inner=Inner(9))

    def test_by_path(self, shelf: Path, tmp_path: Path) -> None:
        own = tmp_path / "mine.toml"
        own.write_text((shelf / "small.toml").read_text())
        assert load_recipe("engines", str(own), Outer) == Outer("s", 1)

    def test_a_wheel_carries_them_inside(self, shelf: Path) -> None:
        inside = shelf.parent / "id3pm_deploy" / "_recipes" / "engines"
        inside.mkdir(parents=True)
        (inside / "device.toml").write_text('name = "d"\ncount = 1\n')
        assert recipe_folder("engines") == inside
        assert recipe_names("engines") == ["device"]
        assert load_recipe("engines", "device", Outer).name == "d"

    @pytest.mark.parametrize(
        "name", ["medium", "", "Small", "README", "../engines/small", "small.tml"]
    )
    @pytest.mark.usefixtures("shelf")
    def test_names_that_are_none(self, name: str) -> None:
        with pytest.raises(RecipeError, match="there is no recipe") as caught:
            load_recipe("engines", name, Outer)
        assert "large, small" in caught.value.fix

    @pytest.mark.usefixtures("shelf")
    def test_a_kind_without_recipes(self) -> None:
        assert recipe_names("nothing") == []
        with pytest.raises(RecipeError, match="there is no recipe"):
            load_recipe("nothing", "small", Outer)

    def test_a_path_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "folder.toml").mkdir()
        for name in ("absent.toml", "folder.toml"):
            with pytest.raises(RecipeError, match="cannot read the recipe"):
                load_recipe("engines", str(tmp_path / name), Outer)

    @pytest.mark.parametrize(
        "data",
        [b"name =", b"name = 1\nname = 2", b"\xff\xfe", b"x = " + b"[" * 16_000],
        ids=["cut", "twice", "not UTF-8", "deep"],
    )
    def test_files_that_are_not_toml(self, tmp_path: Path, data: bytes) -> None:
        path = tmp_path / "odd.toml"
        path.write_bytes(data)
        with pytest.raises(RecipeError, match="is not TOML"):
            load_recipe("engines", str(path), Outer)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('name = "a"\ncount = 1\nratio = nan', "ratio must be a finite number"),
            ('name = "a"\ncount = 2024-01-01', "count must be int"),
            ('name = "a"\ncount = 1\n[iner]\nsize = 1', "unknown keys: iner"),
        ],
    )
    def test_the_message_names_the_recipe(
        self, tmp_path: Path, text: str, message: str
    ) -> None:
        path = tmp_path / "odd.toml"
        path.write_text(text)
        with pytest.raises(RecipeError, match=message) as caught:
            load_recipe("engines", str(path), Outer)
        assert "recipe odd.toml" in caught.value.what


class TestSettings:
    @staticmethod
    def load(*settings: str) -> Outer:
        return load_recipe("engines", "large", Outer, settings)

    @pytest.mark.parametrize(
        ("setting", "key", "value"),
        [
            ("count=7", "count", 7),
            (" count = 1_000 ", "count", 1000),
            ("ratio=1", "ratio", 1.0),
            ("flag=true", "flag", True),
            ("kind=two", "kind", "two"),
            ("name=float16-turing", "name", "float16-turing"),
            ("name='two words'", "name", "two words"),
            ("name=a/b.toml", "name", "a/b.toml"),
            ("sizes=[1, 2]", "sizes", (1, 2)),
            ("sizes=[]", "sizes", ()),
            ("inner={ size = 4 }", "inner", Inner(4)),
        ],
    )
    @pytest.mark.usefixtures("shelf")
    def test_a_setting_replaces_what_the_file_says(
        self, setting: str, key: str, value: Any
    ) -> None:
        found = self.load(setting)
        assert getattr(found, key) == value
        plain = self.load()
        assert dataclasses.replace(found, **{key: getattr(plain, key)}) == plain

    @pytest.mark.usefixtures("shelf")
    def test_the_last_of_several_counts(self) -> None:
        assert self.load("count=7", "flag=true", "count=8").count == 8

    def test_a_key_that_the_file_lacks(self, shelf: Path, tmp_path: Path) -> None:
        own = tmp_path / "mine.toml"
        own.write_text("count = 1")
        assert load_recipe("engines", str(own), Outer, ["name=n"]) == Outer("n", 1)

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("count", "is not KEY=VALUE"),
            ("=3", "is not KEY=VALUE"),
            ("colour=1", "has an unknown key"),
            ("inner.size=1", "has an unknown key"),
            ("count=many", "must be int"),
            ("flag=yes", "must be bool"),
            ("kind=three", "must be one of 'one', 'two'"),
            ("sizes=1", "must be a list"),
            ("sizes=[1.5]", "must be int"),
            ("sizes=[1,", "a value that is not TOML"),
            ("name=two words", "a value that is not TOML"),
            ("name=", "a value that is not TOML"),
            ("count=1\nflag=true", "a value that is not TOML"),
            ("sizes=" + "[" * 16_000, "a value that is not TOML"),
            ("name=" + "x" * 20_000, "a value that is not TOML"),
            ("ratio=nan", "must be a finite number"),
        ],
    )
    @pytest.mark.usefixtures("shelf")
    def test_the_setting_at_fault_is_named(self, setting: str, message: str) -> None:
        with pytest.raises(RecipeError) as caught:
            self.load("name=right", setting)
        assert message in caught.value.what
        assert f"the setting {setting[:50]!r:.50}" in caught.value.what
        assert "right" not in caught.value.what
        assert len(str(caught.value)) < 500

    @pytest.mark.usefixtures("shelf")
    def test_words_in_a_list_need_quotes(self) -> None:
        with pytest.raises(RecipeError) as caught:
            load_recipe("engines", "large", Words, ["words=[8.9]"])
        assert """'words=["word"]'""" in caught.value.fix

    @pytest.mark.usefixtures("shelf")
    def test_settings_that_do_not_go_together_are_shown(self) -> None:
        with pytest.raises(RecipeError) as caught:
            load_recipe("engines", "large", Fussy, ["name=n", "count=12"])
        assert "recipe large.toml" in caught.value.what
        assert "count = 12: too many" in caught.value.what
        assert (caught.value.why, caught.value.fix) == ("it is 12", "take fewer")


@pytest.mark.parametrize("kind", ["export", "engines"])
def test_the_repositorys_own_recipes_are_found(kind: str, root: Path) -> None:
    assert recipe_folder(kind) == root / kind
    assert recipe_names(kind)
