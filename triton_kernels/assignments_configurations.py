"""The entries of sort_slots for inspect, bench and gpu-check.

Letters: T tokens, K slots per token, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from triton_kernels.assignments import sort_slots
from triton_kernels.configurations import Cost, Operation


def _inputs(dtype: torch.dtype, device: str, *, T: int, E: int, K: int, kept: int = 100, **_: int) -> dict[str, Any]:
    """Distinct experts per token; `kept` percent of the slots are used."""
    generator = torch.Generator().manual_seed(0)
    weight_TK, expert_TK = torch.rand(T, E, generator=generator).topk(K, dim=-1)
    keep_TK = None if kept == 100 else (torch.rand(T, K, generator=generator) * 100 < kept).to(device)
    return {"expert_TK": expert_TK.to(device), "weight_TK": weight_TK.to(device, dtype).requires_grad_(), "keep_TK": keep_TK, "n_experts": E}


def _cost(element_size: int, *, T: int, E: int, K: int, kept: int = 100, **_: int) -> tuple[Cost, Cost]:
    """Integers are of 8 bytes: the slots' experts, and five of the results. Additions and comparisons are not counted as FLOPs."""
    slots = T * K
    read = element_size + 8 + (kept < 100)
    return Cost(flops=0, bytes=slots * (read + element_size + 24) + 8 * (T + E)), Cost(flops=0, bytes=slots * (2 * element_size + 8 + (kept < 100)))


def _call(**inputs: Any) -> tuple[Tensor, ...]:
    return tuple(sort_slots(**inputs, padded=True))


KERNELS = frozenset({"count_kernel", "scan_kernel", "place_kernel", "slot_gradient_kernel"})

OPERATIONS = tuple(
    Operation(
        name=name,
        call=_call,
        inputs=_inputs,
        cost=_cost,
        inspect_shape={"T": 4096, "E": 80, "K": K, **kept},
        check_shapes=({"T": 1, "E": 5, "K": 3, **kept}, {"T": 257, "E": 80, "K": 12, **kept}, {"T": 3000, "E": 300, "K": 20, **kept}),
        bench_shapes=({"T": 4096, "E": 80, "K": K, **kept}, {"T": 65536, "E": 80, "K": K, **kept}),
        cpu_shape={"T": 4096, "E": 80, "K": K, **kept},
        without_products=KERNELS,
    )
    for name, K, kept in (("assignments", 12, {}), ("assignments/ragged", 24, {"kept": 50}))
)
