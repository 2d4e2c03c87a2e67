"""The mixture-of-experts layer: route, dispatch, experts, combine.

Legend: T tokens, D model width, L latent width, E experts.
"""

import torch
from torch import Tensor, nn

from foundation.exact_buffers import ExactBuffers
from moe.config import MoEConfig
from moe.experts import Experts, SharedExpert, draw_matrix
from moe.packed import PackedExperts
from routing.decode_step import describe_router
from routing.router import Router, Routing
from routing.sequences import Sequences
from triton_kernels.native.decode_step import NativeBlock, NotInOneCall, Watch


class MoE(ExactBuffers):
    """Replaces the MLP of a transformer block. Backward reaches the router through the rows' weights and through
    `Routing.losses`.

    Args:
        d_model: width of the tokens.
        layer_index: what the router's random draws and messages name the layer by.

    Raises:
        ValueError: for a routing policy that does not fit the layer, see `Router.set_policy`.
    """

    def __init__(self, config: MoEConfig, *, d_model: int, layer_index: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(
            config.router,
            d_model=d_model,
            n_experts=config.n_experts,
            layer_index=layer_index,
            has_shared_expert=config.d_shared > 0,
        )
        sizes = {"n_experts": config.n_experts, "d_model": config.d_latent or d_model, "d_expert": config.d_expert}
        options = {"bias": config.expert_bias, "clamped": config.clamped, "gated": config.gated}
        # Experts of no width have nothing to pack.
        if config.packed is None or config.d_expert == 0:
            self.experts: Experts | PackedExperts = Experts(**sizes, **options, backend=config.backend)
        else:
            self.experts = PackedExperts(config.packed, **sizes, **options)
        shared = config.d_shared
        self.shared_expert = SharedExpert(d_model=d_model, d_shared=shared, gated=config.gated) if shared else None
        self.latent_in_DL = nn.Parameter(torch.empty(d_model, config.d_latent)) if config.d_latent else None
        self.latent_out_LD = nn.Parameter(torch.empty(config.d_latent, d_model)) if config.d_latent else None
        self.shared_gate_D = nn.Parameter(torch.zeros(d_model)) if config.shared_gate else None

    def init_weights(self, generator: torch.Generator, *, down_scale: float = 1.0) -> None:
        """Fresh weights, all of them drawn here and nowhere else; construction leaves them unset.

        Args:
            generator: what they are drawn from, in a fixed order: router, experts, shared expert, latent.
            down_scale: multiplies the projections back into the residual stream, for instance by (2 * n_layers)^-1/2.
        """
        self.router.init_weights(generator)
        self.experts.init_weights(generator, down_scale=down_scale)
        if self.shared_expert is not None:
            self.shared_expert.init_weights(generator, down_scale=down_scale)
        if self.latent_in_DL is not None and self.latent_out_LD is not None:
            draw_matrix(self.latent_in_DL, generator)
            draw_matrix(self.latent_out_LD, generator, down_scale)
        if self.shared_gate_D is not None:
            # Half open for every token.
            nn.init.zeros_(self.shared_gate_D)

    def forward(self, x_TD: Tensor, sequences: Sequences | None = None) -> tuple[Tensor, Routing]:
        """Routes each token, computes its experts and adds them up.

        Args:
            x_TD: [T, D] in the dtype of the activations.
            sequences: for a policy that follows them; without them all tokens are one.

        Returns:
            y_TD [T, D] in the same dtype, and how the tokens were routed.
        """
        routed_TD, shared_TD, routing = self.parts(x_TD, sequences)
        return routed_TD if shared_TD is None else routed_TD + shared_TD, routing

    def parts(self, x_TD: Tensor, sequences: Sequences | None = None) -> tuple[Tensor, Tensor | None, Routing]:
        """`forward` with its two summands apart: what the routed experts give, and the shared one, or None."""
        routing = self.router(x_TD, sequences)
        # Dispatch, SwiGLU and combine are one operation: the gathered inputs and the experts' outputs never exist as a
        # whole.
        if self.latent_in_DL is None or self.latent_out_LD is None:
            y_TD = self.experts(x_TD, routing.assignments)
        else:
            y_TL = self.experts(x_TD @ self.latent_in_DL.to(x_TD.dtype), routing.assignments)
            y_TD = y_TL @ self.latent_out_LD.to(x_TD.dtype)
        if routing.identity_T is not None:
            y_TD = y_TD + (routing.identity_T[:, None] * x_TD).to(x_TD.dtype)
        if routing.constant_TD is not None:
            y_TD = y_TD + routing.constant_TD.to(x_TD.dtype)
        shared_TD = None
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(x_TD)
            if self.shared_gate_D is not None:
                shared_TD = (x_TD @ self.shared_gate_D.to(x_TD.dtype)).sigmoid()[:, None] * shared_TD
        return y_TD, shared_TD, routing

    def describe(self, block: NativeBlock, watch: Watch) -> None:
        """Fills in the layer's part of a decode step that is one call of C.

        Raises:
            NotInOneCall: for a part that the call does not know.
        """
        if type(self) is not MoE or self.shared_gate_D is not None or self.latent_in_DL is not None:
            raise NotInOneCall(f"experts in a {type(self).__name__}, a gate of the shared expert, or a latent")
        watch.module(self)
        describe_router(self.router, block, watch)
        self.experts.describe(block, watch)
        if self.shared_expert is not None:
            self.shared_expert.describe(block, watch)
