"""RMSNorm and the head's loss in C, with their gradients, against torch in fp64.

Legend: T tokens, D model width, V vocabulary.
"""

import pytest
import torch
from torch.nn import functional

from attention.norm import RMSNorm
from lm.model import IGNORED_TARGET
from triton_kernels.native.library import native
from triton_kernels.native.loss import mean_head_loss

pytestmark = pytest.mark.skipif(native().library is None, reason=native().reason)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_threads(compute):
    """The results, which must have the same bits with one, two and three threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other))
    return results[0]


@pytest.mark.parametrize("shape", [(1, 7), (3, 0, 4), (4, 3, 5), (1000, 128), (2, 500, 4, 33)])
def test_norm(shape):
    x, gain_D, dy = draw(*shape), draw(shape[-1], seed=1), draw(*shape, seed=2)
    norm = RMSNorm(shape[-1])
    norm.weight.data.copy_(gain_D)

    def ours():
        leaf = x.float().requires_grad_()
        y = norm(leaf)
        return y.detach(), *torch.autograd.grad(y, (leaf, norm.weight), dy.float())

    leaves = x.requires_grad_(), gain_D.requires_grad_()
    y = functional.rms_norm(x, gain_D.shape, gain_D, norm.eps)
    for got, expected in zip(by_threads(ours), (y, *torch.autograd.grad(y, leaves, dy))):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("T", "D", "V"), [(1, 4, 5), (61, 33, 100), (500, 64, 1003), (241, 16, 513)])
def test_loss_of_the_head(T, D, V):
    x_TD, head_VD = draw(T, D), draw(V, D, seed=1)
    target_T = torch.randint(V, (T,), generator=torch.Generator().manual_seed(2))
    target_T[T // 2] = IGNORED_TARGET

    def ours():
        leaves = [x.float().requires_grad_() for x in (x_TD, head_VD)]
        loss = mean_head_loss(*leaves, target_T, ignored=IGNORED_TARGET)
        return loss.detach(), *torch.autograd.grad(3 * loss, leaves)

    leaves = [x.clone().requires_grad_() for x in (x_TD, head_VD)]
    losses_T = functional.cross_entropy(
        leaves[0] @ leaves[1].T, target_T, ignore_index=IGNORED_TARGET, reduction="none"
    )
    results = by_threads(ours)
    for got, expected in zip(results, (losses_T.mean(), *torch.autograd.grad(3 * losses_T.mean(), leaves))):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * (expected.abs().max().item() + 1e-12))
    with torch.no_grad():
        assert torch.equal(mean_head_loss(x_TD.float(), head_VD.float(), target_T, ignored=IGNORED_TARGET), results[0])


def test_a_nan_logit_makes_a_nan_loss():
    x_TD = torch.ones(3, 4)
    x_TD[1, 2] = torch.nan
    assert mean_head_loss(x_TD, torch.ones(5, 4), torch.zeros(3, dtype=torch.int64), ignored=IGNORED_TARGET).isnan()
