"""linear_decode on its Triton kernels: one launch for all of a layer's decode step that a head can do by itself.

Legend: B batch, H heads, K key width, V value width, X channels, W convolution width.
"""

from torch import Tensor

from triton_kernels.common.registration import has_work, kernel_op
from triton_kernels.common.sizes import cdiv, power_of_two
from triton_kernels.linear.linear_decode_kernels import (
    DeltaForm,
    DeltaTensors,
    LightningTensors,
    ProjectionStrides,
    StateForm,
    delta_decode_kernel,
    lightning_decode_kernel,
)

# Entries of the state that a program holds at once, and its value columns where no norm ties a head's columns together:
# narrow enough that 16 heads of one sequence are 128 programs.
PROGRAM_ENTRIES = 128 * 128
LIGHTNING_BLOCK = 16


def tiles(key_width: int, value_width: int, widest: int = PROGRAM_ENTRIES) -> tuple[StateForm, int]:
    """Constants, and warps, of a launch over heads of these widths, in blocks of at most `widest` value columns."""
    block_k = power_of_two(key_width)
    block_v = min(power_of_two(value_width), PROGRAM_ENTRIES // block_k, widest)
    # 128 entries per thread: two programs of 128 x 128 then share a processor. Wider keys leave room for half as many.
    warps = max(1, block_k * block_v // (32 * (128 if block_k <= 128 else 64)))
    return StateForm(K=key_width, V=value_width, BLOCK_K=block_k, BLOCK_V=block_v), warps


def dense_rows(x: Tensor) -> Tensor:
    """x as the kernels read it: one stride from row to row."""
    return x if x.stride(-1) == 1 else x.contiguous()


def lightning_tensors(qkv: Tensor, log_decay: Tensor, state: Tensor, o: Tensor) -> LightningTensors:
    """What the kernels of lightning heads are given."""
    qkv = dense_rows(qkv)
    return LightningTensors(qkv=qkv, log_decay=log_decay, state=state, o=o, qkv_stride=qkv.stride(0), H=state.shape[1])


@kernel_op("delta_decode", strided="qkv gate a b", mutates_args=("state", "tail"))
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
        form, warps = tiles(K, V)
        delta_decode_kernel[(B * H,)](
            tensors=DeltaTensors(
                *projections,
                conv=conv,
                A_log=A_log,
                dt_bias=dt_bias,
                norm=norm,
                state=state,
                tail=tail,
                y=y,
            ),
            strides=ProjectionStrides(*(x.stride(0) for x in projections)),
            H=H,
            eps=eps,
            scale=K**-0.5,
            FORM=DeltaForm(*form, W=conv.shape[1], SILU=silu, PER_CHANNEL=a.shape[1] != H),
            num_warps=warps,
        )
    return y


@kernel_op("lightning_decode", strided="qkv", mutates_args=("state",))
def lightning_decode_op(qkv: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    """o [B, H, V]; the arguments are those of `lightning_decode`, already checked."""
    B, H, K, V = state.shape
    o = qkv.new_empty(B, H, V)
    if has_work(o):
        form, warps = tiles(K, V, LIGHTNING_BLOCK)
        lightning_decode_kernel[(B * H * cdiv(V, form.BLOCK_V),)](
            tensors=lightning_tensors(qkv, log_decay, state, o), FORM=form, num_warps=warps
        )
    return o
