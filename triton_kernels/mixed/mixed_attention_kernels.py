"""The kernels of mixed_attention: softmax heads and linear heads of one layer in one launch, forward and decode, whose
programs take either role.

The scan of a linear head is a chain of chunks that no second program can shorten, and there are few of them: alone they
leave most processors idle for their whole length. Beside the softmax heads' blocks of queries, which are many and
independent, they cost their arithmetic only. So the scans come first, being as long as the longest block of queries,
then the blocks, the longest first. The sequence is not cut into segments here.

Legend: B batch, T tokens, S keys, H query heads, G key/value heads, J linear heads, K key width, V value width, N
sequences.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
from collections import namedtuple

import triton
import triton.language as tl

from triton_kernels.common.tiles import wide
from triton_kernels.linear import decayed_linear_attention_kernels
from triton_kernels.linear.decayed_linear_attention_kernels import ScanSizes, Segments
from triton_kernels.linear.linear_decode_kernels import lightning_head
from triton_kernels.softmax import flash_attention_kernels
from triton_kernels.softmax.flash_decode_kernels import decode_kernel

softmax_block = flash_attention_kernels.forward_kernel
linear_scan = decayed_linear_attention_kernels.forward_kernel
# The linear heads' scan, as `decayed_linear_attention_kernels.forward_kernel` takes it.
Linear = namedtuple("Linear", "tensors cu_seqlens strides T J n_head_rows scale")
# Of the softmax heads: sink logits, output and statistics.
Softmax = namedtuple("Softmax", "call sinks o lse")


@triton.jit
def mixed_forward_kernel(
    softmax,
    linear,
    n_scans,
    FORM: tl.constexpr,
    LINEAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """o and lse of the softmax heads, o and the final state of the linear heads."""
    if tl.program_id(0) < n_scans:
        # One segment: nothing is ever written to the states of segments.
        linear_scan(
            linear.tensors,
            Segments(linear.tensors.final, linear.tensors.final),
            linear.cu_seqlens,
            wide(linear.T),
            ScanSizes(linear.J, linear.n_head_rows, 1, (LINEAR.V + BLOCK - 1) // BLOCK),
            linear.strides,
            linear.scale,
            LINEAR,
            BLOCK,
            CHUNK,
            True,
        )
    else:
        softmax_block(softmax.call, softmax.sinks, softmax.o, softmax.lse, FORM, BLOCK_M, BLOCK_N, n_scans)


@triton.jit
def mixed_decode_kernel(softmax, linear, n_linear, FORM: tl.constexpr, LINEAR: tl.constexpr, BLOCK_N: tl.constexpr):
    """Slices of the linear heads' states, then splits of the softmax heads' caches."""
    if tl.program_id(0) < n_linear:
        lightning_head(tl.program_id(0), linear, LINEAR)
    else:
        decode_kernel(softmax, FORM, BLOCK_N, n_linear)
