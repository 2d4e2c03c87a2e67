"""flash_decode on Triton, in one launch: the cached tokens are split among programs, and the last one to finish puts
their softmaxes together.

Decoding reads every cached byte once and does 2 H (K + V) FLOP per token of it: memory bound, so what counts is that
all processors read. One program per (sequence, key head) would leave most of them idle; FlashDecoding (Dao et al.,
2023) splits the tokens too. The query heads of a group share a program, so that a key is read once for all of them, and
fill the rows of a tensor core product. Every program leaves its share in memory and counts itself; who counts the last
one adds the shares up, always in the order of the splits: two runs give the same bits.

Legend: B sequences, H query heads, G key/value heads, K key width, V value width, R query heads of a group, N cached
tokens of a step, P splits.
"""

# A jitted helper that returns a tuple is beyond a type checker.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from collections import namedtuple

import triton
import triton.language as tl

from triton_kernels.common.tiles import product, wide
from triton_kernels.softmax.flash_attention_kernels import LOG2E

Decode = namedtuple(
    "Decode",
    "q k v k_scale v_scale lengths block_table sinks partial statistics counters o S G n_splits window columns"
    " scale_log2",
)
# Widths and what they are padded to, query heads per key head and what they are padded to, tokens of a page (0: none),
# splits combined at a time.
DecodeForm = namedtuple("DecodeForm", "K V BLOCK_K BLOCK_V GROUP BLOCK_R PAGE WINDOW BLOCK_P")


@triton.jit
def widened(x, dtype: tl.constexpr):
    """x in the dtype of the products. Bytes are e4m3 on a GPU older than that type: its bits moved into fp16's fields
    are 2^8 too small."""
    if x.dtype == tl.uint8:
        bits = ((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)
        number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256
        return tl.where((x & 0x7F) == 0x7F, float("nan"), number).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def decode_kernel(a, FORM: tl.constexpr, BLOCK_N: tl.constexpr, first_program=0):
    """One split's share: the unnormalised output [.., P, V] and (maximum, sum) [.., P, 2], both fp32, of each query
    head; from the last one also o.

    Programs below first_program are not counted.
    """
    program = tl.program_id(0) - first_program
    split, pair = program % a.n_splits, program // a.n_splits
    group, sequence = pair % a.G, pair // a.G
    length = tl.load(a.lengths + sequence)
    first, past = wide(0), tl.minimum(length, wide(a.S))
    if FORM.WINDOW:
        first = tl.maximum(length - a.window, 0)
    # Shares are whole steps, so that no key is read twice.
    share = tl.cdiv(tl.cdiv(tl.maximum(past - first, 0), BLOCK_N), a.n_splits) * BLOCK_N
    begin = first + split * share
    end = tl.minimum(begin + share, past)
    r_R, k_K, v_V = tl.arange(0, FORM.BLOCK_R), tl.arange(0, FORM.BLOCK_K), tl.arange(0, FORM.BLOCK_V)
    head_R = wide(pair) * FORM.GROUP + r_R
    q_RK = tl.load(
        a.q + head_R[:, None] * FORM.K + k_K[None, :],
        mask=(r_R < FORM.GROUP)[:, None] & (k_K < FORM.K)[None, :],
        other=0.0,
    )

    BLOCK_R: tl.constexpr = FORM.BLOCK_R
    BLOCK_V: tl.constexpr = FORM.BLOCK_V
    o_RV = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    max_R = tl.full([BLOCK_R], float("-inf"), tl.float32)
    sum_R = tl.zeros([BLOCK_R], tl.float32)
    for step in range(0, tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N).to(tl.int32)):
        row_N = begin + step * BLOCK_N + tl.arange(0, BLOCK_N)
        seen_N = row_N < end
        page_N = wide(sequence)
        scale_row_N = page_N * a.S + row_N
        if FORM.PAGE > 0:
            page_N = tl.load(a.block_table + wide(sequence) * a.columns + row_N // FORM.PAGE, mask=seen_N, other=0).to(
                tl.int64
            )
            row_N = row_N % FORM.PAGE
            scale_row_N = page_N * FORM.PAGE + row_N
        k_row_N = page_N * a.k.batch + row_N * a.k.row + wide(group) * a.k.head
        v_row_N = page_N * a.v.batch + row_N * a.v.row + wide(group) * a.v.head
        k_KN = tl.load(
            a.k.ptr + k_row_N[None, :] + k_K[:, None], mask=seen_N[None, :] & (k_K < FORM.K)[:, None], other=0.0
        )
        v_NV = tl.load(
            a.v.ptr + v_row_N[:, None] + v_V[None, :], mask=seen_N[:, None] & (v_V < FORM.V)[None, :], other=0.0
        )
        s_RN = product(q_RK, widened(k_KN, q_RK.dtype), None) * a.scale_log2
        if a.k_scale is not None:
            s_RN *= tl.load(a.k_scale + scale_row_N * a.G + group, mask=seen_N, other=0.0).to(tl.float32)[None, :]
        s_RN = tl.where(seen_N[None, :], s_RN, float("-inf"))
        new_max_R = tl.maximum(max_R, tl.max(s_RN, 1))
        p_RN = tl.exp2(s_RN - new_max_R[:, None])
        rescale_R = tl.exp2(max_R - new_max_R)
        sum_R = sum_R * rescale_R + tl.sum(p_RN, 1)
        if a.v_scale is not None:
            p_RN *= tl.load(a.v_scale + scale_row_N * a.G + group, mask=seen_N, other=0.0).to(tl.float32)[None, :]
        o_RV = product(p_RN.to(q_RK.dtype), widened(v_NV, q_RK.dtype), o_RV * rescale_R[:, None])
        max_R = new_max_R

    partial_R = head_R * a.n_splits + split
    tl.store(
        a.partial + partial_R[:, None] * FORM.V + v_V[None, :],
        o_RV,
        mask=(r_R < FORM.GROUP)[:, None] & (v_V < FORM.V)[None, :],
    )
    tl.store(a.statistics + partial_R * 2, max_R, mask=r_R < FORM.GROUP)
    tl.store(a.statistics + partial_R * 2 + 1, sum_R, mask=r_R < FORM.GROUP)
    # All threads' stores come before the count; what was stored before any count is visible to who counts last, and
    # leaves the counter at zero.
    tl.debug_barrier()
    before = 0
    if a.n_splits > 1:
        before = tl.atomic_add(a.counters + pair, 1, sem="acq_rel", scope="gpu")
        if before == a.n_splits - 1:
            tl.store(a.counters + pair, 0)
    if before == a.n_splits - 1:
        combine_splits(a, pair, FORM)


@triton.jit
def combine_splits(a, pair, FORM: tl.constexpr):
    """o of a group's query heads: the splits' outputs, each weighted by e^{its maximum - the common one}, over the sum
    of their sums."""
    HEADS: tl.constexpr = triton.next_power_of_2(FORM.GROUP)
    p_P, v_V = tl.arange(0, FORM.BLOCK_P), tl.arange(0, FORM.BLOCK_V)
    r_R = tl.arange(0, HEADS)
    inside_R, head_R = r_R < FORM.GROUP, wide(pair) * FORM.GROUP + r_R
    BLOCK_V: tl.constexpr = FORM.BLOCK_V
    o_RV = tl.zeros([HEADS, BLOCK_V], tl.float32)
    if a.sinks is not None:
        # The sink is a split of weight one and value zero that was met first.
        max_R = tl.load(a.sinks + pair % a.G * FORM.GROUP + r_R, mask=inside_R, other=0.0).to(tl.float32) * LOG2E
        sum_R = tl.full([HEADS], 1.0, tl.float32)
    else:
        max_R = tl.full([HEADS], float("-inf"), tl.float32)
        sum_R = tl.zeros([HEADS], tl.float32)
    for first in range(0, a.n_splits, FORM.BLOCK_P):
        row_PR = head_R[None, :] * a.n_splits + (first + p_P)[:, None]
        mask_PR = (first + p_P < a.n_splits)[:, None] & inside_R[None, :]
        # The first-level cache of this processor may hold what the memory held before the others wrote.
        max_PR = tl.load(a.statistics + row_PR * 2, mask=mask_PR, other=float("-inf"), cache_modifier=".cg")
        sum_PR = tl.load(a.statistics + row_PR * 2 + 1, mask=mask_PR, other=0.0, cache_modifier=".cg")
        mask_PRV = mask_PR[:, :, None] & (v_V < FORM.V)[None, None, :]
        o_PRV = tl.load(
            a.partial + row_PR[:, :, None] * FORM.V + v_V[None, None, :], mask=mask_PRV, other=0.0, cache_modifier=".cg"
        )
        new_max_R = tl.maximum(max_R, tl.max(max_PR, 0))
        # Splits that saw no token have no maximum; until one has, everything is zero.
        shift_R = tl.where(new_max_R == float("-inf"), 0.0, new_max_R)
        weight_PR = tl.exp2(max_PR - shift_R[None, :])
        rescale_R = tl.exp2(max_R - shift_R)
        sum_R = sum_R * rescale_R + tl.sum(weight_PR * sum_PR, 0)
        o_RV = o_RV * rescale_R[:, None] + tl.sum(o_PRV * weight_PR[:, :, None], 0)
        max_R = new_max_R
    o_RV = o_RV / tl.where(sum_R > 0, sum_R, 1.0)[:, None]
    mask_RV = inside_R[:, None] & (v_V < FORM.V)[None, :]
    tl.store(a.o + head_R[:, None] * FORM.V + v_V[None, :], o_RV.to(a.o.dtype.element_ty), mask=mask_RV)
