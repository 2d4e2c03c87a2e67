"""linear_decode on its Triton kernels: one launch for all of a layer's decode step that a head can do by itself.

Legend: B batch, H heads, K key width, V value width, X channels, W convolution width.
"""

from torch import Tensor

from triton_kernels.common.registration import has_work, kernel_op
from triton_kernels.common.sizes import cdiv
from triton_kernels.linear.linear_decode_kernels import delta_decode_kernel, lightning_decode_kernel

# Entries of the state that a program holds at once, and its value columns where no norm ties a head's columns together:
# narrow enough that 16 heads of one sequence are 128 programs.
PROGRAM_ENTRIES = 128 * 128
LIGHTNING_BLOCK = 16


def tiles(key_width: int, value_width: int, widest: int = PROGRAM_ENTRIES) -> dict[str, int]:
    """Constants of a launch over heads of these widths, in blocks of at most `widest` value columns."""
    block_k = 1 << (key_width - 1).bit_length()
    block_v = min(1 << (value_width - 1).bit_length(), PROGRAM_ENTRIES // block_k, widest)
    # 128 entries per thread: two programs of 128 x 128 then share a processor. Wider keys leave room for half as many.
    warps = max(1, block_k * block_v // (32 * (128 if block_k <= 128 else 64)))
    return {"K": key_width, "V": value_width, "BLOCK_K": block_k, "BLOCK_V": block_v, "num_warps": warps}


def dense_rows(x: Tensor) -> Tensor:
    """x as the kernels read it: one stride from row to row."""
    return x if x.stride(-1) == 1 else x.contiguous()


@kernel_op("delta_decode", mutates_args=("state", "tail"))
def delta_decode_op(
    qkv: Tensor,
    gate: Tensor,
    a: Tensor,
    b: Tensor,
    conv: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm: Tensor,
    state: Tensor,
    tail: Tensor,
    eps: float,
    silu: bool,
) -> Tensor:
    """y [B, H, V]; the arguments are those of `delta_decode`, already checked."""
    B, H, K, V = state.shape
    y = qkv.new_empty(B, H, V)
    if has_work(y):
        projections = [dense_rows(x) for x in (qkv, gate.flatten(1), a, b)]
        weights = (x.contiguous() for x in (conv, A_log, dt_bias, norm))
        delta_decode_kernel[(B * H,)](
            *projections,
            *weights,
            state,
            tail,
            y,
            *(x.stride(0) for x in projections),
            H,
            eps,
            K**-0.5,
            W=conv.shape[1],
            SILU=silu,
            PER_CHANNEL=a.shape[1] != H,
            **tiles(K, V),
        )
    return y


@kernel_op("lightning_decode", mutates_args=("state",))
def lightning_decode_op(qkv: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    """o [B, H, V]; the arguments are those of `lightning_decode`, already checked."""
    B, H, K, V = state.shape
    o = qkv.new_empty(B, H, V)
    if has_work(o):
        qkv, constants = dense_rows(qkv), tiles(K, V, LIGHTNING_BLOCK)
        grid = (B * H * cdiv(V, constants["BLOCK_V"]),)
        lightning_decode_kernel[grid](qkv, log_decay.contiguous(), state, o, qkv.stride(0), H, **constants)
    return o
