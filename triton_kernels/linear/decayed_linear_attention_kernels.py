"""The one scan that is every pass of decayed linear attention, and the gradient of its gate.

    out_i = a_i query_i . S + sum_j D_ij (query_i . key_j) value_j          S <- w S + sum_j b_j key_j^T value_j

Forward it is o (query, key, value = q, k, v) and dq (dO, v, k); run from the last chunk to the first (sign -1), with
the chunk's decays mirrored, it is dk (v, dO, q) and dv (k, q, dO). A program owns one head and a slice of `value`'s
columns and keeps S [IN, BLOCK] in registers; slices never exchange anything. When heads are few the sequence is cut
into segments: one launch finds each segment's own state (OUTPUT False), the next starts every segment from the states
before it. No product takes the transpose of another product's result, the pattern that Triton miscompiles on Hopper
before 3.7.1.

Legend: IN width of query and key, OUT width of value. Offsets to rows are int64; offsets inside a tile are int32.
"""

# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from collections import namedtuple

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


# What every launch of a call is given, in the order in which a kernel takes it: tensors, each segment's own state and
# its log-decay, sizes, and the strides by token and by head.
ForwardTensors = namedtuple("ForwardTensors", "q k v gate o initial final")
BackwardTensors = namedtuple("BackwardTensors", "q k v gate do dq dk dv dots anchors start dinitial dfinal")
Segments = namedtuple("Segments", "states decays")
ScanSizes = namedtuple("ScanSizes", "n_heads n_head_rows n_segments n_programs")
ForwardStrides = namedtuple("ForwardStrides", "q q_head k k_head v v_head gate gate_head")
BackwardStrides = namedtuple("BackwardStrides", "q q_head k k_head v v_head do do_head gate gate_head")
# Its constants: widths, what the width of query and key is padded to, chunks between two anchors, which inputs there
# are, and how fp32 products are computed.
ScanForm = namedtuple("ScanForm", "K V BLOCK_IN ANCHOR HAS_GATE HAS_INITIAL PACKED PRECISION")

# A role of the scan: tensors at the sequence's first token, and their strides by token.
Role = namedtuple("Role", "query key value gate out dot_with")
# start and end are the states outside the sequence, start with strides of its own; dots and anchors are <dot_with_i,
# out_i> over the slice's columns and the state at the end, in time, of every ANCHOR chunks; each may be None, and
# with_x says whether it concerns this role.
Outside = namedtuple("Outside", "start end dots anchors start_in_stride start_out_stride with_start with_end with_dots")
# What of the scan a program does, and the widths of the role.
Part = namedtuple("Part", "n_rows head_row n_head_rows segment n_segments slice_ in_width out_width sign")


@triton.jit
def scan_segment(
    role,
    strides,
    outside,
    part,
    segments,
    scale,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    OUTPUT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One slice of one segment of one head. `scale` multiplies q wherever q stands."""
    PRECISION: tl.constexpr = FORM.PRECISION
    BLOCK_IN: tl.constexpr = FORM.BLOCK_IN
    ANCHOR: tl.constexpr = FORM.ANCHOR
    in_width, out_width = part.in_width, part.out_width
    rows = tl.arange(0, CHUNK)
    columns_in = tl.arange(0, BLOCK_IN)
    columns = part.slice_ * BLOCK + tl.arange(0, BLOCK)
    state_mask = tile_mask(columns_in < in_width, columns, out_width)
    state_tile = columns_in[:, None] * out_width + columns[None, :]
    state = tl.zeros([BLOCK_IN, BLOCK], tl.float32)
    if OUTPUT:
        if outside.start is not None:
            start_tile = columns_in[:, None] * outside.start_in_stride + columns[None, :] * outside.start_out_stride
            start = outside.start + part.head_row * (in_width * out_width)
            state = tl.load(start + start_tile, mask=state_mask & outside.with_start, other=0.0)
        for before in range(0, part.segment):
            row = before * part.n_head_rows + part.head_row
            own = tl.load(segments.states + row * (in_width * out_width) + state_tile, mask=state_mask, other=0.0)
            state = state * tl.exp2(tl.load(segments.decays + row)) + own

    n_chunks = tl.cdiv(part.n_rows, CHUNK)
    segment_chunks = tl.cdiv(n_chunks, part.n_segments)
    first_step = tl.minimum(part.segment * segment_chunks, n_chunks)
    last_step = tl.minimum(first_step + segment_chunks, n_chunks)
    forward = part.sign > 0
    chunk = first_step if forward else n_chunks - 1 - first_step
    out_scale = tl.where(forward, scale, 1.0)
    state_scale = tl.where(forward, 1.0, scale)
    total = tl.zeros([], tl.float32)
    for _ in range(0, (last_step - first_step).to(tl.int32)):
        row0 = chunk * CHUNK
        inside = rows < tl.minimum(part.n_rows - row0, CHUNK).to(tl.int32)
        key_tile = load_tile(role.key + row0 * strides.key, rows, strides.key, columns_in, inside, in_width, EXACT)
        value_tile = load_tile(
            role.value + row0 * strides.value, rows, strides.value, columns, inside, out_width, EXACT
        )
        gate = None if role.gate is None else role.gate + row0 * strides.gate
        c, whole = chunk_decays(gate, rows, strides.gate, inside, CHUNK)
        total += whole
        from_start, to_end = tl.exp2(c), tl.exp2(whole - c)
        if OUTPUT:
            query_tile = load_tile(
                role.query + row0 * strides.query, rows, strides.query, columns_in, inside, in_width, EXACT
            )
            # Positions that move with the chunk, rather than rows, keep the compiler from holding CHUNK^2
            # loop-invariant flags in registers.
            decays = decay_within(c, row0.to(tl.int32) + rows, part.sign)
            scores = (over_width(query_tile, tl.trans(key_tile), PRECISION) * (decays * scale)).to(value_tile.dtype)
            result = over_width(query_tile, state.to(query_tile.dtype), PRECISION)
            result *= (tl.where(forward, from_start, to_end) * out_scale)[:, None]
            result = tl.dot(scores, value_tile, result, input_precision=PRECISION)
            out_tile = rows[:, None] * strides.out + columns[None, :]
            tl.store(
                (role.out + row0 * strides.out) + out_tile, result, mask=tile_mask(inside, columns, out_width, EXACT)
            )
            if outside.dots is not None:
                with_tile = load_tile(
                    role.dot_with + row0 * strides.dot_with, rows, strides.dot_with, columns, inside, out_width, EXACT
                ).to(tl.float32)
                tl.store(outside.dots + row0 + rows, tl.sum(with_tile * result, 1), mask=inside & outside.with_dots)
                # The state here is that of the end of the chunk before (forward) or of this one (in reverse).
                ended = chunk - 1 if forward else chunk
                at_anchor = outside.with_dots & (ended >= 0) & (((ended + 1) % ANCHOR == 0) | (ended == n_chunks - 1))
                tl.store(
                    outside.anchors + (ended // ANCHOR) * (in_width * out_width) + state_tile,
                    state,
                    mask=state_mask & at_anchor,
                )
            if PRECISION == "ieee":
                # Read anew: what fp32 products hold in registers leaves no room to keep it.
                key_tile = load_tile(
                    role.key + row0 * strides.key, rows, strides.key, columns_in, inside, in_width, EXACT
                )
        decayed_value = (value_tile.to(tl.float32) * (tl.where(forward, to_end, from_start) * state_scale)[:, None]).to(
            value_tile.dtype
        )
        state = tl.dot(tl.trans(key_tile), decayed_value, state * tl.exp2(whole), input_precision=PRECISION)
        chunk += part.sign

    if not OUTPUT:
        row = part.segment * part.n_head_rows + part.head_row
        tl.store(segments.states + row * (in_width * out_width) + state_tile, state, mask=state_mask)
        tl.store(segments.decays + row, total, mask=part.slice_ == 0)
    elif outside.end is not None:
        tl.store(
            outside.end + part.head_row * (in_width * out_width) + state_tile,
            state,
            mask=state_mask & outside.with_end & (part.segment == part.n_segments - 1),
        )


@triton.jit
def forward_kernel(
    tensors,
    segments,
    cu_seqlens,
    n_tokens: tl.int64,
    sizes,
    strides,
    scale,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    OUTPUT: tl.constexpr,
):
    """o and the final state. Heads vary slowest, as a head's programs read the same rows."""
    K: tl.constexpr = FORM.K
    V: tl.constexpr = FORM.V
    head_row, program = (tl.program_id(0) // sizes.n_programs).to(tl.int64), tl.program_id(0) % sizes.n_programs
    sequence, head = head_row // sizes.n_heads, head_row % sizes.n_heads
    first, n_rows = place_sequence(cu_seqlens, sequence, n_tokens, FORM.PACKED)
    SLICES: tl.constexpr = (V + BLOCK - 1) // BLOCK
    EXACT: tl.constexpr = (K == FORM.BLOCK_IN) and (V % BLOCK == 0)
    k = tensors.k + (first * strides.k + head * strides.k_head)
    v = tensors.v + (first * strides.v + head * strides.v_head)
    gate = tensors.gate
    if FORM.HAS_GATE:
        gate += first * strides.gate + head * strides.gate_head
    q, o = tensors.q, tensors.o
    # The launch that only finds the segments' own states has neither.
    if OUTPUT:
        q += first * strides.q + head * strides.q_head
        o += (first * sizes.n_heads + head) * V
    scan_segment(
        Role(q, k, v, gate, o, None),
        Role(strides.q, strides.k, strides.v, strides.gate, sizes.n_heads * V, 0),
        Outside(tensors.initial, tensors.final, None, None, V, 1, True, True, False),
        Part(n_rows, head_row, sizes.n_head_rows, program // SLICES, sizes.n_segments, program % SLICES, K, V, 1),
        segments,
        scale,
        FORM,
        BLOCK,
        CHUNK,
        OUTPUT,
        EXACT,
    )


@triton.jit
def backward_kernel(
    tensors,
    segments,
    cu_seqlens,
    n_tokens: tl.int64,
    n_all_tokens: tl.int64,
    n_slots,
    sizes,
    strides,
    scale,
    with_initial,
    with_dfinal,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    OUTPUT: tl.constexpr,
):
    """dq, dk and dv: three roles of the same scan, each with slices of its own, that share nothing but what they read.

    The role only chooses pointers and the direction, so that the three have one body: its registers and its shared
    memory are those of one.
    """
    K: tl.constexpr = FORM.K
    V: tl.constexpr = FORM.V
    head_row, program = (tl.program_id(0) // sizes.n_programs).to(tl.int64), tl.program_id(0) % sizes.n_programs
    sequence, head = head_row // sizes.n_heads, head_row % sizes.n_heads
    first, n_rows = place_sequence(cu_seqlens, sequence, n_tokens, FORM.PACKED)
    K_SLICES: tl.constexpr = (K + BLOCK - 1) // BLOCK
    SLICES: tl.constexpr = 2 * K_SLICES + (V + BLOCK - 1) // BLOCK
    EXACT: tl.constexpr = (K == V) and (K == FORM.BLOCK_IN) and (K % BLOCK == 0)
    segment, slice_ = program // SLICES, program % SLICES
    q = tensors.q + (first * strides.q + head * strides.q_head)
    k = tensors.k + (first * strides.k + head * strides.k_head)
    v = tensors.v + (first * strides.v + head * strides.v_head)
    do = tensors.do + (first * strides.do + head * strides.do_head)
    gate = tensors.gate
    if gate is not None:
        gate += first * strides.gate + head * strides.gate_head
    row_out = first * sizes.n_heads + head
    if slice_ < K_SLICES:
        role, sign = 0, 1
        query, key, value, dot_with = do, v, k, q
        query_stride, key_stride, value_stride, dot_stride = strides.do, strides.v, strides.k, strides.q
        out, in_width, out_width = tensors.dq + row_out * K, V, K
        outside, with_start = tensors.start, with_initial
        state_in_stride, state_out_stride = 1, V
    elif slice_ < 2 * K_SLICES:
        role, sign = 1, -1
        query, key, value, dot_with = v, do, q, k
        query_stride, key_stride, value_stride, dot_stride = strides.v, strides.do, strides.q, strides.k
        out, in_width, out_width = tensors.dk + row_out * K, V, K
        outside, with_start = tensors.dfinal, with_dfinal
        state_in_stride, state_out_stride = 1, V
    else:
        role, sign = 2, -1
        query, key, value, dot_with = k, q, do, do
        query_stride, key_stride, value_stride, dot_stride = strides.k, strides.q, strides.do, strides.do
        out, in_width, out_width = tensors.dv + row_out * V, K, V
        outside, with_start = tensors.dfinal, with_dfinal
        state_in_stride, state_out_stride = V, 1
    if EXACT:
        in_width, out_width = K, V
    role_rows = (sizes.n_segments - 1) * sizes.n_head_rows * role
    dots, anchors = tensors.dots, tensors.anchors
    if dots is not None:
        # dots [2, K slices, H, all tokens] and anchors [2, H, slots, V, K].
        dots += (slice_ * sizes.n_heads + head) * n_all_tokens + first
        slot = first_slot(first, sequence, n_rows, FORM.ANCHOR * CHUNK, FORM.PACKED)
        anchors += ((role * sizes.n_heads + head) * n_slots + slot) * (K * V)
    # Only dv's states lie as those of the sequence do, so that role stores what the initial state receives.
    with_end = (role == 2) & (with_initial != 0)
    scan_segment(
        Role(query, key, value, gate, out, dot_with),
        Role(query_stride, key_stride, value_stride, strides.gate, sizes.n_heads * out_width, dot_stride),
        Outside(
            outside,
            tensors.dinitial,
            dots,
            anchors,
            state_in_stride,
            state_out_stride,
            with_start != 0,
            with_end,
            role != 2,
        ),
        Part(
            n_rows,
            head_row,
            sizes.n_head_rows,
            segment,
            sizes.n_segments,
            slice_ - role * K_SLICES,
            in_width,
            out_width,
            sign,
        ),
        Segments(segments.states + role_rows * (K * V), segments.decays + role_rows),
        scale,
        FORM,
        BLOCK,
        CHUNK,
        OUTPUT,
        EXACT,
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


GateTensors = namedtuple("GateTensors", "dots anchors final dfinal dgate cu_seqlens")
GateForm = namedtuple("GateForm", "SIZE BLOCK_SIZE K_SLICES ROWS BLOCK_S PACKED")


@triton.jit
def gate_gradient_kernel(tensors, n_tokens: tl.int64, n_all_tokens: tl.int64, sizes, FORM: tl.constexpr):
    """dg_t = sum_{t <= r < end} (<q_r, dq_r> - <k_r, dk_r>) + <S_end, dS_end>, with `end` the end of the slot of ROWS
    tokens that t lies in.

    With c the cumulative log-decay, a token's row contributes the first term to dc_r, and dg_t is the sum of dc from t
    to the end. Over a whole sequence the rounding errors of all later tokens pile up; so the sum runs to the end of a
    slot of a few chunks only, and everything beyond it is one number, the state times its gradient there.
    """
    SIZE: tl.constexpr = FORM.SIZE
    ROWS: tl.constexpr = FORM.ROWS
    slot, head, sequence, first, n_rows = place_chunk(
        tensors.cu_seqlens,
        tl.program_id(0),
        n_tokens,
        sizes.n_sequences,
        sizes.n_heads,
        ROWS,
        FORM.BLOCK_S,
        FORM.PACKED,
    )
    rows = tl.arange(0, ROWS)
    inside = rows < n_rows
    dc = tl.zeros([ROWS], tl.float32)
    for part in tl.static_range(2 * FORM.K_SLICES):
        row = tensors.dots + (part * sizes.n_heads + head) * n_all_tokens + first
        x = tl.load(row + rows, mask=inside, other=0.0)
        dc += x if part < FORM.K_SLICES else -x
    beyond = tl.zeros([], tl.float32)
    if n_rows > ROWS:
        state = tensors.anchors + (head * sizes.n_slots + slot) * SIZE
        dstate = state + (head * 0 + sizes.n_heads) * sizes.n_slots * SIZE
        beyond = inner_product(state, dstate, SIZE, FORM.BLOCK_SIZE)
    elif tensors.dfinal is not None:
        state_row = (sequence * sizes.n_heads + head) * SIZE
        beyond = inner_product(tensors.final + state_row, tensors.dfinal + state_row, SIZE, FORM.BLOCK_SIZE)
    # The sum from t on is all of it, less the sum up to t, plus t's own.
    dg = beyond + tl.sum(dc, 0) - tl.cumsum(dc, 0) + dc
    tl.store(tensors.dgate + (first + rows) * sizes.n_heads + head, dg, mask=inside)
