"""What a model costs, from its configuration: parameters, FLOPs, cache bytes, bytes read per decoded token.

One multiply-add is 2 FLOPs. Only products count (norms, activations, softmax and routing scores' sorting do not): the
backward of a product costs two products of the same size, so backward = 2 x forward wherever weights and inputs both
need gradients. Parameters are counted on a model built on the meta device, so they cannot disagree with the real one.
Mixing across tokens is counted by the kinds of attention.
"""

import dataclasses
import functools
from typing import cast

import torch

from attention.cache import cache_bytes
from lm.block import Block
from lm.config import ModelConfig
from lm.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One block: its parameters and forward FLOPs per token."""

    letter: str
    total_parameters: int
    active_parameters: float
    forward_flops: float


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """Costs of a model at one sequence length and mean number of experts.

    Attributes:
        embedding_parameters: the token table; a lookup, so no FLOPs, and only one row of it is active.
        layers: per block.
        head_parameters: the output projection, where it is not the embedding, and final norm.
        head_flops: forward FLOPs per token of the head.
        tied: whether the output projection is the embedding, which then takes part in a product as a whole.
    """

    embedding_parameters: int
    layers: tuple[LayerCost, ...]
    head_parameters: int
    head_flops: float
    tied: bool = False

    @property
    def total_parameters(self) -> int:
        return self.embedding_parameters + sum(layer.total_parameters for layer in self.layers) + self.head_parameters

    @property
    def active_parameters(self) -> float:
        """Parameters that take part in a product for one token: experts used, shared weights and the head; not the
        embedding table, unless it is the head."""
        head = self.head_parameters + (self.embedding_parameters if self.tied else 0)
        return sum(layer.active_parameters for layer in self.layers) + head

    @property
    def forward_flops(self) -> float:
        """Per token."""
        return self.flops()

    @property
    def training_flops(self) -> float:
        """Forward and backward of the whole network, per token."""
        return 3 * self.flops()

    def flops(self, first: int = 0, last: int | None = None, head: bool = True) -> float:
        """Forward FLOPs per token of blocks [first, last), with the head or without it."""
        return sum(layer.forward_flops for layer in self.layers[first:last]) + (self.head_flops if head else 0.0)

    def prefix_share(self, boundary: int) -> float:
        """Share of all parameters that lie in the embedding and blocks [0, boundary)."""
        return (
            self.embedding_parameters + sum(layer.total_parameters for layer in self.layers[:boundary])
        ) / self.total_parameters


def model_cost(config: ModelConfig, *, length: int, mean_experts: float | tuple[float, ...]) -> ModelCost:
    """Costs of training or prefilling sequences of `length` tokens.

    Args:
        config: the model.
        length: tokens of a sequence; what mixing across tokens costs is averaged over them.
        mean_experts: real experts per token, measured or intended; one number, or one per block.

    Returns:
        Parameters and forward FLOPs per token, by block.

    Raises:
        ValueError: for another number of means than of blocks.
    """
    # Weights are counted by their number, in whatever form they are stored.
    model = meta_model(config.with_packed(None))
    # Every block is asked for its own number of experts: configurations may differ from block to block.
    means = (float(mean_experts),) * config.n_layers if isinstance(mean_experts, int | float) else mean_experts
    if len(means) != config.n_layers:
        raise ValueError(f"mean_experts: {len(means)} numbers for {config.n_layers} layers")
    layers = []
    for index, (block, letter, mean) in enumerate(zip(model.blocks, config.plan.letters, means)):
        routed = cast(Block, block).moe.experts
        experts = _count(routed)
        # Biases are no products, though a layer's experts hold theirs in one matrix.
        matrices = experts - sum(p.numel() for name, p in routed.named_parameters() if name.startswith("b_"))
        total = _count(block)
        # A block of a single expert, a dense MLP, has no more of them in use.
        in_use, matrices = (
            min(mean * count / config.block(index).moe.n_experts, count) for count in (experts, matrices)
        )
        # Weights of two or more dimensions are products; norms and per-head constants are not.
        products = sum(p.numel() for p in block.parameters() if p.dim() >= 2) - experts + matrices
        layers.append(
            LayerCost(letter, total, total - experts + in_use, 2 * products + mixing_flops(config, index, length))
        )
    head, tied = model.head.numel(), config.tied_embeddings
    own = _count(model.norm) + (0 if tied else head)
    return ModelCost(model.embedding_VD.numel(), tuple(layers), own, 2.0 * head, tied)


def mixing_flops(config: ModelConfig, layer: int, length: int) -> float:
    """Forward FLOPs per token of mixing across tokens in one layer, without the projections, averaged over a causal
    sequence of `length` tokens."""
    return config.plan.kinds[layer].mixing_flops(config.block(layer).attention, length)


def kv_bytes(config: ModelConfig, length: int) -> int:
    """Bytes of the whole cache of one sequence after `length` tokens: keys and values, ring buffers, linear states,
    convolution tails."""
    return sum(cache_bytes(config.attentions, config.plan, length, element_size=getattr(torch, config.dtype).itemsize))


def decode_bytes(config: ModelConfig, length: int, mean_experts: float) -> float:
    """Bytes one decode step has to read for one sequence: active weights in `config.dtype`, packed ones of experts as
    they are stored, the embedding row and the cache."""
    element_size = getattr(torch, config.dtype).itemsize
    cost = model_cost(config, length=length, mean_experts=mean_experts)
    # A layer that shares another's keys and values owns no bytes but reads the owner's.
    cache = sum(
        kind.read_bytes(attention, length, element_size)
        for kind, attention in zip(config.plan.kinds, config.attentions)
    )
    weights = element_size * (cost.active_parameters + config.d_model)
    for moe in (config.block(layer).moe for layer in range(config.n_layers)):
        if moe.packed is not None:
            d_model, width = moe.d_latent or config.d_model, 2 * moe.d_expert if moe.gated else moe.d_expert
            usual = element_size * d_model * (width + moe.d_expert)
            stored = moe.packed.n_bytes(d_model, width) + moe.packed.n_bytes(moe.d_expert, d_model)
            weights -= (usual - stored) * min(mean_experts, moe.n_experts)
    return weights + cache


@functools.lru_cache(maxsize=64)
def meta_model(config: ModelConfig) -> LanguageModel:
    """The model without memory: shapes only."""
    with torch.device("meta"):
        return LanguageModel(config)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
