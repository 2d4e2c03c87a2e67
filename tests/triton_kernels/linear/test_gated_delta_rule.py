"""The delta rules, gated, plain and per channel: reference and kernels against the token-by-token recurrence in fp64,
outputs and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_kernels.linear.gated_delta_rule import gated_delta_rule
from triton_kernels.linear.kimi_delta_attention import kimi_delta_attention
from triton_kernels.linear.linear_attention_torch import linear_attention_recurrence
from triton_kernels.linear.linear_decode import linear_attention_step
from triton_kernels.native.library import native

IN_C = pytest.param("native", marks=pytest.mark.skipif(native().library is None, reason=native().reason))
RULES = ("gated", "plain", "kimi")
# How many units of rounding an output or a gradient may be off, relative to its largest entry.
ROUNDINGS = {torch.float64: 1e5, torch.float32: 40, torch.float16: 12}


def draw(
    rule: str,
    batch: int,
    tokens: int,
    groups: int,
    heads: int,
    widths: tuple[int, int],
    n_states: int,
    dtype: torch.dtype,
    floor: float = -1.0,
):
    """q, k, v, log-decay (None for the plain rule), beta in [0, 2], initial state: leaves that want gradients."""
    generator = torch.Generator().manual_seed(tokens + 7 * heads)
    K, V = widths
    low = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Unit keys: with beta up to 2 the recurrence is stable for nothing longer.
    k = torch.nn.functional.normalize(normal(batch, tokens, groups, K), dim=-1)
    gate_shape = (batch, tokens, heads) + ((K,) if rule == "kimi" else ())
    g = None if rule == "plain" else floor * torch.rand(gate_shape, generator=generator, dtype=torch.float64)
    beta = 2 * torch.rand(batch, tokens, heads, generator=generator, dtype=torch.float64)
    tensors = [normal(batch, tokens, groups, K).to(dtype), k.to(dtype), normal(batch, tokens, heads, V).to(dtype)]
    tensors += [None if g is None else g.to(low), beta.to(low), normal(n_states, heads, K, V).to(low)]
    return [None if x is None else x.requires_grad_() for x in tensors]


def run(rule: str, tensors, backend: str = "torch", **options):
    q, k, v, g, beta, state = tensors
    op = kimi_delta_attention if rule == "kimi" else gated_delta_rule
    return op(q, k, v, g, beta, initial_state_BHKV=state, backend=backend, **options)


def define(tensors, normalize_qk: bool, cu_seqlens: torch.Tensor | None):
    """The recurrence in fp64."""
    q, k, v, g, beta, state = (None if x is None else x.double() for x in tensors)
    group = v.shape[2] // q.shape[2]
    if normalize_qk:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    q, k = ((x * f).repeat_interleave(group, 2) for x, f in ((q, q.shape[-1] ** -0.5), (k, 1.0)))
    return linear_attention_recurrence(
        q, k, v, torch.zeros_like(beta) if g is None else g, beta, state, cu_seqlens=cu_seqlens
    )


def assert_close(
    rule: str, tensors, backend: str, cu_seqlens: torch.Tensor | None = None, normalize_qk: bool = True, **options
) -> None:
    leaves = [x for x in tensors if x is not None]
    out, final = run(rule, tensors, backend, cu_seqlens=cu_seqlens, normalize_qk=normalize_qk, **options)
    assert out.dtype == tensors[2].dtype
    assert final.dtype == tensors[5].dtype
    expected_out, expected_final = define(tensors, normalize_qk, cu_seqlens)
    generator = torch.Generator().manual_seed(0)
    weight, final_weight = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (out, final))
    grads = torch.autograd.grad((out * weight).sum() + (final * final_weight).sum(), leaves)
    loss = (expected_out * weight).sum() + (expected_final * final_weight).sum()
    expected = torch.autograd.grad(loss, leaves, materialize_grads=True)
    beta_scale = float((expected[-2] * tensors[4]).detach().abs().max()) if tensors[4].numel() else 0.0
    unit = ROUNDINGS[tensors[0].dtype] * torch.finfo(tensors[0].dtype).eps
    names = [
        "out",
        "final",
        *(name for name, x in zip(("q", "k", "v", "log_decay", "beta", "state"), tensors) if x is not None),
    ]
    for name, have, want in zip(names, (out, final, *grads), (expected_out, expected_final, *expected)):
        if have.numel() == 0:
            continue
        # The gate's gradient is a difference of terms as large as beta's: under a strong decay it is far smaller than
        # what cancels.
        scale = float(want.detach().abs().max()) + (beta_scale if name == "log_decay" else 0.0)
        error = float((have.double() - want.double()).detach().abs().max())
        assert error <= unit * max(scale, 1e-30), f"{name}: error {error:.2e}, scale {scale:.2e}"


@settings(max_examples=25, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    tokens=st.sampled_from([1, 15, 16, 17, 63, 100]),
    chunk_size=st.sampled_from([1, 2, 8, 16, 64]),
    heads=st.sampled_from([(1, 1), (2, 2), (1, 3), (2, 4)]),
    floor=st.sampled_from([0.0, -1.0, -50.0]),
    normalize_qk=st.booleans(),
)
def test_reference_equals_the_recurrence(rule, tokens, chunk_size, heads, floor, normalize_qk):
    tensors = draw(rule, 2, tokens, *heads, (5, 3), 2, torch.float64, floor)
    assert_close(rule, tensors, "torch", normalize_qk=normalize_qk, chunk_size=chunk_size)


@settings(max_examples=15, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    chunk_size=st.sampled_from([4, 16]),
)
def test_reference_on_packed_sequences(rule, lengths, chunk_size):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    tensors = draw(rule, 1, sum(lengths), 1, 2, (4, 6), len(lengths), torch.float64)
    assert_close(rule, tensors, "torch", cu_seqlens, chunk_size=chunk_size)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lengths", [[600], [130, 0, 1, 200]])
def test_reference_across_many_blocks_in_fp32(rule, lengths, monkeypatch):
    """Blocks of two chunks, of 4 heads 64 wide, whose scratch memory each takes from the one before; the last one is
    shorter."""
    monkeypatch.setattr("triton_kernels.linear.chunks_torch.BLOCK_BYTES", 2 * 2 * 4 * 32 * 64 * 4)
    cu_seqlens = None if len(lengths) == 1 else torch.tensor([0, *lengths]).cumsum(0)
    assert_close(rule, draw(rule, 1, sum(lengths), 4, 4, (64, 64), len(lengths), torch.float32), "torch", cu_seqlens)


@pytest.mark.skipif(native().library is None, reason=native().reason)
@settings(max_examples=25, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    tokens=st.sampled_from([1, 2, 7, 31, 32, 33, 63, 100]),
    heads=st.sampled_from([(1, 1), (1, 3), (2, 4)]),
    widths=st.sampled_from([(5, 3), (16, 40), (64, 64), (33, 17)]),
    floor=st.sampled_from([0.0, -1.0, -50.0]),
    normalize_qk=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float16]),
)
def test_in_c_equals_the_recurrence(rule, tokens, heads, widths, floor, normalize_qk, dtype):
    tensors = draw(rule, 2, tokens, *heads, widths, 2, dtype, floor)
    assert_close(rule, tensors, "native", normalize_qk=normalize_qk)


@pytest.mark.skipif(native().library is None, reason=native().reason)
@settings(max_examples=8, deadline=None)
@given(rule=st.sampled_from(RULES), lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5).filter(any))
def test_in_c_on_packed_sequences(rule, lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    assert_close(rule, draw(rule, 1, sum(lengths), 1, 2, (12, 20), len(lengths), torch.float32), "native", cu_seqlens)


@pytest.mark.skipif(native().library is None, reason=native().reason)
@pytest.mark.parametrize("rule", RULES)
def test_in_c_the_same_bits_by_one_thread_or_more_wherever_inputs_lie(rule):
    q, k, v, g, beta, state = draw(rule, 2, 70, 2, 4, (16, 24), 2, torch.float32)
    # Parts of one projection, and channels before tokens.
    inner = torch.cat([x.detach().flatten(2) for x in (q, k, v)], -1)
    parts = [x.unflatten(-1, (-1, width)) for x, width in zip(inner.split([32, 32, 96], -1), (16, 16, 24))]
    across = [None if x is None else x.detach().transpose(1, -1).contiguous().transpose(1, -1) for x in (q, k, v, g)]
    before, results = torch.get_num_threads(), []
    try:
        for threads, inputs in ((1, (q, k, v, g)), (2, (*parts, g)), (3, across)):
            torch.set_num_threads(threads)
            leaves = [None if x is None else x.detach().requires_grad_() for x in (*inputs, beta, state)]
            out, final = run(rule, leaves, "native", normalize_qk=True)
            wanted = [x for x in leaves if x is not None]
            gradients = torch.autograd.grad(out.square().sum() + final.square().sum(), wanted)
            results.append((out, final, *gradients))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@pytest.mark.skipif(native().library is None, reason=native().reason)
def test_auto_takes_c_and_keeps_nothing_where_no_gradient_is_asked(monkeypatch):
    from triton_kernels.linear import native as linear_native

    called = []
    monkeypatch.setattr(linear_native, "call", lambda name, *arguments: called.append((name, arguments)) or 0)
    q, k, v, g, beta, state = (x.detach() for x in draw("gated", 1, 40, 1, 1, (16, 16), 1, torch.float32))
    run("gated", (q, k, v, g, beta, state), "auto")
    run("gated", (q.requires_grad_(), k, v, g, beta, state), "auto")
    assert [name for name, _ in called] == ["rule_forward"] * 2
    # The states before every chunk, and the errors.
    assert [[x is not None for x in arguments[9:11]] for _, arguments in called] == [[False] * 2, [True] * 2]
    with pytest.raises(ValueError, match="backend='native' takes"):
        run("gated", (*(x.double() for x in (q, k, v)), g, beta, state), "native")


def test_inverse_survives_repeated_keys():
    # beta = 2 and equal keys: powers of the matrix reach 1e24, its inverse stays at 2.
    from triton_kernels.linear.chunked_rule_torch import invert_unit_lower

    a = 2 * torch.ones(1, 64, 64).tril(-1)
    expected = torch.linalg.inv(torch.eye(64, dtype=torch.float64) + a)
    torch.testing.assert_close(invert_unit_lower(a).double(), expected, atol=1e-4, rtol=0)


KERNEL_RULES = RULES


@settings(max_examples=4, deadline=None)
@given(
    rule=st.sampled_from(KERNEL_RULES),
    tokens=st.sampled_from([1, 15, 20]),
    widths=st.sampled_from([(16, 16), (40, 16), (16, 40)]),
    heads=st.sampled_from([(1, 1), (1, 2)]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    normalize_qk=st.booleans(),
)
def test_kernels_equal_the_recurrence(rule, tokens, widths, heads, dtype, normalize_qk):
    assert_close(
        rule, draw(rule, 2, tokens, *heads, widths, 2, dtype), "triton", normalize_qk=normalize_qk, chunk_size=16
    )


@pytest.mark.parametrize("rule", KERNEL_RULES)
@pytest.mark.parametrize("floor", [0.0, -50.0])
def test_kernels_with_extreme_gates(rule, floor, monkeypatch):
    # In fp32, which alone holds such decays, chunks are 16 tokens unless this is lifted.
    monkeypatch.setattr("triton_kernels.linear.delta_rule_launch.SINGLE_CHUNK", 64)
    assert_close(rule, draw(rule, 1, 70, 1, 1, (16, 16), 1, torch.float32, floor), "triton", chunk_size=64)


@settings(max_examples=3, deadline=None)
@given(rule=st.sampled_from(KERNEL_RULES), lengths=st.lists(st.sampled_from([0, 1, 5, 16, 20]), min_size=2, max_size=4))
def test_kernels_on_packed_sequences(rule, lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    tensors = draw(rule, 1, sum(lengths), 1, 2, (16, 16), len(lengths), torch.float32)
    assert_close(rule, tensors, "triton", cu_seqlens, chunk_size=16)


@pytest.mark.parametrize("rule", KERNEL_RULES)
def test_kernels_read_strided_inputs_and_need_no_state(rule):
    q, k, v, g, beta, _ = draw(rule, 2, 20, 2, 2, (16, 16), 2, torch.float32)
    fused = torch.cat([q, k, v], -1).detach()
    views = fused.split(16, -1)
    assert not views[0].is_contiguous()
    expected, expected_final = run(rule, (q, k, v, g, beta, None), "triton", chunk_size=16)
    out, final = run(rule, (*views, g, beta, None), "triton", chunk_size=16)
    assert torch.equal(out, expected)
    assert torch.equal(final, expected_final)
    zeros = torch.zeros_like(final)
    assert torch.equal(run(rule, (q, k, v, g, beta, zeros), "triton", chunk_size=16)[0], expected)


@pytest.mark.parametrize("backend", ["torch", "triton", IN_C])
@pytest.mark.parametrize("rule", RULES)
def test_the_future_changes_no_bit_of_the_past(rule, backend):
    tensors = draw(rule, 1, 40, 1, 1, (16, 16), 1, torch.float32)
    changed = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    with torch.no_grad():
        for x in changed[:5]:
            if x is not None:
                x[:, 21:] *= -3.0 if x.dim() == 4 and x is not changed[3] else 0.5
    results = []
    for xs in (tensors, changed):
        out, _ = run(rule, xs, backend, chunk_size=16, normalize_qk=True)
        leaves = [x for x in xs if x is not None]
        results.append((out[:, :21], *torch.autograd.grad(out[:, :21].sum(), leaves)))
    for before, after in zip(*results):
        assert torch.equal(before[:, :21], after[:, :21])
    # With grouped inputs of the same length the rows after the cut get no gradient at all.
    assert all(bool((grad[:, 21:] == 0).all()) for grad in results[0][1:4])


@pytest.mark.parametrize("backend", ["torch", "triton", IN_C])
@pytest.mark.parametrize("rule", RULES)
def test_prefill_and_decode_equal_the_whole(rule, backend):
    q, k, v, g, beta, state = (
        None if x is None else x.detach() for x in draw(rule, 2, 21, 1, 2, (16, 16), 2, torch.float32)
    )
    whole, whole_final = run(rule, (q, k, v, g, beta, state), backend, normalize_qk=True, chunk_size=16)
    start = [None if x is None else x[:, :18] for x in (q, k, v, g, beta)]
    out, state = run(rule, (*start, state), backend, normalize_qk=True, chunk_size=16)
    outs = [out]
    for t in range(18, 21):
        decay = None if g is None else g[:, t] if rule == "kimi" else g[:, t, :, None]
        out, state = linear_attention_step(q[:, t], k[:, t], v[:, t], decay, beta[:, t], state, normalize_qk=True)
        outs.append(out[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(state, whole_final, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", KERNEL_RULES)
def test_kernels_repeat_bit_for_bit_and_pass_torchs_own_checks(rule):
    tensors = draw(rule, 1, 20, 1, 1, (16, 16), 1, torch.float32)
    leaves = [x for x in tensors if x is not None]
    first, second = (
        torch.autograd.grad(run(rule, tensors, "triton", chunk_size=16)[0].square().sum(), leaves) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    from triton_kernels.linear.delta_rule_launch import forward_op

    # The fake implementations say what torch.compile and CUDA graphs will see.
    torch.library.opcheck(
        forward_op,
        (*tensors, None, 0.25, True, 16),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": lambda x: x[..., :4]}, "k_BTGK has shape"),
        ({"v": lambda x: x[:, :, :1].expand(-1, -1, 3, -1)}, "3 value heads are not a multiple of 2"),
        ({"v": lambda x: x.half()}, "v is torch.float16 but q is torch.float32"),
        ({"g": lambda x: x[:, :-1]}, "log_decay_BTH"),
        ({"beta": lambda x: x[..., :1]}, "beta_BTH has shape"),
        ({"state": lambda x: x[:1]}, "initial_state_BHKV has shape"),
        ({"chunk_size": lambda _: 48}, "chunk_size=48"),
        ({"backend": lambda _: "cuda"}, "backend='cuda'"),
        ({"cu_seqlens": lambda _: torch.tensor([0, 9])}, "B must be 1"),
    ],
)
@pytest.mark.parametrize("rule", ["gated", "kimi"])
def test_mistakes_are_named(rule, change, message):
    q, k, v, g, beta, state = draw(rule, 2, 9, 2, 2, (16, 8), 2, torch.float32)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "g": g,
        "beta": beta,
        "state": state,
        "chunk_size": 16,
        "backend": "torch",
        "cu_seqlens": None,
    }
    arguments |= {name: mistake(arguments[name]) for name, mistake in change.items()}
    tensors = [arguments.pop(name) for name in ("q", "k", "v", "g", "beta", "state")]
    with pytest.raises(ValueError, match=message):
        run(rule, tensors, **arguments)


def test_kernels_name_what_they_cannot_do():
    tensors = draw("gated", 1, 9, 1, 1, (160, 16), 1, torch.float32)
    with pytest.raises(ValueError, match="heads of width 160"):
        run("gated", tensors, "triton")
    tensors = draw("gated", 1, 9, 1, 1, (16, 16), 1, torch.float32)
    with pytest.raises(ValueError, match="chunk_size=8"):
        run("gated", tensors, "triton", chunk_size=8)


# Every rule, every layout and every dtype, but not each with each: the interpreter takes up to ten seconds for one.
@pytest.mark.parametrize(
    ("rule", "lengths", "dtype", "heads", "widths"),
    [
        ("plain", [0, 35, 1, 0, 17], torch.float32, 2, (16, 16)),
        pytest.param("plain", [0, 40, 1, 0, 17], torch.float32, 2, (24, 40), marks=pytest.mark.long),
        pytest.param("gated", None, torch.float32, 2, (24, 40), marks=pytest.mark.long),
        pytest.param("gated", [0, 40, 1, 0, 17], torch.float16, 2, (24, 40), marks=pytest.mark.long),
        pytest.param("kimi", None, torch.float16, 2, (24, 40), marks=pytest.mark.long),
        ("kimi", [0, 35, 1, 0, 17], torch.float32, 1, (24, 40)),
    ],
)
def test_segments_equal_the_recurrence(rule, lengths, dtype, heads, widths, monkeypatch):
    # More segments than some sequences have chunks: 4, each a scan of its own in two passes.
    monkeypatch.setattr("triton_kernels.linear.delta_rule_launch.choose_segments", lambda *_: 4)
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    tokens, n_states = (70, 2) if lengths is None else (sum(lengths), len(lengths))
    tensors = draw(rule, 2 if lengths is None else 1, tokens, 1, heads, widths, n_states, dtype)
    assert_close(rule, tensors, "triton", cu_seqlens, chunk_size=16)


@pytest.mark.parametrize("rule", KERNEL_RULES)
def test_segments_repeat_bit_for_bit_and_see_no_future(rule, monkeypatch):
    monkeypatch.setattr("triton_kernels.linear.delta_rule_launch.choose_segments", lambda *_: 3)
    tensors = draw(rule, 1, 60, 1, 1, (16, 16), 1, torch.float32)
    changed = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    with torch.no_grad():
        for x in changed[:5]:
            if x is not None:
                x[:, 40:] *= 0.5
    results = []
    for xs in (tensors, tensors, changed):
        out, _ = run(rule, xs, "triton", chunk_size=16, normalize_qk=True)
        results.append((out[:, :40], *torch.autograd.grad(out[:, :40].sum(), [x for x in xs if x is not None])))
    assert all(torch.equal(a, b) for a, b in zip(*results[:2]))
    assert all(torch.equal(a[:, :40], b[:, :40]) for a, b in zip(*results[1:]))


def test_when_a_sequence_is_cut(monkeypatch):
    from triton_kernels.linear.linear_attention_launch import choose_segments

    # Heads of four slices each and 64 chunks: a few heads win, sixteen would not, nor does a short sequence.
    assert [choose_segments(4 * heads, 64, 1.0) for heads in (1, 4, 8, 32)] == [11, 9, 5, 1]
    assert choose_segments(16, 8, 1.0) == 1
    for tokens, heads, segments in ((4096, 16, 1), (4096, 4, 9), (256, 4, 1)):
        from triton_kernels.linear.delta_rule_launch import DeltaCall

        q = torch.empty(1, tokens, heads, 128, device="meta", dtype=torch.bfloat16)
        assert DeltaCall(q, q, None, cu_seqlens=None, chunk_size=64).segments == segments
