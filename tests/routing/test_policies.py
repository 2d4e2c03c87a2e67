"""Each policy against its definition, computed token by token, and what all of them share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.policies.null_experts import NullExperts
from routing.policies.random_k import RandomK, draw_k
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.router import NonFiniteScoresError, Router, RouterConfig

D, E = 16, 12
POLICIES = [
    TopK(k=3),
    TopP(p=0.5, target_mean=None, floor=1, cap=8),
    TopP(p=0.5, target_mean=4.0, floor=2, cap=E),
    NullExperts(k=6, n_null=9, target_mean=4.0, floor=0),
    NullExperts(k=6, n_null=9, target_mean=4.0, floor=1, null_weighs=False),
    RandomK(k_min=1, k_max=5, k_eval=3),
]


def router(policy, *, seed=0, **config) -> Router:
    built = Router(RouterConfig(policy=policy, **config), d_model=D, n_experts=E, layer_index=0)
    built.init_weights(torch.Generator().manual_seed(seed))
    return built


def tokens(n=64, seed=0, scale=1.0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) * scale


def chosen(routing) -> list[set[int]]:
    sets: list[set[int]] = [set() for _ in range(routing.assignments.n_tokens)]
    for t, e in zip(routing.assignments.token_N.tolist(), routing.assignments.expert_N.tolist()):
        sets[t].add(e)
    return sets


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_weights_sum_to_one_over_the_chosen(policy, score):
    routing = router(policy, score=score)(tokens())
    total_T = torch.zeros(64).index_add(0, routing.assignments.token_N, routing.assignments.weight_N)
    if isinstance(policy, NullExperts) and policy.null_weighs:
        assert (total_T <= 1 + 1e-6).all()
        assert (total_T < 0.99).any()
    else:
        torch.testing.assert_close(total_T, (routing.assignments.experts_per_token_T() > 0).float())


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_without_renormalisation_the_weights_are_the_scores(policy):
    built = router(policy, renormalise=False)
    routing = built(tokens())
    scores = built.scores(tokens()).scores_TE
    torch.testing.assert_close(
        routing.assignments.weight_N, scores[routing.assignments.token_N, routing.assignments.expert_N]
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_gradients_reach_every_router_weight(policy, score):
    built = router(policy, score=score, balance_coefficient=0.0, z_coefficient=0.0)
    routing = built(tokens())
    target_N = torch.arange(routing.assignments.weight_N.shape[0]) % 7.0
    ((routing.assignments.weight_N - target_N) ** 2).sum().backward()
    for name, parameter in built.named_parameters():
        if (
            name == "null_weight_ZD"
            and isinstance(policy, NullExperts)
            and not policy.null_weighs
            and score == "sigmoid"
        ):
            # Nothing but the selection reads null columns here.
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name == "null_weight_ZD" and isinstance(policy, NullExperts) and not policy.null_weighs:
            # Renormalisation over the real experts cancels the softmax's denominator.
            torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter.grad), atol=1e-4, rtol=0)
        else:
            assert parameter.grad.abs().sum() > 1e-3, name


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 10**6), st.floats(0.05, 0.95), st.integers(0, 3), st.integers(3, E), st.sampled_from([0.3, 1.0, 4.0])
)
def test_top_p_takes_the_smallest_set_whose_mass_exceeds_p(seed, p, floor, cap, sharpness):
    built = router(TopP(p=p, target_mean=None, floor=floor, cap=cap), seed=seed).eval()
    x = tokens(16, seed, sharpness)
    probs_TE = built.scores(x).probs_TE.detach()
    for t, experts in enumerate(chosen(built(x))):
        ranked = probs_TE[t].sort(descending=True)
        smallest = next(
            (n for n in range(1, E + 1) if float(ranked.values[:n].sum()) > built.policy.budget.threshold), E
        )  # type: ignore[union-attr]
        # Within rounding of the threshold either neighbour is right.
        near = (
            abs(float(ranked.values[:smallest].sum()) - p) < 1e-5
            or abs(float(ranked.values[: smallest - 1].sum()) - p) < 1e-5
        )
        if not near:
            assert len(experts) == min(max(smallest, floor), cap)
            assert experts == set(ranked.indices[: len(experts)].tolist())


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.integers(1, 10),
    st.floats(-0.1, 0.1),
    st.sampled_from(["softmax", "sigmoid"]),
)
def test_null_experts_are_top_k_over_both_kinds_of_columns(seed, k, n_null, bias, score):
    built = router(
        NullExperts(k=k, n_null=n_null, target_mean=None, floor=0), seed=seed, score=score, renormalise=False
    ).eval()
    built.policy.budget.threshold.fill_(-bias)  # type: ignore[union-attr]
    x = tokens(16, seed)
    scores = built.scores(x)
    assert scores.null_TZ is not None
    both = torch.cat([scores.scores_TE, scores.null_TZ + bias], dim=-1)
    expected = [set(row[row < E].tolist()) for row in both.topk(k, dim=-1)[1]]
    assert chosen(built(x)) == expected


def test_null_weights_are_shares_of_all_chosen_columns():
    built = router(NullExperts(k=6, n_null=9, target_mean=None, floor=0)).eval()
    routing, scores = built(tokens()), built.scores(tokens())
    assert scores.null_TZ is not None
    total_T = torch.cat([scores.scores_TE, scores.null_TZ], dim=-1).topk(6, dim=-1)[0].sum(dim=-1)
    rows = routing.assignments
    torch.testing.assert_close(rows.weight_N, scores.scores_TE[rows.token_N, rows.expert_N] / total_T[rows.token_N])


def test_renormalised_top_k_is_softmax_after_the_choice():
    built = router(TopK(k=3))
    chosen_T3 = built.scores(tokens()).logits_TE.topk(3, dim=-1)
    rows = built(tokens()).assignments
    expected_TE = torch.zeros(64, E).scatter(1, chosen_T3[1], chosen_T3[0].softmax(dim=-1))
    torch.testing.assert_close(rows.weight_N, expected_TE[rows.token_N, rows.expert_N])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_selection_bias_selects_and_never_weighs(score):
    built = router(TopK(k=2), renormalise=False, score=score)
    built.selection_bias_E[5] = 10.0
    routing, scores = built(tokens()), built.scores(tokens())
    assert all(5 in experts for experts in chosen(routing))
    rows = routing.assignments
    torch.testing.assert_close(rows.weight_N, scores.scores_TE[rows.token_N, rows.expert_N])


def test_random_k_is_a_function_of_seed_step_and_layer():
    config = RandomK(k_min=1, k_max=10, k_eval=4)
    draws = [
        draw_k(config, seed=s, step=t, layer_index=layer) for s in range(3) for t in range(40) for layer in range(3)
    ]
    again = [
        draw_k(config, seed=s, step=t, layer_index=layer) for s in range(3) for t in range(40) for layer in range(3)
    ]
    assert draws == again
    assert set(draws) == set(range(1, 11))
    per_layer = [[draw_k(config, seed=0, step=t, layer_index=layer) for t in range(40)] for layer in range(3)]
    assert per_layer[0] != per_layer[1] != per_layer[2]
    shared = RandomK(k_min=1, k_max=10, k_eval=4, per="step")
    assert len({draw_k(shared, seed=0, step=7, layer_index=layer) for layer in range(8)}) == 1


def test_random_k_draws_in_training_and_is_fixed_in_evaluation():
    config = RandomK(k_min=1, k_max=10, k_eval=4)
    built = router(config).train()
    for step in range(5):
        built.begin_step(step, seed=3)
        expected = draw_k(config, seed=3, step=step, layer_index=0)
        assert (built(tokens()).assignments.experts_per_token_T() == expected).all()
    built.eval()
    assert (built(tokens()).assignments.experts_per_token_T() == 4).all()


@pytest.mark.parametrize("trained", POLICIES, ids=repr)
def test_any_router_runs_under_every_policy(trained):
    built = router(trained).eval()
    for policy in [
        TopK(k=1),
        TopK(k=4),
        TopP(p=0.3, target_mean=None, cap=E),
        RandomK(k_min=1, k_max=5, k_eval=2),
        trained,
    ]:
        built.set_policy(policy)
        routing = built(tokens())
        # Columns that a policy does not know must not change what it does.
        if not isinstance(policy, NullExperts):
            plain = router(policy).eval()
            plain.weight_ED.data.copy_(built.weight_ED)
            torch.testing.assert_close(plain(tokens()).assignments.weight_N, routing.assignments.weight_N)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (TopK(k=13), r"TopK.k = 13 is outside \[1, 12\]"),
        (TopK(k=0), r"TopK.k = 0 is outside"),
        (TopP(p=1.0), r"TopP.p = 1.0 is outside \(0, 1\)"),
        (TopP(p=0.0), r"TopP.p = 0.0 is outside"),
        (TopP(p=0.5, floor=5, cap=4, target_mean=None), r"floor = 5 must lie in \[0, cap = 4\]"),
        (TopP(p=0.5, cap=8, target_mean=9.0), r"target_mean = 9.0 .* out of reach: floor = 1, cap = 8"),
        (TopP(p=0.5, cap=8, floor=4, target_mean=3.0), r"target_mean = 3.0 .* out of reach: floor = 4"),
        (
            TopP(cap=8, floor=0, target_mean=0.5),
            r"TopP.target_mean = 0.5 is out of reach with floor = 0: .* first expert",
        ),
        (TopP(p=0.5, cap=13, target_mean=None), r"cap = 13 is outside"),
        (TopP(cap=8, target_mean=4.0, rate=0.0), r"rate = 0.0 is outside \(0, 1\]"),
        (NullExperts(k=13), r"NullExperts.k = 13 is outside"),
        (NullExperts(k=8, n_null=0), r"n_null = 0 must be at least 1"),
        (NullExperts(k=8, n_null=2, target_mean=5.0), r"target_mean = 5.0 is out of reach: with n_null = 2"),
        (RandomK(k_min=1, k_max=13, k_eval=3), r"RandomK.k_max = 13 is outside"),
        (RandomK(k_min=5, k_max=4, k_eval=3), r"k_min = 5 exceeds k_max = 4"),
        (RandomK(k_min=1, k_max=4, k_eval=3, per="token"), r"per = 'token' is not one of"),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_bad_policies_are_refused_by_name(policy, message):
    with pytest.raises(ValueError, match=message):
        router(policy)
    with pytest.raises(ValueError, match=message):
        router(TopK(k=2)).set_policy(policy)


def test_unknown_score_policy_and_other_null_columns_are_refused():
    with pytest.raises(ValueError, match=r"score = 'tanh' is not one of"):
        router(TopK(k=2), score="tanh")
    with pytest.raises(ValueError, match=r"'top_k' is not a routing policy; known: DifficultyHead, DocumentPool"):
        router(TopK(k=2)).set_policy("top_k")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'top_k' is not a routing policy; known: DifficultyHead, DocumentPool"):
        router("top_k")
    with pytest.raises(ValueError, match="n_null = 9, but this router has 5 null columns"):
        router(NullExperts(k=6, n_null=5, target_mean=4.0)).set_policy(NullExperts(k=6, n_null=9, target_mean=4.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    x = tokens()
    x[7, 3] = bad
    with pytest.raises(NonFiniteScoresError, match="router of layer 0: scores are not finite"):
        router(TopK(k=2))(x)
