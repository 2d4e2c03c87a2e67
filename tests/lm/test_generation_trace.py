"""A trace holds what every token's experts were decided on: decided again it gives what was dispatched, and the
thresholds beside it are those that calibration would set."""

import numpy as np
import pytest
import torch

from attention.config import AttentionConfig
from lm.budget import budget_table, set_budget
from lm.config import BlockOverride, ModelConfig
from lm.generate import generate
from lm.generation_trace import SCORES, TEXT, Recorder, read_generation, read_scores, traced_generation
from lm.model import LanguageModel
from lm.sampling import SamplingConfig
from moe.config import MoEConfig
from routing.policies.difficulty_head import DifficultyHead
from routing.policies.null_experts import NullExperts
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.router import RouterConfig

VARIED = [TopP(target_mean=4.0, cap=12), NullExperts(k=8, n_null=8, target_mean=3.0), DifficultyHead(target_mean=3.0)]


def model_of(policy, lowest=None):
    moe = MoEConfig(n_experts=32, d_expert=8, router=RouterConfig(policy=policy))
    first = None if lowest is None else MoEConfig(n_experts=32, d_expert=8, router=RouterConfig(policy=lowest))
    config = ModelConfig(
        vocab_size=50,
        d_model=32,
        n_layers=2,
        layer_plan="SF",
        attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16, window=4),
        moe=moe,
        blocks=(BlockOverride(moe=first), BlockOverride()),
    )
    model = LanguageModel(config).init_weights(0)
    torch.nn.init.normal_(model.head_VD, std=0.5, generator=torch.Generator().manual_seed(1))
    return model.eval()


def tokens(rows=8):
    return torch.randint(0, 50, (rows, 64), generator=torch.Generator().manual_seed(3))


def recorded(model, folder, n=20, **more):
    with traced_generation(model, folder, prompt=[1, 2, 3], calibration_BT=tokens(), **more) as record:
        for step in generate(model, [1, 2, 3], max_new_tokens=n, sampling=SamplingConfig()):
            record.add(step, "x")
    return read_generation(folder), read_scores(folder)


@pytest.mark.parametrize("policy", [*VARIED, TopK(k=3)], ids=lambda policy: type(policy).__name__)
def test_scores_say_what_was_dispatched(policy, tmp_path):
    (text, experts_NL), scores = recorded(model_of(policy), tmp_path, sampling=SamplingConfig(seed=5), budget=3.0)
    assert scores.keep_NLK.sum(-1).tolist() == experts_NL.tolist()
    # The weights of what is used, and of nothing else.
    assert (scores.weight_NLK[~scores.keep_NLK] == 0).all()
    assert (scores.expert_NLK[scores.keep_NLK] >= 0).all()
    assert scores.logit_NLE.shape == (20, 2, 32)
    assert text.config.n_layers == 2
    assert text.sampling.seed == 5
    assert text.counted_layers == (0, 1)
    assert text.cap == scores.level_NLK.shape[-1]
    assert all(nats > 0 for nats in text.nats)


@pytest.mark.parametrize("policy", VARIED, ids=lambda policy: type(policy).__name__)
def test_the_table_of_budgets_is_what_calibration_sets(policy):
    model = model_of(policy)
    means, threshold_ML = budget_table(model, tokens())
    assert 2.5 in means
    row = threshold_ML[means.index(2.5)]
    set_budget(model, 2.5, tokens())
    thresholds = [float(router.policy.budget.threshold) for router in model.routers()]
    # The first layer's scores do not depend on any budget.
    assert thresholds[0] == pytest.approx(float(row[0]))
    # The second's do, when the layer below it changes: not by much.
    before, row_after = float(row[1]), budget_table(model, tokens())[1][means.index(2.5)]
    assert thresholds[1] == pytest.approx(float(row_after[1]))
    assert thresholds[1] == pytest.approx(before, rel=0.5)


def test_a_layer_with_one_number_for_all_takes_whole_budgets_only():
    means, threshold_ML = budget_table(model_of(TopP(target_mean=4.0, cap=12), lowest=TopK(k=3)), tokens())
    assert means == [float(n) for n in range(1, 13)]
    assert threshold_ML[:, 0].tolist() == means
    assert (threshold_ML[:, 1].diff() >= 0).all()


def test_a_budget_that_changes_on_the_way_is_on_record(tmp_path):
    model = model_of(TopP(target_mean=4.0, cap=12))
    with traced_generation(model, tmp_path, prompt=[1]) as record:
        for place, step in enumerate(generate(model, [1], max_new_tokens=12, sampling=SamplingConfig())):
            record.add(step, "x")
            if place == 5:
                set_budget(model, 8.0, tokens())
    (_, experts_NL), scores = read_generation(tmp_path), read_scores(tmp_path)
    assert len(np.unique(scores.threshold_NL[:6])) == 2 - (scores.threshold_NL[0, 0] == scores.threshold_NL[0, 1])
    assert (scores.threshold_NL[6:] > scores.threshold_NL[0]).all()
    assert scores.keep_NLK.sum(-1).tolist() == experts_NL.tolist()
    # Recorded without text to calibrate on, there is no table.
    assert scores.mean_M.size == 0


def test_the_way_in_one_call_gives_the_same_record():
    """Without hooks a decode step may be one call of C."""
    model = model_of(TopP(target_mean=4.0, cap=12))
    recorder = Recorder(model, prompt=[1, 2, 3])
    for step in generate(model, [1, 2, 3], max_new_tokens=20, sampling=SamplingConfig()):
        recorder.add(step, "x")
        counts = [int(keep.sum()) for keep in recorder.scores().keep_NLK[-1]]
        assert counts == list(step.experts)


def test_nothing_generated_is_a_record_too(tmp_path):
    with traced_generation(model_of(TopK(k=3)), tmp_path, prompt=[1]) as record:
        pass
    assert record.scores().expert_NLK.shape == (0, 2, 1)


def test_a_trace_without_scores_and_a_damaged_one_are_refused(tmp_path):
    recorded(model_of(TopK(k=3)), tmp_path, n=3)
    (tmp_path / SCORES).write_bytes((tmp_path / SCORES).read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        read_scores(tmp_path)
    (tmp_path / SCORES).unlink()
    with pytest.raises(ValueError, match="record it again"):
        read_scores(tmp_path)
    assert (tmp_path / TEXT).is_file()
