"""linear_decode on Triton: one launch for all of a layer's decode step that a head can do by itself.

Decoding a linear head reads and writes its state and does 6 K V FLOP on it: bound by memory. A program holds one head's
state in registers (all of it up to 128 x 128, else a block of columns after the other; without a norm over the head a
program takes one narrow block), reduces it along K for what k and q read, and writes it back where it was.

Legend: B batch, H heads, K key width, V value width (padded to powers of two in the tiles), X channels, W convolution
width.
"""

# Jitted helpers that return tuples are beyond a type checker.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from collections import namedtuple

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


# A delta layer's projections, parameters, memory and output; the strides of the projections from sequence to sequence.
DeltaTensors = namedtuple("DeltaTensors", "qkv gate a b conv A_log dt_bias norm state tail y")
ProjectionStrides = namedtuple("ProjectionStrides", "qkv gate a b")
DeltaForm = namedtuple("DeltaForm", "K V BLOCK_K BLOCK_V W SILU PER_CHANNEL")
# A lightning layer's, with the stride of its projection and its number of heads.
LightningTensors = namedtuple("LightningTensors", "qkv log_decay state o qkv_stride H")
StateForm = namedtuple("StateForm", "K V BLOCK_K BLOCK_V")


@triton.jit
def delta_decode_kernel(tensors, strides, H, eps, scale, FORM: tl.constexpr):
    """One head of one sequence: convolution, gate, state, read-out and gated norm."""
    K: tl.constexpr = FORM.K
    V: tl.constexpr = FORM.V
    BLOCK_V: tl.constexpr = FORM.BLOCK_V
    W: tl.constexpr = FORM.W
    conv = tensors.conv
    row, head = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    k = tl.arange(0, FORM.BLOCK_K)
    in_k = k < K
    qkv = tensors.qkv + row * strides.qkv
    tail = tensors.tail + row * H * (2 * K + V) * (W - 1)
    state = tensors.state + (row * H + head) * (K * V)
    y = tensors.y + (row * H + head) * V
    gate = tensors.gate + (row * strides.gate + head * V)
    q_channel, k_channel = head * K + k, (H + head) * K + k
    q_K = convolved(qkv, conv, tail, q_channel, in_k, W)
    k_K = convolved(qkv, conv, tail, k_channel, in_k, W)
    q_K *= scale * tl.rsqrt(tl.sum(q_K * q_K, 0) + EPSILON)
    k_K *= tl.rsqrt(tl.sum(k_K * k_K, 0) + EPSILON)
    n = head * K + k if FORM.PER_CHANNEL else head + k * 0
    x_K = tl.load(tensors.a + row * strides.a + n, mask=in_k, other=0.0).to(tl.float32) + tl.load(
        tensors.dt_bias + n, mask=in_k, other=0.0
    ).to(tl.float32)
    softplus_K = tl.maximum(x_K, 0.0) + tl.log(1 + tl.exp(-tl.abs(x_K)))
    decay_K = tl.exp(-tl.exp(tl.load(tensors.A_log + head).to(tl.float32)) * softplus_K)
    beta = tl.sigmoid(tl.load(tensors.b + row * strides.b + head).to(tl.float32))
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
        act_V = gate_V * tl.sigmoid(gate_V) if FORM.SILU else tl.sigmoid(gate_V)
        norm_V = tl.load(tensors.norm + v, mask=v < V, other=0.0).to(tl.float32)
        y_V = o_V * tl.rsqrt(squares / V + eps) * norm_V * act_V
        tl.store(y + v, y_V.to(y.dtype.element_ty), mask=v < V)


@triton.jit
def lightning_head(program, tensors, FORM: tl.constexpr):
    """A slice of one head of one sequence."""
    K: tl.constexpr = FORM.K
    V: tl.constexpr = FORM.V
    BLOCK_K: tl.constexpr = FORM.BLOCK_K
    BLOCK_V: tl.constexpr = FORM.BLOCK_V
    H = tensors.H
    SLICES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    row, head = (program // SLICES).to(tl.int64) // H, program // SLICES % H
    k, v = tl.arange(0, BLOCK_K), program % SLICES * BLOCK_V + tl.arange(0, BLOCK_V)
    qkv = tensors.qkv + row * tensors.qkv_stride
    q_K = convolved(qkv, None, None, head * K + k, k < K, 1)
    k_K = convolved(qkv, None, None, (H + head) * K + k, k < K, 1)
    v_V = convolved(qkv, None, None, 2 * H * K + head * V + v, v < V, 1)
    decay_K = tl.zeros([BLOCK_K], tl.float32) + tl.exp(tl.load(tensors.log_decay + head).to(tl.float32))
    tl.debug_barrier()
    state = tensors.state + (row * H + head) * (K * V)
    o_V = advance(state, q_K, k_K, v_V, decay_K, 1.0, k, v, K, V, False)
    tl.store(tensors.o + (row * H + head) * V + v, o_V.to(tensors.o.dtype.element_ty), mask=v < V)


@triton.jit
def lightning_decode_kernel(tensors, FORM: tl.constexpr):
    """o of a slice of a head per program."""
    lightning_head(tl.program_id(0), tensors, FORM)
