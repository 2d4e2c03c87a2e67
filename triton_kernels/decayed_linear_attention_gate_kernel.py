"""The gradient of the log-decay from what the scans of the backward left behind.

With c the cumulative log-decay, a token's row contributes <q_r, dq_r> - <k_r, dk_r> to dc_r, and dg_t is the sum of dc from t to the end. Summed over
a whole sequence the rounding errors of all later tokens pile up; so the sum runs to the end of a slot of a few chunks only, and everything beyond it
is one number, <S_end, dS_end>, the state and its gradient there.
"""

# fmt: off
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit
def inner_product(a, b, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """<a, b> of two arrays of SIZE elements, in fp32."""
    total = tl.zeros([BLOCK_SIZE], tl.float32)
    for start in range(0, SIZE, BLOCK_SIZE):
        entries = start + tl.arange(0, BLOCK_SIZE)
        x = tl.load(a + entries, mask=entries < SIZE, other=0.0).to(tl.float32)
        total += x * tl.load(b + entries, mask=entries < SIZE, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def gate_gradient_kernel(
    dots, anchors, final, dfinal, dgate, cu_seqlens, n_tokens: tl.int64, n_all_tokens: tl.int64, n_slots, n_heads, n_sequences,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, K_SLICES: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
    PACKED: tl.constexpr, HAS_DFINAL: tl.constexpr,
):
    """dg_t = sum_{t <= r < end} (<q_r, dq_r> - <k_r, dk_r>) + <S_end, dS_end>, with `end` the end of the slot of ROWS tokens that t lies in."""
    slot, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # A sequence's slots start at first // ROWS + its number: find the last sequence that starts no later than this slot.
    sequences = tl.arange(0, BLOCK_S)
    known = sequences < n_sequences
    starts = tl.load(cu_seqlens + sequences, mask=known, other=0) if PACKED else sequences * n_tokens
    sequence = tl.sum(tl.where(known & (starts // ROWS + sequences <= slot), 1, 0), 0) - 1
    first = tl.load(cu_seqlens + sequence) if PACKED else sequence * n_tokens
    n_rows = tl.load(cu_seqlens + sequence + 1) - first if PACKED else n_tokens
    row0 = (slot - first // ROWS - sequence) * ROWS
    rows = tl.arange(0, ROWS)
    inside = row0 + rows < n_rows
    dc = tl.zeros([ROWS], tl.float32)
    for part in tl.static_range(2 * K_SLICES):
        x = tl.load(dots + (part * n_heads + head) * n_all_tokens + first + row0 + rows, mask=inside, other=0.0)
        dc += x if part < K_SLICES else -x
    beyond = tl.zeros([], tl.float32)
    if row0 + ROWS < n_rows:
        state = anchors + (head * n_slots + slot) * SIZE
        beyond = inner_product(state, state + n_heads.to(tl.int64) * n_slots * SIZE, SIZE, BLOCK_SIZE)
    elif HAS_DFINAL:
        state_row = (sequence * n_heads + head) * SIZE
        beyond = inner_product(final + state_row, dfinal + state_row, SIZE, BLOCK_SIZE)
    # The sum from t on is all of it, less the sum up to t, plus t's own.
    dg = beyond + tl.sum(dc, 0) - tl.cumsum(dc, 0) + dc
    tl.store(dgate + (first + row0 + rows) * n_heads + head, dg, mask=inside)
