"""The adapter of grouped_gemm without that package: a stand-in with its documented signature checks what it is
given."""

import sys
import types

import pytest
import torch

from moe.backends import BACKENDS, choose_backend
from routing.assignments import Assignments


class StrictGmm(torch.autograd.Function):
    """Refuses what the package refuses; leaves NaN in the gradient of an expert without rows, the worst that
    `torch.empty` can hold."""

    @staticmethod
    def forward(ctx, a, b, batch_sizes):
        assert a.ndim == 2
        assert b.ndim == 3
        assert a.shape[1] == b.shape[1]
        assert a.is_contiguous()
        assert b.is_contiguous()
        assert batch_sizes.device.type == "cpu"
        assert batch_sizes.dtype == torch.int64
        assert batch_sizes.shape == b.shape[:1]
        assert int(batch_sizes.sum()) == a.shape[0]
        ctx.save_for_backward(a, b)
        ctx.sizes = batch_sizes.tolist()
        return torch.cat([rows @ w for rows, w in zip(a.split(ctx.sizes), b)])

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        d_a = torch.cat([rows @ w.T for rows, w in zip(grad.split(ctx.sizes), b)])
        d_b = torch.stack(
            [
                x.T @ rows if len(x) else torch.full_like(w, torch.nan)
                for x, rows, w in zip(a.split(ctx.sizes), grad.split(ctx.sizes), b)
            ]
        )
        return d_a, d_b, None


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    module = types.ModuleType("grouped_gemm")
    module.ops = types.SimpleNamespace(gmm=lambda a, b, batch_sizes, trans_b=False: StrictGmm.apply(a, b, batch_sizes))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "grouped_gemm", module)


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_padding", [0, 3])
def test_agrees_with_the_reference_on_ragged_rows(n_padding, weight_dtype):
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    gate_up = torch.randn(4, 6, 8, generator=generator, dtype=weight_dtype).requires_grad_()
    down = torch.randn(4, 4, 6, generator=generator, dtype=weight_dtype).requires_grad_()
    weight_N = torch.rand(5 + n_padding, generator=generator, dtype=torch.float64).requires_grad_()
    rows = Assignments(
        token_N=torch.tensor([0, 2, 4, 0, 1] + [0] * n_padding),
        expert_N=torch.tensor([0, 0, 0, 2, 2] + [4] * n_padding),
        weight_N=weight_N,
        expert_offsets=torch.tensor([0, 3, 3, 5, 5]),
        token_offsets=torch.tensor([0, 2, 3, 4, 4, 5]),
        row_of_slot_N=torch.tensor([0, 3, 4, 1, 2]),
    )
    inputs, dy_TD = (x_TD, gate_up, down, weight_N), torch.randn(5, 6, generator=generator, dtype=torch.float64)
    got, expected = (BACKENDS[name].compute(x_TD, gate_up, down, rows) for name in ("megablocks", "reference"))
    torch.testing.assert_close(got, expected)
    for mine, theirs in zip(torch.autograd.grad(got, inputs, dy_TD), torch.autograd.grad(expected, inputs, dy_TD)):
        torch.testing.assert_close(mine, theirs)


def test_the_refusal_says_what_is_needed():
    with pytest.raises(
        ValueError,
        match=r"'megablocks' cannot run: grouped_gemm.ops.gmm takes bfloat16 on CUDA, not torch.float32 on cpu",
    ):
        choose_backend(torch.zeros(1, 8), torch.zeros(2, 8, 8), "megablocks")
