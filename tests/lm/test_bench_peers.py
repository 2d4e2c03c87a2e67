"""The benchmark against transformers compares models of the same size, and runs."""

import csv
import time

import pytest

from foundation.environment import version
from lm.__main__ import main
from lm.accounting import meta_model
from lm.bench_peers import Part, PeersConfig, _row
from lm.peer_sides import CASES, FAMILIES

pytestmark = pytest.mark.skipif(version("transformers") is None, reason="transformers is not installed")


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_both_sides_have_as_many_parameters(case):
    import torch

    with torch.device("meta"):
        theirs = sum(p.numel() for p in FAMILIES[case.family](case).parameters())
    ours = sum(p.numel() for p in meta_model(case.model_config("float32")).parameters())
    assert abs(ours / theirs - 1) < 0.03


def test_a_row_says_who_is_how_fast(tmp_path, capsys, forked):
    table = tmp_path / "peers.csv"
    arguments = "--cases GGGF --dtypes float32 --parts decode --longest 1024 --rounds 1 --threads 1 --csv"
    main(["bench-peers", *arguments.split(), str(table)])
    printed = capsys.readouterr().out
    assert "GGGF, float32: ours by " in printed
    assert "transformers by attention sdpa, experts grouped_mm, torch's " in printed
    rows = list(csv.DictReader(table.open()))
    assert [(row["part"], row["batch"], row["length"]) for row in rows] == [
        ("decode", "1", "1024"),
        ("decode", "8", "1024"),
    ]
    for row in rows:
        ours, theirs = float(row["ours_tokens_per_second"]), float(row["transformers_tokens_per_second"])
        assert ours > 0
        assert float(row["ratio"]) == pytest.approx(ours / theirs, rel=0.01)
        assert f"{row['ratio']}x" in printed


@pytest.mark.parametrize(("seconds", "rounds", "speed"), [(0.0, "1", "100.0"), (60.0, "2", "200.0")])
def test_a_slow_row_has_fewer_rounds(seconds, rounds, speed):
    class Worker:
        turns = 0

        def seconds(self, part):
            time.sleep(0.01)
            self.turns += 1
            # The first turn is slower.
            return part.tokens / (100 if self.turns == 1 else 200)

    workers = {"ours": Worker(), "transformers": Worker()}
    config = PeersConfig(rounds=2, seconds=seconds)
    row = _row("F", "bfloat16", Part(name="prefill", batch=1, length=8), workers, config)
    assert (row["rounds"], row["ours_tokens_per_second"]) == (rounds, speed)
