"""What the attention kernels share: which rows a program owns, which keys a block of queries sees, loading, masking and turning of tiles.

A query at position p sees the keys (p - window, p] when causal, all of them otherwise. For a block of queries the keys fall into three runs:
blocks cut by the window's left edge, blocks seen whole (no mask is computed there), and blocks cut by the diagonal or by the end.

Legend: M queries, N keys of a block, R rows and W channels of any tile, K key width, P half of the rotated channels, F folds of the channels.
"""

# A jitted helper that returns a tuple looks like a function that never returns to a type checker.
# pyright: reportGeneralTypeIssues=false
import math
from collections import namedtuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))

# Where a [B, T, H, width] tensor lies: its pointer and the strides of its first three axes; channels lie side by side.
Rows = namedtuple("Rows", "ptr batch row head")
# What every kernel of one call is given: q, k, v as Rows, tables [T, P], sizes; scale_log2 is for scores in units of log 2.
Call = namedtuple("Call", "q k v cu_seqlens cos sin T S H n_sequences n_blocks window scale scale_log2")
# Its constants: widths, what they are padded to (powers of two), query heads per key head, rotated channels (a power of two, or 0).
Form = namedtuple("Form", "K V BLOCK_K BLOCK_V GROUP ROTARY CAUSAL WINDOW")


@triton.jit
def wide(x):
    """x as an int64 scalar, so that a row times a stride cannot overflow. Also for the Python integers that the interpreter's loops give."""
    return tl.full((), 0, tl.int64) + x


@triton.jit
def product(a, b, accumulator):
    """accumulator + a @ b; fp32 operands keep all their bits instead of becoming tf32."""
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def block_pointers(x, batch, row, head, column, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] from one row of one head on, as int32 offsets from one scalar: 64-bit tiles would take the registers that products need."""
    base = x.ptr + wide(batch) * x.batch + wide(row) * x.row + wide(head) * x.head + column
    return base + (tl.arange(0, ROWS)[:, None] * x.row + tl.arange(0, BLOCK)[None, :])


@triton.jit
def load_block(x, batch, row, head, inside_R, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECK_ROWS: tl.constexpr = True, column=0):
    """A tile with zeros outside `inside` and past WIDTH; a mask that can hide nothing is left out of the program altogether."""
    pointers_RW = block_pointers(x, batch, row, head, column, inside_R.shape[0], BLOCK)
    inside_W = tl.arange(0, BLOCK) < WIDTH
    if CHECK_ROWS and BLOCK > WIDTH:
        return tl.load(pointers_RW, mask=inside_R[:, None] & inside_W[None, :], other=0.0)
    elif CHECK_ROWS:
        return tl.load(pointers_RW, mask=inside_R[:, None], other=0.0)
    elif BLOCK > WIDTH:
        return tl.load(pointers_RW, mask=inside_W[None, :], other=0.0)
    else:
        return tl.load(pointers_RW)


@triton.jit
def store_block(x, batch, row, head, y_RW, inside_R, WIDTH: tl.constexpr, column=0):
    """Stores a tile in the dtype found there, but for what lies outside `inside` or past WIDTH."""
    pointers_RW = block_pointers(x, batch, row, head, column, y_RW.shape[0], y_RW.shape[1])
    mask_RW = inside_R[:, None] & (tl.arange(0, y_RW.shape[1]) < WIDTH)[None, :]
    tl.store(pointers_RW, y_RW.to(x.ptr.dtype.element_ty), mask=mask_RW)


@triton.jit
def locate(call, n_heads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr, first_program=0):
    """(batch row, head, first token of the sequence (int64), its queries, its keys, this program's block in it).

    Programs run over the blocks of a head first, so that neighbours share its keys in L2. LAST_FIRST starts with the last block, which is
    the longest when causal. Packed, sequence n owns the slots from cu_seqlens[n] // BLOCK + n on: at least as many as it has blocks, found
    without a table and without the host. The slots left over hold a block past the sequence's end. Programs below first_program are not counted.
    """
    program = tl.program_id(0) - first_program
    slot = program % call.n_blocks
    head = (program // call.n_blocks) % n_heads
    batch = program // call.n_blocks // n_heads
    if call.cu_seqlens is not None:
        n_started = 0
        for first in range(0, call.n_sequences, 128):
            n = first + tl.arange(0, 128)
            slot_N = tl.load(call.cu_seqlens + n, mask=n < call.n_sequences, other=0) // BLOCK + n
            n_started += tl.sum(((slot_N <= slot) & (n < call.n_sequences)).to(tl.int32))
        sequence = n_started - 1
        start = tl.load(call.cu_seqlens + sequence)
        length = (tl.load(call.cu_seqlens + sequence + 1) - start).to(tl.int32)
        return batch, head, start, length, length, (slot - start // BLOCK - sequence).to(tl.int32)
    else:
        return batch, head, wide(0), call.T, call.S, call.n_blocks - 1 - slot if LAST_FIRST else slot


@triton.jit
def key_runs(first_position, n_keys, window, FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(a, b, c, d): the queries at [first_position, + BLOCK_M) see keys [a, d); of the steps of BLOCK_N from a, those in [b, c) are seen whole."""
    past = tl.minimum(first_position + BLOCK_M, n_keys) if FORM.CAUSAL else n_keys
    past_whole = first_position + 1 if FORM.CAUSAL else n_keys
    first = 0 * n_keys
    whole = first
    if FORM.WINDOW:
        first = tl.maximum(first_position - window + 1, 0)
        whole = tl.minimum(first + tl.cdiv(tl.maximum(past - window - first, 0), BLOCK_N) * BLOCK_N, past)
    past_whole = whole + tl.maximum(past_whole - whole, 0) // BLOCK_N * BLOCK_N
    return first, whole, tl.minimum(past_whole, past), past


@triton.jit
def query_runs(first_key, offset, n_queries, window, FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE: tl.constexpr):
    """(a, b, c): queries [a, c) see some of the keys [first_key, + BLOCK_N), and those of [b, c) all of them. ONE: all count as cut (b = c)."""
    first = 0 * n_queries
    whole = first
    past = n_queries
    if FORM.CAUSAL:
        first = tl.minimum(tl.maximum(first_key - offset, 0), n_queries)
        if FORM.WINDOW:
            past = tl.minimum(tl.maximum(first_key + BLOCK_N + window - 1 - offset, first), n_queries)
        cut = tl.maximum(first_key + BLOCK_N - 1 - offset - first, 0)
        whole = past if ONE else tl.minimum(first + tl.cdiv(cut, BLOCK_M) * BLOCK_M, past)
    return first, whole, past


@triton.jit
def visible(position, key, n_keys, window, FORM: tl.constexpr):
    """The mask of a block, for positions and keys that broadcast against each other."""
    seen = key < n_keys
    if FORM.CAUSAL:
        seen = seen & (key <= position)
    if FORM.WINDOW:
        seen = seen & (key > position - window)
    return seen


@triton.jit
def load_queries(call, batch, head, row, inside_M, FORM: tl.constexpr):
    """The block of queries from `row` on, turned."""
    q_MK = load_block(call.q, batch, row, head, inside_M, FORM.K, FORM.BLOCK_K)
    if FORM.ROTARY > 0:
        q_MK = rotate_tile(q_MK, call, row, inside_M, FORM.ROTARY, False).to(q_MK.dtype)
    return q_MK


@triton.jit
def load_keys(call, batch, group, row, inside_N, FORM: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """Keys and values of one step."""
    k_NK = load_block(call.k, batch, row, group, inside_N, FORM.K, FORM.BLOCK_K, CHECK_ROWS)
    return k_NK, load_block(call.v, batch, row, group, inside_N, FORM.V, FORM.BLOCK_V, CHECK_ROWS)


@triton.jit
def rotate_tile(x_MK, call, row, inside_M, ROTARY: tl.constexpr, BACK: tl.constexpr):
    """x in fp32, its first ROTARY channels turned by the tables' rows from `row` on (BACK: turned back, as gradients are).

    The channels are folded into halves that lie in the same registers of a tensor core's result, so that no channel has to be fetched.
    """
    M: tl.constexpr = x_MK.shape[0]
    HALF: tl.constexpr = ROTARY // 2
    FOLDS: tl.constexpr = x_MK.shape[1] // ROTARY
    first_MFP, second_MFP = tl.split(tl.permute(tl.reshape(x_MK.to(tl.float32), [M, FOLDS, 2, HALF]), (0, 1, 3, 2)))
    # Rows past the end read row 0 rather than nothing: a mask would cost registers.
    angle_MFP = tl.where(inside_M, row + tl.arange(0, M), 0)[:, None, None] * HALF + tl.arange(0, HALF)[None, None, :]
    if FOLDS == 1:
        cos_MFP, sin_MFP = tl.load(call.cos + angle_MFP), tl.load(call.sin + angle_MFP)
    else:
        turns_MFP = (tl.arange(0, FOLDS) == 0)[None, :, None]
        cos_MFP, sin_MFP = tl.load(call.cos + angle_MFP, mask=turns_MFP, other=1.0), tl.load(call.sin + angle_MFP, mask=turns_MFP, other=0.0)
    sin_MFP = -sin_MFP if BACK else sin_MFP
    turned_MFP2 = tl.join(first_MFP * cos_MFP - second_MFP * sin_MFP, second_MFP * cos_MFP + first_MFP * sin_MFP)
    return tl.reshape(tl.permute(turned_MFP2, (0, 1, 3, 2)), [M, FOLDS * ROTARY])
