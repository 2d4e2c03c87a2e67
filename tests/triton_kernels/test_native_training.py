"""RMSNorm, projections, a router's decision and the head's loss in C, with their gradients, against torch in fp64.

Legend: T tokens, D model width, V vocabulary, I and O the widths of a weight, E experts, K slots per token.
"""

import pytest
import torch
from torch.nn import functional

from attention.norm import RMSNorm
from lm.model import IGNORED_TARGET
from triton_kernels.experts.expert_slots import RULES, SCORES, router_scores, sort_slots
from triton_kernels.native.library import native
from triton_kernels.native.loss import head_losses
from triton_kernels.native.projection import project

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


@pytest.mark.parametrize(("T", "n_in", "n_out"), [(9, 1, 1), (61, 33, 100), (500, 64, 130), (241, 7, 16)])
@pytest.mark.parametrize("asked", [(True, True), (True, False), (False, True)])
def test_projection(T, n_in, n_out, asked):
    x_TI, weight_OI, dy_TO = draw(T, n_in), draw(n_out, n_in, seed=1), draw(T, n_out, seed=2)

    def ours():
        leaves = [x.float().requires_grad_(needed) for x, needed in zip((x_TI, weight_OI), asked)]
        y_TO = project(leaves[0], leaves[1])
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return y_TO.detach(), *torch.autograd.grad(y_TO, wanted, dy_TO.float())

    gradients = [each for each, needed in zip((dy_TO @ weight_OI, dy_TO.T @ x_TI), asked) if needed]
    for got, expected in zip(by_threads(ours), (x_TI @ weight_OI.T, *gradients), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


def test_projection_of_nothing_has_no_gradient():
    x_TI, weight_OI = torch.empty(2, 0, 5, requires_grad=True), torch.ones(3, 5, requires_grad=True)
    y_TO = project(x_TI, weight_OI)
    assert y_TO.shape == (2, 0, 3)
    y_TO.sum().backward()
    assert x_TI.grad is not None
    assert weight_OI.grad is not None
    assert not weight_OI.grad.any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalise", [True, False])
def test_routing_of_many_tokens(rule, score, renormalise):
    T, E, k = 150, 13, 5
    logits_TE, bias_E, d_weight_N = draw(T, E), 0.1 * draw(E, seed=1), draw(T * k, seed=2)
    threshold = torch.tensor({"top_k": 0.0, "top_p": 0.4, "threshold": -0.7 if score == "sigmoid" else -1.5 / E}[rule])
    options = {"k": k, "rule": rule, "score": score, "renormalise": renormalise}

    def rows(logits_TE, backend):
        slots = router_scores(logits_TE, bias_E.to(logits_TE.dtype), threshold, **options, backend=backend)
        keep_TK = None if rule == "top_k" else slots.keep_TK
        sorted_rows = sort_slots(slots.expert_TK, slots.weight_TK, keep_TK, n_experts=E, padded=False, backend=backend)
        n_rows = len(sorted_rows.weight_N)
        (gradient_TE,) = torch.autograd.grad(sorted_rows.weight_N, logits_TE, d_weight_N[:n_rows].to(logits_TE.dtype))
        return (*sorted_rows[1:], sorted_rows.weight_N.detach(), gradient_TE)

    results = by_threads(lambda: rows(logits_TE.float().requires_grad_(), "native"))
    expected = rows(logits_TE.clone().requires_grad_(), "torch")
    for got, right in zip(results, expected, strict=True):
        torch.testing.assert_close(got.to(right.dtype), right, rtol=1e-5, atol=1e-6)
    assert len(expected[0]) == T * k if rule == "top_k" else len(expected[0]) < T * k


def test_equal_scores_go_to_the_lower_expert_and_a_nan_to_the_first_slot():
    logits_TE = torch.zeros(2, 6)
    logits_TE[1, 4] = torch.nan
    bias_E = torch.tensor([0.0, -0.0, -torch.inf, 0.0, 0.0, 0.0])
    slots = router_scores(logits_TE, bias_E, torch.tensor(0.0), k=6, score="sigmoid", backend="native")
    assert slots.expert_TK.tolist() == [[0, 1, 3, 4, 5, 2], [4, 0, 1, 3, 5, 2]]
    assert slots.weight_TK[1].isnan().all()


@pytest.mark.parametrize(("T", "D", "V"), [(1, 4, 5), (61, 33, 100), (500, 64, 1003), (241, 16, 513)])
def test_loss_of_the_head(T, D, V):
    x_TD, head_VD = draw(T, D), draw(V, D, seed=1)
    target_T = torch.randint(V, (T,), generator=torch.Generator().manual_seed(2))
    target_T[T // 2] = IGNORED_TARGET

    def ours():
        leaves = [x.float().requires_grad_() for x in (x_TD, head_VD)]
        loss, loss_T = head_losses(*leaves, target_T, ignored=IGNORED_TARGET)
        return loss.detach(), loss_T, *torch.autograd.grad(3 * loss, leaves)

    leaves = [x.clone().requires_grad_() for x in (x_TD, head_VD)]
    losses_T = functional.cross_entropy(
        leaves[0] @ leaves[1].T, target_T, ignore_index=IGNORED_TARGET, reduction="none"
    )
    results = by_threads(ours)
    right = losses_T.mean(), losses_T.detach(), *torch.autograd.grad(3 * losses_T.mean(), leaves)
    for got, expected in zip(results, right, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * (expected.abs().max().item() + 1e-12))
    with torch.no_grad():
        again = head_losses(x_TD.float(), head_VD.float(), target_T, ignored=IGNORED_TARGET)
    assert all(torch.equal(x, y) for x, y in zip(again, results))


def test_a_nan_logit_makes_a_nan_loss():
    x_TD = torch.ones(3, 4)
    x_TD[1, 2] = torch.nan
    loss, loss_T = head_losses(x_TD, torch.ones(5, 4), torch.zeros(3, dtype=torch.int64), ignored=IGNORED_TARGET)
    assert loss.isnan()
    assert loss_T.isnan().tolist() == [False, True, False]
