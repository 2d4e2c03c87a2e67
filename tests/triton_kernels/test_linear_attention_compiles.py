"""torch.compile takes each linear-attention op on a CPU as one graph, forward and backward, and changes nothing."""

import pytest
import torch

from triton_kernels.decayed_linear_attention import decayed_linear_attention
from triton_kernels.gated_delta_rule import gated_delta_rule
from triton_kernels.kimi_delta_attention import kimi_delta_attention


@pytest.mark.parametrize("name", ["decayed", "fixed", "gated", "kimi"])
def test_one_graph_forward_and_backward(name: str) -> None:
    # One and a half chunks: the padded last chunk is in the graph too.
    q, k, v = (torch.randn(1, 6, 2, 4, requires_grad=True) for _ in range(3))
    decay_H, decay_BTH, decay_BTHK = (-torch.rand(shape) for shape in ((2,), (1, 6, 2), (1, 6, 2, 4)))
    beta = torch.rand(1, 6, 2)

    def run() -> torch.Tensor:
        if name in ("decayed", "fixed"):
            return decayed_linear_attention(q, k, v, decay_H if name == "fixed" else decay_BTH, chunk_size=4)[0]
        if name == "gated":
            return gated_delta_rule(q, k, v, decay_BTH, beta, normalize_qk=True, chunk_size=4)[0]
        return kimi_delta_attention(q, k, v, decay_BTHK, beta, normalize_qk=True, chunk_size=4)[0]

    # aot_eager traces forward and backward as inductor does, and needs no C++ compiler.
    compiled, eager = torch.compile(run, fullgraph=True, backend="aot_eager")(), run()
    assert torch.equal(compiled, eager)
    for have, want in zip(torch.autograd.grad(compiled.sum(), (q, k, v)), torch.autograd.grad(eager.sum(), (q, k, v))):
        assert torch.equal(have, want)
