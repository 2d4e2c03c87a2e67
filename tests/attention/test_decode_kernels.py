"""Decoding on the fused kernels (in Triton's interpreter here) gives what the torch composition gives, for every layer
that has one."""

import pytest
import torch

import triton_kernels.linear.linear_decode
import triton_kernels.mixed.mixed_attention
import triton_kernels.softmax.flash_decode
from attention import HybridCache


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


@pytest.mark.parametrize(
    ("pattern", "op"),
    [
        *((pattern, triton_kernels.softmax.flash_decode) for pattern in ("F", "Sr", "A")),
        ("M", triton_kernels.mixed.mixed_attention),
    ],
)
def test_fused_decode_of_sequences_of_different_lengths(make_stack, tiny, pattern, op, monkeypatch, without_native):
    """Three of them: shorter than the window, longer, and one that crosses it on the way."""
    stack = make_stack(pattern, tiny)
    texts = [stack.input(1, length, seed=length) for length in (2, 11, 4)]
    caches = [stack.cache(1, 16) for _ in texts]
    more_BTD, used = stack.input(3, 4), []

    def always_triton(backend, x, native=None):
        used.append(backend)
        return "triton"

    with torch.no_grad():
        for cache, text in zip(caches, texts):
            stack(text, cache)
        cache = HybridCache.stack(caches)
        monkeypatch.setattr(op, "check_backend", always_triton)
        decoded_BTD = torch.cat([stack(more_BTD[:, t : t + 1], cache) for t in range(4)], dim=1)
        monkeypatch.undo()
        assert used == ["auto"] * 4 * len(pattern)
        for text, more_TD, decoded_TD in zip(texts, more_BTD, decoded_BTD):
            expected_TD = stack(torch.cat([text, more_TD[None]], dim=1))[0, -4:]
            torch.testing.assert_close(decoded_TD, expected_TD, rtol=0, atol=1e-5)
