"""Expert parallelism: the experts of a layer are spread over processes; tokens travel to them and back (GShard, arXiv
2006.16668).

A token travels once to each process that holds any of its experts, with the list of those experts and their weights,
and comes back as one weighted sum. So at most min(k, P) rows of width D move each way per token, where one row per
expert would be k; the receiving process needs no code of its own, since the sum over a token's experts is what
`compute_experts` gives anyway.

Legend: T tokens of this process, D model width, E experts of all processes, F expert width, P processes, N rows of this
process's tokens, S (token, process) pairs sent, M tokens received, R rows received.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moe.backends import compute_experts
from moe.experts import Experts
from routing.assignments import Assignments


class ExpertParallelExperts(Experts):
    """Takes the place of `experts`: process p of the mesh keeps and computes the experts [p E/P, (p + 1) E/P).

    Weights are DTensors, `Shard(0)` over the mesh, under the names they had; every process must hold the same `experts`
    beforehand. All processes of the mesh call forward and backward together, each with tokens of its own, as many as it
    likes.

    The gradient of a weight is the mean over the processes' losses, not their sum: as data parallelism (FSDP) leaves it
    for all other weights.

    Args:
        experts: whole, the same on every process.
        mesh: one-dimensional.

    Raises:
        ValueError: if the mesh has other dimensions or its size does not divide the number of experts, and for experts
            with biases or another activation.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        n_experts = experts.w_down_EFD.shape[0]
        if experts.has_options:
            raise ValueError("expert parallelism knows neither MoEConfig.expert_bias nor MoEConfig.clamped")
        self.clamped = self.b_gate_up_EF2 = self.b_down_ED = None
        self.gated = True
        if mesh.ndim != 1:
            raise ValueError(
                f"expert parallelism runs over one dimension of a mesh, this one has {mesh.ndim}: {mesh.mesh_dim_names}"
            )
        if n_experts % mesh.size():
            raise ValueError(
                f"n_experts = {n_experts} cannot be divided evenly over {mesh.size()} processes of expert parallelism"
            )
        self.backend, self.mesh, self.n_processes, self.n_local = (
            experts.backend,
            mesh,
            mesh.size(),
            n_experts // mesh.size(),
        )
        # Without a source rank nothing is sent: each process cuts its part out of weights that are the same everywhere.
        self.w_gate_up_EDF2 = nn.Parameter(
            distribute_tensor(experts.w_gate_up_EDF2.detach(), mesh, [Shard(0)], src_data_rank=None)
        )
        self.w_down_EFD = nn.Parameter(
            distribute_tensor(experts.w_down_EFD.detach(), mesh, [Shard(0)], src_data_rank=None)
        )

    def forward(self, x_TD: Tensor, assignments: Assignments) -> Tensor:
        """y_TD as the experts of one process would compute it, up to the order of the sum over a token's experts."""
        exchange = _Exchange(assignments, self.mesh, self.n_local)
        x_MD = exchange.to_experts(_Copies.apply(x_TD, *exchange.sent_tokens), exchange.tokens_out, exchange.tokens_in)
        received = exchange.received_assignments(assignments)
        y_MD = compute_experts(
            x_MD, self._local(self.w_gate_up_EDF2), self._local(self.w_down_EFD), received, backend=self.backend
        )
        y_SD = exchange.to_experts(y_MD, exchange.tokens_in, exchange.tokens_out)
        return _sum_of_copies(y_SD, exchange.sent_tokens, x_TD.shape[0])

    def _local(self, weight: Tensor) -> Tensor:
        """This process's experts, with the gradient of P processes' tokens turned from a sum into a mean."""
        assert isinstance(weight, DTensor)
        local = weight.to_local()
        if local.requires_grad:
            local.register_hook(lambda gradient: gradient / self.n_processes)
        return local


class _Exchange:
    """What this process sends to each of the others and receives from them, for one forward.

    The sizes of messages are numbers on the host, so on a GPU this waits for the router, once per layer.

    Attributes:
        sent_tokens: per process, the tokens sent there, ascending.
        tokens_out: numbers of tokens sent to each process.
        tokens_in: numbers of tokens received from each process.
        rows_out: numbers of rows sent to each process.
        rows_in: numbers of rows received from each process.
    """

    def __init__(self, assignments: Assignments, mesh: DeviceMesh, n_local: int):
        n_processes, device = mesh.size(), assignments.token_N.device
        self.group, self.n_local = mesh.get_group(), n_local
        n_rows_P = assignments.expert_offsets[::n_local].diff()
        # Padding rows lie behind the last expert, and on another process than this row's there is no room for them.
        n_rows = int(assignments.expert_offsets[-1])
        self.token_N, self.expert_N = assignments.token_N[:n_rows], assignments.expert_N[:n_rows]
        owner_N = self.expert_N // n_local
        needed_PT = torch.zeros(n_processes, assignments.n_tokens, dtype=torch.bool, device=device)
        needed_PT[owner_N, self.token_N] = True
        counts_P2 = torch.stack([needed_PT.sum(dim=1), n_rows_P], dim=1)
        received_P2 = self.to_experts(counts_P2, [1] * n_processes, [1] * n_processes)
        self.tokens_out, self.rows_out = counts_P2.t().tolist()
        self.tokens_in, self.rows_in = received_P2.t().tolist()
        self.sent_tokens = needed_PT.nonzero()[:, 1].split(self.tokens_out)
        # Where a row's token stands among those that go to the same process.
        self.place_N = (needed_PT.cumsum(dim=1) - 1)[owner_N, self.token_N]

    def to_experts(self, values: Tensor, out: list[int], into: list[int]) -> Tensor:
        """The first `out[0]` of the first dimension go to process 0, and so on; what comes back is ordered by source.
        Differentiable."""
        received = all_to_all_single_autograd(values.contiguous(), into, out, self.group)
        # What is on its way comes in a wrapper that has no memory of its own, and forms in C that know no gradients
        # read memory.
        return (
            received.wait() if isinstance(received, AsyncCollectiveTensor) and not received.requires_grad else received
        )

    def received_assignments(self, assignments: Assignments) -> Assignments:
        """The rows that this process's experts compute, over the received tokens."""
        message_R = self.to_experts(
            self.place_N * self.n_local + self.expert_N % self.n_local, self.rows_out, self.rows_in
        )
        weight_R = self.to_experts(assignments.weight_N[: self.expert_N.shape[0]], self.rows_out, self.rows_in)
        tokens_in_P = torch.tensor(self.tokens_in, device=message_R.device)
        first_R = (tokens_in_P.cumsum(dim=0) - tokens_in_P).repeat_interleave(
            torch.tensor(self.rows_in, device=message_R.device), output_size=message_R.shape[0]
        )
        token_R, expert_R = first_R + message_R // self.n_local, message_R % self.n_local
        return Assignments.from_rows(token_R, expert_R, weight_R, n_tokens=sum(self.tokens_in), n_experts=self.n_local)


class _Copies(torch.autograd.Function):
    """x_TD -> x_SD, the rows of each index in turn. The gradient is added up index by index, so in one order on every
    device."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, *tokens: Tensor) -> Tensor:
        ctx.save_for_backward(*tokens)
        ctx.n_tokens = x_TD.shape[0]  # pyright: ignore[reportAttributeAccessIssue]
        return x_TD.index_select(0, torch.cat(tokens))

    @staticmethod
    def backward(ctx, dx_SD: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sum_of_copies(dx_SD, ctx.saved_tensors, ctx.n_tokens), *[None] * len(ctx.saved_tensors)


def _sum_of_copies(y_SD: Tensor, tokens: tuple[Tensor, ...], n_tokens: int) -> Tensor:
    """y_TD: what came back for each token, added in the order of the processes, in fp32 or better; zero for a token
    that went nowhere.

    No index holds a token twice, so no addition meets another one on the way and the sum is the same each time.
    """
    total_TD = y_SD.new_zeros(n_tokens, y_SD.shape[1], dtype=torch.promote_types(y_SD.dtype, torch.float32))
    for token_s, y_sD in zip(tokens, y_SD.split([len(index) for index in tokens])):
        total_TD.index_add_(0, token_s, y_sD.to(total_TD.dtype))
    return total_TD.to(y_SD.dtype)
