"""The two scans of the delta rules over the chunks of a sequence: the state forward in time, its gradient backward.

    E = T (V - read_k S)        O = read_q S + F_q E        S <- whole S + write^T E
    dV = T^T (F_q^T dO + write dS)        dS <- whole dS + read_q^T dO - read_k^T dV

A program owns one head and a slice of the value columns and keeps S or dS [K, BLOCK] in fp32 registers; slices never exchange anything. T, F_q and
the factors come from the prepare kernel. With a scalar gate read_q, read_k and write are q, k and k times a factor per row (CHANNEL False); with a
gate per key channel they are matrices of their own and `whole` has K entries. Only loaded tiles are transposed, never the result of a product: that
is the pattern Triton before 3.7.1 miscompiles on Hopper.
"""

# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# fmt: off
import triton
import triton.language as tl

from triton_kernels.delta_tiles import load_tile, place_sequence


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


@triton.jit
def load_or_zero(base, tile, mask, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, EXISTS: tl.constexpr):
    if EXISTS:
        return tl.load(base + tile, mask=mask, other=0.0)
    else:
        return tl.zeros([BLOCK_K, BLOCK], tl.float32)


@triton.jit
def scan_states(
    q, k, w, v, attention, inverse, read_q, read_k, write, whole, out, errors, states, state, q_stride, k_stride, w_stride, v_stride, v_width_stride,
    n_rows, columns, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, CHANNEL: tl.constexpr, OUTPUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Run over all chunks from the first; every pointer is at the sequence's first token (or slot) of its head. OUTPUT: write O; else write E and the
    state before each chunk, which the gradients need. Returns the last state."""
    rows = tl.arange(0, CHUNK)
    k_columns = tl.arange(0, BLOCK_K)
    state_mask = (k_columns < K)[:, None] & (columns < V)[None, :]
    dtype: tl.constexpr = v.dtype.element_ty
    row0 = n_rows * 0
    slot = n_rows * 0
    for _ in range(0, tl.cdiv(n_rows, CHUNK).to(tl.int32)):
        inside = row0 + rows < n_rows
        k_tile = load_tile(k + row0 * k_stride, rows, k_stride, k_columns, inside, K)
        v_tile = load_tile(v + row0 * v_stride, rows, v_stride, columns, inside, V).to(tl.float32)
        t_tile = load_tile(inverse + row0 * CHUNK, rows, CHUNK, rows, inside, CHUNK)
        low_state = state.to(dtype)
        if not OUTPUT:
            tl.store(states + slot * (K * V) + k_columns[:, None] * V + columns[None, :], low_state, mask=state_mask)
        predicted = scaled(tl.dot(k_tile, low_state, input_precision=PRECISION), read_k, row0, rows, inside, CHANNEL)
        error = tl.dot(t_tile, (v_tile - predicted).to(dtype), input_precision=PRECISION)
        out_mask = inside[:, None] & (columns < V)[None, :]
        if OUTPUT:
            q_tile = load_tile(q + row0 * q_stride, rows, q_stride, k_columns, inside, K)
            f_tile = load_tile(attention + row0 * CHUNK, rows, CHUNK, rows, inside, CHUNK)
            o = scaled(tl.dot(q_tile, low_state, input_precision=PRECISION), read_q, row0, rows, inside, CHANNEL)
            o = tl.dot(f_tile, error.to(dtype), o, input_precision=PRECISION)
            tl.store(out + row0 * v_width_stride + rows[:, None] * v_width_stride + columns[None, :], o, mask=out_mask)
        else:
            tl.store(errors + row0 * v_width_stride + rows[:, None] * v_width_stride + columns[None, :], error, mask=out_mask)
        written = scaled(error, write, row0, rows, inside, CHANNEL).to(dtype)
        if CHANNEL:
            k_tile = load_tile(w + row0 * w_stride, rows, w_stride, k_columns, inside, K)
        decayed = state * load_whole(whole, slot, k_columns, K, CHANNEL)
        state = tl.dot(tl.trans(k_tile), written, decayed, input_precision=PRECISION)
        row0 += CHUNK
        slot += 1
    return state


@triton.jit
def scan_gradients(
    q, k, w, do, attention, inverse, read_q, read_k, write, whole, dv, dstates, dstate, q_stride, k_stride, w_stride, do_stride, dv_stride,
    n_rows, columns, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):
    """Run over all chunks from the last, writing dV and the gradient of the state after each chunk. Returns that of the first state."""
    rows = tl.arange(0, CHUNK)
    k_columns = tl.arange(0, BLOCK_K)
    state_mask = (k_columns < K)[:, None] & (columns < V)[None, :]
    dtype: tl.constexpr = do.dtype.element_ty
    n_chunks = tl.cdiv(n_rows, CHUNK)
    slot = n_chunks - 1
    row0 = slot * CHUNK
    for _ in range(0, n_chunks.to(tl.int32)):
        inside = row0 + rows < n_rows
        q_tile = load_tile(q + row0 * q_stride, rows, q_stride, k_columns, inside, K)
        k_tile = load_tile(k + row0 * k_stride, rows, k_stride, k_columns, inside, K)
        do_tile = load_tile(do + row0 * do_stride, rows, do_stride, columns, inside, V)
        t_tile = load_tile(inverse + row0 * CHUNK, rows, CHUNK, rows, inside, CHUNK)
        f_tile = load_tile(attention + row0 * CHUNK, rows, CHUNK, rows, inside, CHUNK)
        w_tile = load_tile(w + row0 * w_stride, rows, w_stride, k_columns, inside, K) if CHANNEL else k_tile
        low_dstate = dstate.to(dtype)
        tl.store(dstates + slot * (K * V) + k_columns[:, None] * V + columns[None, :], low_dstate, mask=state_mask)
        derror = scaled(tl.dot(w_tile, low_dstate, input_precision=PRECISION), write, row0, rows, inside, CHANNEL)
        derror = tl.dot(tl.trans(f_tile), do_tile, derror, input_precision=PRECISION)
        dv_tile = tl.dot(tl.trans(t_tile), derror.to(dtype), input_precision=PRECISION)
        tl.store(dv + row0 * dv_stride + rows[:, None] * dv_stride + columns[None, :], dv_tile, mask=inside[:, None] & (columns < V)[None, :])
        read_do = scaled(do_tile, read_q, row0, rows, inside, CHANNEL).to(dtype)
        read_dv = scaled(-dv_tile, read_k, row0, rows, inside, CHANNEL).to(dtype)
        decayed = dstate * load_whole(whole, slot, k_columns, K, CHANNEL)
        dstate = tl.dot(tl.trans(q_tile), read_do, decayed, input_precision=PRECISION)
        dstate = tl.dot(tl.trans(k_tile), read_dv, dstate, input_precision=PRECISION)
        row0 -= CHUNK
        slot -= 1
    return dstate


@triton.jit
def scan_kernel(
    q, k, w, v, do, attention, inverse, read_q, read_k, write, whole, initial, dfinal, out, final, errors, states, dv, dstates, dinitial, cu_seqlens,
    n_tokens: tl.int64, n_all_tokens: tl.int64, n_chunks, n_slots, n_heads,
    q_stride, q_head, k_stride, k_head, w_stride, w_head, v_stride, v_head, do_stride, do_head,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, CHANNEL: tl.constexpr,
    FORWARD: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """FORWARD: O and the final state. Else the two scans the gradients need, as two roles of one launch, because neither waits for the other."""
    SLICES: tl.constexpr = (V + BLOCK - 1) // BLOCK
    ROLES: tl.constexpr = 1 if FORWARD else 2
    slice_ = tl.program_id(0) % SLICES
    role = tl.program_id(0) // SLICES % ROLES
    head_row = (tl.program_id(0) // (SLICES * ROLES)).to(tl.int64)
    sequence, head = head_row // n_heads, head_row % n_heads
    first, n_rows, slot0 = place_sequence(cu_seqlens, sequence, n_tokens, n_chunks, CHUNK, PACKED)
    at = head * n_all_tokens + first
    # One set of heads for matrices made by the prepare kernel, one per group for the inputs.
    qk_head = head if CHANNEL else head // GROUP
    q += first * q_stride + qk_head * q_head
    k += first * k_stride + qk_head * k_head
    attention += at * CHUNK
    inverse += at * CHUNK
    whole += (head * n_slots + slot0) * (K if CHANNEL else 1)
    if CHANNEL:
        w += first * w_stride + head * w_head
    else:
        read_q += at
        read_k += at
        write += at
    columns = slice_ * BLOCK + tl.arange(0, BLOCK)
    k_columns = tl.arange(0, BLOCK_K)
    tile = head_row * (K * V) + k_columns[:, None] * V + columns[None, :]
    mask = (k_columns < K)[:, None] & (columns < V)[None, :]
    row_v = (first * n_heads + head) * V
    slot_states = (head * n_slots + slot0) * (K * V)
    if FORWARD:
        state = load_or_zero(initial, tile, mask, BLOCK_K, BLOCK, HAS_INITIAL)
        state = scan_states(
            q, k, w, v + first * v_stride + head * v_head, attention, inverse, read_q, read_k, write, whole, out + row_v, None, None, state,
            q_stride, k_stride, w_stride, v_stride, n_heads * V, n_rows, columns, K, V, BLOCK_K, CHUNK, CHANNEL, True, PRECISION,
        )
        tl.store(final + tile, state, mask=mask)
    elif role == 0:
        state = load_or_zero(initial, tile, mask, BLOCK_K, BLOCK, HAS_INITIAL)
        scan_states(
            q, k, w, v + first * v_stride + head * v_head, attention, inverse, read_q, read_k, write, whole, None, errors + row_v,
            states + slot_states, state, q_stride, k_stride, w_stride, v_stride, n_heads * V, n_rows, columns, K, V, BLOCK_K, CHUNK, CHANNEL, False,
            PRECISION,
        )
    else:
        dstate = load_or_zero(dfinal, tile, mask, BLOCK_K, BLOCK, HAS_DFINAL)
        dstate = scan_gradients(
            q, k, w, do + first * do_stride + head * do_head, attention, inverse, read_q, read_k, write, whole, dv + row_v, dstates + slot_states,
            dstate, q_stride, k_stride, w_stride, do_stride, n_heads * V, n_rows, columns, K, V, BLOCK_K, CHUNK, CHANNEL, PRECISION,
        )
        if HAS_INITIAL:
            tl.store(dinitial + tile, dstate, mask=mask)
