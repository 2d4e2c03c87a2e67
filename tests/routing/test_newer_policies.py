"""Expert thresholds, relative thresholds, columns of three kinds or that stand apart: each against its definition.

Legend: T tokens, D model width, E experts, Z null columns, N rows.
"""

import pytest
import torch

from moe.config import MoEConfig
from moe.layer import MoE
from routing.policies.expert_threshold import ExpertThreshold
from routing.policies.moe_plus_plus import MoEPlusPlus
from routing.policies.null_experts import NullExperts
from routing.policies.relative_threshold import RelativeThreshold
from routing.policies.top_k import TopK
from routing.router import Router, RouterConfig

D, E, T = 16, 12, 256


def router(policy, **config) -> Router:
    built = Router(RouterConfig(policy=policy, **config), d_model=D, n_experts=E, layer_index=0)
    built.init_weights(torch.Generator().manual_seed(0))
    return built


def tokens(n=T, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def chosen_TE(routing) -> torch.Tensor:
    mask_TE = torch.zeros(routing.assignments.n_tokens, E, dtype=torch.bool)
    mask_TE[routing.assignments.token_N, routing.assignments.expert_N] = True
    return mask_TE


def step(built, number, n=T):
    built.begin_step(number, seed=0)
    routing = built(tokens(n, seed=number))
    built.after_step()
    return routing


def test_the_first_bars_are_those_of_expert_choice():
    """After one step every expert has computed, with its new bar, just its share of that step's tokens."""
    built = router(ExpertThreshold(k=3.0, floor=0, cap=E)).train()
    step(built, 5)
    built.eval()
    mask_TE = chosen_TE(built(tokens(seed=5)))
    assert (mask_TE.sum(dim=0) == 3 * T // E).all()
    scores_TE = built.scores(tokens(seed=5)).scores_TE
    best_TE = torch.zeros_like(mask_TE).scatter(0, scores_TE.topk(3 * T // E, dim=0)[1], True)
    assert torch.equal(mask_TE, best_TE)


def test_expert_thresholds_are_causal_balance_and_hold_the_mean():
    built = router(ExpertThreshold(k=3.0, floor=0, cap=E, decay=0.9)).train()
    # Scores that a plain top-k would send to two experts.
    built.weight_ED.data[:2] *= 3
    for number in range(40):
        step(built, number, 1024)
    built.eval()
    x_TD = tokens(4096, seed=100)
    whole_TE = chosen_TE(built(x_TD))
    assert torch.equal(whole_TE[:64], chosen_TE(built(x_TD[:64])))
    load_E = whole_TE.float().mean(dim=0) * E / 3
    assert 0.85 < load_E.min() <= load_E.max() < 1.15
    assert whole_TE.sum(dim=1).float().mean() == pytest.approx(3.0, rel=0.03)
    # Some need more than others, which is the point.
    assert whole_TE.sum(dim=1).float().std() > 0.5


def test_bars_are_a_plain_mean_first_and_then_a_moving_one():
    built, decay = router(ExpertThreshold(k=3.0, cap=E, decay=0.75)).train(), 0.75
    expected_E = torch.zeros(E)
    for number in range(8):
        scores_TE = built.scores(tokens(seed=number)).scores_TE.detach()
        fair_E = scores_TE.sort(dim=0, descending=True)[0][3 * T // E - 1]
        expected_E += max(1 / (number + 1), 1 - decay) * (fair_E - expected_E)
        step(built, number)
    torch.testing.assert_close(built.policy.bar_E, expected_E)  # type: ignore[arg-type]


def test_bars_do_not_depend_on_how_a_step_is_cut():
    whole, parts = (router(ExpertThreshold(k=3.0, cap=E)).train() for _ in range(2))
    step(whole, 0)
    parts.begin_step(0, seed=0)
    for part_TD in tokens(seed=0).split(100):
        parts(part_TD)
    parts.after_step()
    assert torch.equal(whole.policy.bar_E, parts.policy.bar_E)  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("floor", [0, 3])
def test_relative_threshold_is_its_formula(ratio, floor):
    built = router(RelativeThreshold(target_mean=4.0, floor=floor, cap=8, ratio=ratio)).eval()
    scores_TE = built.scores(tokens()).scores_TE
    ranked_TE, order_TE = scores_TE.sort(dim=-1, descending=True)
    passes_TE = ranked_TE >= ratio * ranked_TE[:, :1]
    passes_TE[:, :floor] = True
    passes_TE[:, 8:] = False
    expected_TE = torch.zeros_like(passes_TE).scatter(1, order_TE, passes_TE)
    assert torch.equal(chosen_TE(built(tokens())), expected_TE)


def test_relative_threshold_holds_its_mean_in_training():
    built = router(RelativeThreshold(target_mean=4.0, cap=E)).train()
    means = [float(step(built, number, 1024).statistics.mean_experts) for number in range(40)]
    assert abs(sum(means[-20:]) / 20 / 4 - 1) < 0.01


def test_columns_of_three_kinds_are_their_formula():
    """y = sum of real experts + (copies) x + sum over constants of their share of x and of their vector, each by its
    renormalised score."""
    policy = MoEPlusPlus(k=6, n_null=9, n_copy=2, n_constant=3, target_mean=None, floor=0)
    layer = MoE(
        MoEConfig(n_experts=E, d_expert=8, d_shared=8, router=RouterConfig(policy=policy, scaling=1.5)),
        d_model=D,
        layer_index=0,
    )
    layer.init_weights(torch.Generator().manual_seed(0))
    layer.eval()
    generator = torch.Generator().manual_seed(1)
    for name in ("constant_CD", "mix_CD"):
        layer.router.policy.get_parameter(name).data.normal_(generator=generator)
    x_TD = tokens(64)
    y_TD, routing = layer(x_TD)
    scores = layer.router.scores(x_TD)
    assert scores.null_TZ is not None
    both = torch.cat([scores.scores_TE, scores.null_TZ], dim=-1)
    kept = torch.zeros_like(both).scatter(1, both.topk(6, dim=-1)[1], 1.0) * both
    weight = 1.5 * kept / kept.sum(dim=-1, keepdim=True)
    assert layer.shared_expert is not None
    expected_TD = layer.experts(x_TD, routing.assignments) + layer.shared_expert(x_TD)
    expected_TD = expected_TD + weight[:, E + 4 : E + 6].sum(dim=1, keepdim=True) * x_TD
    policy_module = layer.router.policy
    for number, (vector_D, mix_D) in enumerate(zip(policy_module.constant_CD, policy_module.mix_CD)):  # type: ignore[arg-type]
        share_T1 = torch.stack([x_TD @ mix_D, torch.zeros(64)], dim=-1).softmax(dim=-1)[:, :1]
        expected_TD = expected_TD + weight[:, E + 6 + number, None] * (share_T1 * x_TD + (1 - share_T1) * vector_D)
    torch.testing.assert_close(y_TD, expected_TD)
    (y_TD**2).sum().backward()
    for name, parameter in layer.router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_columns_that_stand_apart_leave_a_whole_budget_as_it_was(renormalise, score):
    """All k slots real: the experts and the weights of top-k, whatever the null columns weigh."""
    built = router(TopK(k=5), renormalise=renormalise, score=score).eval()
    expected = built(tokens()).assignments
    built.set_policy(NullExperts(k=5, n_null=5, target_mean=3.0, apart=True))
    built.null_weight_ZD.data.normal_(std=D**-0.5, generator=torch.Generator().manual_seed(2))  # type: ignore[union-attr]
    built.eval().calibrate(5.0)
    got = built(tokens()).assignments
    assert torch.equal(got.expert_N, expected.expert_N)
    torch.testing.assert_close(got.weight_N, expected.weight_N)
    # Among the others, columns of a softmax take their share of it.
    built.set_policy(NullExperts(k=5, n_null=5, target_mean=3.0))
    built.eval().calibrate(5.0)
    same = torch.allclose(built(tokens()).assignments.weight_N, expected.weight_N)
    assert same == (renormalise or score == "sigmoid")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ExpertThreshold(k=4.0, cap=E, decay=1.0), r"decay = 1.0 is outside \[0, 1\)"),
        (ExpertThreshold(k=9.0, cap=8), "target_mean = 9.0"),
        (RelativeThreshold(target_mean=4.0, cap=E, ratio=1.5), r"ratio = 1.5 is outside \[0, 1\]"),
        (RelativeThreshold(target_mean=1.0, floor=2, cap=E), "target_mean = 1.0"),
        (MoEPlusPlus(k=8, n_null=9, n_copy=6, n_constant=6, target_mean=4.0), "n_copy = 6 and n_constant = 6"),
        (MoEPlusPlus(k=8, n_null=9, target_mean=4.0, null_weighs=False), "null_weighs = False"),
    ],
    ids=repr,
)
def test_bad_policies_are_refused_by_name(policy, message):
    with pytest.raises(ValueError, match=message):
        router(policy)
