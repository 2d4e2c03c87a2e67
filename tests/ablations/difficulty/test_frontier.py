"""Which trained models are static, and what each is measured at."""

import dataclasses

import numpy as np
import pytest

from ablations.comparison.registry import all_methods
from ablations.difficulty import frontier, training
from ablations.difficulty.frontier import OWN, RANDOM, TRAINED, UNIFORM, measure_frontier, methods_of
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
    def observe_as(folder, windows, change=None, permute_seed=None):
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


def test_a_method_that_takes_the_name_of_a_static_model_is_refused(monkeypatch):
    method = dataclasses.replace(all_methods()["top_p"], name="static_4")
    monkeypatch.setattr(training, "find_methods", lambda names: [all_methods()["baseline"], method])
    options = TrainingOptions(methods=("static_4",), static=(4,))
    with pytest.raises(ValueError, match="--methods static_4: is also the name of a static model"):
        main_plan(options, None, ModelOptions().config(300))
