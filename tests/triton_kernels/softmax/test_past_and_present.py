"""A piece of a prompt over what is cached before it: the form outside of autograd equals the one with a mask.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

import pytest
import torch

from triton_kernels.softmax.flash_attention import flash_attention


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("T", "S"), [(2, 3), (17, 64), (64, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_masked_form(T, S, dtype, with_sinks):
    draw = torch.Generator().manual_seed(T)
    q_BTHK, k_BSGK, v_BSGK = (
        torch.randn(2, n, heads, 32, generator=draw).to(dtype) for n, heads in ((T, 4), (S, 2), (S, 2))
    )
    sinks_H = torch.tensor([0.0, 3.0, -torch.inf, -2.0]) if with_sinks else None
    masked = flash_attention(q_BTHK, k_BSGK, v_BSGK, sinks_H=sinks_H)
    with torch.no_grad():
        pieces = flash_attention(q_BTHK, k_BSGK, v_BSGK, sinks_H=sinks_H)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(pieces, masked, rtol=0, atol=tolerance)
