"""What the flash attention kernels share: which rows a program owns, which keys a block of queries sees, and the mask at the edges.

A query at position p sees the keys (p - window, p] when causal, all of them otherwise. For a block of queries the keys fall into three runs:
blocks cut by the window's left edge, blocks seen whole (no mask is computed there), and blocks cut by the diagonal or by the end.
"""

import triton
import triton.language as tl


@triton.jit
def wide(x):
    """x as an int64 scalar, so that a row times a stride cannot overflow. Also for the Python integers that the interpreter's loops give."""
    return tl.full((), 0, tl.int64) + x


@triton.jit
def head_pointer(ptr, stride_b, stride_t, stride_h, batch, token, head):
    """Where the channels of one head of one token of a [B, T, H, width] tensor begin."""
    return ptr + wide(batch) * stride_b + wide(token) * stride_t + wide(head) * stride_h


@triton.jit
def locate(cu_seqlens_ptr, n_sequences, n_blocks, n_heads, T, S, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr, first_program=0):
    """(batch row, head, first token of the sequence (int64), its queries, its keys, this program's block in it).

    Programs run over the blocks of a head first, so that neighbours share its keys in L2. LAST_FIRST starts with the last block, which is
    the longest when causal. Packed, sequence n owns the slots from cu_seqlens[n] // BLOCK + n on: at least as many as it has blocks, found
    without a table and without the host. The slots left over hold a block past the sequence's end. Programs below first_program are not counted.
    """
    program = tl.program_id(0) - first_program
    slot = program % n_blocks
    head = (program // n_blocks) % n_heads
    batch = program // n_blocks // n_heads
    if cu_seqlens_ptr is not None:
        n_started = 0
        for first in range(0, n_sequences, 128):
            n = first + tl.arange(0, 128)
            slot_N = tl.load(cu_seqlens_ptr + n, mask=n < n_sequences, other=0) // BLOCK + n
            n_started += tl.sum(((slot_N <= slot) & (n < n_sequences)).to(tl.int32))
        sequence = n_started - 1
        start = tl.load(cu_seqlens_ptr + sequence)
        length = (tl.load(cu_seqlens_ptr + sequence + 1) - start).to(tl.int32)
        return batch, head, start, length, length, (slot - start // BLOCK - sequence).to(tl.int32)
    else:
        block = n_blocks - 1 - slot if LAST_FIRST else slot
        return batch, head, wide(0), T, S, block


@triton.jit
def key_runs(first_position, n_queries, n_keys, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """(a, b, c, d): the queries at [first_position, + BLOCK_M) see keys [a, d); of the steps of BLOCK_N from a, those in [b, c) are seen whole."""
    past = tl.minimum(first_position + BLOCK_M, n_keys) if CAUSAL else n_keys
    past_whole = first_position + 1 if CAUSAL else n_keys
    first = 0 * n_keys
    whole = first
    if WINDOW:
        first = tl.maximum(first_position - window + 1, 0)
        cut = tl.maximum(past - window - first, 0)
        whole = tl.minimum(first + tl.cdiv(cut, BLOCK_N) * BLOCK_N, past)
    past_whole = whole + tl.maximum(past_whole - whole, 0) // BLOCK_N * BLOCK_N
    return first, whole, tl.minimum(past_whole, past), past


@triton.jit
def query_runs(
    first_key, offset, n_queries, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ONE: tl.constexpr
):
    """(a, b, c): queries [a, c) see some of the keys [first_key, + BLOCK_N), and those of [b, c) all of them. ONE: all count as cut (b = c)."""
    first = 0 * n_queries
    whole = first
    past = n_queries
    if CAUSAL:
        first = tl.minimum(tl.maximum(first_key - offset, 0), n_queries)
        if WINDOW:
            past = tl.minimum(tl.maximum(first_key + BLOCK_N + window - 1 - offset, first), n_queries)
        cut = tl.maximum(first_key + BLOCK_N - 1 - offset - first, 0)
        whole = past if ONE else tl.minimum(first + tl.cdiv(cut, BLOCK_M) * BLOCK_M, past)
    return first, whole, past


@triton.jit
def visible(position, key, n_keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """The mask of a block, for positions and keys that broadcast against each other."""
    seen = key < n_keys
    if CAUSAL:
        seen = seen & (key <= position)
    if WINDOW:
        seen = seen & (key > position - window)
    return seen


@triton.jit
def product(a, b, accumulator):
    """accumulator + a @ b; fp32 operands keep all their bits instead of becoming tf32."""
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def tile_offsets(stride, width_W, ROWS: tl.constexpr):
    """Offsets [ROWS, W] in int32 from one scalar pointer: 64-bit pointers would take the registers that the products need."""
    return tl.arange(0, ROWS)[:, None] * stride + width_W[None, :]


@triton.jit
def load_tile(pointers_RW, rows_R, width_W, CHECK_ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A tile with zeros outside `rows` and past WIDTH; a mask that can hide nothing is left out of the program altogether."""
    if CHECK_ROWS and width_W.shape[0] > WIDTH:
        return tl.load(pointers_RW, mask=rows_R[:, None] & (width_W < WIDTH)[None, :], other=0.0)
    elif CHECK_ROWS:
        return tl.load(pointers_RW, mask=rows_R[:, None], other=0.0)
    elif width_W.shape[0] > WIDTH:
        return tl.load(pointers_RW, mask=(width_W < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(pointers_RW)


@triton.jit
def store_tile(base, stride, x_RW, rows_R, width_W, WIDTH: tl.constexpr):
    """Stores a tile from `base` on, in the dtype found there, but for what lies outside `rows` or past WIDTH."""
    mask_RW = rows_R[:, None] & (width_W < WIDTH)[None, :]
    tl.store(base + tile_offsets(stride, width_W, x_RW.shape[0]), x_RW.to(base.dtype.element_ty), mask=mask_RW)
