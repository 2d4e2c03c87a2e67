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
