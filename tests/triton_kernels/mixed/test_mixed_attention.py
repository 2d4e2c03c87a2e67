"""mixed_attention: the common launch (in the interpreter) against the two ops' torch references in fp64, outputs, state
and every gradient; decoding against the full form."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_kernels.linear.linear_decode import split_heads
from triton_kernels.mixed.mixed_attention import mixed_attention, mixed_decode

NAMES = ("q", "k", "v", "linear_q", "linear_k", "linear_v", "log_decay", "sinks_H", "initial_state_NJKV")


def draw(
    B, T, H, G, J, widths=(16, 16, 16, 16), S=None, N=None, gate="fixed", extras=True, dtype=torch.float32, seed=0
) -> dict[str, Any]:
    """The tensors by name; widths: K and V of the softmax heads, K and V of the linear heads; extras: sinks and an
    initial state."""
    generator = torch.Generator().manual_seed(seed)
    K, V, linear_K, linear_V = widths
    shapes = {"q": (B, T, H, K), "k": (B, S or T, G, K), "v": (B, S or T, G, V)}
    shapes |= {"linear_q": (B, T, J, linear_K), "linear_k": (B, T, J, linear_K), "linear_v": (B, T, J, linear_V)}
    tensors: dict[str, Any] = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }
    decay_shape = {"none": None, "fixed": (J,), "token": (B, T, J)}[gate]
    tensors["log_decay"] = None if decay_shape is None else -torch.rand(decay_shape, generator=generator)
    tensors["sinks_H"] = torch.randn(H, generator=generator) if extras else None
    tensors["initial_state_NJKV"] = torch.randn(N or B, J, linear_K, linear_V, generator=generator) if extras else None
    return {name: x if x is None else x.requires_grad_() for name, x in tensors.items()}


def results(tensors, **options):
    """The three outputs and the gradients of every tensor through all of them."""
    positional = [tensors[name] for name in NAMES[:7]]
    outputs = mixed_attention(
        *positional, **{name: tensors[name] for name in NAMES[7:]}, linear_scale=0.3, chunk_size=16, **options
    )
    generator = torch.Generator().manual_seed(1)
    loss = torch.stack(
        [(x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in outputs]
    ).sum()
    leaves = {name: x for name, x in tensors.items() if x is not None}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(("o", "linear_o", "final"), outputs)) | dict(zip(leaves, gradients))


def assert_as_exact_as_torch(tensors, **options):
    in_fp64 = {name: None if x is None else x.detach().double().requires_grad_() for name, x in tensors.items()}
    exact, by_torch = results(in_fp64, backend="torch", **options), results(tensors, backend="torch", **options)
    # The gradient of a fixed decay adds up, over the tokens, sums of <q, dq> - <k, dk> that largely cancel: roundings
    # of the sum of their sizes.
    sizes = sum((in_fp64[f"linear_{name}"] * exact[f"linear_{name}"]).sum(-1).abs() for name in "qk")
    cancelled = sizes.sum((0, 1)).max() * sizes.shape[1] ** 0.5 if sizes.numel() > 0 else 0
    for name, x in results(tensors, backend="triton", **options).items():
        right = exact[name]
        assert x.dtype == by_torch[name].dtype
        if right.numel() == 0:
            continue
        # The gradient of a fixed decay is one number per head: the sum of a term per token that largely cancel.
        largest = right.abs().max() + (cancelled if name == "log_decay" else 0) + 1
        budget = (
            2 * (by_torch[name].double() - right).abs().sum() / right.numel() ** 0.5
            + 16 * torch.finfo(tensors["q"].dtype).eps * largest
        )
        # Written so that a NaN fails.
        assert (x.double() - right).abs().max() <= budget, name


@pytest.mark.parametrize(
    ("B", "T", "S", "H", "G", "J", "widths", "gate", "window", "dtype"),
    [
        (1, 1, 1, 1, 1, 1, (16, 16, 16, 16), "none", None, torch.float32),
        (1, 1, 1, 1, 1, 1, (16, 16, 16, 16), "none", None, torch.float16),
        (2, 63, 63, 4, 2, 3, (32, 16, 16, 32), "token", None, torch.float16),
        (1, 100, 100, 2, 1, 1, (24, 40, 16, 48), "fixed", 30, torch.float32),
        (1, 70, 150, 2, 2, 2, (16, 16, 32, 16), "fixed", None, torch.float16),
        (1, 90, 90, 1, 1, 1, (64, 64, 64, 64), "token", 1, torch.float32),
    ],
)
def test_outputs_and_gradients(B, T, S, H, G, J, widths, gate, window, dtype):
    assert_as_exact_as_torch(draw(B, T, H, G, J, widths, S=S, gate=gate, extras=T % 2 == 1, dtype=dtype), window=window)


@settings(max_examples=3, deadline=None)
@given(
    st.data(),
    st.integers(1, 40),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from(["none", "fixed", "token"]),
)
def test_any_heads_lengths_windows_and_packings(data, T, G, J, group, gate):
    window = data.draw(st.none() | st.integers(1, T + 5))
    cuts = data.draw(st.none() | st.lists(st.integers(0, T), max_size=4))
    cu_seqlens = None if cuts is None else torch.tensor([0, *sorted(cuts), T])
    tensors = draw(
        1,
        T,
        G * group,
        G,
        J,
        N=1 if cu_seqlens is None else len(cu_seqlens) - 1,
        gate=gate,
        extras=data.draw(st.booleans()),
        seed=T,
    )
    assert_as_exact_as_torch(tensors, window=window, cu_seqlens=cu_seqlens)


def test_packed_sequences_with_empty_and_single_token_ones():
    tensors = draw(1, 60, 2, 1, 2, N=5, gate="token", dtype=torch.float16)
    assert_as_exact_as_torch(tensors, cu_seqlens=torch.tensor([0, 0, 1, 31, 31, 60]), window=20)


def test_the_future_changes_no_bit_of_the_past_and_two_runs_agree():
    tensors = draw(1, 45, 2, 1, 1, gate="token")
    changed = dict(tensors)
    for name in NAMES[:7]:
        changed[name] = torch.cat((tensors[name][:, :25], 3 * tensors[name][:, 25:] - 1), 1).detach().requires_grad_()

    def past(x: dict[str, Any]):
        outputs = mixed_attention(
            *(x[name] for name in NAMES[:7]), **{name: x[name] for name in NAMES[7:]}, chunk_size=16, backend="triton"
        )
        gradients = torch.autograd.grad(
            outputs[0][:, :25].sum() + outputs[1][:, :25].sum(), [x[name] for name in NAMES[:6]]
        )
        return [*(o[:, :25] for o in outputs[:2]), *(gradient[:, :25] for gradient in gradients)]

    before, again, after = past(tensors), past(tensors), past(changed)
    assert all(torch.equal(a, b) for a, b in zip(before, again))
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_fused_projections_are_read_where_they_lie():
    fused = torch.randn(2, 40, 4, 48, generator=torch.Generator().manual_seed(0))
    pieces = [fused[:, :, :2], fused[:, :, 2:]]
    inputs = [x for piece in pieces for x in piece.split(16, -1)]
    assert not any(x.is_contiguous() for x in inputs)
    strided = mixed_attention(*inputs, None, backend="triton")
    dense = mixed_attention(*(x.contiguous() for x in inputs), None, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(strided, dense))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("window", [None, 12])
def test_prefill_and_decode_equal_the_full_form(backend, window):
    """Token by token over a growing cache, or a ring where there is a window, full of NaN where nothing is cached
    yet."""
    B, T, H, G, J, K = 1, 29, 4, 2, 2, 16
    x = {name: None if value is None else value.detach() for name, value in draw(B, T, H, G, J, extras=True).items()}
    qkv_BTX = torch.randn(B, T, 3 * J * K, generator=torch.Generator().manual_seed(5))
    linear = split_heads(F.silu(qkv_BTX), (J, K, K))
    options = {"sinks_H": x["sinks_H"], "backend": backend}
    state = {"initial_state_NJKV": x["initial_state_NJKV"]}
    o, linear_o, final = mixed_attention(
        x["q"], x["k"], x["v"], *linear, x["log_decay"], window=window, **state, **options
    )
    prefill = [y[:, :25] for y in (x["q"], x["k"], x["v"], *linear)]
    _, _, running = mixed_attention(*prefill, x["log_decay"], window=window, **state, **options)
    capacity = window or T
    caches = [torch.full((B, capacity, G, K), torch.nan) for _ in range(2)]
    for t in range(T):
        for cache, name in zip(caches, "kv"):
            cache[:, t % capacity] = x[name][:, t]
        if t >= 25:
            lengths_B = torch.full((B,), t + 1)
            step = mixed_decode(
                x["q"][:, t], *caches, lengths_B, qkv_BTX[:, t], x["log_decay"], state_BJKV=running, **options
            )
            torch.testing.assert_close(step[0], o[:, t], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(step[1], linear_o[:, t], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(running, final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("S", "lengths", "H", "G", "J", "K"),
    [(1, [1, 0], 2, 1, 1, 16), (100, [100, 7], 4, 2, 3, 24), (130, [900], 2, 2, 2, 64)],
)
def test_decode_kernel_is_as_exact_as_torch(S, lengths, H, G, J, K, dtype):
    generator = torch.Generator().manual_seed(S)
    B, lengths_B = len(lengths), torch.tensor(lengths)
    tensors = [
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((B, H, K), (B, S, G, K), (B, S, G, K), (B, 3 * J * K))
    ]
    state, log_decay_J = torch.randn(B, J, K, K, generator=generator), -torch.rand(J, generator=generator)

    def run(dtype, backend):
        q, k, v, qkv = (x.to(dtype) for x in tensors)
        after = state.to(torch.promote_types(dtype, torch.float32), copy=True)
        return [
            *mixed_decode(
                q, k, v, lengths_B, qkv, log_decay_J, state_BJKV=after, sinks_H=torch.ones(H), backend=backend
            ),
            after,
        ]

    for ours, low, right in zip(run(dtype, "triton"), run(dtype, "torch"), run(torch.float64, "torch")):
        assert ours.dtype == low.dtype
        budget = 2 * (low.double() - right).abs().max() + 8 * torch.finfo(dtype).eps * right.abs().max()
        assert (ours.double() - right).abs().max() <= budget


def test_the_operators_are_registered_soundly():
    from triton_kernels.mixed.mixed_attention_launch import decode_op, forward_op

    x = draw(1, 20, 2, 1, 2)
    arguments = (
        x["q"],
        x["k"],
        x["v"],
        x["sinks_H"],
        x["linear_q"],
        x["linear_k"],
        x["linear_v"],
        None,
        x["initial_state_NJKV"],
        None,
    )
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(forward_op, (*arguments, 7, 0.25, 1.0, 16), test_utils=tests)
    q, k, v = (x[name].detach() for name in "qkv")
    decode = (
        q[:, 0],
        k,
        v,
        torch.tensor([20]),
        None,
        torch.zeros(1, 96),
        torch.zeros(2),
        torch.zeros(1, 2, 16, 16),
        0.25,
    )
    torch.library.opcheck(decode_op, decode, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 9, 3, 16), "v": torch.zeros(1, 9, 3, 16)}, "multiple of G"),
        ({"linear_q": torch.zeros(1, 8, 2, 16)}, "linear_q_BTJK has shape"),
        ({"linear_k": torch.zeros(1, 9, 3, 16)}, "linear_k_BTJK has shape"),
        ({"linear_v": torch.zeros(1, 9, 2, 16).half()}, "linear_v_BTJV is torch.float16"),
        ({"log_decay": torch.zeros(3)}, "log_decay_J has shape"),
        ({"sinks_H": torch.zeros(3)}, "sinks_H has shape"),
        ({"initial_state_NJKV": torch.zeros(2, 2, 16, 16)}, "initial_state_NJKV has shape"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens must rise from 0 to T=9"),
        ({"window": 0}, "window=0"),
        ({"scale": 0.0}, "mixed_attention: scale=0.0"),
        ({"chunk_size": 24, "backend": "triton"}, "chunk_size=24"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, message):
    arguments = draw(1, 9, 4, 2, 2) | change
    positional = [arguments.pop(name) for name in NAMES[:7]]
    with pytest.raises(ValueError, match=message):
        mixed_attention(*positional, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_BHK": torch.zeros(2, 3, 8)}, "multiple of G"),
        ({"k_cache_BSGK": torch.zeros(2, 5, 2, 4)}, "k_cache_BSGK has shape"),
        ({"v_cache_BSGV": torch.zeros(2, 6, 2, 8)}, "v_cache_BSGV has shape"),
        ({"v_cache_BSGV": torch.zeros(2, 5, 2, 8).half()}, "v_cache_BSGV is torch.float16"),
        ({"lengths_B": torch.tensor([1, 2], dtype=torch.int32)}, "lengths_B is torch.int32"),
        ({"linear_qkv_BX": torch.zeros(2, 47)}, "qkv_BX has shape"),
        ({"linear_qkv_BX": torch.zeros(3, 48), "state_BJKV": torch.zeros(3, 2, 8, 8)}, "state_BJKV holds 3 sequences"),
        ({"log_decay_J": torch.zeros(3)}, "log_decay_J has shape"),
        ({"sinks_H": torch.zeros(3)}, "sinks_H has shape"),
        ({"scale": -1.0}, "mixed_decode: scale=-1.0"),
        ({"state_BJKV": torch.zeros(2, 2, 8, 8).transpose(2, 3), "backend": "triton"}, "must be contiguous"),
    ],
)
def test_wrong_decode_arguments_are_refused_by_name(change, message):
    arguments = {
        "q_BHK": torch.zeros(2, 4, 8),
        "k_cache_BSGK": torch.zeros(2, 5, 2, 8),
        "v_cache_BSGV": torch.zeros(2, 5, 2, 8),
        "lengths_B": torch.tensor([5, 2]),
        "linear_qkv_BX": torch.zeros(2, 48),
        "log_decay_J": torch.zeros(2),
        "state_BJKV": torch.zeros(2, 2, 8, 8),
    }
    with pytest.raises(ValueError, match=message):
        mixed_decode(**arguments | change)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("seed", range(3))
def test_a_fixed_decay_keeps_the_digits_of_its_gradient_through_the_final_state_alone(seed: int, backend: str) -> None:
    """Five chunks, the last of one token; once 2e-4 of it were lost."""

    def gradient(dtype: torch.dtype, backend: str) -> torch.Tensor:
        tensors = draw(1, 65, 2, 1, 2, seed=seed, extras=False)
        tensors = {name: None if x is None else x.detach().to(dtype) for name, x in tensors.items()}
        decay = tensors["log_decay"].requires_grad_()
        *_, final = mixed_attention(*(tensors[name] for name in NAMES[:7]), chunk_size=16, backend=backend)
        weights = torch.randn(final.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        (gradient,) = torch.autograd.grad((final.double() * weights).sum(), [decay])
        return gradient.double()

    exact = gradient(torch.float64, "torch")
    assert (gradient(torch.float32, backend) - exact).abs().max() < 1e-5 * exact.abs().max()
