"""Routing and experts in C on a CPU: `router_scores`, `sort_slots` and `grouped_mlp` for the few tokens of a decode
step, and for many with gradients.

Legend: T tokens, D model width, E experts, F expert width, F2 = 2F, K slots per token, N assigned rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.native.library import (
    call,
    has_memory,
    is_native,
    native,
    products_here,
    rounded,
    rounds_products,
    takes_many_rows,
    threads,
    wide,
)

# Tokens of a piece, as in routing.c, and the least width of rows in grouped_mlp.c's scratch.
ROUTED, LEAST_INNER = 64, 16


def routes_natively(x: Tensor, n_tokens: int, *others: Tensor) -> bool:
    """Whether `router_scores_native` and `sort_slots_native` take these: few tokens, or many with gradients."""
    return is_native(x, n_tokens, *others) or takes_many_rows(x, *others)


def router_scores_native(
    logits_TE: Tensor,
    bias_E: Tensor,
    threshold: Tensor,
    *,
    k: int,
    rule: int,
    score: str,
    renormalise: bool,
    floor: int,
) -> tuple[Tensor, ...]:
    """The fields of `router_scores`' `Slots` by the rule's number; equal scores: the lower expert first."""
    given = (logits_TE, bias_E, float(threshold), k, floor, rule, score == "sigmoid", renormalise)
    if torch.is_grad_enabled() and logits_TE.requires_grad:
        return _Route.apply(*given)  # pyright: ignore[reportReturnType]
    return _route(*given)


def _route(
    logits_TE: Tensor,
    bias_E: Tensor,
    threshold: float,
    k: int,
    floor: int,
    rule: int,
    use_sigmoid: bool,
    renormalise: bool,
) -> tuple[Tensor, ...]:
    T, E = logits_TE.shape
    weight_TK, level_TK = torch.empty(2, T, k).unbind()
    expert_TK, keep_TK = torch.empty(T, k, dtype=torch.int64), torch.empty(T, k, dtype=torch.bool)
    call(
        "route",
        *(wide(logits_TE), wide(bias_E), threshold),
        *(weight_TK, expert_TK, keep_TK, level_TK, torch.empty(_pieces(T), 5, E)),
        *(T, E, k, floor),
        *(rule, use_sigmoid, renormalise, threads()),
    )
    return weight_TK, expert_TK, keep_TK, level_TK


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, *options: Any) -> tuple[Tensor, ...]:
        weight_TK, expert_TK, keep_TK, level_TK = _route(logits_TE, *options)
        *_, ctx.use_sigmoid, ctx.renormalise = options
        ctx.mark_non_differentiable(expert_TK, keep_TK, level_TK)
        ctx.save_for_backward(wide(logits_TE), expert_TK, keep_TK)
        return weight_TK, expert_TK, keep_TK, level_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weight_TK: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits_TE, expert_TK, keep_TK = ctx.saved_tensors
        (T, E), d_logits_TE = logits_TE.shape, torch.empty_like(logits_TE)
        call(
            "route_backward",
            *(wide(d_weight_TK), logits_TE, expert_TK, keep_TK, d_logits_TE, torch.empty(_pieces(T), E)),
            *(T, E, expert_TK.shape[1], ctx.use_sigmoid, ctx.renormalise, threads()),
        )
        return d_logits_TE, *(None,) * 7


def _pieces(n_tokens: int) -> int:
    return -(-n_tokens // ROUTED)


def sort_slots_native(
    expert_TK: Tensor, weight_TK: Tensor, keep_TK: Tensor | None, *, n_experts: int
) -> tuple[Tensor, ...]:
    """The fields of `sort_slots`' `Rows`, dropped slots taken out."""
    if torch.is_grad_enabled() and weight_TK.requires_grad:
        return _SortSlots.apply(expert_TK, weight_TK, keep_TK, n_experts)  # pyright: ignore[reportReturnType]
    return _sort_slots(expert_TK, weight_TK, keep_TK, n_experts)


def _sort_slots(expert_TK: Tensor, weight_TK: Tensor, keep_TK: Tensor | None, n_experts: int) -> tuple[Tensor, ...]:
    T, K = expert_TK.shape
    weight_N = torch.empty(T * K)
    token_N, expert_N, row_of_slot_N = torch.empty(3, T * K, dtype=torch.int64).unbind()
    expert_offsets, token_offsets = torch.empty(n_experts + T + 2, dtype=torch.int64).split([n_experts + 1, T + 1])
    n = call(
        "sort_slots",
        *(expert_TK.contiguous(), wide(weight_TK), None if keep_TK is None else keep_TK.contiguous()),
        *(weight_N, token_N, expert_N, expert_offsets, token_offsets, row_of_slot_N),
        *(T, K, n_experts),
    )
    weight_N, token_N, expert_N, row_of_slot_N = (x_N[:n] for x_N in (weight_N, token_N, expert_N, row_of_slot_N))
    return weight_N, token_N, expert_N, expert_offsets, token_offsets, row_of_slot_N


class _SortSlots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, expert_TK: Tensor, weight_TK: Tensor, keep_TK: Tensor | None, n_experts: int
    ) -> tuple[Tensor, ...]:
        weight_N, *others = _sort_slots(expert_TK, weight_TK, keep_TK, n_experts)
        ctx.mark_non_differentiable(*others)
        ctx.save_for_backward(others[-1], keep_TK)
        ctx.shape, ctx.dtype = weight_TK.shape, weight_TK.dtype
        return weight_N, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weight_N: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        row_of_slot_N, keep_TK = ctx.saved_tensors
        # Kept slots in their order.
        d_kept_N = d_weight_N.to(ctx.dtype)[row_of_slot_N]
        if keep_TK is None:
            return None, d_kept_N.view(ctx.shape), None, None
        d_weight_TK = torch.zeros(ctx.shape, dtype=ctx.dtype)
        d_weight_TK[keep_TK] = d_kept_N
        return None, d_weight_TK, None, None


def why_not_native(x_TD: Tensor, w_down_EFD: Tensor) -> str | None:
    """Why `grouped_mlp_native` does not take these tensors, or None."""
    if takes_many_rows(x_TD, w_down_EFD, dtypes=products_here()) or is_native(x_TD, len(x_TD), w_down_EFD):
        return None
    if x_TD.device.type != "cpu":
        return f"the form in C needs tensors on the CPU, these are on {x_TD.device}"
    if not {x_TD.dtype, w_down_EFD.dtype} <= set(products_here()):
        return (
            "the form in C takes float32, and bfloat16 but where torch knows products of it (AMX, ARM), or few tokens"
            " without gradients by float32 weights"
        )
    if torch.compiler.is_compiling():
        return "torch.compile does not look into the form in C"
    if not (has_memory(x_TD) and has_memory(w_down_EFD)):
        return "the form in C takes plain tensors, not parts of tensors that are spread over processes"
    return f"there is no form in C: {native().reason}"


def grouped_mlp_native(
    x_TD: Tensor,
    w_gate_up_EDF2: Tensor,
    w_down_EFD: Tensor,
    token_N: Tensor,
    weight_N: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    row_of_slot_N: Tensor,
) -> Tensor:
    """`grouped_mlp` on checked arguments that `why_not_native` lets pass, in x's dtype: summed in fp32 (see
    `rounds_products`), by weights that are read where they lie if they are fp32 and dense.

    Raises:
        ValueError: for rows that no sort made.
    """
    if not is_native(x_TD, len(x_TD)):
        weights = w_gate_up_EDF2.float(), w_down_EFD.float()
        y_TD = _ManyRows.apply(x_TD, *weights, token_N, weight_N, expert_offsets)
        assert isinstance(y_TD, Tensor)
        return y_TD
    (T, D), (E, F, _) = x_TD.shape, w_down_EFD.shape
    y_TD = torch.empty(T, D)
    call(
        "experts",
        *(wide(x_TD), wide(w_gate_up_EDF2), wide(w_down_EFD), token_N.contiguous(), wide(weight_N)),
        *(expert_offsets.contiguous(), token_offsets.contiguous(), row_of_slot_N.contiguous(), y_TD),
        *(T, len(token_N), E, D, F, threads()),
    )
    return y_TD.to(x_TD.dtype)


class _ManyRows(torch.autograd.Function):
    """Keeps the pre-activations (gate | up) of every row for backward, and nothing else of the size of all rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_gate_up_EDF2: Tensor,
        w_down_EFD: Tensor,
        token_N: Tensor,
        weight_N: Tensor,
        expert_offsets: Tensor,
    ) -> Tensor:
        (T, D), (E, F, _), N = x_TD.shape, w_down_EFD.shape, len(token_N)
        inputs = (wide(w_gate_up_EDF2), wide(w_down_EFD), token_N.contiguous(), wide(weight_N))
        offsets = expert_offsets.contiguous()
        hidden_NF2 = torch.empty(N, 2 * F) if any(ctx.needs_input_grad) else None
        y_TD = torch.empty(T, D)
        call(
            "grouped_mlp_forward",
            *(wide(x_TD), *inputs, offsets, hidden_NF2, torch.empty(N, max(F, LEAST_INNER)), y_TD),
            *(T, N, E, D, F, rounds_products(x_TD.dtype), threads()),
        )
        ctx.save_for_backward(x_TD, *inputs, offsets, hidden_NF2)
        ctx.weight_dtype = weight_N.dtype
        return rounded(y_TD, x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, *inputs, offsets, hidden_NF2 = ctx.saved_tensors
        (T, D), (E, F, _), N = dy_TD.shape, inputs[1].shape, len(inputs[2])
        dx_TD, d_gate_up, d_down = (
            torch.empty(x.shape) if needed else None for x, needed in zip((x_TD, *inputs), ctx.needs_input_grad[:3])
        )
        # Rows of padding belong to no expert and are passed over.
        d_weight_N = torch.zeros(N)
        call(
            "grouped_mlp_backward",
            *(wide(dy_TD), wide(x_TD), *inputs, offsets, hidden_NF2, torch.empty(N, max(2 * F, LEAST_INNER))),
            *(dx_TD, d_gate_up, d_down, d_weight_N),
            *(T, E, D, F, rounds_products(x_TD.dtype), threads()),
        )
        dx_TD = None if dx_TD is None else rounded(dx_TD, x_TD.dtype)
        return dx_TD, d_gate_up, d_down, None, d_weight_N.to(ctx.weight_dtype), None
