"""Plain top-k in one kernel (here in the interpreter) is the policy's own decision: experts, weights, losses and
gradients."""

import pytest
import torch

from routing.router import Router, RouterConfig
from routing.top_k import TopK
from routing.top_p import TopP

T, D, E = 19, 8, 11


def forward(config: RouterConfig):
    """Dispatched rows, losses and the gradients of a training step; the selection bias is large enough to decide."""
    router = Router(config, d_model=D, n_experts=E, layer_index=0)
    router.selection_bias_E.copy_(0.3 * torch.randn(E, generator=torch.Generator().manual_seed(1)))
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(2)).requires_grad_()
    routing = router(x_TD)
    rows = routing.assignments
    dweight_N = torch.randn(rows.weight_N.shape, generator=torch.Generator().manual_seed(3))
    ((rows.weight_N * dweight_N).sum() + sum(routing.losses.values())).backward()
    assert x_TD.grad is not None
    assert router.weight_ED.grad is not None
    return (rows.token_N, rows.expert_N, rows.expert_offsets, router.step_rows_E), (
        rows.weight_N,
        x_TD.grad,
        router.weight_ED.grad,
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_the_kernel_decides_as_the_policy_does(score, renormalise, monkeypatch):
    config = RouterConfig(policy=TopK(k=3), score=score, renormalise=renormalise, selection_bias_step=1e-3)
    decided, computed = forward(config)
    monkeypatch.setattr(Router, "is_plain_top_k_on_gpu", lambda self, scores: True)
    # What is compared is the kernel, not the policy once more.
    monkeypatch.setattr("routing.top_k.TopKPolicy.select", None)
    decided_by_kernel, computed_by_kernel = forward(config)
    assert all(torch.equal(mine, its) for mine, its in zip(decided, decided_by_kernel))
    for mine, its in zip(computed, computed_by_kernel):
        torch.testing.assert_close(its, mine, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("policy", "dtype", "expected"),
    [
        (TopK(k=2), torch.float32, True),
        (TopK(k=2), torch.bfloat16, True),
        (TopK(k=2), torch.float64, False),
        (TopK(k=2, n_groups=4, top_groups=2), torch.float32, False),
        (TopK(k=2, n_groups=4, top_groups=4), torch.float32, True),
        (TopP(target_mean=2.0, cap=4), torch.float32, False),
    ],
)
def test_which_routers_use_it(policy, dtype, expected, monkeypatch):
    router = Router(RouterConfig(policy=policy), d_model=D, n_experts=12, layer_index=0)
    scores = router.scores(torch.zeros(2, D, dtype=dtype))
    assert not router.is_plain_top_k_on_gpu(scores)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert router.is_plain_top_k_on_gpu(scores) == expected
