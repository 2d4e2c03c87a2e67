"""The Triton kernels in the interpreter against the fp64 recurrence: outputs, states and every gradient.

The error budget comes from the data: a kernel may be off by twice what the torch reference is off by in the same dtype,
plus a few roundings.
"""

import pytest
import torch

from triton_kernels.linear.decayed_linear_attention import decayed_linear_attention
from triton_kernels.linear.linear_attention_torch import linear_attention_recurrence, token_log_decay
from triton_kernels.linear.linear_decode import linear_attention_step

EMPTY_AND_SHORT = [0, 0, 1, 40, 40, 63]


def draw(
    batch: int,
    tokens: int,
    heads: int,
    K: int,
    V: int,
    n_states: int,
    gate: str,
    dtype: torch.dtype,
    floor: float = -1.0,
):
    """Leaves in the dtype under test, and the same numbers in fp64: q, k, v, log_decay, initial state."""
    generator = torch.Generator().manual_seed(tokens + K)
    shapes = [(batch, tokens, heads, K), (batch, tokens, heads, K), (batch, tokens, heads, V), (n_states, heads, K, V)]
    q, k, v, state = (torch.randn(shape, generator=generator) for shape in shapes)
    gates = {"none": None, "fixed": (heads,), "token": (batch, tokens, heads)}
    shape = gates[gate]
    g = None if shape is None else floor * torch.rand(shape, generator=generator)
    low = [q.to(dtype), k.to(dtype), v.to(dtype), g, state]
    exact = [None if x is None else x.double().requires_grad_() for x in low]
    return [None if x is None else x.requires_grad_() for x in low], exact


def outputs_and_gradients(run, leaves: list[torch.Tensor | None], with_final: bool) -> list[torch.Tensor]:
    out, final = run(leaves)
    generator = torch.Generator().manual_seed(0)
    loss = (out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
    if with_final:
        loss = loss + (final * torch.randn(final.shape, generator=generator, dtype=torch.float64)).sum()
    used = [x for x in leaves if x is not None]
    return [out, final, *torch.autograd.grad(loss, used, materialize_grads=True)]


def assert_kernels_equal_recurrence(
    shape: tuple[int, ...], gate: str, dtype: torch.dtype, cu_seqlens=None, floor: float = -1.0, with_final: bool = True
):
    batch, tokens, heads, K, V = shape
    n_states = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    low, exact = draw(batch, tokens, heads, K, V, n_states, gate, dtype, floor)

    def run(backend: str):
        return lambda x: decayed_linear_attention(
            x[0],
            x[1],
            x[2],
            x[3],
            scale=0.3,
            initial_state_BHKV=x[4],
            cu_seqlens=cu_seqlens,
            chunk_size=16,
            backend=backend,
        )

    def definition(x):
        return linear_attention_recurrence(
            x[0], x[1], x[2], token_log_decay(x[3], x[0]), None, x[4], scale=0.3, cu_seqlens=cu_seqlens
        )

    expected = outputs_and_gradients(definition, exact, with_final)
    reference = outputs_and_gradients(run("torch"), low, with_final)
    actual = outputs_and_gradients(run("triton"), low, with_final)
    for position, (kernel, torch_low, right) in enumerate(zip(actual, reference, expected)):
        assert not kernel.isnan().any(), position
        largest = right.abs().max() if right.numel() else torch.tensor(0.0)
        if position == 5 and gate == "fixed":
            # One number per head, the sum of a term per token that largely cancel.
            largest = largest * tokens**0.5
        budget = 2 * (torch_low - right).abs().sum() / max(1, right.numel()) ** 0.5 + 16 * torch.finfo(dtype).eps * (
            largest + 1
        )
        assert right.numel() == 0 or (kernel - right).abs().max() <= budget, position


@pytest.mark.parametrize("tokens", [1, 63, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_odd_lengths(tokens: int, dtype: torch.dtype) -> None:
    assert_kernels_equal_recurrence((2 if tokens < 100 else 1, tokens, 2, 16, 16), "token", dtype)


@pytest.mark.parametrize("gate", ["none", "fixed"])
def test_long_sequence_in_segments_and_slots(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_kernels.linear.decayed_linear_attention_launch.choose_segments", lambda *_: 3)
    assert_kernels_equal_recurrence((1, 257, 1, 16, 16), gate, torch.float32)


def test_segments_of_a_token_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_kernels.linear.decayed_linear_attention_launch.choose_segments", lambda *_: 3)
    assert_kernels_equal_recurrence((1, 137, 2, 16, 16), "token", torch.float32)


@pytest.mark.parametrize("gate", ["fixed", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_sequences_with_empty_and_single_token_ones(gate: str, dtype: torch.dtype) -> None:
    assert_kernels_equal_recurrence((1, 63, 2, 16, 16), gate, dtype, torch.tensor(EMPTY_AND_SHORT))


@pytest.mark.parametrize(("K", "V"), [(24, 40), (40, 16), (80, 80)])
def test_widths_that_no_block_divides(K: int, V: int) -> None:
    assert_kernels_equal_recurrence((1, 33, 1, K, V), "token", torch.float32)


@pytest.mark.parametrize("floor", [0.0, -50.0])
@pytest.mark.parametrize("with_final", [True, False])
def test_extreme_gates(floor: float, with_final: bool) -> None:
    assert_kernels_equal_recurrence((1, 50, 2, 16, 16), "token", torch.float32, floor=floor, with_final=with_final)


def test_strided_inputs_are_read_in_place() -> None:
    fused = torch.randn(2, 20, 3, 48)
    q, k, v = fused.split(16, -1)
    out, _ = decayed_linear_attention(q, k, v, None, chunk_size=16, backend="triton")
    dense, _ = decayed_linear_attention(
        q.contiguous(), k.contiguous(), v.contiguous(), None, chunk_size=16, backend="triton"
    )
    assert torch.equal(out, dense)


def test_bitwise_causal_and_repeatable() -> None:
    (q, k, v, g, _), _ = draw(1, 70, 1, 16, 16, 1, "token", torch.float32)
    first = 37

    def run(x: list[torch.Tensor]) -> list[torch.Tensor]:
        out, _ = decayed_linear_attention(*x, chunk_size=16, backend="triton")
        # Only the past's outputs are differentiated: what lies after them must not touch the gradients either.
        return [out[:, :first], *(grad[:, :first] for grad in torch.autograd.grad(out[:, :first].sum(), x))]

    changed = [torch.cat((x[:, :first], 3 * x[:, first:] - 1), 1).detach().requires_grad_() for x in (q, k, v, g)]
    before, again, after = run([q, k, v, g]), run([q, k, v, g]), run(changed)
    assert all(torch.equal(a, b) for a, b in zip(before, again))
    assert torch.equal(before[0], after[0])
    # dq of the past reads nothing later; dk, dv and dg read zeros of dO there.
    assert all(torch.equal(a, b) for a, b in zip(before[1:4], after[1:4]))


def test_prefill_then_steps_equal_the_full_form() -> None:
    (q, k, v, g, state), _ = draw(1, 20, 2, 16, 16, 1, "token", torch.float32)
    full, final = decayed_linear_attention(q, k, v, g, initial_state_BHKV=state, chunk_size=16, backend="triton")
    prefix, running = decayed_linear_attention(
        q[:, :17], k[:, :17], v[:, :17], g[:, :17], initial_state_BHKV=state, chunk_size=16, backend="triton"
    )
    outputs = [prefix]
    for t in range(17, 20):
        out, running = linear_attention_step(q[:, t], k[:, t], v[:, t], g[:, t, :, None], None, running, scale=1.0)
        outputs.append(out[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), full)
    torch.testing.assert_close(running, final)


def test_registration_is_sound() -> None:
    from triton_kernels.linear.decayed_linear_attention_launch import forward_op

    (q, k, v, g, state), _ = draw(1, 17, 1, 16, 16, 1, "token", torch.float32)
    torch.library.opcheck(
        forward_op,
        (q, k, v, g, state, None, 1.0, 16),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_a_chunk_the_kernels_cannot_take_is_refused() -> None:
    x = torch.randn(1, 8, 1, 16)
    with pytest.raises(ValueError, match="chunk_size=24"):
        decayed_linear_attention(x, x, x, None, chunk_size=24, backend="triton")
    wide = torch.randn(1, 8, 1, 512)
    with pytest.raises(ValueError, match="head width 512"):
        decayed_linear_attention(wide, wide, wide, None, backend="triton")
