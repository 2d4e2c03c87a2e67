import json
import logging

import pytest

from staged_training import record
from staged_training.record import (
    Ledger,
    RunMismatchError,
    environment,
    finish_run,
    json_differences,
    locked,
    of_other_code,
    open_run,
    read_run,
)

CONFIG = {"seed": 0, "model": {"d_model": 16, "shape": (1, 2)}}


def test_a_finished_run_is_recognised(tmp_path):
    assert open_run(tmp_path, CONFIG, "hash") is None
    assert open_run(tmp_path, CONFIG, "hash") is None
    with pytest.raises(ValueError, match="holds no finished run"):
        read_run(tmp_path)
    ledger = Ledger()
    ledger.add("trunk", flops=10.0, seconds=1.0)
    ledger.add("trunk", flops=5.0, seconds=0.5)
    finish_run(tmp_path, {"bits_per_byte": 1.5}, ledger)
    found = open_run(tmp_path, CONFIG, "hash")
    assert found is not None
    assert found.result == {"bits_per_byte": 1.5}
    assert (
        found.ledger.costs
        == json.loads((tmp_path / "ledger.json").read_text())
        == {"trunk": {"flops": 15.0, "seconds": 1.5}}
    )
    assert found.config["model"]["shape"] == [1, 2]


def test_another_config_is_refused_by_key(tmp_path):
    open_run(tmp_path, CONFIG, "hash")
    with pytest.raises(
        RunMismatchError, match=r"model\.d_model: stored 16, asked 32; seed: stored 0, asked 1\. Choose another folder"
    ):
        open_run(tmp_path, {"seed": 1, "model": {"d_model": 32, "shape": (1, 2)}}, "hash")


def test_a_run_of_other_code_is_refused_by_file_and_found_from_beside(tmp_path):
    code = {"lm/model.py": "aa", "torch": "2.9"}
    mine = {**CONFIG, "code": code}
    edited = {**CONFIG, "code": {**code, "lm/model.py": "bb", "lm/new.py": "cc"}}
    half = tmp_path / "trunk_0123456789ab"
    open_run(half, mine, "hash")
    with pytest.raises(
        RunMismatchError, match=r"other code: lm/model\.py, lm/new\.py changed\. --accept-old-code takes it as it is"
    ):
        open_run(half, edited, "hash")
    with pytest.raises(RunMismatchError, match="other code: its code is not known"):
        open_run(tmp_path / "old", CONFIG, "hash") or open_run(tmp_path / "old", mine, "hash")
    with pytest.raises(RunMismatchError, match=r"seed: stored 0, asked 1"):
        open_run(half, {**edited, "seed": 1}, "hash")
    # Beside it a finished one of two other files, and one of another seed.
    for name, config in (
        ("trunk_11111111", {**mine, "code": {"torch": "2.8"}}),
        ("trunk_22222222", {**mine, "seed": 3}),
    ):
        open_run(tmp_path / name, config, "hash")
        finish_run(tmp_path / name, {}, Ledger())
    assert of_other_code(tmp_path / "trunk_33333333", edited) == [tmp_path / "trunk_11111111", half]
    assert of_other_code(half, mine) == [tmp_path / "trunk_11111111"]
    # A folder that was chosen by name is looked for nowhere else.
    assert of_other_code(tmp_path / "mine", edited) == []
    assert of_other_code(tmp_path / "old", edited) == [tmp_path / "old"]


def test_differences_name_the_place():
    assert json_differences({"a": [1, 2], "b": {"c": 1}}, {"a": [1, 2], "b": {"c": 1}}) == []
    assert json_differences({"b": {"c": 1}}, {"b": {"c": 1, "d": None}, "e": 0}) == ["e: stored null, asked 0"]


def test_environment_says_where(monkeypatch):
    found = environment(data_hash="hash")
    assert found["data_hash"] == "hash"
    assert {"python", "torch", "numpy", "triton", "sentencepiece"} <= set(found["versions"])
    assert found["commit"] is None or len(found["commit"]) == 40
    assert isinstance(found["uncommitted_changes"], bool)
    assert found["threads"] >= 1
    assert found["device"]


def test_continuing_elsewhere_is_said(tmp_path, monkeypatch, caplog):
    open_run(tmp_path, CONFIG, "hash")
    here = environment(data_hash="hash")
    monkeypatch.setattr(record, "environment", lambda data_hash: {**here, "threads": 99})
    with caplog.at_level(logging.WARNING):
        open_run(tmp_path, CONFIG, "hash")
    assert f"threads: stored {here['threads']}, asked 99" in caplog.text


def test_one_process_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(RunMismatchError, match="is being run by another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
