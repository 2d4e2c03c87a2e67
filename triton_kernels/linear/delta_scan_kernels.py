"""The two scans of the delta rules over the chunks of a sequence: the state forward in time, its gradient backward.

    E = T (V - read_k S)        O = read_q S + F_q E        S <- whole S + write^T E
    dV = T^T (F_q^T dO + write dS)        dS <- whole dS + read_q^T dO - read_k^T dV

A program owns one head and a slice of the value columns and keeps S or dS [K, BLOCK] in fp32 registers; slices never
exchange anything. T, F_q and the factors come from the prepare kernel. With a scalar gate read_q, read_k and write are
q, k and k times a factor per row (CHANNEL False); with a gate per key channel they are matrices of their own and
`whole` has K entries. Only loaded tiles are transposed, never the result of a product: that is the pattern Triton
before 3.7.1 miscompiles on Hopper.

Where heads are few the sequence is cut into segments, and the scan runs twice over each as over a sequence of its own.
Over a segment the state goes from S to M S + own: the first pass (FIRST) finds `own`, its end from zero (for the first
segment: from what the sequence starts with), and M by the same steps, as K more columns that start at the identity and
write no values. The second starts every segment from the fold of those before it. The gradient goes the other way, from
dS to M^T dS + own, M being that of the forward. Segments are counted in the direction of the scan.
"""

# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from collections import namedtuple

import triton
import triton.language as tl

from triton_kernels.linear.tiles import first_slot, load_tile, place_sequence, tile_mask


@triton.jit
def scaled(x, factor, row0, rows, inside, CHANNEL: tl.constexpr):
    """x times a loaded factor per row, unless the operand x met already holds it."""
    if CHANNEL:
        return x
    else:
        return x * tl.load(factor + row0 + rows, mask=inside, other=0.0)[:, None]


@triton.jit
def load_whole(whole, slot, k_columns, K: tl.constexpr, CHANNEL: tl.constexpr):
    """e^{c_C} as [BLOCK_K, 1], or [1, 1] for a scalar gate."""
    if CHANNEL:
        return tl.load(whole + slot * K + k_columns, mask=k_columns < K, other=0.0)[:, None]
    else:
        return tl.load(whole + slot + tl.arange(0, 1))[:, None]


# With what the state is read and written; its strides by token and by head, those of v and dO among them.
Operands = namedtuple("Operands", "q k w attention inverse read_q read_k write whole")
OperandStrides = namedtuple("OperandStrides", "q q_head k k_head w w_head v v_head do do_head")
# What goes in besides, what the segments are on their own (see above), and what comes out; None where a pass has none.
Given = namedtuple("Given", "v do initial dfinal")
Segments = namedtuple("Segments", "own transition down")
Outputs = namedtuple("Outputs", "out final errors states dv dstates dinitial")
ScanSizes = namedtuple("ScanSizes", "n_tokens n_all_tokens n_slots n_heads n_head_rows n_segments")

# Inside a kernel: strides by token, `value` for v or dO and `out` for what lies like o.
TokenStrides = namedtuple("TokenStrides", "q k w value out")
States = namedtuple("States", "v out errors states")
Gradients = namedtuple("Gradients", "do dv dstates")
# The how manieth segment of the scan a program walks.
Nth = namedtuple("Nth", "head_row n_head_rows nth n_segments")


@triton.jit
def scan_states(operands, strides, tensors, state, n_rows, columns, FORM: tl.constexpr):
    """Run over all chunks from the first; every pointer is at the sequence's first token (or slot) of its head. Writes
    O, or E and the state before each chunk, which the gradients need, or nothing: whatever is not None. Returns the
    last state."""
    q, k, w, attention, inverse, read_q, read_k, write, whole = operands
    K: tl.constexpr = FORM.K
    V: tl.constexpr = FORM.V
    CHUNK: tl.constexpr = FORM.CHUNK
    CHANNEL: tl.constexpr = FORM.CHANNEL
    PRECISION: tl.constexpr = FORM.PRECISION
    v, out, errors, states = tensors
    rows = tl.arange(0, CHUNK)
    k_columns = tl.arange(0, FORM.BLOCK_K)
    state_mask = tile_mask(k_columns < K, columns, V)
    dtype: tl.constexpr = v.dtype.element_ty
    row0 = n_rows * 0
    slot = n_rows * 0
    for _ in range(0, tl.cdiv(n_rows, CHUNK).to(tl.int32)):
        inside = row0 + rows < n_rows
        k_tile = load_tile(k + row0 * strides.k, rows, strides.k, k_columns, inside, K)
        v_tile = load_tile(v + row0 * strides.value, rows, strides.value, columns, inside, V).to(tl.float32)
        t_tile = load_tile(inverse + row0 * CHUNK, rows, CHUNK, rows, inside, CHUNK)
        low_state = state.to(dtype)
        if states is not None:
            tl.store(states + slot * (K * V) + k_columns[:, None] * V + columns[None, :], low_state, mask=state_mask)
        predicted = scaled(tl.dot(k_tile, low_state, input_precision=PRECISION), read_k, row0, rows, inside, CHANNEL)
        error = tl.dot(t_tile, (v_tile - predicted).to(dtype), input_precision=PRECISION)
        tile = row0 * strides.out + rows[:, None] * strides.out + columns[None, :]
        if out is not None:
            q_tile = load_tile(q + row0 * strides.q, rows, strides.q, k_columns, inside, K)
            f_tile = load_tile(attention + row0 * CHUNK, rows, CHUNK, rows, inside, CHUNK)
            o = scaled(tl.dot(q_tile, low_state, input_precision=PRECISION), read_q, row0, rows, inside, CHANNEL)
            o = tl.dot(f_tile, error.to(dtype), o, input_precision=PRECISION)
            tl.store(out + tile, o, mask=tile_mask(inside, columns, V))
        if errors is not None:
            tl.store(errors + tile, error, mask=tile_mask(inside, columns, V))
        written = scaled(error, write, row0, rows, inside, CHANNEL).to(dtype)
        if CHANNEL:
            k_tile = load_tile(w + row0 * strides.w, rows, strides.w, k_columns, inside, K)
        decayed = state * load_whole(whole, slot, k_columns, K, CHANNEL)
        state = tl.dot(tl.trans(k_tile), written, decayed, input_precision=PRECISION)
        row0 += CHUNK
        slot += 1
    return state


@triton.jit
def scan_gradients(operands, strides, tensors, dstate, n_rows, columns, FORM: tl.constexpr):
    """Run over all chunks from the last, writing dV and the gradient of the state after each chunk (unless they are
    None). Returns that of the first state."""
    q, k, w, attention, inverse, read_q, read_k, write, whole = operands
    K: tl.constexpr = FORM.K
    V: tl.constexpr = FORM.V
    CHUNK: tl.constexpr = FORM.CHUNK
    CHANNEL: tl.constexpr = FORM.CHANNEL
    PRECISION: tl.constexpr = FORM.PRECISION
    do, dv, dstates = tensors
    rows = tl.arange(0, CHUNK)
    k_columns = tl.arange(0, FORM.BLOCK_K)
    state_mask = tile_mask(k_columns < K, columns, V)
    dtype: tl.constexpr = do.dtype.element_ty
    n_chunks = tl.cdiv(n_rows, CHUNK)
    slot = n_chunks - 1
    row0 = slot * CHUNK
    for _ in range(0, n_chunks.to(tl.int32)):
        inside = row0 + rows < n_rows
        q_tile = load_tile(q + row0 * strides.q, rows, strides.q, k_columns, inside, K)
        k_tile = load_tile(k + row0 * strides.k, rows, strides.k, k_columns, inside, K)
        do_tile = load_tile(do + row0 * strides.value, rows, strides.value, columns, inside, V)
        t_tile = load_tile(inverse + row0 * CHUNK, rows, CHUNK, rows, inside, CHUNK)
        f_tile = load_tile(attention + row0 * CHUNK, rows, CHUNK, rows, inside, CHUNK)
        w_tile = load_tile(w + row0 * strides.w, rows, strides.w, k_columns, inside, K) if CHANNEL else k_tile
        low_dstate = dstate.to(dtype)
        derror = scaled(tl.dot(w_tile, low_dstate, input_precision=PRECISION), write, row0, rows, inside, CHANNEL)
        derror = tl.dot(tl.trans(f_tile), do_tile, derror, input_precision=PRECISION)
        dv_tile = tl.dot(tl.trans(t_tile), derror.to(dtype), input_precision=PRECISION)
        if dv is not None:
            tl.store(dstates + slot * (K * V) + k_columns[:, None] * V + columns[None, :], low_dstate, mask=state_mask)
            tl.store(
                dv + row0 * strides.out + rows[:, None] * strides.out + columns[None, :],
                dv_tile,
                mask=tile_mask(inside, columns, V),
            )
        read_do = scaled(do_tile, read_q, row0, rows, inside, CHANNEL).to(dtype)
        read_dv = scaled(-dv_tile, read_k, row0, rows, inside, CHANNEL).to(dtype)
        decayed = dstate * load_whole(whole, slot, k_columns, K, CHANNEL)
        dstate = tl.dot(tl.trans(q_tile), read_do, decayed, input_precision=PRECISION)
        dstate = tl.dot(tl.trans(k_tile), read_dv, dstate, input_precision=PRECISION)
        row0 -= CHUNK
        slot -= 1
    return dstate


@triton.jit
def start_state(
    start,
    own,
    transition,
    place,
    columns,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """What the nth segment of the scan starts from: `start` (or zero) before the first, then the fold of the segments
    between, in fp32."""
    K: tl.constexpr = FORM.K
    V: tl.constexpr = FORM.V
    BLOCK_K: tl.constexpr = FORM.BLOCK_K
    HALF: tl.constexpr = BLOCK_K // 2
    head_row, n_head_rows, nth, n_segments = place
    k_columns, m_columns = tl.arange(0, BLOCK_K), tl.arange(0, HALF)
    tile = k_columns[:, None] * V + columns[None, :]
    mask = tile_mask(k_columns < K, columns, V)
    state = tl.zeros([BLOCK_K, BLOCK], tl.float32)
    if start is not None:
        state = tl.load(start + head_row * (K * V) + tile, mask=mask & (nth == 0), other=0.0)
    if own is not None and not FIRST:
        state += tl.load(own + head_row * (K * V) + tile, mask=mask & (nth > 0), other=0.0)
        row, column = (1, K) if TRANSPOSED else (K, 1)
        # One stage, and half the matrix at a time: more of it would take all registers, or the room of a second
        # program.
        for before in tl.range(1, nth, num_stages=1):
            segment = n_segments - 1 - before if TRANSPOSED else before
            m = (
                transition
                + (segment * n_head_rows + head_row) * (K * K)
                + k_columns[:, None] * row
                + m_columns[None, :] * column
            )
            upper, lower = tl.split(tl.permute(tl.reshape(state, [2, HALF, BLOCK]), (1, 2, 0)))
            state = tl.load(own + (before * n_head_rows + head_row) * (K * V) + tile, mask=mask, other=0.0)
            m_tile = tl.load(m, mask=tile_mask(k_columns < K, m_columns, K), other=0.0)
            state = tl.dot(m_tile, upper, state, input_precision="tf32x3")
            m_tile = tl.load(m + HALF * column, mask=tile_mask(k_columns < K, HALF + m_columns, K), other=0.0)
            state = tl.dot(m_tile, lower, state, input_precision="tf32x3")
    return state


@triton.jit
def scan_kernel(
    operands,
    strides,
    given,
    segments,
    outputs,
    cu_seqlens,
    sizes,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    FORWARD: tl.constexpr,
    FIRST: tl.constexpr,
):
    """FORWARD: O and the final state; else the two scans the gradients need, as two roles of one launch, because
    neither waits for the other. FIRST: instead own [segments - 1, S, H, K, V] and transition [segments - 1, S, H, K,
    K], or down, that of the gradients."""
    K: tl.constexpr = FORM.K
    V: tl.constexpr = FORM.V
    CHUNK: tl.constexpr = FORM.CHUNK
    CHANNEL: tl.constexpr = FORM.CHANNEL
    q, k, w, attention, inverse, read_q, read_k, write, whole = operands
    v, do, initial, dfinal = given
    own, transition, down = segments
    out, final, errors, states, dv, dstates, dinitial = outputs
    n_tokens, n_all_tokens, n_slots, n_heads, n_head_rows, n_segments = sizes
    V_SLICES: tl.constexpr = (V + BLOCK - 1) // BLOCK
    SLICES: tl.constexpr = V_SLICES + ((K + BLOCK - 1) // BLOCK if FORWARD and FIRST else 0)
    ROLES: tl.constexpr = 1 if FORWARD or FIRST else 2
    # The role, 0 for the states and 1 for their gradients, is a constant to the compiler where there is but one.
    role = tl.program_id(0) // SLICES % ROLES + (1 if FIRST and not FORWARD else 0)
    slice_ = tl.program_id(0) % SLICES
    n_scanned = n_segments - 1 if FIRST else n_segments
    nth = tl.program_id(0) // (SLICES * ROLES) % n_scanned
    head_row = (tl.program_id(0) // (SLICES * ROLES) // n_scanned).to(tl.int64)
    sequence, head = head_row // n_heads, head_row % n_heads
    segment = nth + role * (n_segments - 1 - 2 * nth)
    first, n_rows = place_sequence(cu_seqlens, sequence, n_tokens, FORM.PACKED)
    slot0 = first_slot(first, sequence, n_rows, CHUNK, FORM.PACKED)
    segment_chunks = tl.cdiv(tl.cdiv(n_rows, CHUNK), n_segments)
    row0 = tl.minimum(segment * segment_chunks * CHUNK, n_rows)
    n_rows = tl.minimum(n_rows - row0, segment_chunks * CHUNK)
    first += row0
    slot0 += row0 // CHUNK

    at = head * n_all_tokens + first
    # One set of heads for matrices made by the prepare kernel, one per group for the inputs.
    qk_head = head if CHANNEL else head // FORM.GROUP
    q += first * strides.q + qk_head * strides.q_head
    k += first * strides.k + qk_head * strides.k_head
    if CHANNEL:
        w += first * strides.w + head * strides.w_head
    else:
        read_q += at
        read_k += at
        write += at
    whole += (head * n_slots + slot0) * (K if CHANNEL else 1)
    operands = Operands(q, k, w, attention + at * CHUNK, inverse + at * CHUNK, read_q, read_k, write, whole)
    row_v, v_row_stride = (first * n_heads + head) * V, n_heads * V
    place = Nth(head_row, n_head_rows, nth, n_segments)
    slot_states = (head * n_slots + slot0) * (K * V)
    columns = slice_ * BLOCK + tl.arange(0, BLOCK)
    k_columns = tl.arange(0, FORM.BLOCK_K)
    tile = head_row * (K * V) + k_columns[:, None] * V + columns[None, :]
    own_row = nth * n_head_rows
    mask = tile_mask(k_columns < K, columns, V)
    # Columns from here on are those of M, except the first segment's, which nothing needs.
    m_columns = columns - V_SLICES * BLOCK
    if FIRST and FORWARD:  # noqa: SIM102 (known to the compiler, unlike the program's role)
        if (slice_ >= V_SLICES) & (segment == 0):
            return

    if FORWARD or not FIRST:  # noqa: SIM102
        if role == 0:
            state = start_state(initial, own, transition, place, columns, FORM, BLOCK, FIRST, False)
            if FIRST:
                state += tl.where(k_columns[:, None] == m_columns[None, :], 1.0, 0.0)
            if out is not None:
                out += row_v
            if errors is not None:
                errors += row_v
                states += slot_states
            v += first * strides.v + head * strides.v_head
            token_strides = TokenStrides(strides.q, strides.k, strides.w, strides.v, v_row_stride)
            walked = States(v, out, errors, states)
            state = scan_states(operands, token_strides, walked, state, n_rows, columns, FORM)
            if FIRST:
                m_tile = (own_row + head_row) * (K * K) + k_columns[:, None] * K + m_columns[None, :]
                tl.store(own + own_row * (K * V) + tile, state, mask=mask)
                tl.store(
                    transition + m_tile, state, mask=tile_mask(k_columns < K, m_columns, K) & (m_columns >= 0)[None, :]
                )
            elif final is not None:
                tl.store(final + tile, state, mask=mask & (nth == n_segments - 1))
    if not FORWARD:  # noqa: SIM102
        if role == 1:
            dstate = start_state(dfinal, down, transition, place, columns, FORM, BLOCK, FIRST, True)
            if not FIRST:
                dv += row_v
                dstates += slot_states
            do += first * strides.do + head * strides.do_head
            gradient_strides = TokenStrides(strides.q, strides.k, strides.w, strides.do, v_row_stride)
            walked_back = Gradients(do, dv, dstates)
            dstate = scan_gradients(operands, gradient_strides, walked_back, dstate, n_rows, columns, FORM)
            if FIRST:
                tl.store(down + own_row * (K * V) + tile, dstate, mask=mask)
            elif initial is not None:
                tl.store(dinitial + tile, dstate, mask=mask & (segment == 0))
