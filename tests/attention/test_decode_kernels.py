"""Decoding on the fused kernels (in Triton's interpreter here) gives what the torch composition gives, for every layer
that has one."""

import pytest
import torch

import triton_kernels.linear.linear_decode
import triton_kernels.softmax.flash_decode


@pytest.mark.parametrize(
    ("pattern", "op"),
    [
        *((pattern, triton_kernels.softmax.flash_decode) for pattern in ("F", "S", "FR", "Sr", "A")),
        *((pattern, triton_kernels.linear.linear_decode) for pattern in ("L", "G", "K")),
    ],
)
def test_fused_decode_equals_the_forward(make_stack, tiny, pattern, op, monkeypatch, without_native):
    """The window of 5 is a ring that goes round twice on the way."""
    stack = make_stack(pattern, tiny)
    x_BTD = stack.input(2, 13)
    expected_BTD = stack(x_BTD).detach()
    cache = stack.cache(2, 13)
    used = []

    def always_triton(backend, x, native=None):
        used.append(backend)
        return "triton"

    with torch.no_grad():
        outputs = [stack(x_BTD[:, :6], cache)]
        monkeypatch.setattr(op, "check_backend", always_triton)
        outputs += [stack(x_BTD[:, t : t + 1], cache) for t in range(6, 13)]
    assert used == ["auto"] * 7 * len(pattern)
    assert cache.length == 13
    torch.testing.assert_close(torch.cat(outputs, 1), expected_BTD, rtol=0, atol=1e-5)
