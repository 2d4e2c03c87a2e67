"""One process of a gloo group, for test_expert_parallel.py: `expert_parallel_worker.py FOLDER RANK WORLD_SIZE`.

Runs every case, and leaves outputs and gradients of its own part in FOLDER/RANK.pt.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moe.config import MoEConfig
from moe.expert_parallel import ExpertParallelExperts
from moe.experts import Experts
from moe.layer import MoE
from routing.assignments import Assignments
from routing.policies.null_experts import NullExperts
from routing.router import RouterConfig

D, E, F, K, T = 16, 8, 16, 5, 21
# Which experts tokens may have: all of them, or only those of process 0, or those of all processes but the first; and
# nobody any.
CASES = {
    "ragged": (0, E),
    "all rows to the first process": (0, 2),
    "no rows to the first process": (4, E),
    "no rows at all": (0, 0),
}


def experts(dtype: torch.dtype) -> Experts:
    built = Experts(n_experts=E, d_model=D, d_expert=F)
    built.init_weights(torch.Generator().manual_seed(0))
    return built.to(dtype)


def problem(case: str, rank: int, dtype: torch.dtype) -> tuple[Tensor, Assignments, Tensor]:
    """x_TD, assignments and the gradient of y_TD of one process: tokens have 0 to K rows; each process has a number of
    tokens of its own."""
    lowest, highest = CASES[case]
    generator = torch.Generator().manual_seed(rank)
    n_tokens = T + rank
    score_TE = torch.rand(n_tokens, E, generator=generator)
    outside_E = (torch.arange(E) < lowest) | (torch.arange(E) >= highest)
    expert_TK = score_TE.masked_fill(outside_E, -1.0).topk(K, dim=-1)[1]
    n_rows_T1 = torch.randint(0, K + 1, (n_tokens, 1), generator=generator).clamp(max=highest - lowest)
    keep_TK = torch.arange(K) < n_rows_T1
    weight_TK = torch.rand(n_tokens, K, generator=generator).to(dtype)
    assignments = Assignments.from_slots(expert_TK, weight_TK.requires_grad_(), keep_TK, n_experts=E)
    x_TD = torch.randn(n_tokens, D, generator=generator).to(dtype).requires_grad_()
    return x_TD, assignments, torch.randn(n_tokens, D, generator=generator).to(dtype)


def layer(backend: str) -> MoE:
    config = MoEConfig(
        n_experts=E,
        d_expert=F,
        d_shared=F,
        backend=backend,
        router=RouterConfig(policy=NullExperts(k=4, n_null=6, target_mean=2.0)),
    )
    moe = MoE(config, d_model=D, layer_index=0)
    moe.init_weights(torch.Generator().manual_seed(0))
    return moe


def full(value: Tensor | None) -> Tensor:
    assert isinstance(value, DTensor)
    return value.full_tensor()


def main(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("expert",))
    results = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for case in CASES:
            parallel = ExpertParallelExperts(experts(torch.float32 if dtype == torch.bfloat16 else dtype), mesh)
            x_TD, assignments, dy_TD = problem(case, rank, dtype)
            y_TD = parallel(x_TD, assignments)
            inputs = (x_TD, assignments.weight_N, parallel.w_gate_up_EDF2, parallel.w_down_EFD)
            dx_TD, dweight_N, dw_gate_up, dw_down = torch.autograd.grad(y_TD, inputs, dy_TD)
            results[case, str(dtype)] = [y_TD.detach(), dx_TD, dweight_N, full(dw_gate_up), full(dw_down)]
    for backend in ("reference", "cpu"):
        moe = layer(backend).train()
        moe.experts = ExpertParallelExperts(moe.experts, mesh)
        x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(rank))
        y_TD, routing = moe(x_TD)
        (y_TD.square().sum() + sum(routing.losses.values())).backward()
        gradients = {name: parameter.grad for name, parameter in moe.named_parameters()}
        results["layer", backend] = [
            y_TD.detach(),
            {name: full(g) if isinstance(g, DTensor) else g for name, g in gradients.items()},
        ]
    refusals = []
    for attempt in (
        lambda: ExpertParallelExperts(Experts(n_experts=E + 1, d_model=D, d_expert=F), mesh),
        lambda: ExpertParallelExperts(
            experts(torch.float32), init_device_mesh("cpu", (1, world_size), mesh_dim_names=("data", "expert"))
        ),
    ):
        try:
            attempt()
            refusals.append("")
        except ValueError as error:
            refusals.append(str(error))
    torch.save({"results": results, "refusals": refusals}, folder / f"{rank}.pt")
    dist.destroy_process_group()
    # A thread of torch's that still wants the interpreter while it is taken down aborts the process, once in a while;
    # all results are written.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
