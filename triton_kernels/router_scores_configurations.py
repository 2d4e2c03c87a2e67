"""The entries of router_scores for inspect, bench and gpu-check. Logits are fp32 whatever the dtype asked for: a router's are.

Letters: T tokens, E experts, K slots per token.
"""

from functools import partial
from typing import Any

import torch

from triton_kernels.configurations import Cost, Operation, random_inputs
from triton_kernels.router_scores import router_scores


def _inputs(dtype: torch.dtype, device: str, *, T: int, E: int, K: int, **_: int) -> dict[str, Any]:
    drawn = random_inputs(0, torch.float32, device, {"logits_TE": (T, E)})
    return drawn | {"bias_E": torch.linspace(-1e-3, 1e-3, E).to(device), "threshold": torch.tensor(0.4).to(device), "k": K}


def _cost(element_size: int, *, T: int, E: int, K: int, **_: int) -> tuple[Cost, Cost]:
    return Cost(flops=10 * T * E, bytes=T * (4 * E + 17 * K)), Cost(flops=12 * T * E, bytes=T * (8 * E + 13 * K))


OPERATIONS = tuple(
    Operation(
        name=f"router_scores/{rule}",
        call=partial(router_scores, rule=rule, score=score),
        inputs=_inputs,
        cost=_cost,
        inspect_shape={"T": 4096, "E": 80, "K": K},
        check_shapes=({"T": 1, "E": 5, "K": 3}, {"T": 257, "E": 80, "K": 12}, {"T": 1000, "E": 300, "K": 20}),
        bench_shapes=({"T": 4096, "E": 80, "K": K}, {"T": 65536, "E": 80, "K": K}),
        cpu_shape={"T": 4096, "E": 80, "K": K},
        without_products=frozenset({"select_kernel", "logit_gradient_kernel"}),
    )
    for rule, score, K in (("top_k", "sigmoid", 12), ("top_p", "softmax", 24))
)
