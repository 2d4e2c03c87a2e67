import math
from pathlib import Path

import pytest

from foundation.tables import read_rows
from staged_training.__main__ import main
from staged_training.record import read_run
from staged_training.sweep import SweepRow, sweep_text

SIZES = [
    *("--dtype=float32", "--vocab-size=300", "--d-model=16", "--n-layers=2", "--n-experts=4"),
    *("--d-expert=8", "--n-heads=2", "--n-kv-heads=1"),
    *("--head-dim=8", "--k=2", "--batch-size=2"),
    "--seq-len=16",
]


def test_a_sweep_trains_each_run_once_and_tabulates_all(documents, tmp_path, capsys):
    command = ["sweep", "--out", str(tmp_path), "--data", str(documents), *SIZES]
    command += ["--optimizers", "adamw", "muon", "--learning-rates", "1e-3", "1e-2", "--csv", str(tmp_path / "t.csv")]
    main([*command, "--tokens", "320"])
    first = read_rows(tmp_path / "t.csv", SweepRow)
    assert [(row.optimizer, row.learning_rate) for row in first] == [
        (optimizer, rate) for rate in (1e-3, 1e-2) for optimizer in ("adamw", "muon")
    ]
    assert len({row.run for row in first}) == len({row.bits_per_byte for row in first}) == 4
    for row in first:
        record = read_run(Path(row.run))
        assert row.bits_per_byte == record.result["bits_per_byte"]
        assert record.config["trunk"]["n_batches"] == 10
        # Annealed over the share behind `trunk_share`.
        assert record.config["trunk"]["schedule"]["decay_steps"] == 2
        assert record.config["optimizer"]["kind"] == row.optimizer
    adamw, muon = first[2:]
    assert muon.flops > adamw.flops
    printed = capsys.readouterr().out
    assert "run 4 of 4: 320 tokens, seed 0" in printed
    assert printed.count(" *") == 2
    # Another budget beside what is finished.
    main([*command, "--token-budgets", "192", "320"])
    both = read_rows(tmp_path / "t.csv", SweepRow)
    assert both[4:] == first
    assert [row.tokens for row in both] == [192] * 4 + [320] * 4
    assert capsys.readouterr().out.count("finished before") == 4


def test_a_rate_that_explodes_is_an_answer(documents, tmp_path, capsys):
    command = ["sweep", "--out", str(tmp_path), "--data", str(documents), *SIZES, "--token-budgets", "192"]
    main([*command, "--learning-rates", "1e-3", "1e15"])
    fine, exploded = read_rows(tmp_path / "sweep.csv", SweepRow)
    assert math.isfinite(fine.bits_per_byte)
    assert math.isinf(exploded.bits_per_byte)
    assert "inf" in capsys.readouterr().out


def test_the_table_takes_means_over_seeds_and_marks_each_optimizers_best_rate():
    def row(optimizer, rate, seed, bits_per_byte):
        return SweepRow(
            optimizer=optimizer,
            learning_rate=rate,
            tokens=1000,
            seed=seed,
            bits_per_byte=bits_per_byte,
            seconds=2.0 + seed,
            flops=1.0,
            run="",
        )

    values = [("adamw", 0.1, 2.0, 2.2), ("adamw", 0.2, 1.9, 2.1), ("muon", 0.1, 1.5, math.inf), ("muon", 0.2, 1.8, 1.8)]
    rows = [row(optimizer, rate, seed, both[seed]) for optimizer, rate, *both in values for seed in (0, 1)]
    lines = [line.split() for line in sweep_text(rows).splitlines()[1:]]
    assert lines == [
        ["adamw", "1,000", "2.5", "0.1", "2.1000", "2.0000", "2.2000"],
        ["adamw", "1,000", "2.5", "0.2", "2.0000", "1.9000", "2.1000", "*"],
        ["muon", "1,000", "2.5", "0.1", "inf", "1.5000", "inf"],
        ["muon", "1,000", "2.5", "0.2", "1.8000", "1.8000", "1.8000", "*"],
    ]


@pytest.mark.parametrize("option", ["--learning-rates 0", "--seeds 0", "--tokens 0", "--optimizers sgd"])
def test_refuses(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", *option.split()])
    assert stopped.value.code == 2
    assert option.split()[0] in capsys.readouterr().err
