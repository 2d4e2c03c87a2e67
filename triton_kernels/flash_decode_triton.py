"""flash_decode on Triton: the cached tokens are split among programs, and a second launch puts their softmaxes together.

Decoding reads every cached byte once and does 2 H (K + V) FLOP per token of it: memory bound, so what counts is that all processors read. One
program per (sequence, key head) would leave most of them idle; FlashDecoding (Dao et al., 2023) splits the tokens too. The query heads of a
group share a program, so that a key is read once for all of them, and fill the rows of a tensor core product.

Legend: B sequences, H query heads, G key/value heads, K key width, V value width, R query heads of a group, N cached tokens of a step, P splits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.configurations import current_architecture
from triton_kernels.flash_attention_blocks import product, wide
from triton_kernels.flash_decode_configurations import MAX_WIDTH, SPLIT, TARGET_PROGRAMS

LOG2E = math.log2(math.e)
OLDEST_WITH_E4M3 = 89


@triton.jit
def widened(x, dtype: tl.constexpr):
    """x in the dtype of the products. Bytes are e4m3 on a GPU older than that type: its bits moved into fp16's fields are 2^8 too small."""
    if x.dtype == tl.uint8:
        bits = ((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)
        number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256
        return tl.where((x & 0x7F) == 0x7F, float("nan"), number).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def split_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, lengths_ptr, block_table_ptr, partial_ptr, statistics_ptr,
    k_stride_b, k_stride_s, k_stride_g, v_stride_b, v_stride_s, v_stride_g, S, G, n_splits, window, blocks_per_row, scale_log2,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, first_program=0,
):  # fmt: skip
    """Over its share of the tokens: the unnormalised output [.., P, V] and (maximum, sum) [.., P, 2], both fp32, of each query head.

    Programs below first_program are not counted.
    """
    program = tl.program_id(0) - first_program
    split = program % n_splits
    group = (program // n_splits) % G
    sequence = program // n_splits // G
    length = tl.load(lengths_ptr + sequence)
    first, past = wide(0), tl.minimum(length, wide(S))
    if WINDOW:
        first = tl.maximum(length - window, 0)
    # Shares are whole steps, so that no key is read twice.
    share = tl.cdiv(tl.cdiv(tl.maximum(past - first, 0), BLOCK_N), n_splits) * BLOCK_N
    begin = first + split * share
    end = tl.minimum(begin + share, past)
    r_R, k_K, v_V = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    head_R = (wide(sequence) * G + group) * GROUP + r_R
    q_RK = tl.load(q_ptr + head_R[:, None] * KEY_WIDTH + k_K[None, :], mask=(r_R < GROUP)[:, None] & (k_K < KEY_WIDTH)[None, :], other=0.0)

    o_RV = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    max_R = tl.full([BLOCK_R], float("-inf"), tl.float32)
    sum_R = tl.zeros([BLOCK_R], tl.float32)
    for step in range(0, tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N).to(tl.int32)):
        token_N = begin + step * BLOCK_N + tl.arange(0, BLOCK_N)
        seen_N = token_N < end
        if PAGE > 0:
            page_N = tl.load(block_table_ptr + wide(sequence) * blocks_per_row + token_N // PAGE, mask=seen_N, other=0).to(tl.int64)
            row_N = token_N % PAGE
            scale_row_N = page_N * PAGE + row_N
        else:
            page_N = wide(sequence)
            row_N = token_N
            scale_row_N = page_N * S + row_N
        k_row_N = page_N * k_stride_b + row_N * k_stride_s + wide(group) * k_stride_g
        v_row_N = page_N * v_stride_b + row_N * v_stride_s + wide(group) * v_stride_g
        k_KN = tl.load(k_ptr + k_row_N[None, :] + k_K[:, None], mask=seen_N[None, :] & (k_K < KEY_WIDTH)[:, None], other=0.0)
        v_NV = tl.load(v_ptr + v_row_N[:, None] + v_V[None, :], mask=seen_N[:, None] & (v_V < VALUE_WIDTH)[None, :], other=0.0)
        s_RN = product(q_RK, widened(k_KN, q_RK.dtype), None) * scale_log2
        if k_scale_ptr is not None:
            s_RN *= tl.load(k_scale_ptr + scale_row_N * G + group, mask=seen_N, other=0.0).to(tl.float32)[None, :]
        s_RN = tl.where(seen_N[None, :], s_RN, float("-inf"))
        new_max_R = tl.maximum(max_R, tl.max(s_RN, 1))
        p_RN = tl.exp2(s_RN - new_max_R[:, None])
        rescale_R = tl.exp2(max_R - new_max_R)
        sum_R = sum_R * rescale_R + tl.sum(p_RN, 1)
        if v_scale_ptr is not None:
            p_RN *= tl.load(v_scale_ptr + scale_row_N * G + group, mask=seen_N, other=0.0).to(tl.float32)[None, :]
        o_RV = product(p_RN.to(q_RK.dtype), widened(v_NV, q_RK.dtype), o_RV * rescale_R[:, None])
        max_R = new_max_R

    partial_R = head_R * n_splits + split
    tl.store(partial_ptr + partial_R[:, None] * VALUE_WIDTH + v_V[None, :], o_RV, mask=(r_R < GROUP)[:, None] & (v_V < VALUE_WIDTH)[None, :])
    tl.store(statistics_ptr + partial_R * 2, max_R, mask=r_R < GROUP)
    tl.store(statistics_ptr + partial_R * 2 + 1, sum_R, mask=r_R < GROUP)


@triton.jit
def reduce_kernel(
    partial_ptr, statistics_ptr, sinks_ptr, o_ptr, H, n_splits, VALUE_WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr
):
    """o of one query head: its splits' outputs, each weighted by e^{its maximum - the common one}, over the sum of their sums."""
    head = wide(tl.program_id(0))
    p_P, v_V = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_V)
    o_V = tl.zeros([BLOCK_V], tl.float32)
    if sinks_ptr is not None:
        # The sink is a split of weight one and value zero that was met first.
        maximum = tl.load(sinks_ptr + head % H).to(tl.float32) * 1.4426950408889634
        total = tl.full((), 1.0, tl.float32)
    else:
        maximum = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
    for first in range(0, n_splits, BLOCK_P):
        split_P = first + p_P
        row_P = head * n_splits + split_P
        max_P = tl.load(statistics_ptr + row_P * 2, mask=split_P < n_splits, other=float("-inf"))
        sum_P = tl.load(statistics_ptr + row_P * 2 + 1, mask=split_P < n_splits, other=0.0)
        mask_PV = (split_P < n_splits)[:, None] & (v_V < VALUE_WIDTH)[None, :]
        o_PV = tl.load(partial_ptr + row_P[:, None] * VALUE_WIDTH + v_V[None, :], mask=mask_PV, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(max_P, 0))
        # Splits that saw no token have no maximum; until one has, everything is zero.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weight_P = tl.exp2(max_P - shift)
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(weight_P * sum_P, 0)
        o_V = o_V * rescale + tl.sum(o_PV * weight_P[:, None], 0)
        maximum = new_maximum
    o_V = o_V / tl.where(total > 0, total, 1.0)
    tl.store(o_ptr + head * VALUE_WIDTH + v_V, o_V.to(o_ptr.dtype.element_ty), mask=v_V < VALUE_WIDTH)


@torch.library.custom_op("hybrid_attention::flash_decode", mutates_args=())
def flash_decode_triton(
    q_BHK: Tensor, k_cache: Tensor, v_cache: Tensor, lengths_B: Tensor, scale: float, window: int | None, sinks_H: Tensor | None,
    block_table_BN: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """o_BHV; the arguments are those of `flash_decode`, already checked."""
    (B, H, K), (G, V) = q_BHK.shape, (v_cache.shape[2], v_cache.shape[3])
    if max(K, V) > MAX_WIDTH or q_BHK.dtype == torch.float64:
        raise ValueError(f"flash_decode: {q_BHK.dtype} heads of width {max(K, V)}; the Triton kernels take up to {MAX_WIDTH}, and no float64")
    o_BHV = q_BHK.new_empty(B, H, V)
    if o_BHV.numel() == 0:
        return o_BHV
    q_BHK = q_BHK.contiguous()
    k_cache, v_cache = (x if x.stride(-1) == 1 else x.contiguous() for x in (k_cache, v_cache))
    if current_architecture() < OLDEST_WITH_E4M3:
        k_cache, v_cache = (x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in (k_cache, v_cache))
    k_scale, v_scale = (None if x is None else x.contiguous() for x in (k_scale, v_scale))
    block_table = None if block_table_BN is None else block_table_BN.contiguous()
    page = 0 if block_table is None else k_cache.shape[1]
    S = k_cache.shape[1] if block_table is None else page * block_table.shape[1]
    options = SPLIT.options(max(K, V))[0]
    block_n = options.blocks["BLOCK_N"]
    # As many splits as fill the device, by the capacity of the cache: the lengths themselves are on the device, unread.
    most = -(-(S if window is None else min(S, window)) // block_n)
    n_splits = max(1, min(-(-TARGET_PROGRAMS // (B * G)), most))
    partial = q_BHK.new_empty(B, H, n_splits, V, dtype=torch.float32)
    statistics = q_BHK.new_empty(B, H, n_splits, 2, dtype=torch.float32)
    strides = (*k_cache.stride()[:3], *v_cache.stride()[:3])
    columns = 0 if block_table is None else block_table.shape[1]
    block_v = max(16, triton.next_power_of_2(V))
    split_kernel[(B * G * n_splits,)](
        q_BHK, k_cache, v_cache, k_scale, v_scale, lengths_B, block_table, partial, statistics,
        *strides, S, G, n_splits, window or 0, columns, scale * LOG2E,
        KEY_WIDTH=K, VALUE_WIDTH=V, BLOCK_K=max(16, triton.next_power_of_2(K)), BLOCK_V=block_v, GROUP=H // G,
        BLOCK_R=max(16, triton.next_power_of_2(H // G)), PAGE=page, WINDOW=window is not None,
        **options.blocks, num_warps=options.num_warps, num_stages=options.num_stages,
    )  # fmt: skip
    reduce_kernel[(B * H,)](partial, statistics, sinks_H, o_BHV, H, n_splits, VALUE_WIDTH=V, BLOCK_V=block_v, BLOCK_P=16, num_warps=4)
    return o_BHV


@flash_decode_triton.register_fake
def _(q_BHK, k_cache, v_cache, lengths_B, scale, window, sinks_H, block_table_BN, k_scale, v_scale):
    return q_BHK.new_empty(q_BHK.shape[0], q_BHK.shape[1], v_cache.shape[3])
