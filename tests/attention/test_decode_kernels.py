"""Decoding on the fused kernels (in Triton's interpreter here) gives what the torch composition gives, for every layer
that has one."""

import pytest
import torch

import triton_kernels.linear.linear_decode


@pytest.mark.parametrize("letter", ["L", "G", "K"])
def test_fused_decode_equals_the_forward(make_stack, tiny, letter, monkeypatch):
    stack = make_stack(letter, tiny)
    x_BTD = stack.input(2, 9)
    expected_BTD = stack(x_BTD).detach()
    cache = stack.cache(2, 9)
    used = []

    def always_triton(backend, x):
        used.append(backend)
        return "triton"

    with torch.no_grad():
        outputs = [stack(x_BTD[:, :6], cache)]
        monkeypatch.setattr(triton_kernels.linear.linear_decode, "check_backend", always_triton)
        outputs += [stack(x_BTD[:, t : t + 1], cache) for t in range(6, 9)]
    assert used == ["auto"] * 3
    assert cache.length == 9
    torch.testing.assert_close(torch.cat(outputs, 1), expected_BTD, rtol=0, atol=1e-5)
