"""One token of a whole linear-attention layer, between its projections: what decoding launches instead of the layer's
operators one by one.

    delta_decode (gated DeltaNet, KDA):   q, k, v = SiLU(conv(x)), q and k of unit length;  g = -exp(A_log) softplus(a +
                                          dt_bias);  beta = sigmoid(b) S <- (I - beta k k^T) e^g S + beta k v^T;  o =
                                                     S^T q / sqrt(K);  y = RMSNorm(o) * act(gate), per head
    lightning_decode (lightning):         q, k, v = SiLU(x);  S <- e^g S + k v^T;  o = S^T q

The state and the convolution's tail are updated in place: the state is read once and written once, nearly all the bytes
there are. Lightning's norm spans all heads, which no program holds, so it stays a launch of its own.

Legend: B batch, H heads, K key width, V value width, X = H (2 K + V) channels of queries, keys and values side by side,
W convolution width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels.common.checks import (
    check_backend,
    check_dtype,
    check_number,
    check_placed,
    check_shape,
    check_tensors,
)
from triton_kernels.linear.causal_conv1d import WIDTHS, causal_conv1d
from triton_kernels.linear.chunked_rule_torch import inverse_length
from triton_kernels.linear.delta_rule import check_delta_inputs
from triton_kernels.linear.gated_rms_norm import ACTIVATIONS, gated_rms_norm
from triton_kernels.linear.linear_attention_torch import linear_attention_recurrence
from triton_kernels.linear.native import delta_decode_native, lightning_decode_native
from triton_kernels.native.library import is_native

MAX_WIDTH = 256


def delta_decode(
    qkv_BX: Tensor,
    gate_BHV: Tensor,
    a: Tensor,
    b_BH: Tensor,
    *,
    conv_XW: Tensor,
    A_log_H: Tensor,
    dt_bias: Tensor,
    norm_V: Tensor,
    state_BHKV: Tensor,
    tail_BXW: Tensor,
    eps: float,
    activation: str,
    backend: str = "auto",
) -> Tensor:
    """One token of a gated DeltaNet or KDA layer, from its projections to the input of its output projection.

    Args:
        qkv_BX, gate_BHV, b_BH: projections in one dtype, which is y's.
        a: [B, H], or [B, H * K] for a decay per key channel.
        conv_XW: the convolution's weights, rounded to the projections' dtype.
        A_log_H, dt_bias: parameters of the decay; dt_bias has as many entries as a row of a.
        norm_V: weights of the gated norm; eps and activation ("silu" or "sigmoid") are its options.
        state_BHKV: fp32, updated in place.
        tail_BXW: the last W - 1 inputs of the convolution in the projections' dtype, updated in place.
        backend: "torch", "triton", or "auto": Triton on CUDA tensors.

    Returns:
        y_BHV. No gradient on Triton.

    Raises:
        ValueError: for shapes, dtypes and options that do not fit.

    Sources: arXiv 2412.06464 (gated DeltaNet), 2510.26692 (KDA).
    """
    op = "delta_decode"
    B, H, K, V = check_linear_projection(op, qkv_BX, state_BHKV)
    sizes = {"B": B, "H": H, "V": V, "X": qkv_BX.shape[1]}
    W = check_tensors(op, sizes, gate_BHV=gate_BHV, b_BH=b_BH, conv_XW=conv_XW, A_log_H=A_log_H, norm_V=norm_V)["W"]
    channels = H if a.dim() == 2 and a.shape[1] == H else H * K
    check_shape(op, "a", a, {"B": B, "H or H*K": channels})
    check_shape(op, "dt_bias", dt_bias, {"entries of a": channels})
    check_shape(op, "tail_BXW", tail_BXW, {"B": B, "X": sizes["X"], "W-1": W - 1})
    check_placed(
        op,
        qkv_BX=qkv_BX,
        conv_XW=conv_XW,
        A_log_H=A_log_H,
        dt_bias=dt_bias,
        norm_V=norm_V,
        state_BHKV=state_BHKV,
        tail_BXW=tail_BXW,
    )
    check_number(op, "eps", eps, least=0)
    check_dtype(op, {"qkv_BX": qkv_BX, "gate_BHV": gate_BHV, "a": a, "b_BH": b_BH, "tail_BXW": tail_BXW})
    if W not in WIDTHS:
        raise ValueError(f"{op}: conv_XW has width W={W}, legal are 2 to {WIDTHS[-1]}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation={activation!r}, legal are {', '.join(map(repr, ACTIVATIONS))}")
    native = tail_BXW.is_contiguous() and is_native(qkv_BX, B, conv_XW, A_log_H, dt_bias, norm_V, state_BHKV)
    backend = check_backend(backend, qkv_BX, native=native)
    if backend == "triton":
        check_in_place(op, qkv_BX, state_BHKV, tail_BXW)
        # Imported here: Triton exists on Linux only, and its interpreter must be chosen before a kernel is defined.
        from triton_kernels.linear.linear_decode_launch import delta_decode_op

        return delta_decode_op(
            qkv=qkv_BX,
            gate=gate_BHV,
            a=a,
            b=b_BH,
            conv=conv_XW,
            A_log=A_log_H,
            dt_bias=dt_bias,
            norm=norm_V,
            state=state_BHKV,
            tail=tail_BXW,
            eps=eps,
            silu=activation == "silu",
        )
    if backend == "native":
        return delta_decode_native(
            *(qkv_BX, gate_BHV, a, b_BH),
            conv_XW=conv_XW,
            A_log_H=A_log_H,
            dt_bias=dt_bias,
            norm_V=norm_V,
            state_BHKV=state_BHKV,
            tail_BXW=tail_BXW,
            eps=eps,
            silu=activation == "silu",
        )
    qkv_B1X, tail = causal_conv1d(qkv_BX[:, None], conv_XW.to(qkv_BX.dtype), initial_tail=tail_BXW, backend="torch")
    log_decay = decay_gate(a, A_log_H, dt_bias)
    beta_BH = b_BH.to(log_decay.dtype).sigmoid()
    o_BHV, state = linear_attention_step(
        *split_heads(qkv_B1X[:, 0], (H, K, V)), log_decay, beta_BH, state_BHKV, normalize_qk=True
    )
    state_BHKV.copy_(state.detach())
    tail_BXW.copy_(tail.detach())
    return gated_rms_norm(o_BHV, gate_BHV, norm_V, eps=eps, activation=activation, backend="torch")


def lightning_decode(qkv_BX: Tensor, log_decay_H: Tensor, *, state_BHKV: Tensor, backend: str = "auto") -> Tensor:
    """One token of a lightning layer's heads, from the projected queries, keys and values (before their SiLU) to what
    is yet to be normed.

    Args:
        qkv_BX: queries, keys and values side by side.
        log_decay_H: fp32 nats per token, <= 0.
        state_BHKV: fp32, updated in place.
        backend: "torch", "triton", or "auto": Triton on CUDA tensors.

    Returns:
        o_BHV in the dtype of qkv. No gradient on Triton.

    Raises:
        ValueError: for shapes and dtypes that do not fit.

    Source: arXiv 2401.04658.
    """
    op = "lightning_decode"
    _, H, K, V = check_linear_projection(op, qkv_BX, state_BHKV)
    check_tensors(op, {"H": H}, log_decay_H=log_decay_H)
    check_dtype(op, {"qkv_BX": qkv_BX})
    check_placed(op, qkv_BX=qkv_BX, log_decay_H=log_decay_H, state_BHKV=state_BHKV)
    backend = check_backend(backend, qkv_BX, native=is_native(qkv_BX, len(qkv_BX), log_decay_H, state_BHKV))
    if backend == "triton":
        check_in_place(op, qkv_BX, state_BHKV)
        from triton_kernels.linear.linear_decode_launch import lightning_decode_op

        return lightning_decode_op(qkv_BX, log_decay_H, state_BHKV)
    if backend == "native":
        return lightning_decode_native(qkv_BX, log_decay_H, state_BHKV=state_BHKV)
    log_decay_BH1 = log_decay_H[:, None].expand(len(qkv_BX), H, 1)
    o_BHV, state = linear_attention_step(
        *split_heads(F.silu(qkv_BX), (H, K, V)), log_decay_BH1, None, state_BHKV, scale=1.0
    )
    state_BHKV.copy_(state.detach())
    return o_BHV


def linear_attention_step(
    q_BGK: Tensor,
    k_BGK: Tensor,
    v_BHV: Tensor,
    log_decay: Tensor | None,
    beta_BH: Tensor | None,
    state_BHKV: Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of `gated_delta_rule`, `kimi_delta_attention` or, without beta, `decayed_linear_attention`, by the
    recurrence itself.

    Args:
        log_decay: [B, H, 1], [B, H, K] or None.
        beta_BH: None for no correction.
        state_BHKV: fp32 or fp64; all is computed in its dtype.
        scale: of the queries; K^-1/2 by default.
        normalize_qk: divides q and k by their length over K.

    Returns:
        o_BHV in v's dtype and the new state in the state's dtype; gradients flow to every tensor.

    Raises:
        ValueError: for shapes and dtypes that do not fit.
    """
    op, H = "linear_attention_step", v_BHV.shape[1]
    sizes = check_delta_inputs(op, q_BGK=q_BGK, k_BGK=k_BGK, v_BHV=v_BHV, beta_BH=beta_BH, state_BHKV=state_BHKV)
    if log_decay is None:
        log_decay = state_BHKV.new_zeros(len(v_BHV), H, 1)
    elif log_decay.shape[2:] != (1,):
        check_tensors(op, sizes, log_decay_BHK=log_decay)
    q_BGK, k_BGK = q_BGK.to(state_BHKV.dtype), k_BGK.to(state_BHKV.dtype)
    if normalize_qk:
        q_BGK, k_BGK = q_BGK * inverse_length(q_BGK), k_BGK * inverse_length(k_BGK)
    q_BHK, k_BHK = (x.repeat_interleave(H // x.shape[1], 1) for x in (q_BGK, k_BGK))
    tokens = (None if x is None else x[:, None].to(state_BHKV.dtype) for x in (q_BHK, k_BHK, v_BHV, log_decay, beta_BH))
    o_B1HV, state_BHKV = linear_attention_recurrence(
        *tokens, state_BHKV, scale=q_BGK.shape[-1] ** -0.5 if scale is None else scale
    )
    return o_B1HV[:, 0].to(v_BHV.dtype), state_BHKV


def decay_gate(a: Tensor, A_log_H: Tensor, dt_bias: Tensor) -> Tensor:
    """Log-decays <= 0 [..., H, 1] or [..., H, K] of the projections a [..., H] or [..., H * K], in at least fp32 (arXiv
    2405.21060, 2412.06464)."""
    return -A_log_H.exp()[:, None] * F.softplus(a + dt_bias).unflatten(-1, (len(A_log_H), -1))


def split_heads(qkv_BX: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [..., H, K] and v [..., H, V] as views of channels that lie side by side; shape is (H, K, V)."""
    H, K, V = shape
    q, k, v = qkv_BX.split([H * K, H * K, H * V], dim=-1)
    return q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (H, V))


def check_linear_projection(op: str, qkv_BX: Tensor, state_BHKV: Tensor) -> tuple[int, int, int, int]:
    """(B, H, K, V) of a state and the channels that belong to it."""
    B, H, K, V = check_tensors(op, state_BHKV=state_BHKV).values()
    check_tensors(op, {"B": B, "X": H * (2 * K + V)}, qkv_BX=qkv_BX)
    if state_BHKV.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op}: state_BHKV is {state_BHKV.dtype}, legal are torch.float32 and, on torch, torch.float64"
        )
    return B, H, K, V


def check_in_place(op: str, qkv_BX: Tensor, *updated: Tensor) -> None:
    """What the kernels cannot take: the state, first of `updated`, and whatever else they write where it lies."""
    width = max(updated[0].shape[2:])
    if qkv_BX.dtype == torch.float64 or updated[0].dtype == torch.float64 or width > MAX_WIDTH:
        raise ValueError(
            f"{op}: {qkv_BX.dtype} heads of width {width}; the Triton kernels take up to {MAX_WIDTH}, and no float64"
        )
    if not all(x.is_contiguous() for x in updated):
        raise ValueError(f"{op}: the state and the tail are updated where they lie and must be contiguous")
