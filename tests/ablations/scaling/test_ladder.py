"""A ladder through its function, on a text and models so small that its numbers mean nothing: what is tested is that a
prediction is written before its run and never after, and that nothing is trained twice."""

import csv
import dataclasses

import pytest

from ablations.scaling.ladder import COMPARED_FILE, POINTS_FILE, PREDICTED_FILE, ladder_command
from ablations.scaling.ladder_options import LadderOptions
from ablations.scaling.ladder_plan import prepare_ladder
from corpus.prepare import CorpusConfig
from lm.options import ModelOptions
from staged_training.execute import ExecutionConfig


@pytest.fixture(scope="module")
def options(text_folder, tiny_model, tmp_path_factory):
    return LadderOptions(
        out=tmp_path_factory.mktemp("ladder"),
        widths=(16, 32),
        depths=(1, 2),
        token_budgets=(512, 1024, 1536),
        expert_counts=(),
        experts_per_token=(),
        held_out=2,
        resamples=20,
        batch_size=4,
        seq_len=32,
        model=ModelOptions(**{**tiny_model, "n_layers": 1}),
        corpus=CorpusConfig(data=(str(text_folder),), vocab_size=300, valid_share=0.1),
        execution=ExecutionConfig(log_every=1000),
    )


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_runs_are_planned_with_their_sizes(options):
    ladder = prepare_ladder(dataclasses.replace(options, expert_counts=(4,), experts_per_token=(2,)))
    # Three sizes on three budgets, one other number of experts, one other k.
    assert len(ladder.rungs) == 11
    assert [rung.held_out for rung in ladder.rungs] == [False] * 9 + [True] * 2
    assert [rung.flops for rung in ladder.rungs] == sorted(rung.flops for rung in ladder.rungs)
    base = next(rung for rung in ladder.rungs if rung.name == "baseline_w16_l1_e8_k3_t512")
    assert (base.tokens, base.experts, base.granularity, base.density) == (512, 8, 8.0, 3 / 8)
    fewer = next(rung for rung in ladder.rungs if "_e4_" in rung.name)
    assert fewer.total_params < base.total_params
    fine = prepare_ladder(dataclasses.replace(options, expert_widths=(2,)))
    (narrow,) = [rung for rung in fine.rungs if rung.name.endswith("_f2")]
    # A quarter as wide, four times as many, as many parameters but for the router's.
    assert (narrow.experts, narrow.granularity, narrow.density) == (32, 32.0, 12 / 32)
    assert narrow.active_params - base.active_params == 24 * 16
    twice = prepare_ladder(dataclasses.replace(options, seeds=2)).rungs
    assert len({rung.plan.trunk_hash for rung in twice}) == len(twice) == 18
    assert {rung.seed for rung in twice} == {0, 1}
    assert twice[1].name == twice[0].name.replace("_s0", "_s1")
    wide = next(rung for rung in ladder.rungs if rung.name == "baseline_w32_l1_e8_k3_t512")
    assert wide.plan.model.attention.n_heads == 2 * base.plan.model.attention.n_heads
    assert wide.granularity == base.granularity


def test_the_largest_runs_are_predicted_before_they_are_trained(options, capsys):
    def phase(name):
        return ladder_command(dataclasses.replace(options, phase=name))

    with pytest.raises(ValueError, match=r"7 runs are not finished, .* train them: --phase small"):
        phase("predict")
    folder = phase("small").folder
    assert "9 runs, 7 to train now" in capsys.readouterr().out
    assert len(table(folder / POINTS_FILE)) == 7
    with pytest.raises(ValueError, match=r"no predicted\.csv; predict the largest runs first"):
        phase("largest")
    phase("predict")
    predicted = (folder / PREDICTED_FILE).read_text()
    assert [row["fitted"] for row in table(folder / PREDICTED_FILE)] == ["7", "7"]
    before = {path: path.stat().st_mtime_ns for path in options.out.glob("trunks/*/result.json")}
    capsys.readouterr()
    phase("all")
    assert "predicted before" in capsys.readouterr().out
    assert (folder / PREDICTED_FILE).read_text() == predicted
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(table(folder / POINTS_FILE)) == 9
    compared = table(folder / COMPARED_FILE)
    assert len(compared) == 2
    for row in compared:
        inside = float(row["low_90"]) <= float(row["loss"]) <= float(row["high_90"])
        assert row["inside"] == str(int(inside))
        assert float(row["error_percent"]) == pytest.approx(100 * (float(row["predicted"]) / float(row["loss"]) - 1))
    (folder / PREDICTED_FILE).unlink()
    with pytest.raises(ValueError, match="is trained already: what is said of it now would be no prediction"):
        phase("predict")


def test_a_ladder_of_a_method_has_its_own_held_out_runs(options):
    ladder = prepare_ladder(dataclasses.replace(options, methods=("baseline", "top_p")))
    held = [rung.method for rung in ladder.rungs if rung.held_out]
    scales = [{rung.scale for rung in ladder.rungs if rung.method == method} for method in ("baseline", "top_p")]
    # What `compare` pairs them by.
    assert len(scales[0]) == 9
    assert scales[0] == scales[1]
    assert sorted(held) == ["baseline"] * 2 + ["top_p"] * 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"expert_widths": (5,)}, "LadderOptions.expert_widths: 5, n_experts would be 12.8"),
        ({"widths": (24,)}, "--widths: 24, n_kv_heads would be 1.5; a multiple of 16 fits"),
        ({"held_out": 9}, "LadderOptions.held_out: 9 of 9 runs, must leave at least one"),
        ({"law": "totl"}, "did you mean 'total'"),
        ({"methods": ("top_q",)}, "no method 'top_q'"),
    ],
)
def test_bad_ladders_are_refused(options, change, said):
    with pytest.raises(ValueError, match=said):
        ladder_command(dataclasses.replace(options, dry_run=True, **change))
