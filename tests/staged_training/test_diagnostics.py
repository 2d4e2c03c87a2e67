"""What routers did over training: written once per interval, equal to what the steps dispatched, shown as a person asks
for it."""

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch

from lm.model import LanguageModel
from routing.assignments import Assignments
from routing.diagnostics import RoutingStatistics, routing_statistics
from routing.policies.random_k import RandomK, draw_k
from routing.policies.top_p import TopP
from staged_training.data import TokenBatches
from staged_training.diagnostics import read_diagnostics
from staged_training.loop import train_stage
from staged_training.optimizer import OptimizerConfig
from staged_training.progress import Progress, read_metrics
from staged_training.run import Run
from staged_training.schedule import Schedule, Stage

STEPS, EVERY = 7, 3


@pytest.fixture
def train(corpus, with_policy):
    def run(folder, policy, *, boundary=0):
        model = LanguageModel(with_policy(policy)).init_weights(0)
        stage = Stage(n_batches=STEPS, schedule=Schedule(peak=1e-2, warmup_steps=2, decay_steps=4))
        batches = TokenBatches(corpus.train.tokens, batch_size=2, seq_len=16)
        progress = Progress("test", n_steps=STEPS, every=EVERY, tokens_per_step=32, bytes_per_token=2.0)
        folder.mkdir(exist_ok=True)
        stage_run = Run(
            label="test",
            method="trunk",
            branch_seed=None,
            stage=stage,
            optimizer=OptimizerConfig(kind="adamw", embedding_rate=1.0),
            seed=0,
            boundary=boundary,
            order=tuple(range(STEPS)),
            identity={},
            folder=folder,
        )
        train_stage(stage_run, model, batches, save_every=STEPS, progress=progress)
        return read_diagnostics(folder)

    return run


def test_a_line_per_interval_says_what_the_step_dispatched(train, tmp_path):
    policy = RandomK(k_min=1, k_max=4, k_eval=2)
    lines = train(tmp_path, policy)
    assert [line.step for line in lines] == [3, 6, 7]
    metrics = read_metrics(tmp_path)
    for line in lines:
        assert [layer.layer for layer in line.layers] == [0, 1, 2, 3]
        drawn = [draw_k(policy, seed=0, step=line.step - 1, layer_index=layer) for layer in range(4)]
        assert [layer.asked for layer in line.layers] == [layer.realised for layer in line.layers] == drawn
        assert np.mean(drawn) == pytest.approx(metrics[line.step - 1]["mean_experts"])
        # Every token of a step uses the same number.
        assert [layer.experts_per_token for layer in line.layers] == [(0.0,) * k + (1.0,) for k in drawn]
        assert all((layer.margin is None) == (layer.realised == 4) for layer in line.layers)
        assert all(layer.max_load >= 1 and 0 < layer.entropy <= np.log(4) + 1e-6 for layer in line.layers)


def test_a_budget_is_shown_beside_what_was_used(train, tmp_path):
    for line in train(tmp_path, TopP(target_mean=2.0, cap=4)):
        for layer in line.layers:
            assert layer.asked == 2.0
            assert sum(layer.experts_per_token) == pytest.approx(1, abs=1e-5)
            assert layer.realised == pytest.approx(
                sum(k * share for k, share in enumerate(layer.experts_per_token)), abs=1e-4
            )


def test_counts_of_parts_add_up_to_those_of_the_whole():
    """What several processes send: the mean of their counts gives the figures of the whole batch, also where a part has
    no margin."""
    generator = torch.Generator().manual_seed(0)
    probs_TE = torch.rand(24, 6, generator=generator).softmax(-1)
    expert_TK = probs_TE.topk(6, dim=-1)[1]
    keep_TK = torch.arange(6) < torch.randint(0, 7, (24, 1), generator=generator)
    keep_TK[:8] = True

    def count(rows):
        return routing_statistics(
            Assignments.from_slots(expert_TK[rows], torch.ones_like(probs_TE[rows]), keep_TK[rows], n_experts=6),
            probs_TE[rows],
        )

    whole = count(slice(None))
    parts = [count(slice(start, start + 8)) for start in (0, 8, 16)]
    assert parts[0].margin.isnan()
    together = RoutingStatistics.from_vector(torch.stack([part.to_vector() for part in parts]).mean(0))
    for name in ("mean_experts", "max_load", "dead_experts", "entropy", "margin"):
        assert float(getattr(together, name)) == pytest.approx(float(getattr(whole, name)), rel=1e-5), name
    torch.testing.assert_close(3 * together.histogram, whole.histogram.double())


def test_the_command_shows_a_run_and_writes_all_of_it(train, tmp_path, forked):
    run = tmp_path / "branches" / "one"
    run.parent.mkdir()
    lines = train(run, TopP(target_mean=2.0, cap=4))

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "staged_training", "diagnostics", *map(str, arguments)],
            capture_output=True,
            text=True,
        )

    shown = command(run, "--csv", tmp_path / "all.csv")
    assert shown.returncode == 0, shown.stderr
    by_layer, over_time = shown.stdout.split("\n\n")[:2]
    assert "step 7, by layer" in by_layer
    assert [row.split()[:3] for row in by_layer.splitlines()[2:]] == [
        [str(layer.layer), "2.00", f"{layer.realised:.2f}"] for layer in lines[-1].layers
    ]
    assert [row.split()[0] for row in over_time.splitlines()[2:]] == ["3", "6", "7"]
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4
    assert float(rows[-1]["share_1"]) == lines[-1].layers[-1].experts_per_token[1]
    # A folder above it is refused with the way.
    refused = command(tmp_path)
    assert refused.returncode == 1
    assert f"try {run}" in refused.stderr
