"""The experts: E SwiGLU networks in two packed parameters, and the shared expert as one more of its own width.

Without gates they have the up projection alone.

Legend: T tokens, D model width, E experts, F expert width.
"""

import torch
from torch import Tensor, nn

from moe.backends import Choice, choose_backend, compute_experts
from moe.config import ClampedSwiGLU
from moe.plain_experts import activation, plain_experts
from routing.assignments import Assignments
from triton_kernels.native.decode_step import NativeBlock, NativeMatrices, NotInOneCall, Watch


class Experts(nn.Module):
    """y_t = sum over the rows of token t of weight * W_down^T (SiLU(W_gate^T x_t) * (W_up^T x_t)).

    Attributes:
        w_gate_up_EDF2: fp32 [E, D, 2F], the gate's columns first; [E, D, F] without gates.
        w_down_EFD: fp32 [E, F, D].
        b_gate_up_EF2, b_down_ED: biases, or None.
        clamped: another activation, or None.
        gated: whether they have gates, see `MoEConfig`.
        backend: see `moe.backends.choose_backend`.
    """

    def __init__(
        self,
        *,
        n_experts: int,
        d_model: int,
        d_expert: int,
        backend: str = "auto",
        bias: bool = False,
        clamped: ClampedSwiGLU | None = None,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.backend, self.clamped, self.gated = backend, clamped, gated
        width = 2 * d_expert if gated else d_expert
        self.b_gate_up_EF2 = nn.Parameter(torch.zeros(n_experts, width)) if bias else None
        self.b_down_ED = nn.Parameter(torch.zeros(n_experts, d_model)) if bias else None
        self.w_gate_up_EDF2 = nn.Parameter(torch.empty(n_experts, d_model, width))
        self.w_down_EFD = nn.Parameter(torch.empty(n_experts, d_expert, d_model))

    def init_weights(self, generator: torch.Generator, *, down_scale: float = 1.0) -> None:
        """Normal with standard deviation fan_in^-1/2; `down_scale` multiplies it for the projection back into the
        residual stream."""
        for weight, scale in ((self.w_gate_up_EDF2, 1.0), (self.w_down_EFD, down_scale)):
            # Drawn on the generator's device, so that the CPU's stream gives the same weights on every device.
            draw = torch.randn(weight.shape, generator=generator, device=generator.device)
            weight.data.copy_(draw * (scale * max(1, weight.shape[1]) ** -0.5))
        for bias in (self.b_gate_up_EF2, self.b_down_ED):
            if bias is not None:
                nn.init.zeros_(bias)

    @property
    def d_expert(self) -> int:
        """F; 0 where there is nothing to compute."""
        return self.w_down_EFD.shape[1]

    @property
    def has_options(self) -> bool:
        """Whether these experts are computed by `moe.plain_experts`."""
        return self.clamped is not None or self.b_down_ED is not None or not self.gated or self.d_expert == 0

    def choice(self, x_TD: Tensor, n_rows: int) -> Choice:
        """What computes so many rows of such tokens, and why."""
        if self.has_options:
            return Choice("plain", "biases or another activation, which torch computes expert by expert")
        return choose_backend(x_TD, self.w_down_EFD, self.backend, n_rows=n_rows)

    def forward(self, x_TD: Tensor, assignments: Assignments) -> Tensor:
        """y_TD [T, D] in the dtype of x_TD."""
        if self.has_options:
            return plain_experts(
                x_TD,
                self.w_gate_up_EDF2,
                self.w_down_EFD,
                assignments,
                b_gate_up_EF2=self.b_gate_up_EF2,
                b_down_ED=self.b_down_ED,
                clamped=self.clamped,
                gated=self.gated,
            )
        return compute_experts(x_TD, self.w_gate_up_EDF2, self.w_down_EFD, assignments, backend=self.backend)

    def describe(self, block: NativeBlock, watch: Watch) -> None:
        """Fills in the experts' part of a decode step that is one call of C.

        Raises:
            NotInOneCall: for another backend, or experts that lie elsewhere.
        """
        if type(self) is not Experts or self.has_options or self.backend not in ("auto", "native"):
            raise NotInOneCall(f"experts that are {type(self).__name__} on backend {self.backend}, or have options")
        watch.module(self)
        watch.same(self, "backend")
        E, D, block.d_expert = block.experts, watch.d_model, self.w_down_EFD.shape[1]
        gate_up = watch.weight(self, "w_gate_up_EDF2", E, D, 2 * block.d_expert)
        down = watch.weight(self, "w_down_EFD", E, block.d_expert, D)
        block.gate_up, block.down = (
            NativeMatrices(codes=weight.wide, bits=32, panels=weight.panels) for weight in (gate_up, down)
        )


class SharedExpert(nn.Module):
    """One network for every token, packed like the others: w_gate_up_DF2 [D, 2F], or [D, F] without a gate, and
    w_down_FD [F, D]."""

    def __init__(self, *, d_model: int, d_shared: int, gated: bool = True) -> None:
        super().__init__()
        self.gated = gated
        self.w_gate_up_DF2 = nn.Parameter(torch.empty(d_model, 2 * d_shared if gated else d_shared))
        self.w_down_FD = nn.Parameter(torch.empty(d_shared, d_model))

    def init_weights(self, generator: torch.Generator, *, down_scale: float = 1.0) -> None:
        """As `Experts.init_weights`."""
        draw_matrix(self.w_gate_up_DF2, generator)
        draw_matrix(self.w_down_FD, generator, down_scale)

    def forward(self, x_TD: Tensor) -> Tensor:
        """y_TD [T, D] in the dtype of x_TD."""
        h_TF2 = x_TD @ self.w_gate_up_DF2.to(x_TD.dtype)
        return activation(h_TF2, gated=self.gated) @ self.w_down_FD.to(x_TD.dtype)

    def describe(self, block: NativeBlock, watch: Watch) -> None:
        """As `Experts.describe`."""
        if type(self) is not SharedExpert or not self.gated:
            raise NotInOneCall(f"a shared expert that is a {type(self).__name__}, or has no gate")
        watch.module(self)
        D, block.d_shared = watch.d_model, self.w_down_FD.shape[0]
        block.shared_gate_up = watch.weight(self, "w_gate_up_DF2", D, 2 * block.d_shared)
        block.shared_down = watch.weight(self, "w_down_FD", block.d_shared, D)


def draw_matrix(weight: Tensor, generator: torch.Generator, scale: float = 1.0) -> None:
    """A matrix [in, out], normal with standard deviation scale in^-1/2, drawn on the generator's device."""
    draw = torch.randn(weight.shape, generator=generator, device=generator.device)
    with torch.no_grad():
        weight.copy_(draw * (scale * weight.shape[0] ** -0.5))
