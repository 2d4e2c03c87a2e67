"""grouped_mlp, sort_slots and router_scores as inspect, bench and gpu-check know them.

Legend: T tokens, D model width, E experts, F expert width, k experts (or slots, K) per token.
"""

from functools import partial
from typing import Any

import torch

from triton_kernels.experts.expert_slots import router_scores, sort_slots
from triton_kernels.experts.grouped_mlp import grouped_mlp
from triton_kernels.tools.operations import Cost, Operation, random_inputs
from triton_kernels.tools.peers import torch_grouped_mm


def _mlp_inputs(
    dtype: torch.dtype, device: str, *, T: int, D: int, E: int, F: int, k: int, ragged: int = 0
) -> dict[str, Any]:
    """Every token draws k experts; ragged: it keeps 0 to k of them, the rest stays as padding behind the last
    expert."""
    generator = torch.Generator().manual_seed(0)
    expert_TK = torch.rand(T, E, generator=generator).topk(k, dim=-1)[1]
    keep_TK = (torch.arange(k) < torch.randint(0, k + 1, (T, 1), generator=generator)) if ragged else None
    rows = sort_slots(
        expert_TK, torch.rand(T, k, generator=generator) / k, keep_TK, n_experts=E, padded=True, backend="torch"
    )._asdict()
    del rows["expert_N"]
    drawn = random_inputs(
        0, dtype, device, {"T": T, "D": D, "E": E, "F": F, "F2": 2 * F}, "x_TD", "w_gate_up_EDF2", "w_down_EFD"
    )
    for name in ("w_gate_up_EDF2", "w_down_EFD"):
        drawn[name].data.mul_(drawn[name].shape[1] ** -0.5)
    return drawn | {name: x.to(device).requires_grad_(name == "weight_N") for name, x in rows.items()}


def _mlp_cost(element_size: int, *, T: int, D: int, E: int, F: int, k: int, ragged: int = 0) -> tuple[Cost, Cost]:
    """x, y, the experts, and the pre-activations that are saved; the rows' indices are small beside them."""
    rows = T * k / (2 if ragged else 1)
    experts, pre_activations = 3 * E * D * F, 2 * rows * F
    forward = Cost(flops=6 * rows * D * F, bytes=element_size * (2 * T * D + experts + pre_activations))
    return forward, Cost(flops=12 * rows * D * F, bytes=element_size * (3 * T * D + 2 * experts + pre_activations))


def _sort_inputs(dtype: torch.dtype, device: str, *, T: int, E: int, K: int, kept: int = 100) -> dict[str, Any]:
    """Distinct experts per token; `kept` percent of the slots are used."""
    generator = torch.Generator().manual_seed(0)
    weight_TK, expert_TK = torch.rand(T, E, generator=generator).topk(K, dim=-1)
    keep_TK = None if kept == 100 else (torch.rand(T, K, generator=generator) * 100 < kept).to(device)
    return {
        "expert_TK": expert_TK.to(device),
        "weight_TK": weight_TK.to(device, dtype).requires_grad_(),
        "keep_TK": keep_TK,
        "n_experts": E,
    }


def _sort_cost(element_size: int, *, T: int, E: int, K: int, kept: int = 100) -> tuple[Cost, Cost]:
    """Integers are of 8 bytes: the slots' experts, and five of the results. Additions and comparisons are not counted
    as FLOPs."""
    both = T * K * (2 * element_size + 8)
    return Cost(flops=0, bytes=both + T * K * (24 + (kept < 100)) + 8 * (T + E)), Cost(flops=0, bytes=both)


def _score_inputs(dtype: torch.dtype, device: str, *, T: int, E: int, K: int) -> dict[str, Any]:
    """fp32 whatever the dtype asked for: a router's logits are."""
    drawn = random_inputs(0, torch.float32, device, {"T": T, "E": E}, "logits_TE")
    return drawn | {
        "bias_E": torch.linspace(-1e-3, 1e-3, E).to(device),
        "threshold": torch.tensor(0.4).to(device),
        "k": K,
    }


def _score_cost(element_size: int, *, T: int, E: int, K: int) -> tuple[Cost, Cost]:
    return Cost(flops=10 * T * E, bytes=T * (4 * E + 17 * K)), Cost(flops=12 * T * E, bytes=T * (8 * E + 13 * K))


def _slots_operation(name: str, call: Any, inputs: Any, cost: Any, kernels: str, K: int, **kept: int) -> Operation:
    usual = {"T": 4096, "E": 80, "K": K, **kept}
    return Operation(
        name=name,
        call=call,
        inputs=inputs,
        cost=cost,
        inspect_shape=usual,
        check_shapes=(
            {"T": 1, "E": 5, "K": 3, **kept},
            {"T": 257, "E": 80, "K": 12, **kept},
            {"T": 3000, "E": 300, "K": 20, **kept},
        ),
        bench_shapes=(usual, usual | {"T": 65536}),
        cpu_shapes=(usual,),
        without_products=frozenset(kernels.split()),
    )


MLP = {"D": 512, "E": 80, "F": 256, "k": 12}
SORT = (
    partial(sort_slots, padded=True),
    _sort_inputs,
    _sort_cost,
    "count_kernel scan_kernel place_kernel slot_gradient_kernel",
)
SCORES = (_score_inputs, _score_cost, "select_kernel logit_gradient_kernel")
OPERATIONS = (
    Operation(
        name="grouped_mlp",
        call=grouped_mlp,
        inputs=_mlp_inputs,
        cost=_mlp_cost,
        inspect_shape={"T": 4096, **MLP},
        check_shapes=(
            {"T": 1, "D": 64, "E": 5, "F": 32, "k": 2},
            {"T": 257, "D": 80, "E": 7, "F": 48, "k": 3, "ragged": 1},
            {"T": 1000, **MLP, "ragged": 1},
            {"T": 300, "D": 2048, "E": 4, "F": 768, "k": 4},
        ),
        bench_shapes=({"T": 4096, **MLP}, {"T": 16384, **MLP}, {"T": 4096, "D": 2048, "E": 80, "F": 768, "k": 12}),
        cpu_shapes=({"T": 1024, **MLP},),
        peers={"grouped_mm": torch_grouped_mm},
        cpu_peers={"grouped_mm": torch_grouped_mm},
        without_products=frozenset({"combine_kernel"}),
    ),
    _slots_operation("assignments", *SORT, K=12),
    _slots_operation("assignments/ragged", *SORT, K=24, kept=50),
    _slots_operation("router_scores/top_k", partial(router_scores, rule="top_k", score="sigmoid"), *SCORES, K=12),
    _slots_operation("router_scores/top_p", partial(router_scores, rule="top_p", score="softmax"), *SCORES, K=24),
)
