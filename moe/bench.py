"""One problem and every way to compute it: forward and backward of the experts, dense products of the same FLOPs, and
how they are timed.

Legend: T tokens, D model width, E experts, F expert width, K experts per token, N = T * K assigned rows.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from foundation.numbers import check_numbers
from moe.backends import compute_experts
from routing.assignments import Assignments

Step = Callable[[], list[Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one expert layer.

    Attributes:
        tokens: in a batch.
        d_model: their width.
        n_experts: routed experts.
        d_expert: hidden width of each.
        k: experts per token.

    Raises:
        ValueError: for a size below 1, or more experts per token than there are.
    """

    tokens: int = 4096
    d_model: int = 512
    n_experts: int = 80
    d_expert: int = 256
    k: int = 12

    def __post_init__(self) -> None:
        check_numbers(self, tokens=1, d_model=1, n_experts=1, d_expert=1, k=1)
        if self.k > self.n_experts:
            raise ValueError(f"Shape.k: {self.k}, must be at most n_experts = {self.n_experts}")

    def flops(self, mean_experts: float) -> float:
        """Of forward and backward: three products of 2 N (D 2F + F D) each."""
        return 3 * 6 * self.tokens * mean_experts * self.d_model * self.d_expert


class Problem:
    """One layer's inputs and the ways to compute it. Every way returns y and the gradients of x, both weights and the
    rows' weights."""

    def __init__(self, shape: Shape, *, dtype: torch.dtype, weight_dtype: torch.dtype, skew: float):
        generator = torch.Generator().manual_seed(0)
        tokens, d_model, n_experts, d_expert = shape.tokens, shape.d_model, shape.n_experts, shape.d_expert
        self.shape, self.dtype = shape, dtype
        self.x_TD = torch.randn(tokens, d_model, generator=generator).to(dtype).requires_grad_()
        self.w_gate_up_EDF2 = (
            (torch.randn(n_experts, d_model, 2 * d_expert, generator=generator) * d_model**-0.5)
            .to(weight_dtype)
            .requires_grad_()
        )
        self.w_down_EFD = (
            (torch.randn(n_experts, d_expert, d_model, generator=generator) * d_expert**-0.5)
            .to(weight_dtype)
            .requires_grad_()
        )
        self.skew = skew
        self.dy_TD = torch.randn(tokens, d_model, generator=generator).to(dtype)
        self.route(seed=0)

    def route(self, seed: int) -> None:
        """Draw the assignments anew, as every training step does: numbers of rows that never repeat are part of the
        cost on a CPU."""
        shape = self.shape
        score_TE = torch.rand(shape.tokens, shape.n_experts, generator=torch.Generator().manual_seed(seed))
        if self.skew > 1.0:
            # Expert 0 is chosen by exactly so many tokens that its load is `skew` times the mean.
            n_chosen = min(shape.tokens, round(self.skew * shape.tokens * shape.k / shape.n_experts))
            score_TE[:, 0] = -1.0
            score_TE[:n_chosen, 0] = 2.0
        score_TK, self.expert_TK = score_TE.topk(shape.k, dim=-1)
        self.weight_TK = (score_TK / score_TK.sum(dim=-1, keepdim=True)).requires_grad_()
        self.use(Assignments.from_slots(self.expert_TK, self.weight_TK.detach(), n_experts=shape.n_experts))

    def use(self, assignments: Assignments) -> None:
        self.assignments = assignments
        self.weight_N = assignments.weight_N.detach().requires_grad_()

    def finish(self, y_TD: Tensor) -> list[Tensor]:
        return [
            y_TD,
            *torch.autograd.grad(y_TD, (self.x_TD, self.w_gate_up_EDF2, self.w_down_EFD, self.weight_N), self.dy_TD),
        ]

    def grouped(self, backend: str) -> list[Tensor]:
        rows = dataclasses.replace(self.assignments, weight_N=self.weight_N)
        return self.finish(compute_experts(self.x_TD, self.w_gate_up_EDF2, self.w_down_EFD, rows, backend=backend))

    def huggingface(self) -> list[Tensor]:
        """The grouped_mm experts of transformers 5, on the same weights and slots. Every token has the same number of
        them there."""
        from transformers.integrations.moe import grouped_mm_experts_forward

        experts = HuggingFaceExperts(self.w_gate_up_EDF2.to(self.dtype), self.w_down_EFD.to(self.dtype))
        y_TD = grouped_mm_experts_forward(experts, self.x_TD, self.expert_TK, self.weight_TK.to(self.dtype))
        gradients = torch.autograd.grad(
            y_TD, (self.x_TD, self.w_gate_up_EDF2, self.w_down_EFD, self.weight_TK), self.dy_TD
        )
        d_weight_N = torch.empty_like(self.weight_N)
        d_weight_N[self.assignments.row_of_slot_N] = gradients[3].reshape(-1)
        return [y_TD, *gradients[:3], d_weight_N]

    def indexed_loop(self) -> list[Tensor]:
        """The plain loop of many model files: it indexes the packed weight, so each backward step writes a gradient of
        full size."""
        rows = self.assignments
        y_TD = torch.zeros_like(self.x_TD)
        for e, (start, stop) in enumerate(zip(rows.expert_offsets.tolist(), rows.expert_offsets.tolist()[1:])):
            token_n = rows.token_N[start:stop]
            gate, up = (self.x_TD[token_n] @ self.w_gate_up_EDF2[e].to(self.dtype)).chunk(2, dim=-1)
            out = (F.silu(gate) * up) @ self.w_down_EFD[e].to(self.dtype)
            y_TD = y_TD.index_add(0, token_n, out * self.weight_N[start:stop, None].to(self.dtype))
        return self.finish(y_TD)

    def dense(self) -> Step:
        """The six products of the same FLOPs on one set of weights, into memory that exists already."""
        n_rows, d_model, d_expert = self.shape.tokens * self.shape.k, self.shape.d_model, self.shape.d_expert
        generator = torch.Generator().manual_seed(0)
        x_ND, a_NF, w_DF2, w_FD = (
            torch.randn(rows, columns, generator=generator).to(self.dtype)
            for rows, columns in ((n_rows, d_model), (n_rows, d_expert), (d_model, 2 * d_expert), (d_expert, d_model))
        )
        h_NF2, y_ND, da_NF, dx_ND = (
            x_ND.new_empty(n_rows, 2 * d_expert),
            torch.empty_like(x_ND),
            torch.empty_like(a_NF),
            torch.empty_like(x_ND),
        )
        dw_DF2, dw_FD = torch.empty_like(w_DF2), torch.empty_like(w_FD)

        def step() -> list[Tensor]:
            torch.mm(x_ND, w_DF2, out=h_NF2)
            torch.mm(a_NF, w_FD, out=y_ND)
            torch.mm(y_ND, w_FD.t(), out=da_NF)
            torch.mm(a_NF.t(), y_ND, out=dw_FD)
            torch.mm(h_NF2, w_DF2.t(), out=dx_ND)
            torch.mm(x_ND.t(), h_NF2, out=dw_DF2)
            return []

        return step


class HuggingFaceExperts(torch.nn.Module):
    """What `transformers.integrations.moe` expects of a module of experts: packed weights [E, D, 2F] and [E, F, D],
    gate and up side by side."""

    is_transposed, is_concatenated, has_gate, has_bias, has_post_expert_norm, _is_expert_parallel = (
        True,
        True,
        True,
        False,
        False,
        False,
    )

    def __init__(self, gate_up_EDF2: Tensor, down_EFD: Tensor):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.num_experts = gate_up_EDF2, down_EFD, down_EFD.shape[0]

    def _apply_gate(self, gate_up_NF2: Tensor) -> Tensor:
        gate_NF, up_NF = gate_up_NF2.chunk(2, dim=-1)
        return F.silu(gate_NF) * up_NF


def largest_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative error in norm over output and gradients."""
    return max(
        float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp_min(1e-30))
        for a, b in zip(got, expected)
    )
