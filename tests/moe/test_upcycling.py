"""Upcycling a dense MLP into experts leaves the first forward unchanged."""

import pytest
import torch
import torch.nn.functional as F

from moe.config import MoEConfig
from moe.layer import MoE
from moe.upcycling import upcycle
from routing.router import RouterConfig
from routing.top_k import TopK
from routing.top_p import TopP

D = 24


def layer(n_experts, d_expert, policy, **options) -> MoE:
    router = RouterConfig(policy=policy, **options)
    return MoE(MoEConfig(n_experts=n_experts, d_expert=d_expert, d_shared=8, router=router), d_model=D, layer_index=0)


def dense(d_hidden, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(D, 2 * d_hidden, generator=generator) * D**-0.5, torch.randn(
        d_hidden, D, generator=generator
    ) * d_hidden**-0.5


@pytest.mark.parametrize(("n_experts", "d_expert", "k"), [(4, 32, 1), (4, 32, 3), (16, 8, 4), (16, 8, 8), (40, 4, 16)])
def test_first_forward_is_the_dense_mlp(n_experts, d_expert, k):
    moe = layer(n_experts, d_expert, TopK(k=k))
    w_gate_up, w_down = dense(32)
    upcycle(moe, w_gate_up, w_down, torch.Generator().manual_seed(1))
    x_TD = torch.randn(100, D, generator=torch.Generator().manual_seed(2))
    y_TD, routing = moe(x_TD)
    gate, up = (x_TD @ w_gate_up).chunk(2, dim=-1)
    torch.testing.assert_close(y_TD, (F.silu(gate) * up) @ w_down, rtol=1e-4, atol=1e-5)
    # It is still a mixture: tokens differ in the copies they use.
    assert routing.assignments.expert_N.unique().numel() > k
    y_TD.square().sum().backward()
    assert moe.experts.w_down_EFD.grad is not None
    assert not torch.equal(moe.experts.w_down_EFD.grad[0], moe.experts.w_down_EFD.grad[-1])


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (layer(4, 12, TopK(k=1)), "dense width 32 in segments of d_expert = 12"),
        (layer(6, 8, TopK(k=4)), "does not divide evenly over n_experts = 6"),
        (layer(16, 8, TopK(k=3)), "k a multiple of 4; the policy is TopK"),
        (layer(16, 8, TopP(target_mean=4.0, cap=8)), "the policy is TopP"),
        (layer(16, 8, TopK(k=4), renormalise=False), "must sum to one"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_upcycled_is_refused(moe, message):
    with pytest.raises(ValueError, match=message):
        upcycle(moe, *dense(32), torch.Generator())
    with pytest.raises(ValueError, match="do not fit"):
        upcycle(moe, dense(32)[0][1:], dense(32)[1], torch.Generator())
