"""The mixture-of-experts layer: route, dispatch, experts, combine.

Legend: T tokens, D model width, E experts.
"""

import torch
from torch import Tensor, nn

from moe.config import MoEConfig
from moe.experts import Experts, SharedExpert
from routing.router import Router, Routing
from routing.zero_computation import ZeroComputationExperts


class MoE(nn.Module):
    """Replaces the MLP of a transformer block. Backward reaches the router through the rows' weights and through
    `Routing.losses`."""

    def __init__(self, config: MoEConfig, *, d_model: int, layer_index: int):
        super().__init__()
        for name in ("n_experts", "d_expert"):
            if getattr(config, name) < 1:
                raise ValueError(f"MoEConfig.{name} = {getattr(config, name)} must be at least 1")
        if config.d_shared < 0:
            raise ValueError(f"MoEConfig.d_shared = {config.d_shared} must not be negative")
        policy = config.router.policy
        # A token without any row would leave the layer as zero, and its router without a gradient.
        if getattr(policy, "floor", 1) == 0 and not config.d_shared and not isinstance(policy, ZeroComputationExperts):
            raise ValueError(
                f"{type(policy).__name__}.floor = 0 needs a shared expert (MoEConfig.d_shared > 0): a token may be left"
                " without experts"
            )
        self.config = config
        self.router = Router(config.router, d_model=d_model, n_experts=config.n_experts, layer_index=layer_index)
        self.experts = Experts(
            n_experts=config.n_experts, d_model=d_model, d_expert=config.d_expert, backend=config.backend
        )
        self.shared_expert = SharedExpert(d_model=d_model, d_shared=config.d_shared) if config.d_shared else None
        self.init_weights(torch.Generator().manual_seed(layer_index))

    def init_weights(self, generator: torch.Generator, *, down_scale: float = 1.0) -> None:
        """down_scale multiplies the projections back into the residual stream, for instance by (2 * n_layers)^-1/2."""
        self.router.init_weights(generator)
        self.experts.init_weights(generator, down_scale=down_scale)
        if self.shared_expert is not None:
            self.shared_expert.init_weights(generator, down_scale=down_scale)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Routing]:
        """x_TD [T, D] in the dtype of the activations -> (y_TD [T, D] in the same dtype, Routing)."""
        routing = self.router(x_TD)
        # Dispatch, SwiGLU and combine are one operation: the gathered inputs and the experts' outputs never exist as a
        # whole.
        y_TD = self.experts(x_TD, routing.assignments)
        if routing.identity_T is not None:
            y_TD = y_TD + (routing.identity_T[:, None] * x_TD).to(x_TD.dtype)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        return y_TD, routing
