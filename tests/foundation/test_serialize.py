"""Configs survive the trip through JSON, and misspelt ones do not start an experiment."""

import dataclasses
import json

import pytest

from foundation.serialize import from_dict, load_json, save_json, to_dict


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
