"""Null columns that join weights trained without them leave their function as it is, and learn to change it.

Legend: T tokens, D model width, E experts, N rows.
"""

import pytest
import torch

from routing.policies.null_experts import NullExperts
from routing.policies.zero_computation import ZeroComputationExperts
from routing.router import Router, RouterConfig

D, E, T = 16, 24, 256
START = 1e-3
POLICIES = [
    NullExperts(k=10, n_null=12, target_mean=6.0, start=START),
    ZeroComputationExperts(k=10, n_null=12, target_mean=6.0, start=START),
]


def router(policy) -> Router:
    built = Router(RouterConfig(policy=policy), d_model=D, n_experts=E, layer_index=0)
    built.init_weights(torch.Generator().manual_seed(0))
    built.calibrate(6.0)
    return built


def tokens() -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_first_weights_are_the_softmax_of_the_chosen(policy):
    built = router(policy)
    routing = built(tokens())
    rows = routing.assignments
    assert rows.experts_per_token_T().float().mean() == pytest.approx(6, abs=0.01)
    probs_N = routing.probs_TE[rows.token_N, rows.expert_N]
    total_T = torch.zeros(T).index_add(0, rows.token_N, probs_N)
    torch.testing.assert_close(rows.weight_N, probs_N / total_T[rows.token_N], rtol=5e-2, atol=0)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_gradient_reaches_what_joined_and_the_gain_learns(policy):
    built = router(policy)
    own = [name for name, _ in built.named_parameters() if name.startswith("policy.") or "null" in name]
    assert "policy.gain.root_1" in own
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-2)
    rows_target_E = torch.randn(E, generator=torch.Generator().manual_seed(2))
    for step in range(20):
        rows = built(tokens()).assignments
        y_T = torch.zeros(T).index_add(0, rows.token_N, rows.weight_N * rows_target_E[rows.expert_N])
        # Wants less of what the experts give: null columns have that to offer, other weights can get nearer to it.
        loss = (y_T - 0.1 * torch.arange(T) / T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for name in own:
            gradient = built.get_parameter(name).grad
            assert gradient is not None, name
            assert gradient.isfinite().all(), name
            assert gradient.abs().max() > 0, (step, name)
        optimizer.step()
    assert abs(built.get_parameter("policy.gain.root_1").item() - START**0.5) > 0.05


@pytest.mark.parametrize("policy", [NullExperts(), ZeroComputationExperts()], ids=repr)
def test_without_a_start_there_is_no_gain(policy):
    built = Router(RouterConfig(policy=policy), d_model=D, n_experts=80, layer_index=0)
    assert not [name for name, _ in built.named_parameters() if "gain" in name]


def test_a_start_outside_of_its_range_is_refused():
    for start in (0.0, -1.0, 2.0):
        with pytest.raises(ValueError, match=f"start = {start}"):
            router(NullExperts(k=10, n_null=12, target_mean=6.0, start=start))
    with pytest.raises(ValueError, match=r"NullExperts\.start = 0\.5: null columns that never weigh"):
        router(NullExperts(k=10, n_null=12, target_mean=6.0, null_weighs=False, start=0.5))
