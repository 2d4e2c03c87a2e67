"""Muon (https://kellerjordan.github.io/posts/muon/) for matrices, beside AdamW for everything else.

Muon turns the momentum of a matrix into one whose singular values are all about 1: every direction is learnt at the
same rate. `torch.optim.Muon` does that for parameters of two dimensions, one after the other. Here a parameter holds
many matrices (all experts of a layer; queries beside keys), each is orthogonalised by itself, and those of one shape
are computed together.

Legend: N matrices, R rows, C columns of each, R <= C.
"""

import ctypes
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from staged_training.packed_matrices import Packing
from triton_kernels.native.library import LONG, P, call, takes_many_rows, threads

# Keller Jordan's quintic, five times, as in torch.optim.Muon: steep at zero, so singular values end between 0.7 and 1.2
# soon instead of at 1 late.
COEFFICIENTS, STEPS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
Scale = Literal["match_rms_adamw", "original"]
SCALES: tuple[Scale, ...] = get_args(Scale)
# Elements of the parameters that are updated at once. Their updates, and the parts of their matrices that lie in other
# processes, are in memory together.
AT_ONCE = 1 << 24


class Muon(torch.optim.AdamW):
    """AdamW, except for the parameters in `packing_of`: they take Muon's steps, and their state is `momentum_buffer`.

    A parameter that is cut over processes stays so, and so does its state. Whole experts are orthogonalised where they
    lie; a matrix that is itself cut is gathered for its orthogonalisation, and every process does that alike.

    Args:
        groups: of parameters [rows, columns], [experts, rows, columns] or, for AdamW, any shape, with `weight_decay`.
        momentum: share that the momentum keeps per step; Nesterov's, as in torch.optim.Muon.
        scale: one of `SCALES`, see `update_scale`.
        dtype: of the products that orthogonalise, where they are torch's: in C they are fp32.
        betas, eps, fused: of AdamW.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        packing_of: dict[Tensor, Packing],
        *,
        momentum: float,
        scale: Scale,
        dtype: torch.dtype,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
    ) -> None:
        super().__init__(groups, lr=0.0, betas=betas, eps=eps, fused=fused)
        self.packing_of, self.momentum, self.dtype = packing_of, momentum, dtype
        self.scale: Scale = scale

    def __setstate__(self, state: dict[str, Any]) -> None:
        # AdamW's looks for its count of steps in every state, to mend files of old versions of torch.
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            matrices = [each for each in group["params"] if each in self.packing_of and each.grad is not None]
            for parameters in _portions(matrices):
                updates = self._updates(parameters)
                for parameter, update in zip(parameters, updates):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"])
                    # AdamW goes by whatever has a gradient.
                    parameter.grad = None
        return super().step(closure)

    def _updates(self, parameters: list[Tensor]) -> list[Tensor]:
        """Moves the momenta; what to subtract from each parameter, at a learning rate of 1."""
        updates = []
        for parameter in parameters:
            gradient, state = parameter.grad, self.state[parameter]
            assert gradient is not None
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = state["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
            updates.append(gradient.lerp(momentum, self.momentum))
        wholes = [_with_whole_matrices(update) for update in updates]
        in_c: list[tuple[Tensor, float]] = []
        by_shape: dict[tuple[int, int], list[tuple[Tensor, float]]] = {}
        for parameter, whole in zip(parameters, wholes):
            packing = self.packing_of[parameter]
            for matrices in packing.split(_local(whole)):
                scale = update_scale(matrices, packing.out_dim, self.scale)
                # The product that is repeated is of the smaller side with itself.
                matrices_NRC = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
                if takes_many_rows(matrices_NRC):
                    in_c.append((matrices_NRC, scale))
                    continue
                by_shape.setdefault((matrices_NRC.shape[1], matrices_NRC.shape[2]), []).append((matrices_NRC, scale))
        if in_c:
            orthogonalise_native(in_c)
        for same in by_shape.values():
            matrices_NRC = torch.cat([each_NRC for each_NRC, _ in same])
            results = orthogonalised(matrices_NRC, self.dtype).split([len(each_NRC) for each_NRC, _ in same])
            for (each_NRC, scale), result_NRC in zip(same, results):
                each_NRC.copy_(result_NRC).mul_(scale)
        return [_cut_as(whole, update) for whole, update in zip(wholes, updates)]


def orthogonalised(matrices_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """Each matrix with its singular values moved to about 1, by the Newton-Schulz iteration in `dtype`; zero stays
    zero."""
    a, b, c = COEFFICIENTS
    norm_N11 = torch.linalg.matrix_norm(matrices_NRC, keepdim=True).clamp(min=EPS)
    x_NRC = (matrices_NRC / norm_N11).to(dtype)
    for _ in range(STEPS):
        gram_NRR = torch.bmm(x_NRC, x_NRC.mT)
        x_NRC = torch.baddbmm(x_NRC, torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c), x_NRC, beta=a)
    return x_NRC


class Stack(ctypes.Structure):
    """`Stack` of newton_schulz.c, field by field."""

    _fields_ = [
        ("x", P),
        *((name, LONG) for name in ("matrices", "next", "rows", "row_stride", "columns", "column_stride")),
        ("scale", ctypes.c_double),
    ]


def orthogonalise_native(stacks: Sequence[tuple[Tensor, float]]) -> None:
    """Each stack of matrices_NRC as `orthogonalised` in fp32 and in place, times what stands beside it, whatever the
    strides: in C on a CPU, where small matrices take a fifth of the time, and less than a half of torch's in bf16."""
    largest_first = sorted(stacks, key=lambda stack: -stack[0].shape[1])
    native = (Stack * len(stacks))()
    for into, (matrices_NRC, scale) in zip(native, largest_first):
        (N, R, C), (next_matrix, row, column) = matrices_NRC.shape, matrices_NRC.stride()
        into.x, into.matrices, into.next, into.scale = matrices_NRC.data_ptr(), N, next_matrix, scale
        into.rows, into.row_stride, into.columns, into.column_stride = R, row, C, column
    call("newton_schulz", native, len(stacks), torch.tensor(COEFFICIENTS), STEPS, EPS, threads())


def orthogonalising_flops(matrices: Tensor) -> int:
    """FLOPs of `orthogonalised` on matrices [N, rows, columns], two per multiplication and addition; the form in C
    needs fewer of long matrices, and counts as if it did not."""
    N, R, C = len(matrices), min(matrices.shape[1:]), max(matrices.shape[1:])
    return STEPS * N * 2 * (R * R * C + R * R * R + R * R * C)


def update_scale(matrices: Tensor, out_dim: int, rule: Scale) -> float:
    """By which the orthogonal update of matrices [N, rows, columns] is multiplied.

    "match_rms_adamw" is 0.2 sqrt(max(rows, columns)): its elements are then as large as those of AdamW's updates, so
    one learning rate and weight decay fit both (arXiv 2502.16982). "original" is Keller Jordan's sqrt(max(1, out/in)).
    """
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(matrices.shape[1:]))
    n_out = matrices.shape[out_dim]
    n_in = matrices.shape[1] * matrices.shape[2] // n_out
    return math.sqrt(max(1.0, n_out / n_in))


def _portions(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in their order, about `AT_ONCE` elements at a time."""
    portion: list[Tensor] = []
    for parameter in parameters:
        if portion and sum(each.numel() for each in portion) + parameter.numel() > AT_ONCE:
            yield portion
            portion = []
        portion.append(parameter)
    if portion:
        yield portion


# A DTensor is told by its mesh: importing the class costs a second, which one process does not need to spend.
def _with_whole_matrices(update: Any) -> Any:
    """The update, cut over processes between experts at most."""
    if not hasattr(update, "device_mesh"):
        return update
    from torch.distributed.tensor import Replicate

    experts = update.dim() == 3
    return update.redistribute(
        placements=[placement if experts and placement.is_shard(0) else Replicate() for placement in update.placements]
    )


def _local(update: Any) -> Tensor:
    """What of it lies in this process, in the same memory."""
    if not hasattr(update, "device_mesh"):
        return update
    # What has just been gathered may still be on its way, in a wrapper that has no memory of its own.
    local = update.to_local()
    return local.wait() if hasattr(local, "wait") else local


def _cut_as(whole: Any, update: Any) -> Any:
    """The inverse of `_with_whole_matrices`; nothing is sent, every process has what it needs."""
    return whole.redistribute(placements=update.placements) if hasattr(update, "device_mesh") else whole
