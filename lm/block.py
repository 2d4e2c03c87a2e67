"""One block of a decoder: attention of any kind, then a mixture of experts, both added to the residual stream.

Legend: B batch, T tokens, D model width.
"""

import dataclasses

import torch
from torch import Tensor, nn

from attention import build_attention
from attention.isolation import Documents, attend_apart, beginnings
from attention.layer_states import LayerState
from attention.norm import RMSNorm, describe_norm
from attention.positions import Start
from lm.config import ModelConfig, Residual
from moe.layer import MoE
from routing.router import Routing
from routing.sequences import Sequences
from triton_kernels.native.decode_step import NativeBlock, NotInOneCall, Watch


def stream_norm(config: ModelConfig) -> RMSNorm:
    """A norm over the residual stream."""
    return RMSNorm(config.d_model, eps=config.norm_eps, unit_offset=config.unit_offset)


def deep_residual(residual: Residual, config: ModelConfig) -> Residual:
    """The sums of a block as they are computed: what is added is divided by how many times as deep as its base a model
    is (`lm.parametrization`)."""
    base = config.parametrization
    if base is None or base.base_n_layers == config.n_layers:
        return residual
    share = base.base_n_layers / config.n_layers
    return dataclasses.replace(
        residual, attention_added=share * residual.attention_added, experts_added=share * residual.experts_added
    )


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x)); `BlockConfig.norm` says where the norms stand."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        block = config.block(layer_index)
        self.n_layers, self.dtype = config.n_layers, getattr(torch, config.dtype)
        self.residual, self.norms_stream = deep_residual(block.residual, config), block.norm == "stream"
        self.shortcut = block.shortcut

        def norm(present: bool) -> nn.Module:
            return stream_norm(config) if present else nn.Identity()

        before, behind = block.norm != "post", block.norm in ("post", "sandwich")
        self.attention_norm = norm(before)
        self.attention = build_attention(
            block.letter,
            block.attention,
            d_model=config.d_model,
            layer_index=layer_index,
            n_layers=config.n_layers,
        )
        self.attention_out_norm = norm(behind)
        # Where there are no experts, the layer is there and adds nothing: every block has a routing.
        experts = block.moe.d_expert > 0
        self.moe_norm = norm(before and experts)
        self.moe = MoE(block.moe, d_model=config.d_model, layer_index=layer_index)
        self.moe_out_norm = norm(behind and experts)

    def init_weights(self, generator: torch.Generator) -> None:
        for norm in (self.attention_norm, self.attention_out_norm, self.moe_norm, self.moe_out_norm):
            if isinstance(norm, RMSNorm):
                norm.reset()
        self.attention.init_weights(generator)
        self.moe.init_weights(generator, down_scale=(2 * self.n_layers) ** -0.5)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        start: Start,
        state,
        shared,
        documents: Documents | None = None,
        sums_BX: Tensor | None = None,
        later_BTD: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, object, Routing, Tensor | None]:
        """Gives the residual stream, keys and values for other layers, how tokens were routed, and what the next block
        is to add: its `later_BTD`. With `last_only` behind attention of the last position alone, unless the router
        goes by all of them, or somebody listens to it."""
        # The residual stream is fp32; what is added to it is computed in `dtype`.
        residual, inner_BTD = self.residual, self.attention_norm(x_BTD)
        if documents is None:
            attended_BTD, kv = self.attention(inner_BTD.to(self.dtype), start=start, state=state, shared=shared)
        else:
            attended_BTD, kv = attend_apart(self.attention, inner_BTD.to(self.dtype), documents, shared)
        if last_only and self.moe.router.policy.decides_alone and not self.moe.router._forward_hooks:
            x_BTD, inner_BTD, attended_BTD = (each_BTD[:, -1:] for each_BTD in (x_BTD, inner_BTD, attended_BTD))
            later_BTD = None if later_BTD is None else later_BTD[:, -1:]
        x_BTD = _sum(
            inner_BTD if self.norms_stream else x_BTD,
            self.attention_out_norm(attended_BTD),
            residual.attention_kept,
            residual.attention_added,
        )
        inner_BTD = self.moe_norm(x_BTD)
        sequences = None
        if self.moe.router.policy.config.follows_sequences:
            B, T = x_BTD.shape[:2]
            begins_BT = None if documents is None else beginnings(documents, B, T)
            sequences = Sequences(n=B, length=T, begins_BS=begins_BT, before_BX=sums_BX)
        inner_TD, routed_BTD = inner_BTD.to(self.dtype).flatten(0, 1), None
        if self.shortcut:
            routed_TD, mixed_TD, routing = self.moe.parts(inner_TD, sequences)
            routed_BTD = routed_TD.view_as(x_BTD) * residual.experts_added
            mixed_TD = torch.zeros_like(inner_TD) if mixed_TD is None else mixed_TD
        else:
            mixed_TD, routing = self.moe(inner_TD, sequences)
        x_BTD = _sum(
            inner_BTD if self.norms_stream else x_BTD,
            self.moe_out_norm(mixed_TD).view_as(x_BTD),
            residual.experts_kept,
            residual.experts_added,
        )
        return x_BTD if later_BTD is None else x_BTD + later_BTD, kv, routing, routed_BTD

    def describe(self, block: NativeBlock, watch: Watch, state: LayerState, eps: float) -> None:
        """Fills in a block of a decode step that is one call of C; eps is its norms'.

        Raises:
            NotInOneCall: for a part that the call does not know.
        """
        if self.residual != Residual() or self.norms_stream or self.shortcut:
            raise NotInOneCall("a block that adds with weights, later, or to a normalised stream")
        watch.module(self)
        for place in ("attention_norm", "attention_out_norm", "moe_norm", "moe_out_norm"):
            setattr(block, place, describe_norm(getattr(self, place), watch, width=watch.d_model, eps=eps))
        self.attention.describe(block, watch, state)
        self.moe.describe(block, watch)


def _sum(x_BTD: Tensor, added_BTD: Tensor, kept: float, added: float) -> Tensor:
    """kept x + added y."""
    x_BTD = x_BTD if kept == 1.0 else x_BTD * kept
    return x_BTD + (added_BTD if added == 1.0 else added_BTD * added)
