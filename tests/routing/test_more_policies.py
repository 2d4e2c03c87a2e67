"""ReLU routing, thresholds, skipping, difficulty head, expert choice and groups: each against its definition."""

import dataclasses

import pytest
import torch

from foundation.serialize import kinds
from routing.policies.difficulty_head import DifficultyHead
from routing.policies.expert_choice import ExpertChoice
from routing.policies.null_experts import NullExperts
from routing.policies.relu import ReLU
from routing.policies.skipping import Skipping
from routing.policies.threshold import LearnedThreshold, ScoreThreshold
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.policies.zero_computation import ZeroComputationExperts
from routing.policy import PolicyConfig
from routing.router import NonFiniteScoresError, Router, RouterConfig

D, E, T = 16, 12, 256
BUDGETED = [
    ReLU(target_mean=4.0, cap=E),
    ScoreThreshold(target_mean=4.0, cap=E),
    LearnedThreshold(target_mean=4.0, cap=E),
    DifficultyHead(target_mean=4.0, cap=E),
    Skipping(k=8),
]


def router(policy, **config) -> Router:
    built = Router(RouterConfig(policy=policy, **config), d_model=D, n_experts=E, layer_index=0)
    built.init_weights(torch.Generator().manual_seed(0))
    return built


def tokens(n=T, seed=0, scale=1.0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) * scale


def chosen_TE(routing) -> torch.Tensor:
    mask_TE = torch.zeros(routing.assignments.n_tokens, E, dtype=torch.bool)
    mask_TE[routing.assignments.token_N, routing.assignments.expert_N] = True
    return mask_TE


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("policy", [*BUDGETED, TopK(k=3, n_groups=4, top_groups=2)], ids=repr)
def test_weights_sum_to_one_and_gradients_reach_every_parameter(policy, score):
    built = router(policy, score=score, balance_coefficient=0.0, z_coefficient=0.0)
    routing = built(tokens())
    total_T = torch.zeros(T).index_add(0, routing.assignments.token_N, routing.assignments.weight_N)
    torch.testing.assert_close(total_T, torch.ones(T))
    target_N = torch.arange(routing.assignments.weight_N.shape[0]) % 7.0
    ((routing.assignments.weight_N - target_N) ** 2).sum().backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 1e-3, name


@pytest.mark.parametrize("policy", BUDGETED, ids=repr)
@pytest.mark.parametrize("target", [1.5, 4.0, 6.25])
def test_every_budget_calibrates_exactly_and_is_saved(policy, target):
    built = router(policy).eval()
    x_TD = tokens()
    if isinstance(policy, DifficultyHead):
        # A head that has learnt nothing makes all tokens tie.
        built.get_parameter("policy.head_D").data.copy_(
            torch.randn(D, generator=torch.Generator().manual_seed(5)) * 0.2
        )
    built.calibrate(target)
    assert float(built(x_TD).statistics.mean_experts) == pytest.approx(target, abs=1e-6)
    other = router(policy).eval()
    other.load_state_dict(built.state_dict())
    assert float(other(x_TD).statistics.mean_experts) == pytest.approx(target, abs=1e-6)


@pytest.mark.parametrize("policy", BUDGETED[:4], ids=repr)
def test_controllers_hold_the_target_in_training(policy):
    built = router(policy).train()
    if isinstance(policy, DifficultyHead):
        built.get_parameter("policy.head_D").data.copy_(
            torch.randn(D, generator=torch.Generator().manual_seed(5)) * 0.2
        )
    means = []
    for step in range(40):
        built.begin_step(step, seed=0)
        means.append(float(built(tokens(1024, seed=step, scale=1 + step / 40)).statistics.mean_experts))
        built.after_step()
    assert abs(sum(means[-20:]) / 20 / 4 - 1) < 0.01


def test_relu_uses_positive_logits_and_weighs_by_them():
    built = router(ReLU(target_mean=4.0, cap=E, floor=0), renormalise=False).eval()
    routing, logits_TE = built(tokens()), built.scores(tokens()).logits_TE
    assert torch.equal(chosen_TE(routing), logits_TE > 0)
    rows = routing.assignments
    torch.testing.assert_close(rows.weight_N, logits_TE[rows.token_N, rows.expert_N])


def test_relu_floor_keeps_one_expert_where_all_logits_are_negative():
    built = router(ReLU(target_mean=4.0, cap=E, floor=1)).eval()
    built.policy.budget.threshold.fill_(-100.0)  # type: ignore[union-attr]
    routing = built(tokens())
    assert (routing.assignments.experts_per_token_T() == 1).all()
    torch.testing.assert_close(routing.assignments.weight_N, torch.ones(T))


def test_relu_penalty_swings_around_its_target():
    """Against a steady pull upwards, as the model's loss would give, the coefficient finds the target in the long
    run."""
    built = router(
        ReLU(target_mean=3.0, cap=E, control="penalty", l1_coefficient=1e-3),
        balance_coefficient=0.0,
        z_coefficient=0.0,
        renormalise=False,
    ).train()
    optimizer = torch.optim.SGD(built.parameters(), lr=1.0)
    means = []
    for step in range(400):
        built.begin_step(step, seed=0)
        # A constant feature stands for the bias that real activations carry.
        x_TD = tokens(seed=step)
        x_TD[:, 0] = 1.0
        routing = built(x_TD)
        means.append(float(routing.statistics.mean_experts))
        (routing.losses["l1"] - 0.1 * built.scores(x_TD).logits_TE.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        built.after_step()
    assert max(means[:50]) > 5.0
    assert abs(sum(means[-300:]) / 300 / 3.0 - 1) < 0.15


def test_relu_coefficient_follows_the_dispatched_mean():
    built = router(ReLU(target_mean=2.0, cap=E, control="penalty", l1_coefficient=1e-3)).train()
    coefficient = built.policy.l1_coefficient
    built.begin_step(0, seed=0)
    built(tokens())
    built.after_step()
    assert float(coefficient) == pytest.approx(1.2e-3)
    built.policy.budget.threshold.fill_(-100.0)  # type: ignore[union-attr]
    built(tokens())
    built.after_step()
    assert float(coefficient) == pytest.approx(1e-3)
    built.after_step()
    assert float(coefficient) == pytest.approx(1e-3)


def test_score_threshold_is_one_bar_for_all_tokens():
    built = router(ScoreThreshold(target_mean=4.0, floor=0, cap=E)).eval()
    built.policy.budget.threshold.fill_(-0.1)  # type: ignore[union-attr]
    assert torch.equal(chosen_TE(built(tokens())), built.scores(tokens()).scores_TE >= 0.1)


def test_learned_threshold_compares_each_expert_with_its_own_bar():
    built = router(LearnedThreshold(target_mean=None, floor=0, cap=E), renormalise=False).eval()
    bar_E = built.get_parameter("policy.bar_E")
    bar_E.data.copy_(torch.linspace(-1, 1, E))
    routing, logits_TE = built(tokens()), built.scores(tokens()).logits_TE
    assert torch.equal(chosen_TE(routing), logits_TE >= bar_E)
    rows = routing.assignments
    torch.testing.assert_close(rows.weight_N, (logits_TE - bar_E).sigmoid()[rows.token_N, rows.expert_N])


def test_skipping_drops_what_is_small_beside_the_best():
    built = router(Skipping(k=6, ratio=0.4)).eval()
    scores_TE = built.scores(tokens()).scores_TE
    top_T6 = scores_TE.topk(6, dim=-1)[0]
    expected_TE = (scores_TE >= top_T6[:, -1:]) & (scores_TE >= 0.4 * top_T6[:, :1])
    assert torch.equal(chosen_TE(built(tokens())), expected_TE)


def test_difficulty_head_gives_exp_of_its_prediction():
    built = router(DifficultyHead(target_mean=4.0, floor=1, cap=E)).eval()
    head_D = built.get_parameter("policy.head_D")
    assert (built(tokens()).assignments.experts_per_token_T() == 4).all()
    head_D.data.copy_(torch.randn(D, generator=torch.Generator().manual_seed(1)) * 0.3)
    wanted_T = (4 * (tokens() @ head_D).exp()).floor().clamp(1, E)
    got_T = built(tokens()).assignments.experts_per_token_T()
    assert (got_T == wanted_T).float().mean() > 0.99
    assert got_T.unique().numel() > 3


def test_expert_choice_is_balanced_and_evaluates_as_top_k():
    built = router(ExpertChoice(k=3.0)).train()
    routing = built(tokens())
    assert (routing.statistics.rows_per_expert == round(3.0 * T / E)).all()
    scores_TE, mask_TE = built.scores(tokens()).scores_TE, chosen_TE(routing)
    for e in range(E):
        assert scores_TE[mask_TE[:, e], e].min() >= scores_TE[~mask_TE[:, e], e].max()
    # No token knows of later ones then.
    assert torch.equal(chosen_TE(built.eval()(tokens())), chosen_TE(router(TopK(k=3))(tokens())))


def test_longcats_bias_controller_holds_the_number_of_real_experts_and_balances_them():
    subject = router(
        ZeroComputationExperts(k=8, n_null=8, target_mean=4.0, bias_rate=0.05), selection_bias_step=0.0
    ).train()
    # A common direction that some experts like: without a controller they would be chosen far too often.
    preferred = torch.randn(D, generator=torch.Generator().manual_seed(5))
    means, busiest = [], []
    for step in range(600):
        subject.begin_step(step, seed=0)
        rows_E = subject(tokens(256, seed=step) + preferred).assignments.rows_per_expert_E().float()
        if step == 0:
            expected_E = 0.05 * (4.0 / (8 * E) - rows_E / (8 * 256))
        subject.after_step()
        if step == 0:
            torch.testing.assert_close(subject.selection_bias_E, expected_E)
        means.append(float(rows_E.sum() / 256))
        busiest.append(float(rows_E.max() / rows_E.mean()))
    assert sum(means[-100:]) / 100 == pytest.approx(4.0, rel=0.01)
    assert sum(busiest[-100:]) / 100 < 0.7 * busiest[0]
    assert subject.policy.budget.threshold == 0.0


def test_groups_limit_where_experts_come_from():
    built = router(TopK(k=3, n_groups=4, top_groups=2)).eval()
    mask_TE = chosen_TE(built(tokens()))
    scores_TGE = built.scores(tokens()).scores_TE.unflatten(-1, (4, 3))
    best_TG = scores_TGE.topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1)[1]
    for t in range(T):
        groups = set(best_TG[t].tolist())
        allowed = torch.tensor([e // 3 in groups for e in range(E)])
        assert not (mask_TE[t] & ~allowed).any()
        assert mask_TE[t].sum() == 3
    # All groups allowed is plain top-k.
    assert torch.equal(
        chosen_TE(router(TopK(k=3, n_groups=4, top_groups=4))(tokens())), chosen_TE(router(TopK(k=3))(tokens()))
    )


def asked_for_four(kind):
    """A policy of the folder at four experts in the mean: whatever fields it has, by their usual names. With a budget
    it has eight slots to fill, or as many as there are experts."""
    fields = {field.name for field in dataclasses.fields(kind)}
    usual = {
        "target_mean": 4.0,
        "k": 8 if "target_mean" in fields else 4,
        "cap": E,
        "n_null": 9,
        "n_copy": 3,
        "n_constant": 3,
    }
    usual |= {"k_min": 1, "k_max": 8, "k_eval": 4, "layers": (4,)}
    return kind(**{name: value for name, value in usual.items() if name in fields})


# Found, not listed: a new file of the folder is among them.
IN_FOLDER = [kind for kind in kinds(PolicyConfig).values() if kind.__module__.startswith("routing.policies.")]
EVERY_POLICY = [asked_for_four(kind) for kind in IN_FOLDER]


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=repr)
def test_a_nan_in_what_scores_are_compared_with_stops(policy):
    built = router(policy).train()
    built(tokens())
    limits = {name: x for name, x in built.policy.state_dict(keep_vars=True).items() if x.is_floating_point()}
    assert ("budget.threshold" in limits) == (built.policy.budget is not None)
    for limit in (built.selection_bias_E, *limits.values()):
        before = limit.detach().clone()
        with torch.no_grad():
            limit.reshape(-1)[-1:].fill_(torch.nan)
        with pytest.raises(NonFiniteScoresError, match=r"router of layer 0: .* its biases or its thresholds"):
            built(tokens())
        with torch.no_grad():
            limit.copy_(before)
        built(tokens())


def test_the_policies_are_those_of_the_folder():
    assert {type(policy) for policy in EVERY_POLICY} >= {type(policy) for policy in BUDGETED} | {TopK, ExpertChoice}


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=repr)
def test_every_policy_says_what_is_true_of_it(policy):
    built = router(policy).train()
    built.begin_step(3, seed=0)
    slots = built.decide(built.scores(tokens()))[0]
    experts_T = built(tokens()).assignments.experts_per_token_T()
    assert policy.varies_by_token == (slots.keep_TK is not None)
    assert policy.fixed_experts is None or (experts_T == policy.fixed_experts).all()
    # What training holds, calibration can restore.
    assert policy.held_mean is None or built.policy.budget is not None
    # Every one of these was asked for four, in one way or another; a random number is four or five in the mean.
    assert 4 <= policy.assumed_experts <= 4.5
    assert policy.evaluated_experts == 4
    assert (built.null_weight_ZD is not None) == (policy.null_columns > 0)
    # A policy that looks at the whole batch decides otherwise for a part of it.
    part = router(policy).train()
    part.begin_step(3, seed=0)
    same = torch.equal(part(tokens()[: T // 2]).assignments.experts_per_token_T(), experts_T[: T // 2])
    assert same != policy.needs_whole_batch
    # What command lines show of it.
    summary = (type(policy).__doc__ or "").splitlines()[0]
    assert summary.endswith(".")
    assert len(summary) > 20


@pytest.mark.parametrize("trained", EVERY_POLICY, ids=repr)
def test_weights_trained_with_any_policy_run_under_every_other(trained):
    built = router(trained).train()
    optimizer = torch.optim.SGD(built.parameters(), lr=0.1)
    for step in range(3):
        built.begin_step(step, seed=0)
        routing = built(tokens(seed=step))
        (routing.assignments.weight_N.square().sum() / T + sum(routing.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        built.after_step()
    weight_ED = built.weight_ED.detach().clone()
    for policy in EVERY_POLICY:
        built.set_policy(policy)
        built.eval()
        if built.policy.budget is not None:
            # A difficulty head that has learnt nothing makes all tokens tie, so the number is a whole one.
            built.calibrate(4.0)
        # 240 tokens: experts that choose divide them evenly.
        assert float(built(tokens(240)).statistics.mean_experts) == pytest.approx(4.0, abs=1e-6), policy
    assert torch.equal(built.weight_ED, weight_ED)


@pytest.mark.parametrize(
    "kind", [ReLU, ScoreThreshold, LearnedThreshold, DifficultyHead, TopP, NullExperts], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize(("floor", "cap"), [(0, 3), (1, 3), (2, 5)])
def test_floors_and_caps_hold_for_every_token_at_any_threshold(kind, floor, cap):
    limits = {"k": cap, "n_null": 9} if kind is NullExperts else {"cap": cap}
    built = router(kind(floor=floor, target_mean=2.5, **limits)).eval()
    for threshold, expected in ((-1e4, floor), (1e4, cap)):
        built.policy.budget.threshold.fill_(threshold)  # type: ignore[union-attr]
        assert (built(tokens()).assignments.experts_per_token_T() == expected).all()
    built.policy.budget.threshold.fill_(0.1)  # type: ignore[union-attr]
    experts_T = built(tokens()).assignments.experts_per_token_T()
    assert floor <= experts_T.min() <= experts_T.max() <= cap


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ReLU(target_mean=4.0, cap=E, l1_factor=1.0), "l1_factor > 1"),
        (ReLU(target_mean=4.0, cap=E, control="hope"), "control = 'hope'"),  # type: ignore[arg-type]
        (ReLU(target_mean=9.0, cap=8), "target_mean = 9.0"),
        (ScoreThreshold(target_mean=0.5, cap=8), "target_mean = 0.5"),
        (LearnedThreshold(target_mean=4.0, cap=13), "cap = 13"),
        (DifficultyHead(target_mean=4.0, cap=8, softness=0.0), "softness = 0.0"),
        (Skipping(k=4, ratio=1.5), r"ratio = 1.5 is outside \[0, 1\]"),
        (ExpertChoice(k=13.0), "ExpertChoice.k = 13.0"),
        (ZeroComputationExperts(k=13), "ZeroComputationExperts.k = 13"),
        (ZeroComputationExperts(k=8, target_mean=4.0, null_weighs=False), "null_weighs = False"),
        (ZeroComputationExperts(k=8, target_mean=None, bias_rate=0.1), "bias_rate = 0.1"),
        (TopK(k=3, n_groups=5), "n_groups = 5 does not divide n_experts = 12"),
        (TopK(k=3, n_groups=4, top_groups=5), "top_groups = 5"),
        (TopK(k=7, n_groups=4, top_groups=2), "TopK.k = 7"),
    ],
    ids=repr,
)
def test_bad_policies_are_refused_by_name(policy, message):
    with pytest.raises(ValueError, match=message):
        router(policy)
