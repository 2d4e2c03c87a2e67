"""The one scan that is every pass of decayed linear attention, and the gradient of its gate.

    out_i = a_i query_i . S + sum_j D_ij (query_i . key_j) value_j          S <- w S + sum_j b_j key_j^T value_j

Forward it is o (query, key, value = q, k, v) and dq (dO, v, k); run from the last chunk to the first (sign -1), with
the chunk's decays mirrored, it is dk (v, dO, q) and dv (k, q, dO). A program owns one head and a slice of `value`'s
columns and keeps S [IN, BLOCK] in registers; slices never exchange anything. When heads are few the sequence is cut
into segments: one launch finds each segment's own state (OUTPUT False), the next starts every segment from the states
before it. No product takes the transpose of another product's result, the pattern that Triton miscompiles on Hopper
before 3.7.1.

Letters: IN width of query and key, OUT width of value. Offsets to rows are int64; offsets inside a tile are int32.
"""

# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportAssignmentType=false
import triton
import triton.language as tl

from triton_kernels.linear.tiles import (
    chunk_decays,
    decay_within,
    first_slot,
    load_tile,
    place_chunk,
    place_sequence,
    tile_mask,
)


@triton.jit
def over_width(x, y, PRECISION: tl.constexpr):
    """x y [CHUNK, N] over the width of the heads. fp32 products take whole rows of x and columns of y into registers,
    which hold no 256 of each: there the width is cut into parts that are summed."""
    PARTS: tl.constexpr = x.shape[1] // 64 if PRECISION == "ieee" and x.shape[1] > 128 else 1
    if PARTS == 1:
        return tl.dot(x, y, input_precision=PRECISION)
    else:
        x = tl.permute(tl.reshape(x, [x.shape[0], PARTS, 64]), (1, 0, 2))
        return tl.sum(tl.dot(x, tl.reshape(y, [PARTS, 64, y.shape[1]]), input_precision=PRECISION), 0)


@triton.jit
def scan_segment(
    tensors,
    strides,
    dots,
    anchors,
    start,
    end,
    state_strides,
    segment_states,
    segment_decays,
    n_rows,
    head_row,
    n_head_rows,
    segment,
    n_segments,
    slice_,
    in_width,
    out_width,
    sign,
    scale,
    with_start,
    with_end,
    with_dots,
    BLOCK_IN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ANCHOR: tl.constexpr,
    OUTPUT: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One slice of one segment of one head; tensors are query, key, value, gate, out and dot_with. `scale` multiplies q
    wherever q stands.

    start and end are the states outside the sequence, dots and anchors are <dot_with_i, out_i> over the slice's columns
    and the state at the end, in time, of every ANCHOR chunks; each may be None, and with_x says whether it concerns
    this role.
    """
    query, key, value, gate, out, dot_with = tensors
    query_stride, key_stride, value_stride, gate_stride, out_stride, dot_stride = strides
    rows = tl.arange(0, CHUNK)
    columns_in = tl.arange(0, BLOCK_IN)
    columns = slice_ * BLOCK + tl.arange(0, BLOCK)
    state_mask = tile_mask(columns_in < in_width, columns, out_width)
    state_tile = columns_in[:, None] * out_width + columns[None, :]
    outer_tile = (
        head_row * (in_width * out_width) + columns_in[:, None] * state_strides[0] + columns[None, :] * state_strides[1]
    )
    state = tl.zeros([BLOCK_IN, BLOCK], tl.float32)
    if OUTPUT:
        if start is not None:
            state = tl.load(start + outer_tile, mask=state_mask & with_start, other=0.0)
        for before in range(0, segment):
            row = before * n_head_rows + head_row
            own = tl.load(segment_states + row * (in_width * out_width) + state_tile, mask=state_mask, other=0.0)
            state = state * tl.exp2(tl.load(segment_decays + row)) + own

    n_chunks = tl.cdiv(n_rows, CHUNK)
    segment_chunks = tl.cdiv(n_chunks, n_segments)
    first_step = tl.minimum(segment * segment_chunks, n_chunks)
    last_step = tl.minimum(first_step + segment_chunks, n_chunks)
    forward = sign > 0
    chunk = first_step if forward else n_chunks - 1 - first_step
    out_scale = tl.where(forward, scale, 1.0)
    state_scale = tl.where(forward, 1.0, scale)
    total = tl.zeros([], tl.float32)
    for _ in range(0, (last_step - first_step).to(tl.int32)):
        row0 = chunk * CHUNK
        inside = rows < tl.minimum(n_rows - row0, CHUNK).to(tl.int32)
        key_tile = load_tile(key + row0 * key_stride, rows, key_stride, columns_in, inside, in_width, EXACT)
        value_tile = load_tile(value + row0 * value_stride, rows, value_stride, columns, inside, out_width, EXACT)
        c, whole = chunk_decays(None if gate is None else gate + row0 * gate_stride, rows, gate_stride, inside, CHUNK)
        total += whole
        from_start, to_end = tl.exp2(c), tl.exp2(whole - c)
        if OUTPUT:
            query_tile = load_tile(query + row0 * query_stride, rows, query_stride, columns_in, inside, in_width, EXACT)
            # Positions that move with the chunk, rather than rows, keep the compiler from holding CHUNK^2
            # loop-invariant flags in registers.
            decays = decay_within(c, row0.to(tl.int32) + rows, sign)
            scores = (over_width(query_tile, tl.trans(key_tile), PRECISION) * (decays * scale)).to(value_tile.dtype)
            result = over_width(query_tile, state.to(query_tile.dtype), PRECISION)
            result *= (tl.where(forward, from_start, to_end) * out_scale)[:, None]
            result = tl.dot(scores, value_tile, result, input_precision=PRECISION)
            out_tile = rows[:, None] * out_stride + columns[None, :]
            tl.store((out + row0 * out_stride) + out_tile, result, mask=tile_mask(inside, columns, out_width, EXACT))
            if dots is not None:
                with_tile = load_tile(
                    dot_with + row0 * dot_stride, rows, dot_stride, columns, inside, out_width, EXACT
                ).to(tl.float32)
                tl.store(dots + row0 + rows, tl.sum(with_tile * result, 1), mask=inside & with_dots)
                # The state here is that of the end of the chunk before (forward) or of this one (in reverse).
                ended = chunk - 1 if forward else chunk
                at_anchor = with_dots & (ended >= 0) & (((ended + 1) % ANCHOR == 0) | (ended == n_chunks - 1))
                tl.store(
                    anchors + (ended // ANCHOR) * (in_width * out_width) + state_tile,
                    state,
                    mask=state_mask & at_anchor,
                )
            if PRECISION == "ieee":
                # Read anew: what fp32 products hold in registers leaves no room to keep it.
                key_tile = load_tile(key + row0 * key_stride, rows, key_stride, columns_in, inside, in_width, EXACT)
        decayed_value = (value_tile.to(tl.float32) * (tl.where(forward, to_end, from_start) * state_scale)[:, None]).to(
            value_tile.dtype
        )
        state = tl.dot(tl.trans(key_tile), decayed_value, state * tl.exp2(whole), input_precision=PRECISION)
        chunk += sign

    if not OUTPUT:
        row = segment * n_head_rows + head_row
        tl.store(segment_states + row * (in_width * out_width) + state_tile, state, mask=state_mask)
        tl.store(segment_decays + row, total, mask=slice_ == 0)
    elif end is not None:
        tl.store(end + outer_tile, state, mask=state_mask & with_end & (segment == n_segments - 1))


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    gate,
    o,
    initial,
    final,
    segment_states,
    segment_decays,
    cu_seqlens,
    n_tokens: tl.int64,
    n_heads,
    n_head_rows,
    n_segments,
    n_programs,
    q_stride,
    q_head,
    k_stride,
    k_head,
    v_stride,
    v_head,
    gate_stride,
    gate_head,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    OUTPUT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and the final state. Heads vary slowest, as a head's programs read the same rows."""
    head_row, program = (tl.program_id(0) // n_programs).to(tl.int64), tl.program_id(0) % n_programs
    sequence, head = head_row // n_heads, head_row % n_heads
    first, n_rows = place_sequence(cu_seqlens, sequence, n_tokens, PACKED)
    SLICES: tl.constexpr = (V + BLOCK - 1) // BLOCK
    EXACT: tl.constexpr = (K == BLOCK_IN) and (V % BLOCK == 0)
    k += first * k_stride + head * k_head
    v += first * v_stride + head * v_head
    if HAS_GATE:
        gate += first * gate_stride + head * gate_head
    if OUTPUT:
        q += first * q_stride + head * q_head
        o += (first * n_heads + head) * V
    scan_segment(
        (q, k, v, gate, o, None),
        (q_stride, k_stride, v_stride, gate_stride, n_heads * V, 0),
        None,
        None,
        initial,
        final,
        (V, 1),
        segment_states,
        segment_decays,
        n_rows,
        head_row,
        n_head_rows,
        program // SLICES,
        n_segments,
        program % SLICES,
        K,
        V,
        1,
        scale,
        True,
        True,
        False,
        BLOCK_IN,
        BLOCK,
        CHUNK,
        1,
        OUTPUT,
        EXACT,
        PRECISION,
    )


@triton.jit
def backward_kernel(
    q,
    k,
    v,
    gate,
    do,
    dq,
    dk,
    dv,
    dots,
    anchors,
    start,
    dinitial,
    dfinal,
    segment_states,
    segment_decays,
    cu_seqlens,
    n_tokens: tl.int64,
    n_all_tokens: tl.int64,
    n_slots,
    n_heads,
    n_head_rows,
    n_segments,
    n_programs,
    q_stride,
    q_head,
    k_stride,
    k_head,
    v_stride,
    v_head,
    do_stride,
    do_head,
    gate_stride,
    gate_head,
    scale,
    with_initial,
    with_dfinal,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ANCHOR: tl.constexpr,
    OUTPUT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, dk and dv: three roles of the same scan, each with slices of its own, that share nothing but what they read.

    The role only chooses pointers and the direction, so that the three have one body: its registers and its shared
    memory are those of one.
    """
    head_row, program = (tl.program_id(0) // n_programs).to(tl.int64), tl.program_id(0) % n_programs
    sequence, head = head_row // n_heads, head_row % n_heads
    first, n_rows = place_sequence(cu_seqlens, sequence, n_tokens, PACKED)
    K_SLICES: tl.constexpr = (K + BLOCK - 1) // BLOCK
    SLICES: tl.constexpr = 2 * K_SLICES + (V + BLOCK - 1) // BLOCK
    EXACT: tl.constexpr = (K == V) and (K == BLOCK_IN) and (K % BLOCK == 0)
    segment, slice_ = program // SLICES, program % SLICES
    q += first * q_stride + head * q_head
    k += first * k_stride + head * k_head
    v += first * v_stride + head * v_head
    do += first * do_stride + head * do_head
    if gate is not None:
        gate += first * gate_stride + head * gate_head
    row_out = first * n_heads + head
    if slice_ < K_SLICES:
        role, sign = 0, 1
        query, query_stride, key, key_stride, value, value_stride, dot_with, dot_stride = (
            do,
            do_stride,
            v,
            v_stride,
            k,
            k_stride,
            q,
            q_stride,
        )
        out, in_width, out_width, outside, with_start = dq + row_out * K, V, K, start, with_initial
        state_in_stride, state_out_stride = 1, V
    elif slice_ < 2 * K_SLICES:
        role, sign = 1, -1
        query, query_stride, key, key_stride, value, value_stride, dot_with, dot_stride = (
            v,
            v_stride,
            do,
            do_stride,
            q,
            q_stride,
            k,
            k_stride,
        )
        out, in_width, out_width, outside, with_start = dk + row_out * K, V, K, dfinal, with_dfinal
        state_in_stride, state_out_stride = 1, V
    else:
        role, sign = 2, -1
        query, query_stride, key, key_stride, value, value_stride, dot_with, dot_stride = (
            k,
            k_stride,
            q,
            q_stride,
            do,
            do_stride,
            do,
            do_stride,
        )
        out, in_width, out_width, outside, with_start = dv + row_out * V, K, V, dfinal, with_dfinal
        state_in_stride, state_out_stride = V, 1
    if EXACT:
        in_width, out_width = K, V
    role_rows = (n_segments - 1) * n_head_rows * role
    if dots is not None:
        # dots [2, K slices, H, all tokens] and anchors [2, H, slots, V, K].
        dots += (slice_ * n_heads + head) * n_all_tokens + first
        anchors += ((role * n_heads + head) * n_slots + first_slot(first, sequence, n_rows, ANCHOR * CHUNK, PACKED)) * (
            K * V
        )
    scan_segment(
        (query, key, value, gate, out, dot_with),
        (query_stride, key_stride, value_stride, gate_stride, n_heads * out_width, dot_stride),
        dots,
        anchors,
        outside,
        dinitial,
        (state_in_stride, state_out_stride),
        segment_states + role_rows * (K * V),
        segment_decays + role_rows,
        n_rows,
        head_row,
        n_head_rows,
        segment,
        n_segments,
        slice_ - role * K_SLICES,
        in_width,
        out_width,
        sign,
        scale,
        with_start != 0,
        (role == 2) & (with_initial != 0),
        role != 2,
        BLOCK_IN,
        BLOCK,
        CHUNK,
        ANCHOR,
        OUTPUT,
        EXACT,
        PRECISION,
    )


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
    dots,
    anchors,
    final,
    dfinal,
    dgate,
    cu_seqlens,
    n_tokens: tl.int64,
    n_all_tokens: tl.int64,
    n_slots,
    n_heads,
    n_sequences,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K_SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dg_t = sum_{t <= r < end} (<q_r, dq_r> - <k_r, dk_r>) + <S_end, dS_end>, with `end` the end of the slot of ROWS
    tokens that t lies in.

    With c the cumulative log-decay, a token's row contributes the first term to dc_r, and dg_t is the sum of dc from t
    to the end. Over a whole sequence the rounding errors of all later tokens pile up; so the sum runs to the end of a
    slot of a few chunks only, and everything beyond it is one number, the state times its gradient there.
    """
    slot, head, sequence, first, n_rows = place_chunk(
        cu_seqlens, tl.program_id(0), n_tokens, n_sequences, n_heads, ROWS, BLOCK_S, PACKED
    )
    rows = tl.arange(0, ROWS)
    inside = rows < n_rows
    dc = tl.zeros([ROWS], tl.float32)
    for part in tl.static_range(2 * K_SLICES):
        x = tl.load(dots + (part * n_heads + head) * n_all_tokens + first + rows, mask=inside, other=0.0)
        dc += x if part < K_SLICES else -x
    beyond = tl.zeros([], tl.float32)
    if n_rows > ROWS:
        state = anchors + (head * n_slots + slot) * SIZE
        beyond = inner_product(state, state + (head * 0 + n_heads) * n_slots * SIZE, SIZE, BLOCK_SIZE)
    elif dfinal is not None:
        state_row = (sequence * n_heads + head) * SIZE
        beyond = inner_product(final + state_row, dfinal + state_row, SIZE, BLOCK_SIZE)
    # The sum from t on is all of it, less the sum up to t, plus t's own.
    dg = beyond + tl.sum(dc, 0) - tl.cumsum(dc, 0) + dc
    tl.store(dgate + (first + rows) * n_heads + head, dg, mask=inside)
