"""Configs survive the trip through JSON, and misspelt ones do not start an experiment."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest

from foundation.serialize import Family, from_dict, kinds, load_json, save_json, to_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed:
    k: int = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    mean: float = 12.0
    cap: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nested:
    policy: Fixed | Threshold = Fixed()
    alone: Fixed = Fixed()
    maybe: Fixed | None = None
    steps: tuple[Fixed, ...] = ()
    name: str


NESTED = Nested(policy=Threshold(mean=6.5), maybe=Fixed(k=3), steps=(Fixed(k=1), Fixed(k=2)), name="run")


def test_round_trip_through_a_file(tmp_path):
    save_json(tmp_path / "config.json", NESTED)
    assert load_json(Nested, tmp_path / "config.json") == NESTED
    assert json.loads((tmp_path / "config.json").read_text())["policy"] == {
        "type": "Threshold",
        "mean": 6.5,
        "cap": None,
    }


def test_absent_keys_take_their_defaults():
    assert from_dict(Nested, {"name": "run"}) == Nested(name="run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"polcy": {}}, r"unknown key 'polcy'; did you mean 'policy'\?"),
        ({"alone": {"kk": 1}}, r"Nested\.alone: unknown key 'kk'; did you mean 'k'\?"),
        ({"policy": {"type": "Treshold"}}, r"Nested\.policy: unknown type 'Treshold'; did you mean 'Threshold'\?"),
        ({"steps": [{"k": 1}, {"j": 2}]}, r"Nested\.steps\[1\]: unknown key 'j'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_legal_one(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Nested, to_dict(NESTED) | change)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Typed:
    count: int = 1
    share: float = 0.5
    on: bool = True
    name: str = ""
    place: Path = Path(".")
    maybe: int | None = None
    mode: Literal["a", "b"] = "a"
    either: int | str = 1
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[int, ...] = ()
    table: dict[str, int] = dataclasses.field(default_factory=dict)
    policy: Fixed | Threshold = Fixed()


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("count", ["2", 2.0, True, None, [2], {}]),
        ("share", ["0.5", True, None, [0.5]]),
        ("on", [1, "true", None]),
        ("name", [1, None, ["a"]]),
        ("place", [1, None, {}]),
        ("maybe", ["1", 1.0, False]),
        ("mode", ["c", 1, None, ["a"]]),
        ("either", [1.5, None, []]),
        ("pair", [[0.5], [0.5, 1.0, 2.0], 0.5, ["0", 1], "ab"]),
        ("many", [[1.5], 1, "12", {"a": 1}]),
        ("table", [{"a": "1"}, [1], None]),
        ("policy", [1, "Fixed", None, {"type": "Fixed", "k": "2"}, [], {}]),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_place(field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^Typed\.{field}\b"):
            from_dict(Typed, {field: value})


def test_values_of_their_types_are_taken_as_they_are():
    stored = {"share": 1, "maybe": 3, "mode": "b", "either": "x", "pair": [1, 2.5], "many": [1, 2], "table": {"a": 1}}
    typed = from_dict(Typed, stored)
    assert typed == Typed(share=1, maybe=3, mode="b", either="x", pair=(1, 2.5), many=(1, 2), table={"a": 1})
    assert type(typed.share) is int, "a hash of it must not change"
    assert from_dict(Typed, {"maybe": None}) == Typed()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"name": 1}', "\udcff"])
def test_a_file_that_holds_no_config_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"^{path}"):
        load_json(Nested, path)


def test_missing_key_is_named():
    with pytest.raises(ValueError, match="missing name"):
        from_dict(Nested, {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape(Family):
    """A family; what follows are its kinds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circle(Shape):
    radius: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square(Shape):
    side: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundedSquare(Square):
    radius: float = 0.1


class Undecorated(Circle):
    """Adds nothing of its own to store: no kind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    shape: Shape = Circle()
    known: Circle | Square = Square()
    maybe: Shape | None = None
    fixed: Circle = Circle()


def test_a_field_of_a_family_holds_any_kind(tmp_path):
    drawing = Drawing(shape=RoundedSquare(side=2.0), known=RoundedSquare(), maybe=Square(), fixed=Circle(radius=3.0))
    save_json(tmp_path / "drawing.json", drawing)
    assert load_json(Drawing, tmp_path / "drawing.json") == drawing
    assert to_dict(drawing) == {
        "shape": {"type": "RoundedSquare", "side": 2.0, "radius": 0.1},
        "known": {"type": "RoundedSquare", "side": 1.0, "radius": 0.1},
        "maybe": {"type": "Square", "side": 1.0},
        "fixed": {"radius": 3.0},
    }
    assert from_dict(Drawing, to_dict(Drawing())) == Drawing()
    assert set(kinds(Shape)) == {"Circle", "Square", "RoundedSquare"}


@pytest.mark.parametrize("field", ["shape", "known", "maybe"])
def test_what_is_no_kind_is_refused_with_the_nearest_one(field):
    for type_, message in (
        ("Squar", r"unknown type 'Squar'; did you mean 'Square'\? Legal: Circle, RoundedSquare, Square"),
        (None, "unknown type None"),
        ("Undecorated", "unknown type 'Undecorated'"),
    ):
        with pytest.raises(ValueError, match=rf"Drawing\.{field}: {message}"):
            from_dict(Drawing, {field: {"type": type_}})
    with pytest.raises(ValueError, match=r"unknown key 'sid'; did you mean 'side'\?"):
        from_dict(Drawing, {field: {"type": "Square", "sid": 1.0}})


def test_two_kinds_of_one_name_are_refused():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Root(Family):
        pass

    def define():
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Leaf(Root):
            pass

        return Leaf

    # The same place again is the same kind, loaded anew.
    first, second = define(), define()
    assert kinds(Root) == {"Leaf": second}
    second.__module__ = "elsewhere"
    with pytest.raises(ValueError, match=r"Root: .* and elsewhere both define Leaf"):
        kinds(Root)
    assert first.__name__ == "Leaf"
