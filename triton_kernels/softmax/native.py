"""One token of a softmax layer on a CPU, between its projections: norms, rotation, the cache's new row, attention.

Legend: B sequences, S rows of the cache, H query heads, G key/value heads, K head width, X = H K or G K.
"""

import functools

import torch
from torch import Tensor

from triton_kernels.native.library import call, wide
from triton_kernels.softmax.rotary import Rotary, rotary_tables


@functools.lru_cache(maxsize=16)
def rotary_at(position: int, rotary_dim: int, base: float) -> Rotary:
    """Cosine and sine [rotary_dim / 2] of one position, fp32: all layers of a decode step turn by the same."""
    cosine_1P, sine_1P = rotary_tables(torch.tensor([position]), rotary_dim=rotary_dim, base=base)
    return cosine_1P[0].float(), sine_1P[0].float()


def softmax_decode_native(
    q_BX: Tensor,
    new_kv: tuple[Tensor, Tensor] | None,
    cache: tuple[Tensor, Tensor],
    *,
    row: int,
    q_norm_K: Tensor | None,
    k_norm_K: Tensor | None,
    eps: float,
    rotary: Rotary,
    sinks_H: Tensor | None,
) -> Tensor:
    """Attention of the newest token over the rows of the cache, in the projections' dtype.

    Args:
        q_BX: the projected queries, before norm and rotation.
        new_kv: projected key and value, before norm and rotation, to be written into the cache; None where another
            layer has written them.
        cache: k_BSGK and v_BSGV, the S rows in use (in any order: a ring), fp32 or bf16, dense but for the first axis.
        row: where in S the new token goes.
        rotary: see `rotary_at`.

    Raises:
        ValueError: for a cache of other heads.
    """
    (B, X), (_, S, G, K) = q_BX.shape, cache[0].shape
    for name, x_BX, legal in (
        ("q_BX", q_BX, X % (G * K) == 0 and len(cache[0]) == B and cache[1].shape == cache[0].shape),
        *(("new_kv", x_BX, x_BX.shape == (B, G * K)) for x_BX in new_kv or ()),
    ):
        if not legal:
            raise ValueError(
                f"softmax_decode: {name} has shape {list(x_BX.shape)}, which does not fit a cache [B, S, G, K] of"
                f" {list(cache[0].shape)}"
            )
    dtype, q_BX = q_BX.dtype, wide(q_BX)
    k_BX, v_BX = (None, None) if new_kv is None else (wide(x_BX) for x_BX in new_kv)
    o_BX = torch.empty(B, X)
    call(
        "softmax_decode",
        *(q_BX, k_BX, v_BX, X, G * K),
        *(*cache, cache[0].stride(0), row, S, cache[0].dtype == torch.bfloat16),
        *(q_norm_K, k_norm_K, *rotary, sinks_H),
        *(eps, K**-0.5, B, X // K, G, K, rotary[0].shape[0], o_BX, torch.get_num_threads()),
    )
    return o_BX.to(dtype)
