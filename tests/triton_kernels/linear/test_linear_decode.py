"""linear_decode: token by token it equals the layers' ops over the whole text; the kernels are as exact as torch, and
update in place."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_kernels.linear.causal_conv1d import causal_conv1d
from triton_kernels.linear.decayed_linear_attention import decayed_linear_attention
from triton_kernels.linear.gated_delta_rule import gated_delta_rule
from triton_kernels.linear.gated_rms_norm import gated_rms_norm
from triton_kernels.linear.kimi_delta_attention import kimi_delta_attention
from triton_kernels.linear.linear_decode import decay_gate, delta_decode, lightning_decode, split_heads

EPS = 1e-5
UPDATED = ("state_BHKV", "tail_BXW")


def draw(B, H, K, V, W, per_channel, T=None, dtype=torch.float64, seed=0) -> dict[str, Any]:
    """Arguments of delta_decode; with T the four projections have a token axis after the batch."""
    generator = torch.Generator().manual_seed(seed)
    X, channels, rows = H * (2 * K + V), H * K if per_channel else H, (B,) if T is None else (B, T)
    shapes = {
        "qkv_BX": (*rows, X),
        "gate_BHV": (*rows, H, V),
        "a": (*rows, channels),
        "b_BH": (*rows, H),
        "tail_BXW": (B, X, W - 1),
    }
    inputs = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }
    weights = {"conv_XW": (X, W), "A_log_H": (H,), "dt_bias": (channels,), "norm_V": (V,), "state_BHKV": (B, H, K, V)}
    weight_dtype = torch.promote_types(dtype, torch.float32)
    return inputs | {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(weight_dtype)
        for name, shape in weights.items()
    }


def run(arguments, function=delta_decode, **options):
    """(output, state, tail), leaving the arguments as they are."""
    arguments = {name: x.clone() if name in UPDATED else x for name, x in arguments.items()}
    y = function(**arguments, **options)
    return [y, *(arguments[name] for name in UPDATED if name in arguments)]


def whole_text(x, activation, per_channel):
    """The layer over all T tokens by the ops that training uses."""
    qkv, tail = causal_conv1d(x["qkv_BX"], x["conv_XW"], initial_tail=x["tail_BXW"])
    q, k, v = split_heads(qkv, x["state_BHKV"].shape[1:])
    log_decay = decay_gate(x["a"], x["A_log_H"], x["dt_bias"])
    options = {"normalize_qk": True, "initial_state_BHKV": x["state_BHKV"]}
    rule, log_decay = (kimi_delta_attention, log_decay) if per_channel else (gated_delta_rule, log_decay[..., 0])
    o, state = rule(q, k, v, log_decay, x["b_BH"].sigmoid(), **options)
    return gated_rms_norm(o, x["gate_BHV"], x["norm_V"], eps=EPS, activation=activation), state, tail


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 7), st.integers(1, 9), st.integers(2, 4), st.booleans())
def test_token_by_token_equals_the_whole_text(T, H, K, V, W, per_channel):
    x = draw(2, H, K, V, W, per_channel, T=T)
    activation = "sigmoid" if per_channel else "silu"
    expected, state, tail = whole_text(x, activation, per_channel)
    running = {name: value.clone() for name, value in x.items()}
    outputs = []
    for t in range(T):
        token = {name: x[name][:, t] for name in ("qkv_BX", "gate_BHV", "a", "b_BH")}
        outputs.append(delta_decode(**running | token, eps=EPS, activation=activation))
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(running["state_BHKV"], state, rtol=1e-9, atol=1e-9)
    assert torch.equal(running["tail_BXW"], tail)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 7), st.integers(1, 9))
def test_lightning_token_by_token_equals_the_whole_text(T, H, K, V):
    generator = torch.Generator().manual_seed(T)
    qkv_BTX = torch.randn(2, T, H * (2 * K + V), generator=generator, dtype=torch.float64)
    state = torch.randn(2, H, K, V, generator=generator, dtype=torch.float64)
    log_decay_H = -torch.rand(H, generator=generator, dtype=torch.float64)
    expected, final = decayed_linear_attention(
        *split_heads(F.silu(qkv_BTX), (H, K, V)), log_decay_H, initial_state_BHKV=state
    )
    outputs = torch.stack([lightning_decode(qkv_BTX[:, t], log_decay_H, state_BHKV=state) for t in range(T)], 1)
    torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, final, rtol=1e-9, atol=1e-9)


def assert_as_exact_as_torch(arguments, function=delta_decode, **options):
    dtype = arguments["qkv_BX"].dtype
    exact = run({name: x.double() for name, x in arguments.items()}, function, backend="torch", **options)
    by_torch = run(arguments, function, backend="torch", **options)
    for ours, low, right in zip(run(arguments, function, backend="triton", **options), by_torch, exact):
        assert ours.dtype == low.dtype
        budget = 2 * (low.double() - right).abs().max() + 8 * torch.finfo(dtype).eps * right.abs().max()
        # Written so that a NaN fails.
        assert (ours.double() - right).abs().max() <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "K", "V", "W"),
    [(1, 1, 1, 1, 2), (2, 3, 6, 10, 4), (2, 2, 32, 64, 3), (1, 2, 64, 40, 4), (1, 1, 256, 256, 4)],
)
def test_kernel_is_as_exact_as_torch(B, H, K, V, W, per_channel, dtype):
    assert_as_exact_as_torch(
        draw(B, H, K, V, W, per_channel, dtype=dtype), eps=EPS, activation="sigmoid" if per_channel else "silu"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("B", "H", "K", "V"), [(1, 1, 1, 1), (2, 3, 6, 10), (2, 2, 32, 50), (1, 2, 64, 128)])
def test_lightning_kernel_is_as_exact_as_torch(B, H, K, V, dtype):
    arguments = draw(B, H, K, V, 2, False, dtype=dtype)
    inputs = {
        "qkv_BX": arguments["qkv_BX"],
        "state_BHKV": arguments["state_BHKV"],
        "log_decay_H": -arguments["A_log_H"].abs(),
    }
    assert_as_exact_as_torch(inputs, lightning_decode)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_gates_at_their_ends_forget_everything_or_nothing(backend, per_channel):
    x = draw(1, 2, 8, 16, 4, per_channel, dtype=torch.float32) | {"A_log_H": torch.full((2,), 3.0)}
    options = {"eps": EPS, "activation": "silu", "backend": backend}
    x["b_BH"] = torch.full((1, 2), -200.0)
    assert torch.equal(run(x | {"a": torch.full_like(x["a"], -1000.0)}, **options)[1], x["state_BHKV"])
    assert not run(x | {"a": torch.full_like(x["a"], 1000.0)}, **options)[1].any()


def test_projections_are_read_where_they_lie():
    """The four as slices of one projection, as the layers pass them."""
    x = draw(2, 2, 16, 16, 4, False, dtype=torch.float32)
    names = ("qkv_BX", "gate_BHV", "a", "b_BH")
    fused = torch.cat([x[name].flatten(1) for name in names], -1)
    pieces = dict(zip(names, fused.split([x[name][0].numel() for name in names], -1)))
    pieces["gate_BHV"] = pieces["gate_BHV"].unflatten(-1, (2, 16))
    assert not any(piece.is_contiguous() for piece in pieces.values())
    options = {"eps": EPS, "activation": "silu", "backend": "triton"}
    for strided, dense in zip(run(x | pieces, **options), run(x, **options)):
        assert torch.equal(strided, dense)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_batch_of_nothing_is_nothing(backend):
    x = draw(0, 2, 16, 8, 4, True, dtype=torch.float32)
    y, state, tail = run(x, eps=EPS, activation="sigmoid", backend=backend)
    assert (y.shape, state.shape, tail.shape) == ((0, 2, 8), (0, 2, 16, 8), (0, 80, 3))
    assert lightning_decode(x["qkv_BX"], x["A_log_H"], state_BHKV=state, backend=backend).shape == (0, 2, 8)


def test_the_operators_are_registered_soundly():
    from triton_kernels.linear.linear_decode_launch import delta_decode_op, lightning_decode_op

    x = draw(2, 2, 8, 8, 4, True, dtype=torch.float32)
    utils = ("test_schema", "test_faketensor")
    names = ("qkv_BX", "gate_BHV", "a", "b_BH", "conv_XW", "A_log_H", "dt_bias", "norm_V", "state_BHKV", "tail_BXW")
    torch.library.opcheck(delta_decode_op, (*(x[name] for name in names), EPS, True), test_utils=utils)
    torch.library.opcheck(lightning_decode_op, (x["qkv_BX"], x["A_log_H"], x["state_BHKV"]), test_utils=utils)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_BX": torch.zeros(2, 5)}, "qkv_BX has shape"),
        ({"gate_BHV": torch.zeros(2, 4, 3)}, "gate_BHV has shape"),
        ({"a": torch.zeros(2, 5)}, "a has shape"),
        ({"b_BH": torch.zeros(2, 2).half()}, "b_BH is torch.float16"),
        ({"conv_XW": torch.zeros(24, 9), "tail_BXW": torch.zeros(2, 24, 8)}, "conv_XW has width W=9"),
        ({"tail_BXW": torch.zeros(2, 24, 2)}, "tail_BXW has shape"),
        ({"A_log_H": torch.zeros(3)}, "A_log_H has shape"),
        ({"dt_bias": torch.zeros(8)}, "dt_bias has shape"),
        ({"norm_V": torch.zeros(3)}, "norm_V has shape"),
        ({"state_BHKV": torch.zeros(2, 4, 4)}, "state_BHKV has shape"),
        ({"state_BHKV": torch.zeros(2, 2, 4, 4).half()}, "state_BHKV is torch.float16"),
        ({"state_BHKV": torch.zeros(2, 2, 4, 4).transpose(2, 3), "backend": "triton"}, "must be contiguous"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, message):
    arguments = draw(2, 2, 4, 4, 4, False, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        delta_decode(**{**arguments, "eps": EPS, "activation": "silu", **change})
