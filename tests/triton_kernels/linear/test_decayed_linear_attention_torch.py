"""The chunked torch reference and the form in C against the token-by-token recurrence in fp64: outputs, states and
every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_kernels.linear.decayed_linear_attention import decayed_linear_attention
from triton_kernels.linear.linear_attention_torch import linear_attention_recurrence, token_log_decay
from triton_kernels.linear.linear_decode import linear_attention_step
from triton_kernels.native.library import native

HEADS, KEY_WIDTH, VALUE_WIDTH = 2, 5, 3
# A fixed decay has one value per head, and takes a shorter way than a learnt one, which has a gradient.
GATES = ["none", "fixed", "learnt", "data"]


def make_inputs(
    gate: str, batch: int, tokens: int, n_states: int, dtype: torch.dtype = torch.float64, floor: float = -1.0
):
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k = draw(batch, tokens, HEADS, KEY_WIDTH), draw(batch, tokens, HEADS, KEY_WIDTH)
    v, state = draw(batch, tokens, HEADS, VALUE_WIDTH), draw(n_states, HEADS, KEY_WIDTH, VALUE_WIDTH)
    shape = {"none": None, "fixed": (HEADS,), "learnt": (HEADS,), "data": (batch, tokens, HEADS)}[gate]
    g = None if shape is None else floor * torch.rand(*shape, generator=generator, dtype=torch.float64)
    return q, k, v, g, state.to(torch.promote_types(dtype, torch.float32))


def assert_equals_recurrence(
    gate: str, tokens: int, chunk_size: int, cu_seqlens: torch.Tensor | None, floor: float
) -> None:
    batch = 2 if cu_seqlens is None else 1
    n_states = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    q, k, v, g, state = make_inputs(gate, batch, tokens, n_states, floor=floor)
    leaves = [x.requires_grad_() for x in (q, k, v, None if gate == "fixed" else g, state) if x is not None]
    out, final = decayed_linear_attention(
        q, k, v, g, scale=0.3, initial_state_BHKV=state, cu_seqlens=cu_seqlens, chunk_size=chunk_size
    )
    expected_out, expected_final = linear_attention_recurrence(
        q, k, v, token_log_decay(g, q), None, state, scale=0.3, cu_seqlens=cu_seqlens
    )
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(final, expected_final)
    weights = torch.randn_like(out), torch.randn_like(final)
    grads = torch.autograd.grad((out * weights[0]).sum() + (final * weights[1]).sum(), leaves)
    expected = torch.autograd.grad(
        (expected_out * weights[0]).sum() + (expected_final * weights[1]).sum(), leaves, materialize_grads=True
    )
    torch.testing.assert_close(grads, expected, atol=1e-9, rtol=1e-7)


@settings(max_examples=20, deadline=None)
@given(
    gate=st.sampled_from(GATES),
    tokens=st.sampled_from([1, 15, 16, 17, 40]),
    chunk_size=st.sampled_from([1, 7, 16, 64]),
    floor=st.sampled_from([0.0, -1.0, -50.0]),
)
def test_equals_the_recurrence(gate: str, tokens: int, chunk_size: int, floor: float) -> None:
    assert_equals_recurrence(gate, tokens, chunk_size, None, floor)


@settings(max_examples=10, deadline=None)
@given(
    gate=st.sampled_from(GATES),
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    chunk_size=st.sampled_from([4, 16]),
)
def test_packed_sequences_equal_the_recurrence(gate: str, lengths: list[int], chunk_size: int) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    assert_equals_recurrence(gate, sum(lengths), chunk_size, cu_seqlens, -1.0)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("lengths", [[64], [70], [30, 0, 1, 40]])
def test_across_many_blocks(gate: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks of 8 a block: each takes its state and its scratch memory from the one before."""
    monkeypatch.setattr("triton_kernels.linear.chunks_torch.BLOCK_BYTES", 2 * 2 * HEADS * 8 * KEY_WIDTH * 8)
    cu_seqlens = None if len(lengths) == 1 else torch.tensor([0, *lengths]).cumsum(0)
    assert_equals_recurrence(gate, sum(lengths), 8, cu_seqlens, -0.1)


@pytest.mark.skipif(native().library is None, reason=native().reason)
@settings(max_examples=20, deadline=None)
@given(
    gate=st.sampled_from(GATES),
    lengths=st.lists(st.sampled_from([0, 1, 31, 32, 63, 100]), min_size=1, max_size=3).filter(any),
    floor=st.sampled_from([0.0, -1.0, -50.0]),
)
def test_in_c_equals_the_recurrence(gate: str, lengths: list[int], floor: float) -> None:
    cu_seqlens = None if len(lengths) == 1 else torch.tensor([0, *lengths]).cumsum(0)
    inputs = make_inputs(gate, 1, sum(lengths), len(lengths), floor=floor)
    results = []
    for backend, dtype in (("native", torch.float32), ("recurrence", torch.float64)):
        q, k, v, g, state = (None if x is None else x.detach().to(dtype) for x in inputs)
        leaves = [x.requires_grad_() for x in (q, k, v, None if gate == "fixed" else g, state) if x is not None]
        options = {"scale": 0.3, "cu_seqlens": cu_seqlens}
        if backend == "native":
            out, final = decayed_linear_attention(q, k, v, g, initial_state_BHKV=state, backend=backend, **options)
        else:
            out, final = linear_attention_recurrence(q, k, v, token_log_decay(g, q), None, state, **options)
        # The gate's gradient is a difference of terms as large as those of the keys.
        loss = out.square().sum() + final.square().sum()
        results.append((out, final, *torch.autograd.grad(loss, leaves, materialize_grads=True)))
    for have, want in zip(*results, strict=True):
        scale = max(1.0, *(float(x.detach().abs().max()) for x in (want, results[1][3])))
        # A learnt decay's gradient is a sum of such differences over all tokens, and may cancel to nothing.
        scale *= sum(lengths) ** 0.5 if want.dim() == 1 else 1.0
        assert (have.double() - want).abs().max() <= 40 * torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_keeps_an_fp32_state_and_stays_near_fp64(dtype: torch.dtype) -> None:
    q, k, v, g, state = make_inputs("data", 1, 100, 1, dtype)
    out, final = decayed_linear_attention(q, k, v, g, initial_state_BHKV=state)
    exact_out, exact_final = decayed_linear_attention(
        q.double(), k.double(), v.double(), g, initial_state_BHKV=state.double()
    )
    assert out.dtype == dtype
    assert final.dtype == torch.float32
    unit = torch.finfo(dtype).eps
    assert (out.double() - exact_out).abs().max() < 16 * unit * exact_out.abs().max()
    assert (final.double() - exact_final).abs().max() < 8 * unit * exact_final.abs().max()


@pytest.mark.parametrize("gate", GATES)
def test_prefill_then_steps_equal_the_full_form(gate: str) -> None:
    q, k, v, g, state = make_inputs(gate, 2, 21, 2)
    full, final = decayed_linear_attention(q, k, v, g, scale=0.5, initial_state_BHKV=state, chunk_size=8)
    split = 13
    prefix_g = g[:, :split] if gate == "data" else g
    outputs, running = decayed_linear_attention(
        q[:, :split], k[:, :split], v[:, :split], prefix_g, scale=0.5, initial_state_BHKV=state, chunk_size=8
    )
    outputs = [outputs]
    for t in range(split, 21):
        decay = g[:, t, :, None] if gate == "data" else None if g is None else g[:, None].expand(2, -1, 1)
        step, running = linear_attention_step(q[:, t], k[:, t], v[:, t], decay, None, running, scale=0.5)
        outputs.append(step[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), full)
    torch.testing.assert_close(running, final)


def test_the_future_changes_no_past_bit() -> None:
    q, k, v, g, state = make_inputs("data", 1, 50, 1, torch.float32)
    changed = [x.clone() for x in (q, k, v, g)]
    for x in changed:
        x[:, 21:] = 7 * x[:, 21:] - 1
    out, _ = decayed_linear_attention(q, k, v, g, initial_state_BHKV=state, chunk_size=16)
    other, _ = decayed_linear_attention(*changed, initial_state_BHKV=state, chunk_size=16)
    assert torch.equal(out[:, :21], other[:, :21])


def test_wrong_arguments_are_refused_by_name() -> None:
    q, k, v, g, state = make_inputs("data", 2, 8, 2, torch.float32)
    cases = [
        ("k_BTHK has shape", {"k_BTHK": k[:, :, :, :4]}),
        ("v_BTHV has shape", {"v_BTHV": v.transpose(1, 2)}),
        ("v_BTHV is torch.bfloat16", {"v_BTHV": v.bfloat16()}),
        ("log_decay has shape", {"log_decay": g[:, :, :1]}),
        ("initial_state_BHKV has shape", {"initial_state_BHKV": state[:1]}),
        ("B must be 1", {"cu_seqlens": torch.tensor([0, 8])}),
        ("int64", {"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)}),
        ("chunk_size=0", {"chunk_size": 0}),
        ("backend='cuda'", {"backend": "cuda"}),
    ]
    for message, change in cases:
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            decayed_linear_attention(**({"q_BTHK": q, "k_BTHK": k, "v_BTHV": v, "log_decay": g} | change))
    with pytest.raises(ValueError, match="rise from 0 to T=8"):
        decayed_linear_attention(q[:1], k[:1], v[:1], None, cu_seqlens=torch.tensor([0, 5, 3, 8]))
    with pytest.raises(ValueError, match="float"):
        decayed_linear_attention(q.long(), k.long(), v.long(), None)
