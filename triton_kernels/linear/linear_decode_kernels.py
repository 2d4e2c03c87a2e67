"""linear_decode on Triton: one launch for all of a layer's decode step that a head can do by itself.

Decoding a linear head reads and writes its state and does 6 K V FLOP on it: bound by memory. A program holds one head's
state in registers (all of it up to 128 x 128, else a block of columns after the other; without a norm over the head a
program takes one narrow block), reduces it along K for what k and q read, and writes it back where it was.

Legend: B batch, H heads, K key width, V value width (padded to powers of two in the tiles), X channels, W convolution
width.
"""

# Jitted helpers that return tuples are beyond a type checker.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-6)


@triton.jit
def convolved(x, conv, tail, channel, inside, W: tl.constexpr):
    """SiLU of the newest token's convolution at some channels, in fp32; x and tail point at this sequence's row. W = 1:
    no convolution."""
    newest = tl.load(x + channel, mask=inside, other=0.0)
    z = newest.to(tl.float32)
    if W > 1:
        z *= tl.load(conv + channel * W + W - 1, mask=inside, other=0.0).to(newest.dtype).to(tl.float32)
        for w in tl.static_range(W - 1):
            weight = tl.load(conv + channel * W + w, mask=inside, other=0.0).to(newest.dtype).to(tl.float32)
            z += weight * tl.load(tail + channel * (W - 1) + w, mask=inside, other=0.0).to(tl.float32)
    return z * tl.sigmoid(z)


@triton.jit
def shift_tail(x, tail, channel, inside, W: tl.constexpr):
    """The tail's oldest entry leaves, the newest token's input enters."""
    for w in tl.static_range(W - 2):
        tl.store(tail + channel * (W - 1) + w, tl.load(tail + channel * (W - 1) + w + 1, mask=inside), mask=inside)
    tl.store(tail + channel * (W - 1) + W - 2, tl.load(x + channel, mask=inside), mask=inside)


@triton.jit
def advance(state, q_K, k_K, v_V, decay_K, beta, k, v, K: tl.constexpr, V: tl.constexpr, DELTA: tl.constexpr):
    """o_V of one token; the state's columns `v` are brought up to date where they lie. Both readings take the decayed
    state before the write."""
    tile = state + k[:, None] * V + v[None, :]
    mask = (k < K)[:, None] & (v < V)[None, :]
    state_KV = tl.load(tile, mask=mask, other=0.0) * decay_K[:, None]
    write_V = v_V
    if DELTA:
        write_V = beta * (v_V - tl.sum(k_K[:, None] * state_KV, 0))
    o_V = tl.sum(q_K[:, None] * state_KV, 0) + tl.sum(q_K * k_K, 0) * write_V
    tl.store(tile, state_KV + k_K[:, None] * write_V[None, :], mask=mask)
    return o_V


@triton.jit
def delta_decode_kernel(
    qkv,
    gate,
    a,
    b,
    conv,
    A_log,
    dt_bias,
    norm,
    state,
    tail,
    y,
    qkv_stride,
    gate_stride,
    a_stride,
    b_stride,
    H,
    eps,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    """One head of one sequence: convolution, gate, state, read-out and gated norm."""
    row, head = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    k = tl.arange(0, BLOCK_K)
    in_k = k < K
    qkv += row * qkv_stride
    tail += row * H * (2 * K + V) * (W - 1)
    state += (row * H + head) * (K * V)
    y += (row * H + head) * V
    gate += row * gate_stride + head * V
    q_channel, k_channel = head * K + k, (H + head) * K + k
    q_K = convolved(qkv, conv, tail, q_channel, in_k, W)
    k_K = convolved(qkv, conv, tail, k_channel, in_k, W)
    q_K *= scale * tl.rsqrt(tl.sum(q_K * q_K, 0) + EPSILON)
    k_K *= tl.rsqrt(tl.sum(k_K * k_K, 0) + EPSILON)
    n = head * K + k if PER_CHANNEL else head + k * 0
    x_K = tl.load(a + row * a_stride + n, mask=in_k, other=0.0).to(tl.float32) + tl.load(
        dt_bias + n, mask=in_k, other=0.0
    ).to(tl.float32)
    softplus_K = tl.maximum(x_K, 0.0) + tl.log(1 + tl.exp(-tl.abs(x_K)))
    decay_K = tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * softplus_K)
    beta = tl.sigmoid(tl.load(b + row * b_stride + head).to(tl.float32))
    squares, o_V = tl.zeros([], tl.float32), tl.zeros([BLOCK_V], tl.float32)
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        v_V = convolved(qkv, conv, tail, 2 * H * K + head * V + v, v < V, W)
        # Several warps may hold the same entries: none may write in place before all have read.
        tl.debug_barrier()
        o_V = advance(state, q_K, k_K, v_V, decay_K, beta, k, v, K, V, True)
        shift_tail(qkv, tail, 2 * H * K + head * V + v, v < V, W)
        squares += tl.sum(o_V * o_V, 0)
        if V > BLOCK_V:
            tl.store(y + v, o_V.to(y.dtype.element_ty), mask=v < V)
    shift_tail(qkv, tail, q_channel, in_k, W)
    shift_tail(qkv, tail, k_channel, in_k, W)
    tl.debug_barrier()
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        if V > BLOCK_V:
            o_V = tl.load(y + v, mask=v < V, other=0.0).to(tl.float32)
        gate_V = tl.load(gate + v, mask=v < V, other=0.0).to(tl.float32)
        act_V = gate_V * tl.sigmoid(gate_V) if SILU else tl.sigmoid(gate_V)
        y_V = o_V * tl.rsqrt(squares / V + eps) * tl.load(norm + v, mask=v < V, other=0.0).to(tl.float32) * act_V
        tl.store(y + v, y_V.to(y.dtype.element_ty), mask=v < V)


@triton.jit
def lightning_head(
    program,
    qkv,
    log_decay,
    state,
    o,
    qkv_stride,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A slice of one head of one sequence."""
    SLICES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    row, head = (program // SLICES).to(tl.int64) // H, program // SLICES % H
    k, v = tl.arange(0, BLOCK_K), program % SLICES * BLOCK_V + tl.arange(0, BLOCK_V)
    qkv += row * qkv_stride
    q_K = convolved(qkv, None, None, head * K + k, k < K, 1)
    k_K = convolved(qkv, None, None, (H + head) * K + k, k < K, 1)
    v_V = convolved(qkv, None, None, 2 * H * K + head * V + v, v < V, 1)
    decay_K = tl.zeros([BLOCK_K], tl.float32) + tl.exp(tl.load(log_decay + head).to(tl.float32))
    tl.debug_barrier()
    o_V = advance(state + (row * H + head) * (K * V), q_K, k_K, v_V, decay_K, 1.0, k, v, K, V, False)
    tl.store(o + (row * H + head) * V + v, o_V.to(o.dtype.element_ty), mask=v < V)


@triton.jit
def lightning_decode_kernel(
    qkv,
    log_decay,
    state,
    o,
    qkv_stride,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    lightning_head(tl.program_id(0), qkv, log_decay, state, o, qkv_stride, H, K, V, BLOCK_K, BLOCK_V)
