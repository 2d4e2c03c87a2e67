"""Block sizes of the grouped MLP's kernels, and the op's entries for inspect, bench and gpu-check.

Letters: T tokens, D model width, E experts, F expert width, k experts per token.
"""

from typing import Any

import torch
from torch import Tensor

from triton_kernels.configurations import Cost, LaunchTable, Operation, launch_table, random_inputs
from triton_kernels.grouped_mlp import grouped_mlp

# fp16 and bf16 first, fp32 second: `tables[dtype is fp32]`. The width is the model's, D.
Tables = tuple[LaunchTable, LaunchTable]
WIDEST = 2**20
# The sum over a token's rows: rows and channels of a step.
SUM_ROWS, SUM_WIDTH = 8, 512


BLOCKS = "BLOCK_M BLOCK_N BLOCK_K"
# fp32 products run on the plain multipliers: small blocks, one table for every architecture and kernel.
SINGLE = launch_table(BLOCKS, {(80, WIDEST): [(32, 32, 32, 4, 2)]})

# Up to width 1024 the products wait for memory, and two programs on a processor hide each other's loads and stores; beyond, arithmetic
# is what there is most of, and the largest tile that fits the registers reuses its operands best. Of gate and up, BLOCK_N counts either.
GATE_UP: Tables = (
    launch_table(BLOCKS, {(80, WIDEST): [(64, 64, 32, 4, 3)], (90, 1024): [(128, 64, 64, 8, 3)], (90, WIDEST): [(128, 128, 64, 8, 3)]}),
    SINGLE,
)
ROW_PRODUCT: Tables = (
    launch_table(BLOCKS, {(80, WIDEST): [(128, 64, 32, 4, 3)], (90, 1024): [(128, 128, 64, 8, 3)], (90, WIDEST): [(128, 256, 64, 8, 3)]}),
    SINGLE,
)
ACTIVATION_GRADIENT: Tables = (
    launch_table(BLOCKS, {(80, WIDEST): [(128, 64, 32, 8, 3)], (90, 1024): [(128, 64, 64, 8, 3)], (90, WIDEST): [(128, 128, 64, 8, 3)]}),
    SINGLE,
)
WEIGHT_GRADIENT: Tables = (
    launch_table(BLOCKS, {(80, WIDEST): [(64, 128, 32, 4, 3)], (90, 1024): [(128, 128, 64, 8, 3)], (90, WIDEST): [(128, 256, 64, 8, 3)]}),
    SINGLE,
)


def _inputs(dtype: torch.dtype, device: str, *, T: int, D: int, E: int, F: int, k: int, ragged: int = 0, **_: int) -> dict[str, Any]:
    """Every token draws k experts; ragged: it keeps 0 to k of them, the rest stays as padding behind the last expert."""
    generator = torch.Generator().manual_seed(0)
    expert_TK = torch.rand(T, E, generator=generator).topk(k, dim=-1)[1]
    n_kept_T = torch.randint(0, k + 1, (T,), generator=generator) if ragged else torch.full((T,), k)
    keep_TK = torch.arange(k) < n_kept_T[:, None]
    bucket_N, slot_of_row_N = torch.sort(expert_TK.masked_fill(~keep_TK, E).flatten(), stable=True)
    row_of_slot_N = torch.empty_like(slot_of_row_N).scatter_(0, slot_of_row_N, torch.arange(T * k))
    kept_first = torch.sort((~keep_TK).flatten().to(torch.uint8), stable=True)[1]
    indices = {
        "token_N": slot_of_row_N // k,
        "expert_offsets": torch.searchsorted(bucket_N, torch.arange(E + 1)),
        "token_offsets": torch.nn.functional.pad(n_kept_T.cumsum(0), (1, 0)),
        "row_of_slot_N": row_of_slot_N[kept_first],
    }
    weight_N = (torch.rand(T * k, generator=generator) / k).to(device).requires_grad_()
    drawn = random_inputs(0, dtype, device, {"x_TD": (T, D), "w_gate_up_EDF2": (E, D, 2 * F), "w_down_EFD": (E, F, D)})
    for name in ("w_gate_up_EDF2", "w_down_EFD"):
        drawn[name].data.mul_(drawn[name].shape[1] ** -0.5)
    return {**drawn, **{name: index.to(device) for name, index in indices.items()}, "weight_N": weight_N}


def _cost(element_size: int, *, T: int, D: int, E: int, F: int, k: int, ragged: int = 0, **_: int) -> tuple[Cost, Cost]:
    """x, y, the experts, and the pre-activations that are saved; the rows' indices are small beside them."""
    rows = T * k / (2 if ragged else 1)
    experts, pre_activations = 3 * E * D * F, 2 * rows * F
    forward = Cost(flops=6 * rows * D * F, bytes=element_size * (2 * T * D + experts + pre_activations))
    return forward, Cost(flops=12 * rows * D * F, bytes=element_size * (3 * T * D + 2 * experts + pre_activations))


def _grouped_mm(**inputs: Tensor) -> Tensor:
    return grouped_mlp(**inputs, backend="grouped_mm")


def _call(*, backend: str, **inputs: Tensor) -> Tensor:
    """torch stands for the loop over experts, or on the CPU for the path that is meant to be fast there."""
    if backend == "torch":
        backend = "reference" if inputs["x_TD"].is_cuda or inputs["x_TD"].dtype == torch.float64 else "cpu"
    return grouped_mlp(**inputs, backend=backend)


OPERATIONS = (
    Operation(
        name="grouped_mlp",
        call=_call,
        inputs=_inputs,
        cost=_cost,
        inspect_shape={"T": 4096, "D": 512, "E": 80, "F": 256, "k": 12},
        check_shapes=(
            {"T": 1, "D": 64, "E": 5, "F": 32, "k": 2},
            {"T": 257, "D": 80, "E": 7, "F": 48, "k": 3, "ragged": 1},
            {"T": 1000, "D": 512, "E": 80, "F": 256, "k": 12, "ragged": 1},
            {"T": 300, "D": 2048, "E": 4, "F": 768, "k": 4},
        ),
        bench_shapes=(
            {"T": 4096, "D": 512, "E": 80, "F": 256, "k": 12},
            {"T": 16384, "D": 512, "E": 80, "F": 256, "k": 12},
            {"T": 4096, "D": 2048, "E": 80, "F": 768, "k": 12},
        ),
        cpu_shape={"T": 1024, "D": 512, "E": 80, "F": 256, "k": 12},
        peers={"grouped_mm": _grouped_mm},
        cpu_peers={"grouped_mm": _grouped_mm},
        without_products=frozenset({"combine_kernel"}),
    ),
)
