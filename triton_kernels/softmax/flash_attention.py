"""Softmax attention with grouped K/V heads, causal or not, optionally in a sliding window, with sink logits, rotary
queries and packed sequences.

    s_ij = scale * <q_i, k_j>;  o_i = sum_j e^{s_ij} v_j / (sum_j e^{s_ij} + e^{sink_h})

Sources: FlashAttention-2 (arXiv 2307.08691) for the tiling, the sink logit as in gpt-oss (arXiv 2508.10925): one more
logit per head in the denominator, with no value, so that a head may attend to nothing.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key width, V value width, P half of the rotated
channels.
"""

import math

import torch
from torch import Tensor

from triton_kernels.common.checks import check_backend, check_cu_seqlens, check_dtype, check_placed, check_tensors
from triton_kernels.native.library import products_here, takes_many_rows
from triton_kernels.softmax.flash_attention_torch import flash_attention_torch
from triton_kernels.softmax.native import flash_attention_native
from triton_kernels.softmax.rotary import Rotary, check_rotary, rotate

OP = "flash_attention"
MAX_WIDTH = 256
MAX_ROTARY_WIDTH = 128


def flash_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rotary: Rotary | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every query over the keys it may see.

    Args:
        q_BTHK: queries. The last query is aligned with the last key, so query t stands at position S - T + t.
        k_BSGK, v_BSGV: keys and values; query head h reads head h // (H // G).
        causal: a query sees the keys up to its own position; then S >= T.
        window: how many keys a query sees, itself included (causal only); None for all.
        scale: of the logits; K^-0.5 by default.
        sinks_H: one logit per query head that joins the softmax's denominator.
        cu_seqlens: int64 [N + 1] from 0 to T: B = 1 holds N sequences end to end (empty ones included) that do not see
            each other; T == S.
        rotary: cosine and sine [T, P] of the queries' angles (`rotary_tables`), which turn the first 2 P channels of
            every query before it meets the keys; these are turned already, by `rotate`. Without gradients.
        backend: "torch", "triton", "native" (in C on a CPU, for `products_here` without cu_seqlens), or "auto": Triton
            on CUDA tensors, C where it takes them.

    Returns:
        o_BTHV in the dtype of q.

    Raises:
        ValueError: for shapes, dtypes and options that do not fit.
    """
    scale = check_attention(
        OP, q_BTHK, k_BSGK, v_BSGV, causal=causal, window=window, scale=scale, sinks_H=sinks_H, cu_seqlens=cu_seqlens
    )
    if rotary is not None:
        check_rotary(OP, rotary, q_BTHK.shape[1], q_BTHK.shape[3])
        check_placed(OP, q_BTHK=q_BTHK, rotary_cosines_TP=rotary[0], rotary_sines_TP=rotary[1])
        rotary = rotary if rotary[0].shape[1] > 0 else None
    heads = [q_BTHK, k_BSGK, v_BSGV, *([] if sinks_H is None else [sinks_H])]
    backend = check_backend(
        backend, q_BTHK, native=cu_seqlens is None and takes_many_rows(*heads, dtypes=products_here())
    )
    if backend == "native":
        return flash_attention_native(
            *(q_BTHK, k_BSGK, v_BSGV),
            rotary=rotary,
            sinks_H=sinks_H,
            causal=causal,
            window=window,
            scale=scale,
        )
    if backend == "torch":
        return flash_attention_torch(
            q_BTHK,
            k_BSGK,
            v_BSGV,
            cu_seqlens=cu_seqlens,
            rotary=rotary,
            sinks_H=sinks_H,
            causal=causal,
            window=window,
            scale=scale,
        )
    check_kernels_take(OP, q_BTHK, v_BSGV)
    if rotary is not None and (
        rotary[0].shape[1].bit_count() > 1 or max(q_BTHK.shape[3], v_BSGV.shape[3]) > MAX_ROTARY_WIDTH
    ):
        # The kernels fold a head's channels in two, which takes a power of two of them, and registers that wider heads
        # do not leave.
        q_BTHK, rotary = rotate(q_BTHK, rotary, backend=backend), None
    # Imported here because machines without Triton (macOS) still have the torch backend.
    from triton_kernels.softmax.flash_attention_launch import forward_op

    cos, sin = rotary or (None, None)
    return forward_op(
        q=q_BTHK,
        k=k_BSGK,
        v=v_BSGV,
        cu_seqlens=cu_seqlens,
        cos=cos,
        sin=sin,
        sinks=sinks_H,
        causal=causal,
        window=window,
        scale=scale,
    )[0]


def check_attention(
    op: str,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
    sinks_H: Tensor | None,
    cu_seqlens: Tensor | None,
) -> float:
    """The scale; raises ValueError, naming the argument, its value and what is legal."""
    sizes = check_tensors(op, q_BTHK=q_BTHK, k_BSGK=k_BSGK, v_BSGV=v_BSGV, sinks_H=sinks_H)
    check_dtype(op, {"q_BTHK": q_BTHK, "k_BSGK": k_BSGK, "v_BSGV": v_BSGV})
    check_placed(op, q_BTHK=q_BTHK, k_BSGK=k_BSGK, v_BSGV=v_BSGV, sinks_H=sinks_H, cu_seqlens=cu_seqlens)
    T, S = sizes["T"], sizes["S"]
    if causal and T > S:
        raise ValueError(
            f"{op}: causal with T={T} queries and S={S} keys; there must be at least as many keys as queries"
        )
    check_window(op, window)
    if window is not None and not causal:
        raise ValueError(f"{op}: window={window} with causal={causal}; a window is legal in causal attention only")
    check_cu_seqlens(op, cu_seqlens, sizes["B"], T)
    if cu_seqlens is not None and T != S:
        raise ValueError(
            f"{op}: cu_seqlens with T={T} queries and S={S} keys; they must be as many, every sequence attends to"
            " itself"
        )
    return check_heads(op, sizes, scale)


def check_window(op: str, window: int | None) -> None:
    if window is not None and (isinstance(window, bool) or not isinstance(window, int | torch.SymInt) or window < 1):
        raise ValueError(f"{op}: window={window!r}; legal are None and whole numbers from 1, the query itself, on")


def check_heads(op: str, sizes: dict[str, int], scale: float | None) -> float:
    """The scale of the logits, K^-0.5 unless given, of H query heads that share G key heads."""
    H, G = sizes["H"], sizes["G"]
    if G == 0 or H % G != 0:
        raise ValueError(f"{op}: the queries have H={H} heads and the keys G={G}; H must be a multiple of G")
    scale = float(sizes["K"] ** -0.5 if scale is None else scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"{op}: scale={scale}; it must be positive and finite")
    return scale


def check_kernels_take(op: str, *heads: Tensor, widest: int = MAX_WIDTH) -> None:
    """Raises ValueError where the Triton kernels have no form for such heads."""
    width = max(x.shape[-1] for x in heads)
    if width > widest or heads[0].dtype == torch.float64:
        raise ValueError(
            f"{op}: {heads[0].dtype} heads of width {width}; the Triton kernels take float32, float16 and bfloat16 up"
            f" to {widest}"
        )
