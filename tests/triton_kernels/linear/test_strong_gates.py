"""Gates that reset the state: a decay below e^-100 is a zero, and in a sum with it the ordinary decays behind it lose
no digits. Against the recurrence in fp64, forward and every gradient."""

import pytest
import torch
from torch import Tensor

from triton_kernels.linear.decayed_linear_attention import decayed_linear_attention
from triton_kernels.linear.gated_delta_rule import gated_delta_rule
from triton_kernels.linear.kimi_delta_attention import kimi_delta_attention
from triton_kernels.linear.linear_attention_torch import linear_attention_recurrence
from triton_kernels.native.library import native

IN_C = pytest.param("native", marks=pytest.mark.skipif(native().library is None, reason=native().reason))
OPS = {"decayed": None, "delta": gated_delta_rule, "channels": kimi_delta_attention}
# Eight resets of a chunk of 64 leave sums of 8 * 144 bits, of which fp32 keeps differences to 2^-14.
BOUND = 1e-4


def draw(op: str, strong: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 64, 1, 16, generator=generator) for _ in range(3))
    gate = -0.1 * torch.rand(1, 64, 1, *([16] if op == "channels" else []), generator=generator)
    gate[:, 3::8] = strong
    beta, state = torch.rand(1, 64, 1, generator=generator), torch.randn(1, 1, 16, 16, generator=generator)
    return [q, k / k.norm(dim=-1, keepdim=True), v, gate, beta, state]


def results(op: str, backend: str, inputs: list[Tensor]) -> list[Tensor]:
    q, k, v, gate, beta, state = leaves = [x.detach().requires_grad_() for x in inputs]
    if backend == "recurrence":
        o, final = linear_attention_recurrence(q, k, v, gate, None if op == "decayed" else beta, state, scale=0.25)
    elif op == "decayed":
        o, final = decayed_linear_attention(q, k, v, gate, scale=0.25, initial_state_BHKV=state, backend=backend)
    else:
        o, final = OPS[op](q, k, v, gate, beta, scale=0.25, initial_state_BHKV=state, backend=backend)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o)
    loss = (o * weights).sum() + final.sum()
    return [o, final, *torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)]


@pytest.mark.parametrize("strong", [-50.0, -1e3, -1e4])
@pytest.mark.parametrize("backend", ["torch", "triton", IN_C])
@pytest.mark.parametrize("op", OPS)
def test_resets_do_not_cost_the_digits_of_other_decays(op: str, backend: str, strong: float) -> None:
    inputs = draw(op, strong)
    exact = results(op, "recurrence", [x.double() for x in inputs])
    stronger = results(op, backend, inputs)
    for found, right in zip(stronger, exact):
        assert (found - right).abs().max() <= BOUND * max(1.0, float(right.abs().max()))
    # Beyond -100 it makes no difference how strong: bit for bit.
    if strong < -100:
        inputs[3] = inputs[3].clamp(min=-100.0)
        for found, right in zip(results(op, backend, inputs), stronger):
            assert torch.equal(found, right)


@pytest.mark.parametrize("backend", ["torch", "triton", IN_C])
@pytest.mark.parametrize("op", OPS)
def test_a_nan_in_the_gate_stays_nan(op: str, backend: str) -> None:
    inputs = draw(op, -1.0)
    inputs[3][:, 9] = torch.nan
    o = results(op, backend, inputs)[0]
    assert o[:, 9:].isnan().all()
