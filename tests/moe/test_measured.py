"""What `auto` takes where several ways to the experts can run: the clear winner of a measurement, the same ever after.

Legend: T tokens, D model width, E experts, F expert width.
"""

import json

import pytest
import torch

from moe import measured
from moe.backends import BACKENDS, choose_backend
from moe.cpu_experts import experts_on_cpu
from moe.measured import ShapeClass, class_of, fastest
from triton_kernels.native.library import native

SHAPE = ShapeClass("float32", "float32", 4, 16, 8, 32, True)


WAYS = (("usual", experts_on_cpu), ("other", experts_on_cpu))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fastest.cache_clear()
    yield tmp_path / "hybrid-moe-lab"
    fastest.cache_clear()


def timed(monkeypatch, usual, other):
    monkeypatch.setattr(measured, "_timed", lambda *_: {"usual": usual, "other": other})


def test_the_clear_winner_is_taken_and_the_times_are_said(monkeypatch):
    timed(monkeypatch, [0.5, 0.4, 0.45], [0.2, 0.2, 0.2])
    assert fastest(SHAPE, "usual", WAYS) == ("other", "measured on this machine: other 200.0 ms, usual 400.0 ms")


def test_every_way_is_timed_in_every_round():
    seconds = measured._timed(SHAPE, dict(WAYS))
    assert {name: len(each) for name, each in seconds.items()} == {"usual": 3, "other": 3}
    assert all(taken > 0 for each in seconds.values() for taken in each)


@pytest.mark.parametrize(("n_experts", "expected"), [(80, 4), (2, 2)])
def test_of_large_experts_several_are_timed(n_experts, expected):
    seen = set()

    def way(x_TD, w_gate_up_EDF2, w_down_EFD, rows):
        seen.add((len(w_down_EFD), len(x_TD) >= 64))
        return experts_on_cpu(x_TD, w_gate_up_EDF2, w_down_EFD, rows)

    measured._timed(ShapeClass("float32", "float32", n_experts, 512, 256, 512, True), {"way": way})
    assert seen == {(expected, True)}


def test_no_clear_winner_leaves_the_usual_way():
    assert measured._chosen({"usual": 1.0, "other": 0.9}, "usual")[0] == "usual"
    assert measured._chosen({"usual": 1.0, "other": 0.8, "another": 0.7}, "usual")[0] == "another"


def test_one_bad_round_is_enough_to_stay(monkeypatch):
    timed(monkeypatch, [1.0, 1.0, 1.0], [0.5, 0.5, 0.95])
    assert fastest(SHAPE, "usual", WAYS)[0] == "usual"


def test_the_first_answer_is_everybodys(own_cache, monkeypatch):
    timed(monkeypatch, [1.0] * 3, [0.5] * 3)
    first = fastest(SHAPE, "usual", WAYS)
    (file,) = own_cache.iterdir()
    timed(monkeypatch, [0.5] * 3, [1.0] * 3)
    fastest.cache_clear()
    assert fastest(SHAPE, "usual", WAYS) == first
    # A process that has measured meanwhile takes what another has left.
    assert measured._written(file, {"usual": 0.5, "other": 1.0}) == json.loads(file.read_text())


def test_a_damaged_file_costs_a_measurement(own_cache, monkeypatch):
    timed(monkeypatch, [1.0] * 3, [0.5] * 3)
    fastest(SHAPE, "usual", WAYS)
    (file,) = own_cache.iterdir()
    file.write_text("no json")
    fastest.cache_clear()
    assert fastest(SHAPE, "usual", WAYS)[0] == "other"


@pytest.mark.skipif(native().library is None, reason=native().reason)
def test_auto_measures_what_is_large(own_cache):
    x_TD, down_EFD = torch.zeros(64, 64), torch.zeros(4, 32, 64)
    assert class_of(x_TD, down_EFD, 128) is None
    assert choose_backend(x_TD, down_EFD, n_rows=128).reason == native().reason
    assert choose_backend(x_TD, down_EFD).reason == native().reason
    chosen = choose_backend(x_TD, down_EFD, n_rows=40_000)
    assert chosen.name in BACKENDS
    assert "native" in chosen.reason
    assert "grouped_mm" in chosen.reason
    assert len(list(own_cache.iterdir())) == 1
    assert choose_backend(x_TD, down_EFD, "cpu", n_rows=40_000) == ("cpu", "asked for")
