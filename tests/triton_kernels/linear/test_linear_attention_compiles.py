"""torch.compile takes each linear-attention op on a CPU as one graph, forward and backward, and changes nothing."""

from typing import Any

import pytest
import torch

from triton_kernels.linear.chunked_rule_torch import forward_op
from triton_kernels.linear.decayed_linear_attention import decayed_linear_attention
from triton_kernels.linear.gated_delta_rule import gated_delta_rule
from triton_kernels.linear.kimi_delta_attention import kimi_delta_attention


@pytest.mark.parametrize("name", ["decayed", "fixed", "gated", "kimi"])
def test_one_graph_forward_and_backward(name: str) -> None:
    # One and a half chunks: the padded last chunk is in the graph too.
    q, k, v = (torch.randn(1, 6, 2, 4, requires_grad=True) for _ in range(3))
    decay_H, decay_BTH, decay_BTHK = (-torch.rand(shape) for shape in ((2,), (1, 6, 2), (1, 6, 2, 4)))
    beta = torch.rand(1, 6, 2)

    def run() -> torch.Tensor:
        # Without a graph `auto` takes the form in C, which rounds otherwise.
        options: dict[str, Any] = {"chunk_size": 4, "backend": "torch"}
        if name in ("decayed", "fixed"):
            return decayed_linear_attention(q, k, v, decay_H if name == "fixed" else decay_BTH, **options)[0]
        options["normalize_qk"] = True
        if name == "gated":
            return gated_delta_rule(q, k, v, decay_BTH, beta, **options)[0]
        return kimi_delta_attention(q, k, v, decay_BTHK, beta, **options)[0]

    # aot_eager traces forward and backward as inductor does, and needs no C++ compiler.
    compiled, eager = torch.compile(run, fullgraph=True, backend="aot_eager")(), run()
    assert torch.equal(compiled, eager)
    for have, want in zip(torch.autograd.grad(compiled.sum(), (q, k, v)), torch.autograd.grad(eager.sum(), (q, k, v))):
        assert torch.equal(have, want)


@pytest.mark.parametrize("n_tokens", [8, 200])
def test_the_graph_does_not_grow_with_the_chunks(n_tokens: int) -> None:
    calls: list[str] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    x, gate = torch.randn(1, n_tokens, 2, 4), torch.rand(1, n_tokens, 2)
    torch.compile(gated_delta_rule, fullgraph=True, backend=count)(x, x, x, -gate, gate, chunk_size=4)
    assert sum("chunked_linear_attention" in call for call in calls) == 1
    assert len(calls) < 20


@pytest.mark.parametrize("gate", [(2,), (1, 9, 2), (1, 9, 2, 4)])
@pytest.mark.parametrize("packed", [False, True])
def test_the_fake_implementation_is_true(gate: tuple[int, ...], packed: bool) -> None:
    q, k, v, initial = (
        torch.randn(shape, requires_grad=True) for shape in (*[(1, 9, 2, 4)] * 3, (3 if packed else 1, 2, 4, 4))
    )
    g = (-torch.rand(gate)).requires_grad_(len(gate) > 1)
    # Packed, there is room for more chunks than there are, which stays as it was found: its numbers cannot be compared.
    tests = (
        "test_schema",
        "test_faketensor",
        "test_autograd_registration",
        *(() if packed else ("test_aot_dispatch_dynamic",)),
    )
    beta, offsets = torch.rand(1, 9, 2, requires_grad=True), torch.tensor([0, 5, 5, 9]) if packed else None
    for correction in (beta, None):
        if correction is not None or len(gate) < 4:
            torch.library.opcheck(
                forward_op, (q, k, v, g, correction, initial, offsets, 4, 0.5, False), test_utils=tests
            )
