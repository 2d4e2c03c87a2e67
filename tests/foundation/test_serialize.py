"""Configs survive the trip through JSON, and misspelt ones do not start an experiment."""

import dataclasses
import json

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
