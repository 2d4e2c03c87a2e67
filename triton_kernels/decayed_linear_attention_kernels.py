"""The one scan that is every pass of decayed linear attention.

    out_i = a_i query_i . S + sum_j D_ij (query_i . key_j) value_j          S <- w S + sum_j b_j key_j^T value_j

Forward it is o (query, key, value = q, k, v) and dq (dO, v, k); run from the last chunk to the first (sign -1), with the chunk's decays mirrored,
it is dk (v, dO, q) and dv (k, q, dO). A program owns one head and a slice of `value`'s columns and keeps S [IN, BLOCK] in registers; slices never
exchange anything. When heads are few the sequence is cut into segments: one launch finds each segment's own state (OUTPUT False), the next starts
every segment from the states before it. No product takes the transpose of another product's result, the pattern that Triton miscompiles on Hopper
before 3.7.1.

Letters: IN width of query and key, OUT width of value. Offsets to rows are int64; offsets inside a tile are int32.
"""

# fmt: off
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from triton_kernels.gates import decay_within, scalar_decays


@triton.jit
def tile_mask(inside, columns, width, EXACT: tl.constexpr):
    """Rows of the sequence, columns of the matrix; EXACT widths, which the blocks divide, need no test."""
    mask = inside[:, None]
    if not EXACT:
        mask = mask & (columns < width)[None, :]
    return mask


@triton.jit
def load_tile(base, row0, rows, stride, columns, inside, width, EXACT: tl.constexpr):
    """[CHUNK, columns] tile of a [T, width] matrix from row0 on, zeros outside."""
    offsets = rows[:, None] * stride + columns[None, :]
    return tl.load((base + row0 * stride) + offsets, mask=tile_mask(inside, columns, width, EXACT), other=0.0)


@triton.jit
def scan_chunks(
    query, key, value, gate, out, dot_with, dots, anchors, state,
    query_stride, key_stride, value_stride, gate_stride, out_stride, dot_stride,
    n_rows, first_step, last_step, column0, in_width, out_width, sign, scale, with_dots,
    BLOCK_IN: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ANCHOR: tl.constexpr,
    OUTPUT: tl.constexpr, HAS_GATE: tl.constexpr, DOTS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):
    """Steps [first_step, last_step) of the scan; returns the state after them and the log2-decay over them. `scale` multiplies q wherever q stands.

    DOTS (where with_dots): also write <dot_with_i, out_i> over the slice's columns, and the state at the end, in time, of every ANCHOR chunks.
    """
    rows = tl.arange(0, CHUNK)
    columns_in = tl.arange(0, BLOCK_IN)
    columns = column0 + tl.arange(0, BLOCK)
    n_chunks = tl.cdiv(n_rows, CHUNK)
    forward = sign > 0
    chunk = first_step if forward else n_chunks - 1 - first_step
    out_scale = tl.where(forward, scale, 1.0)
    state_scale = tl.where(forward, 1.0, scale)
    total = tl.zeros([], tl.float32)
    for _ in range(0, (last_step - first_step).to(tl.int32)):
        row0 = chunk * CHUNK
        inside = rows < tl.minimum(n_rows - row0, CHUNK).to(tl.int32)
        key_tile = load_tile(key, row0, rows, key_stride, columns_in, inside, in_width, EXACT)
        value_tile = load_tile(value, row0, rows, value_stride, columns, inside, out_width, EXACT)
        c, whole = scalar_decays(gate + row0 * gate_stride if HAS_GATE else gate, rows, gate_stride, inside, CHUNK, HAS_GATE)
        total += whole
        from_start, to_end = tl.exp2(c), tl.exp2(whole - c)
        if OUTPUT:
            query_tile = load_tile(query, row0, rows, query_stride, columns_in, inside, in_width, EXACT)
            scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION) * (decay_within(c, row0, rows, sign) * scale)
            scores = scores.to(value_tile.dtype)
            result = tl.dot(query_tile, state.to(query_tile.dtype), input_precision=PRECISION)
            result *= (tl.where(forward, from_start, to_end) * out_scale)[:, None]
            result = tl.dot(scores, value_tile, result, input_precision=PRECISION)
            offsets = rows[:, None] * out_stride + columns[None, :]
            tl.store((out + row0 * out_stride) + offsets, result, mask=tile_mask(inside, columns, out_width, EXACT))
            if DOTS:
                with_tile = load_tile(dot_with, row0, rows, dot_stride, columns, inside, out_width, EXACT).to(tl.float32)
                tl.store(dots + row0 + rows, tl.sum(with_tile * result, 1), mask=inside & with_dots)
                # The state here is that of the end of the chunk before (forward) or of this one (in reverse).
                ended = chunk - 1 if forward else chunk
                at_anchor = with_dots & (ended >= 0) & (((ended + 1) % ANCHOR == 0) | (ended == n_chunks - 1))
                anchor = anchors + (ended // ANCHOR) * (in_width * out_width)
                anchor_mask = (columns_in < in_width)[:, None] & (columns < out_width)[None, :] & at_anchor
                tl.store(anchor + (columns_in[:, None] * out_width + columns[None, :]), state, mask=anchor_mask)
        decayed_value = (value_tile.to(tl.float32) * (tl.where(forward, to_end, from_start) * state_scale)[:, None]).to(value_tile.dtype)
        state = tl.dot(tl.trans(key_tile), decayed_value, state * tl.exp2(whole), input_precision=PRECISION)
        chunk += sign
    return state, total


@triton.jit
def run_role(
    query, key, value, gate, out, dot_with, dots, anchors, initial, final, segment_states, segment_decays,
    query_stride, key_stride, value_stride, gate_stride, out_stride, dot_stride, state_in_stride, state_out_stride,
    n_rows, head_row, n_head_rows, segment, n_segments, slice_, in_width, out_width, sign, scale, with_initial, with_final, with_dots,
    BLOCK_IN: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ANCHOR: tl.constexpr, OUTPUT: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, DOTS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):
    """One slice of one segment of one head. HAS_x: the buffer exists; with_x: it concerns this role."""
    columns_in = tl.arange(0, BLOCK_IN)[:, None]
    columns = (slice_ * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (columns_in < in_width) & (columns < out_width)
    size = in_width * out_width
    tile = columns_in * out_width + columns
    outer_tile = columns_in * state_in_stride + columns * state_out_stride
    n_chunks = tl.cdiv(n_rows, CHUNK)
    per_segment = tl.cdiv(n_chunks, n_segments)
    first_step = tl.minimum(segment * per_segment, n_chunks)
    last_step = tl.minimum(first_step + per_segment, n_chunks)
    state = tl.zeros([BLOCK_IN, BLOCK], tl.float32)
    if OUTPUT:
        if HAS_INITIAL:
            state = tl.load(initial + head_row * size + outer_tile, mask=mask & with_initial, other=0.0)
        for before in range(0, segment):
            row = before * n_head_rows + head_row
            decay = tl.exp2(tl.load(segment_decays + row))
            state = state * decay + tl.load(segment_states + row * size + tile, mask=mask, other=0.0)
    state, total = scan_chunks(
        query, key, value, gate, out, dot_with, dots, anchors, state,
        query_stride, key_stride, value_stride, gate_stride, out_stride, dot_stride,
        n_rows, first_step, last_step, slice_ * BLOCK, in_width, out_width, sign, scale, with_dots,
        BLOCK_IN, BLOCK, CHUNK, ANCHOR, OUTPUT, HAS_GATE, DOTS, EXACT, PRECISION,
    )
    if not OUTPUT:
        row = segment * n_head_rows + head_row
        tl.store(segment_states + row * size + tile, state, mask=mask)
        tl.store(segment_decays + row, total, mask=slice_ == 0)
    elif HAS_FINAL:
        tl.store(final + head_row * size + outer_tile, state, mask=mask & with_final & (segment == n_segments - 1))


@triton.jit
def place(cu_seqlens, n_tokens: tl.int64, n_heads, n_programs, PACKED: tl.constexpr):
    """(head row, head, sequence, first token, rows, program of this head): heads vary slowest, as a head's programs read the same rows."""
    head_row = (tl.program_id(0) // n_programs).to(tl.int64)
    sequence, head = head_row // n_heads, head_row % n_heads
    first = sequence * n_tokens
    n_rows = n_tokens
    if PACKED:
        first = tl.load(cu_seqlens + sequence)
        n_rows = tl.load(cu_seqlens + sequence + 1) - first
    return head_row, head, sequence, first, n_rows, tl.program_id(0) % n_programs


@triton.jit
def forward_kernel(
    q, k, v, gate, o, initial, final, segment_states, segment_decays, cu_seqlens,
    n_tokens: tl.int64, n_heads, n_head_rows, n_segments, n_programs,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, gate_stride, gate_head, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, OUTPUT: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """o and the final state; or, with OUTPUT False, the state and the decay of every segment but the last."""
    head_row, head, _, first, n_rows, program = place(cu_seqlens, n_tokens, n_heads, n_programs, PACKED)
    SLICES: tl.constexpr = (V + BLOCK - 1) // BLOCK
    EXACT: tl.constexpr = (K == BLOCK_IN) and (V % BLOCK == 0)
    k += first * k_stride + head * k_head
    v += first * v_stride + head * v_head
    if HAS_GATE:
        gate += first * gate_stride + head * gate_head
    if OUTPUT:
        q += first * q_stride + head * q_head
        o += (first * n_heads + head) * V
    run_role(
        q, k, v, gate, o, None, None, None, initial, final, segment_states, segment_decays,
        q_stride, k_stride, v_stride, gate_stride, n_heads * V, 0, V, 1,
        n_rows, head_row, n_head_rows, program // SLICES, n_segments, program % SLICES, K, V, 1, scale, True, True, False,
        BLOCK_IN, BLOCK, CHUNK, 1, OUTPUT, HAS_GATE, HAS_INITIAL, True, False, EXACT, PRECISION,
    )


@triton.jit
def backward_kernel(
    q, k, v, gate, do, dq, dk, dv, dots, anchors, initial, dfinal, dinitial, segment_states, segment_decays, cu_seqlens,
    n_tokens: tl.int64, n_all_tokens: tl.int64, n_slots, n_heads, n_head_rows, n_segments, n_programs,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, do_stride, do_head, gate_stride, gate_head, scale, with_initial, with_dfinal,
    K: tl.constexpr, V: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ANCHOR: tl.constexpr,
    OUTPUT: tl.constexpr, HAS_GATE: tl.constexpr, HAS_STATE: tl.constexpr, DOTS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq, dk and dv: three roles of the same scan, each with slices of its own, that share nothing but what they read.

    The role only chooses pointers and the direction, so that the three have one body: its registers and its shared memory are those of one.
    """
    head_row, head, sequence, first, n_rows, program = place(cu_seqlens, n_tokens, n_heads, n_programs, PACKED)
    K_SLICES: tl.constexpr = (K + BLOCK - 1) // BLOCK
    SLICES: tl.constexpr = 2 * K_SLICES + (V + BLOCK - 1) // BLOCK
    EXACT: tl.constexpr = (K == V) and (K == BLOCK_IN) and (K % BLOCK == 0)
    segment, slice_ = program // SLICES, program % SLICES
    q += first * q_stride + head * q_head
    k += first * k_stride + head * k_head
    v += first * v_stride + head * v_head
    do += first * do_stride + head * do_head
    if HAS_GATE:
        gate += first * gate_stride + head * gate_head
    row_out = first * n_heads + head
    if slice_ < K_SLICES:
        role, sign = 0, 1
        query, query_stride, key, key_stride, value, value_stride, dot_with, dot_stride = do, do_stride, v, v_stride, k, k_stride, q, q_stride
        out, in_width, out_width, start, with_start = dq + row_out * K, V, K, initial, with_initial
        state_in_stride, state_out_stride = 1, V
    elif slice_ < 2 * K_SLICES:
        role, sign = 1, -1
        query, query_stride, key, key_stride, value, value_stride, dot_with, dot_stride = v, v_stride, do, do_stride, q, q_stride, k, k_stride
        out, in_width, out_width, start, with_start = dk + row_out * K, V, K, dfinal, with_dfinal
        state_in_stride, state_out_stride = 1, V
    else:
        role, sign = 2, -1
        query, query_stride, key, key_stride, value, value_stride, dot_with, dot_stride = k, k_stride, q, q_stride, do, do_stride, do, do_stride
        out, in_width, out_width, start, with_start = dv + row_out * V, K, V, dfinal, with_dfinal
        state_in_stride, state_out_stride = V, 1
    if EXACT:
        in_width, out_width = K, V
    role_slice = slice_ - role * K_SLICES
    role_rows = (n_segments - 1) * n_head_rows * role
    if DOTS:
        # dots [2, K slices, H, all tokens] and anchors [2, H, slots, V, K]; a sequence's slots start at first // (rows per slot) + sequence.
        dots += (slice_ * n_heads + head) * n_all_tokens + first
        anchors += ((role * n_heads + head) * n_slots + first // (ANCHOR * CHUNK) + sequence) * (K * V)
    run_role(
        query, key, value, gate, out, dot_with, dots, anchors, start, dinitial, segment_states + role_rows * (K * V), segment_decays + role_rows,
        query_stride, key_stride, value_stride, gate_stride, n_heads * out_width, dot_stride, state_in_stride, state_out_stride,
        n_rows, head_row, n_head_rows, segment, n_segments, role_slice, in_width, out_width, sign, scale,
        with_start != 0, (role == 2) & (with_initial != 0), role != 2,
        BLOCK_IN, BLOCK, CHUNK, ANCHOR, OUTPUT, HAS_GATE, HAS_STATE, HAS_STATE, DOTS, EXACT, PRECISION,
    )
