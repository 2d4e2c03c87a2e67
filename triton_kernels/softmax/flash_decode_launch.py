"""flash_decode on its Triton kernel: how many programs share a sequence's cached tokens, and what counts the
finished ones.

Legend: B sequences, S rows of the cache, H query heads, G key/value heads, K key width, V value width, P splits.
"""

# The launches' constexpr parameters are plain values to the caller, which a type checker cannot know.
# pyright: reportArgumentType=false
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.common.launch_tables import current_architecture
from triton_kernels.common.registration import has_work, kernel_op
from triton_kernels.common.sizes import cdiv, padded, power_of_two
from triton_kernels.common.tiles import rows
from triton_kernels.softmax.flash_attention_kernels import LOG2E
from triton_kernels.softmax.flash_attention_launch import Visibility
from triton_kernels.softmax.flash_decode_kernels import Decode, DecodeForm, decode_kernel
from triton_kernels.softmax.launch_tables import SPLIT

OLDEST_WITH_E4M3 = 89
# What a program holds at once of the shares it adds up: 64 registers of each thread.
COMBINED_ENTRIES = 8192
# Two programs for each of 132 processors.
TARGET_PROGRAMS = 264
# What counts the programs that have finished (see `split_counters`), by device and stream. A CPU's are for the
# interpreter and the offline tools.
COUNTERS = {(torch.device("cpu"), 0): torch.zeros(TARGET_PROGRAMS, dtype=torch.int32)}


class Cache(NamedTuple):
    """Cached keys and values as `flash_decode` takes them, all in their place on the device."""

    k: Tensor
    v: Tensor
    block_table: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class DecodeCall:
    """What a launch needs to decode the softmax heads of one layer, and their output `o`."""

    def __init__(
        self,
        q: Tensor,
        cache: Cache,
        lengths: Tensor,
        *,
        o: Tensor,
        visibility: Visibility,
        sinks: Tensor | None,
    ):
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (cache.k, cache.v))
        if current_architecture() < OLDEST_WITH_E4M3:
            k, v = (x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in (k, v))
        block_table, k_scale, v_scale = cache.block_table, cache.k_scale, cache.v_scale
        (B, H, V), (G, K) = o.shape, k.shape[2:]
        page, columns = (0, 0) if block_table is None else (k.shape[1], block_table.shape[1])
        S = page * columns or k.shape[1]
        self.options = SPLIT[q.dtype == torch.float32].options(max(K, V))[0]
        # As many splits as fill the device, by the capacity of the cache: the lengths themselves are on the device,
        # unread. But no more than leave the last program less to put together than it has read.
        n_keys = S if visibility.window is None else min(S, visibility.window)
        balance = isqrt(n_keys * (K + V) * k.element_size() // (4 * (H // G) * V))
        n_splits = max(1, min(cdiv(TARGET_PROGRAMS, B * G), cdiv(n_keys, self.options.blocks["BLOCK_N"]), balance))
        partial, statistics = (o.new_empty(B, H, n_splits, width, dtype=torch.float32) for width in (V, 2))
        block_p = max(1, COMBINED_ENTRIES // (power_of_two(H // G) * padded(V)))
        self.programs = B * G * n_splits
        self.arguments = Decode(
            q=q,
            k=rows(k),
            v=rows(v),
            k_scale=k_scale,
            v_scale=v_scale,
            lengths=lengths,
            block_table=block_table,
            sinks=sinks,
            partial=partial,
            statistics=statistics,
            counters=split_counters(o),
            o=o,
            S=S,
            G=G,
            n_splits=n_splits,
            window=visibility.window or 0,
            columns=columns,
            scale_log2=visibility.scale * LOG2E.value,
        )
        self.form = DecodeForm(
            K=K,
            V=V,
            BLOCK_K=padded(K),
            BLOCK_V=padded(V),
            GROUP=H // G,
            BLOCK_R=padded(H // G),
            PAGE=page,
            WINDOW=visibility.window is not None,
            BLOCK_P=min(16, block_p),
        )


def split_counters(x: Tensor) -> Tensor:
    """A zero for each group of splits (fewer than TARGET_PROGRAMS, or there are no splits). Every launch leaves zeros,
    so that none has to clear them: they are kept, per device and stream.

    Launches that share them must not run at the same time. Those of one stream do not; but a CUDA graph keeps the
    counters of the stream it was captured on, so graphs captured on one stream must not be replayed side by side. A
    graph captured on a stream that has never decoded gets counters of its own for each call, cleared by a second
    launch, since what a capture clears is zero only after a replay."""
    key = (x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0)
    if key in COUNTERS:
        return COUNTERS[key]
    counters = torch.zeros(TARGET_PROGRAMS, dtype=torch.int32, device=x.device)
    if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        COUNTERS[key] = counters
    return counters


@kernel_op("flash_decode", strided="k_cache v_cache")
def decode_op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """o [B, H, V]; the arguments are those of `flash_decode`, already checked."""
    o = q.new_empty(*q.shape[:2], v_cache.shape[3])
    if has_work(o):
        call = DecodeCall(
            q,
            Cache(k=k_cache, v=v_cache, block_table=block_table, k_scale=k_scale, v_scale=v_scale),
            lengths,
            o=o,
            visibility=Visibility(causal=True, window=window, scale=scale),
            sinks=sinks,
        )
        decode_kernel[(call.programs,)](a=call.arguments, FORM=call.form, **call.options.keywords)
    return o
