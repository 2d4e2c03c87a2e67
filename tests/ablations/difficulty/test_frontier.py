"""Which trained models are static, and what each is measured at."""

import dataclasses
import types

import numpy as np
import pytest

from ablations.comparison.registry import all_methods
from ablations.difficulty import analysis, frontier, training
from ablations.difficulty.correlations import bounded, document_weights, pooled, resampled_spearman
from ablations.difficulty.frontier import OWN, RANDOM, TRAINED, UNIFORM, Point, measure_frontier, methods_of
from ablations.difficulty.observe import Observed
from ablations.difficulty.training import Study, TrainingOptions, main_plan
from lm.options import ModelOptions


@pytest.fixture
def study():
    names = ("random_k", "static_bar", "static_4")
    return Study(
        k=4,
        tokens=1,
        corpus="corpus",
        models={name: name for name in names},
        runs={name: name for name in names},
        static={"static_4": 4},
        seconds={},
        command="",
        environment={},
    )


def test_static_models_are_known_by_what_they_are_and_not_by_their_names(study, tmp_path, monkeypatch):
    def observe_as(folder, windows, change=None, counts_NL=None):
        return Observed(nats_N=np.ones(1), experts_NL=np.ones((1, 1)))

    class HeldOut:
        text = calibration_BT = None

    monkeypatch.setattr(frontier, "observe_as", observe_as)
    assert methods_of(study) == ["random_k", "static_bar"]
    points = measure_frontier(tmp_path, study, HeldOut(), forced=(2, 8), budgets=(4,))
    assert [(point.weights, point.allocation, point.asked) for point in points] == [
        *(
            (name, *point)
            for name in methods_of(study)
            for point in ((UNIFORM, 2), (UNIFORM, 8), (OWN, 4), (RANDOM, 4))
        ),
        ("static_4", TRAINED, 4),
    ]


def test_several_seeds_are_pooled_and_paired_by_seed():
    """Two seeds of a method: its difference from the static model of its own seed, with the noise of both in it."""
    rng, names = np.random.default_rng(0), ("top_p", "top_p_seed_1", "static_4", "static_4_seed_1")
    study = Study(
        k=4,
        tokens=1,
        corpus="corpus",
        models={},
        runs={name: name for name in names},
        static={"static_4": 4, "static_4_seed_1": 4},
        seconds={},
        command="",
        environment={},
        methods={name: name.removesuffix("_seed_1") for name in names},
        seeds={name: int(name.endswith("_1")) for name in names},
    )
    document, base = np.arange(400) // 10, rng.normal(3, 1, 400)
    # Seeds differ by 0.5, the method is better by 0.1.
    points = [
        Point(
            weights=name,
            allocation=TRAINED if name in study.static else OWN,
            asked=4,
            observed=Observed(
                nats_N=base + 0.5 * study.seed_of(name) - 0.1 * (name not in study.static) + rng.normal(0, 0.05, 400),
                experts_NL=np.full((400, 2), 4),
            ),
        )
        for name in names
    ]
    windows = types.SimpleNamespace(document_N=document, n_bytes_N=np.full(400, 2))
    tokens = types.SimpleNamespace(windows=windows, weights_RD=document_weights(40, 100))
    assert [(point.weights, rival.weights) for point, rival in analysis.pairs_of(study, points)] == [
        ("top_p", "static_4"),
        ("top_p_seed_1", "static_4_seed_1"),
    ]
    assert len(analysis.difference_rows(study, points, tokens)) == 2
    (row,) = analysis.pooled_difference_rows(study, points, tokens)
    assert (row["weights"], row["against"]) == ("top_p, 2 seeds", "static_4")
    assert row["difference"] == pytest.approx(-0.1 / 2 / np.log(2), abs=0.005)
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    assert analysis.labels(study, ["top_p", "top_p_seed_1"])["top_p, 2 seeds"] == ["top_p", "top_p_seed_1"]


def test_a_correlation_over_seeds_holds_their_noise():
    rng = np.random.default_rng(1)
    document, x = np.arange(2000) // 20, rng.normal(size=2000)
    weights = document_weights(100, 200)
    found = [
        resampled_spearman(x, slope * x + rng.normal(size=2000), document, weights_RD=weights)
        for slope in (0.1, 0.2, 0.6)
    ]
    over = pooled(*zip(*found))
    alone = bounded(*found[0])
    assert over.value == pytest.approx(np.mean([value for value, _ in found]))
    # Three seeds that differ so much say little, however many documents there are.
    assert over.high - over.low > 3 * (alone.high - alone.low)


def test_a_method_that_takes_the_name_of_a_static_model_is_refused(monkeypatch):
    method = dataclasses.replace(all_methods()["top_p"], name="static_4")
    monkeypatch.setattr(training, "find_methods", lambda names: [all_methods()["baseline"], method])
    options = TrainingOptions(methods=("static_4",), static=(4,))
    with pytest.raises(ValueError, match="--methods static_4: is also the name of a static model"):
        main_plan(options, None, ModelOptions().config(300))
