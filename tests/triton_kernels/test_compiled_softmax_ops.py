"""torch.compile(fullgraph=True) of the softmax and small ops on a CPU: one graph, the same outputs and gradients, on
both backends.

The graph is captured and differentiated by AOT autograd and then run as it is ("aot_eager"): what is proved is that
nothing breaks the graph and that the registered fake implementations and gradients are those of the op. On the torch
backend packed sequences are cut at numbers read from `cu_seqlens`, which no full graph can hold, so they are compiled
on the kernels alone.
"""

import pytest
import torch

from triton_kernels.linear.causal_conv1d import causal_conv1d
from triton_kernels.linear.gated_rms_norm import gated_rms_norm
from triton_kernels.softmax.flash_attention import flash_attention
from triton_kernels.softmax.flash_decode import flash_decode
from triton_kernels.softmax.rotary import rotary_tables, rotate

TABLES = rotary_tables(torch.arange(20), rotary_dim=8, base=100.0)


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def attention(q, k, v, sinks, backend):
    return flash_attention(q, k, v, window=7, sinks_H=sinks, rotary=TABLES, backend=backend)


def packed_attention(q, k, v, backend):
    return flash_attention(q, k, v, cu_seqlens=torch.tensor([0, 0, 1, 20]), backend=backend)


def convolution(x, weight, bias, tail, backend):
    return torch.cat(
        [out.flatten() for out in causal_conv1d(x, weight, bias_D=bias, initial_tail=tail, backend=backend)]
    )


def norm(x, gate, weight, backend):
    return gated_rms_norm(x, gate, weight, eps=1e-5, backend=backend)


def rotation(x, backend):
    return rotate(x, TABLES, backend=backend)


QKV = ((1, 20, 2, 16), (1, 20, 1, 16), (1, 20, 1, 16))


@pytest.mark.parametrize(
    ("call", "shapes", "backend"),
    [
        *((attention, (*QKV, (2,)), backend) for backend in ("torch", "triton")),
        (packed_attention, QKV, "triton"),
        *((convolution, ((2, 9, 5), (5, 4), (5,), (2, 5, 3)), backend) for backend in ("torch", "triton")),
        *((norm, ((3, 5, 16), (3, 5, 16), (16,)), backend) for backend in ("torch", "triton")),
        *((rotation, ((1, 20, 2, 16),), backend) for backend in ("torch", "triton")),
    ],
)
def test_one_graph_gives_the_same_numbers(call, shapes, backend):
    inputs = draw(*shapes)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (call, compiled):
        y = function(*inputs, backend)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for plain, ours in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_graph_of_decode_gives_the_same_numbers(backend):
    q, k, v = (x.detach() for x in draw((2, 2, 16), (2, 9, 1, 16), (2, 9, 1, 16)))
    lengths_B = torch.tensor([9, 4])
    compiled = torch.compile(flash_decode, fullgraph=True, backend="aot_eager")
    ours, plain = (function(q, k, v, lengths_B, backend=backend) for function in (compiled, flash_decode))
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
