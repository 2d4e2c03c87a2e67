"""The delta rules on their Triton kernels, as operators that torch.compile and CUDA graphs see as one node each.

Forward: prepare (chunks in parallel), scan. Backward: both scans in one launch, then the gradients (chunks in parallel;
with a decay per key channel also blocks of channels, and a launch for their row sums). Where heads are few a scan is
two launches, see `delta_scan_kernels.py`. Legend: B batch, T tokens, G query/key heads, H value heads, K key width, V
value width, S sequences, C chunk length, N segments.
"""

# A launch's options are keywords that no kernel lists, which a type checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false
from typing import Any

import torch
from torch import Tensor

from triton_kernels.common.launch_tables import LaunchOptions, Tables
from triton_kernels.common.registration import has_work, kernel_op
from triton_kernels.common.sizes import cdiv, padded
from triton_kernels.linear.delta_gradient_kernels import (
    FinishForm,
    FinishTensors,
    GradientStrides,
    GradientTensors,
    finish_kernel,
    gradient_kernel,
)
from triton_kernels.linear.delta_prepare_kernels import (
    ChunkSizes,
    DeltaForm,
    Inputs,
    Prepared,
    QueryKeyStrides,
    prepare_kernel,
)
from triton_kernels.linear.delta_scan_kernels import (
    Given,
    Operands,
    OperandStrides,
    Outputs,
    ScanSizes,
    Segments,
    scan_kernel,
)
from triton_kernels.linear.launch_tables import (
    CHANNELS,
    FINISH_ROWS,
    GRADIENTS,
    PREPARE,
    SCAN_BACKWARD,
    SCAN_FORWARD,
    SCAN_SEGMENTS,
)
from triton_kernels.linear.linear_attention_launch import (
    MIN_PROGRAMS,
    LinearCall,
    addressable,
    choose_segments,
    token_strides,
)
from triton_kernels.linear.tiles import SlotSizes

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

CHUNK_SIZES = (16, 32, 64)
# fp32 products run on the plain multipliers, which take their operands from registers: longer chunks spill.
SINGLE_CHUNK = 16
MAX_WIDTH = 128


class DeltaCall(LinearCall):
    """Sizes and launch options of one call; g is None, [B, T, H] or, with a decay per channel, [B, T, H, K]."""

    def __init__(self, q: Tensor, v: Tensor, g: Tensor | None, *, cu_seqlens: Tensor | None, chunk_size: int):
        super().__init__(q, v, cu_seqlens)
        self.channel = g is not None and g.dim() == 4
        self.chunk, self.n_slots = chunk_size, self.slots(chunk_size)
        # Slices of a scan are 32 columns wide, or 16, which nearly fill the device for 15 heads and more.
        wide, narrow = (self.head_rows * cdiv(self.V, width) for width in (32, 16))
        self.segments = choose_segments(wide, self.chunks(chunk_size), 1.0) if narrow < 0.9 * MIN_PROGRAMS else 1
        # The fold of segments takes halves of the key width, and no product takes less than 16.
        self.padded_k = max(32, self.block_k) if self.segments > 1 else self.block_k

    def form(self, normalize_qk: bool) -> DeltaForm:
        """The constants of its kernels."""
        return DeltaForm(
            K=self.K,
            V=self.V,
            BLOCK_K=self.padded_k,
            CHUNK=self.chunk,
            GROUP=self.H // self.G,
            CHANNEL=self.channel,
            NORMALIZE=normalize_qk,
            PACKED=self.is_packed,
            BLOCK_S=self.block_s,
            PRECISION=self.precision,
        )

    def options(self, tables: Tables) -> tuple[LaunchOptions, ...]:
        return tables[self.is_single + 2 * self.channel].options(self.width)

    def scan(self, tables: Tables, form: DeltaForm, *, forward: bool, **arguments: Any) -> None:
        """One launch, or two over segments: first their own states and transitions, then everything else. `arguments`
        are those of `scan_kernel` that the launches share."""
        # (tables, first pass, slices of K and of V per head, segments) of each launch.
        launches = [(tables, False, (0, 1 if forward else 2), 1)]
        if self.segments > 1:
            launches = [
                (tables, True, (int(forward), 1), self.segments - 1),
                (SCAN_SEGMENTS, *launches[0][1:3], self.segments),
            ]
        sizes = ScanSizes(
            n_tokens=self.T,
            n_all_tokens=self.B * self.T,
            n_slots=self.n_slots,
            n_heads=self.H,
            n_head_rows=self.head_rows,
            n_segments=self.segments,
        )
        for table, first, (of_k, of_v), segments in launches:
            options, slices = self.widest_slices(self.options(table), of_k=of_k, of_v=of_v, segments=segments)
            scan_kernel[(self.head_rows * segments * slices,)](
                **arguments, sizes=sizes, FORM=form, FORWARD=forward, FIRST=first, **options.keywords
            )

    def operands(self, q: Tensor, k: Tensor, prepared: Prepared) -> Operands:
        """What reads and writes the state: matrices read_q, read_k and write, or q and k with a factor per row for each
        of the three."""
        factors = (prepared.read_q, prepared.read_k, prepared.write)
        matrices, row_factors = (factors, (None, None, None)) if self.channel else ((q, k, None), factors)
        q_, k_, w_ = matrices
        read_q, read_k, write = row_factors
        return Operands(
            q=q_,
            k=k_,
            w=w_,
            attention=prepared.attention,
            inverse=prepared.inverse,
            read_q=read_q,
            read_k=read_k,
            write=write,
            whole=prepared.whole,
        )

    def sum_groups(self, grad_BTHK: Tensor) -> Tensor:
        """[B, T, G, K]: the gradient of q or k, summed over the value heads that share it."""
        return grad_BTHK if self.H == self.G else grad_BTHK.unflatten(2, (self.G, -1)).sum(3)


@kernel_op("delta_rule", strided="q k v")
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    normalize_qk: bool,
    chunk_size: int,
) -> Eight:
    """(o, final state, attention [H, B T, C], inverse [H, B T, C], row factors [3, H, B T], decays of whole chunks [H,
    slots], states of segments on their own [N - 1, S, H, K, V], transitions [N - 1, S, H, K, K]); with a decay per
    channel the factors are matrices [3, B, T, H, K] and the decays are [H, slots, K]."""
    call = DeltaCall(q, v, g, cu_seqlens=cu_seqlens, chunk_size=chunk_size)
    rows, single = call.B * call.T, {"dtype": torch.float32}
    o, final = v.new_empty(v.shape), v.new_empty(call.S, call.H, call.K, call.V, **single)
    attention, inverse = (v.new_empty(call.H, rows, chunk_size) for _ in range(2))
    factors = v.new_empty(3, *v.shape[:3], call.K) if call.channel else v.new_empty(3, call.H, rows, **single)
    whole = v.new_empty((call.H, call.n_slots, call.K) if call.channel else (call.H, call.n_slots), **single)
    own, transition = (
        v.new_empty(call.segments - 1, call.S, call.H, call.K, width, **single) for width in (call.V, call.K)
    )
    outputs = (o, final, attention, inverse, factors, whole, own, transition)
    if not has_work(final):
        return outputs
    q, k, v = addressable(q), addressable(k), addressable(v)
    form, prepared = call.form(normalize_qk), Prepared(attention, inverse, *factors, whole)
    if o.numel() > 0:
        prepare_kernel[(call.n_slots * call.H,)](
            inputs=Inputs(q=q, k=k, gate=g, beta=beta),
            prepared=prepared,
            cu_seqlens=cu_seqlens,
            sizes=ChunkSizes(
                n_tokens=call.T,
                n_all_tokens=rows,
                n_slots=call.n_slots,
                n_heads=call.H,
                n_sequences=call.S,
            ),
            strides=QueryKeyStrides(*token_strides(q, k)),
            scale=scale,
            FORM=form,
            **call.options(PREPARE)[0].keywords,
        )
    operands = call.operands(q, k, prepared)
    call.scan(
        SCAN_FORWARD,
        form,
        forward=True,
        operands=operands,
        strides=OperandStrides(*token_strides(*operands[:3], v, None)),
        given=Given(v=v, do=None, initial=initial, dfinal=None),
        segments=Segments(own, transition, None) if call.segments > 1 else Segments(None, None, None),
        outputs=Outputs(out=o, final=final, errors=None, states=None, dv=None, dstates=None, dinitial=None),
        cu_seqlens=cu_seqlens,
    )
    return outputs


@kernel_op("delta_rule_backward", strided="do q k v")
def backward_op(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    attention: Tensor,
    inverse: Tensor,
    factors: Tensor,
    whole: Tensor,
    own: Tensor,
    transition: Tensor,
    scale: float,
    normalize_qk: bool,
    chunk_size: int,
) -> Six:
    """(dq, dk, dv, dg, dbeta, dinitial); dg and dinitial are empty where there is no gate or no initial state."""
    call = DeltaCall(q, v, g, cu_seqlens=cu_seqlens, chunk_size=chunk_size)
    dq, dk, dv, dbeta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), beta.new_empty(beta.shape)
    dg = beta.new_empty((0,)) if g is None else g.new_empty(g.shape)
    dinitial = beta.new_empty((0,) if initial is None else initial.shape, dtype=torch.float32)
    if not has_work(whole) and not has_work(dinitial):
        return dq, dk, dv, dg, dbeta, dinitial
    do, q, k, v = addressable(do), addressable(q), addressable(k), addressable(v)
    errors = torch.empty_like(dv)
    states, dstates = (v.new_empty(call.H, call.n_slots, call.K, call.V) for _ in range(2))
    form = call.form(normalize_qk)
    operands = call.operands(q, k, Prepared(attention, inverse, *factors, whole))
    segments = (own, transition, torch.empty_like(own)) if call.segments > 1 else (None, None, None)
    call.scan(
        SCAN_BACKWARD,
        form,
        forward=False,
        operands=operands,
        strides=OperandStrides(*token_strides(*operands[:3], v, do)),
        given=Given(v=v, do=do, initial=initial, dfinal=dfinal),
        segments=Segments(*segments),
        outputs=Outputs(out=None, final=None, errors=errors, states=states, dv=dv, dstates=dstates, dinitial=dinitial),
        cu_seqlens=cu_seqlens,
    )
    if dv.numel() == 0:
        return dq, dk, dv, dg, dbeta, dinitial
    # Per value head; with a decay per channel also before the sums over the channels, and therefore in fp32.
    channels = CHANNELS if call.channel else call.block_k
    blocks = cdiv(call.K, channels)
    head_dq, head_dk = (
        v.new_empty(*v.shape[:3], call.K, dtype=torch.float32 if call.channel else v.dtype) for _ in range(2)
    )
    block_dbeta = v.new_empty(blocks, *v.shape[:3], dtype=torch.float32) if call.channel else dbeta
    options = call.options(GRADIENTS)[0].keywords
    # At least two blocks of V: with one there is no loop, and all of the kernel's loads move to its front.
    options["BLOCK"] = min(options["BLOCK"], max(16, padded(call.V) // 2))
    gradient_kernel[(call.n_slots * call.H * blocks,)](
        tensors=GradientTensors(
            q=q,
            k=k,
            gate=g,
            beta=beta,
            do=do,
            errors=errors,
            dv=dv,
            states=states,
            dstates=dstates,
            dq=head_dq,
            dk=head_dk,
            dgate=dg,
            dbeta=block_dbeta,
            cu_seqlens=cu_seqlens,
        ),
        n_tokens=call.T,
        n_all_tokens=call.B * call.T,
        sizes=SlotSizes(n_slots=call.n_slots, n_heads=call.H, n_sequences=call.S),
        strides=GradientStrides(*token_strides(q, k, do)),
        scale=scale,
        FORM=form,
        CHANNELS=channels,
        **options,
    )
    if not call.channel:
        return call.sum_groups(head_dq), call.sum_groups(head_dk), dv, dg, dbeta, dinitial
    finish_kernel[(cdiv(call.B * call.T, FINISH_ROWS) * call.G,)](
        tensors=FinishTensors(
            q=q, k=k, head_dq=head_dq, head_dk=head_dk, block_dbeta=block_dbeta, dq=dq, dk=dk, dbeta=dbeta
        ),
        n_all_tokens=call.B * call.T,
        n_heads=call.H,
        strides=QueryKeyStrides(*token_strides(q, k)),
        FORM=FinishForm(
            K=call.K,
            BLOCK_K=call.block_k,
            N_BLOCKS=blocks,
            ROWS=FINISH_ROWS,
            GROUP=call.H // call.G,
            NORMALIZE=normalize_qk,
        ),
        num_warps=4,
    )
    return dq, dk, dv, dg, dbeta, dinitial


def setup_context(ctx: Any, inputs: tuple, output: Eight) -> None:
    *tensors, cu_seqlens, ctx.scale, ctx.normalize_qk, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, g, beta, initial, cu_seqlens, *prepared = ctx.saved_tensors
    attention, inverse, factors, whole, own, transition = prepared
    dq, dk, dv, dg, dbeta, dinitial = backward_op(
        do=torch.zeros_like(v) if do is None else do,
        dfinal=dfinal,
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        initial=initial,
        cu_seqlens=cu_seqlens,
        attention=attention,
        inverse=inverse,
        factors=factors,
        whole=whole,
        own=own,
        transition=transition,
        scale=ctx.scale,
        normalize_qk=ctx.normalize_qk,
        chunk_size=ctx.chunk_size,
    )
    return dq, dk, dv, None if g is None else dg, dbeta, None if initial is None else dinitial, None, None, None, None


forward_op.register_autograd(backward, setup_context=setup_context)


def check_kernels_take(op: str, q_BTGK: Tensor, v_BTHV: Tensor, chunk_size: int) -> None:
    """Raises ValueError where the Triton kernels have no form for such heads or chunks."""
    width = max(q_BTGK.shape[3], v_BTHV.shape[3])
    if width > MAX_WIDTH or q_BTGK.dtype == torch.float64:
        raise ValueError(
            f"{op}: {q_BTGK.dtype} heads of width {width}; the Triton kernels take float32, float16 and bfloat16 up to"
            f" {MAX_WIDTH}"
        )
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(f"{op}: chunk_size={chunk_size}; the Triton kernels take {CHUNK_SIZES}")


def delta_rule_triton(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor | None,
    beta_BTH: Tensor,
    initial_SHKV: Tensor | None,
    *,
    scale: float,
    normalize_qk: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The kernels behind `gated_delta_rule` (log_decay None or [B, T, H]) and `kimi_delta_attention` ([B, T, H, K]),
    whose arguments these are; `check_kernels_take` them."""
    chunk_size = min(chunk_size, SINGLE_CHUNK) if q_BTGK.dtype == torch.float32 else chunk_size
    log_decay, initial_SHKV = (None if x is None else x.contiguous() for x in (log_decay, initial_SHKV))
    o, final, *_ = forward_op(
        q=q_BTGK,
        k=k_BTGK,
        v=v_BTHV,
        g=log_decay,
        beta=beta_BTH.contiguous(),
        initial=initial_SHKV,
        cu_seqlens=cu_seqlens,
        scale=scale,
        normalize_qk=normalize_qk,
        chunk_size=chunk_size,
    )
    return o, final
