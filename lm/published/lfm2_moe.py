"""LFM2 with experts (Liquid AI, arXiv 2511.23404): gated short convolutions and a little full attention, dense MLPs in
the first layers, experts chosen by sigmoid scores and a bias, tied embeddings."""

import dataclasses
from collections.abc import Iterator

from lm.config import ModelConfig
from lm.published.family import (
    Family,
    decoder_tensors,
    experts_tensors,
    read_attention,
    read_letters,
    read_sigmoid_router,
    read_sizes,
    softmax_tensors,
    with_dense,
)
from lm.published.fields import Fields
from lm.published.layouts import SAME, Stored, reshaped
from moe.config import MoEConfig

LETTERS = {"conv": "C", "full_attention": "F"}
NORMS = {"pre": {"attention_norm": "operator_norm", "moe_norm": "ffn_norm"}}
PARTS = ("w1", "w3", "w2")
# Added to the sum of the weights of a token's experts.
EPS = 1e-6


def read(fields: Fields) -> ModelConfig:
    """See `Family.read`."""
    sizes = read_sizes(fields, tied=True)
    fields.only("conv_bias", False)
    fields.only("use_expert_bias", True)
    attention = read_attention(
        fields,
        rope_base=1_000_000.0,
        short_conv_dim=sizes["d_model"],
        conv_width=fields.get("conv_L_cache", int, 3),
    )
    moe = MoEConfig(
        n_experts=fields.get("num_experts", int),
        d_expert=fields.get("moe_intermediate_size", int),
        router=dataclasses.replace(read_sigmoid_router(fields), renormalise_eps=EPS),
    )
    # There is no usual order of them.
    fields.get("layer_types", list)
    plan = read_letters(fields, LETTERS, ["conv"] * sizes["n_layers"])
    config = ModelConfig(**sizes, layer_plan=plan, attention=attention, moe=moe)
    n_dense = fields.get("num_dense_layers", int, 2)
    return with_dense(
        config, [layer < n_dense for layer in range(config.n_layers)], fields.get("intermediate_size", int)
    )


def tensors(config: ModelConfig) -> Iterator[Stored]:
    """See `Family.tensors`."""
    yield from decoder_tensors(config, NORMS, "embedding_norm")
    W = config.attention.conv_width
    for layer in range(config.n_layers):
        block, ours, theirs = config.block(layer), f"blocks.{layer}", f"model.layers.{layer}"
        if block.letter == "C":
            yield Stored(f"{ours}.attention.to_inner.weight", (f"{theirs}.conv.in_proj.weight",), SAME)
            taps = reshaped((-1, W), (-1, 1, W))
            yield Stored(f"{ours}.attention.conv_XW", (f"{theirs}.conv.conv.weight",), taps)
            yield Stored(f"{ours}.attention.to_out.weight", (f"{theirs}.conv.out_proj.weight",), SAME)
        else:
            yield from softmax_tensors(layer, block.attention, out="out_proj", norm="{}_layernorm")
        yield from experts_tensors(layer, block.moe, f"{theirs}.feed_forward", PARTS)
        if block.moe.n_experts > 1:
            bias = (f"{theirs}.feed_forward.expert_bias",)
            yield Stored(f"{ours}.moe.router.selection_bias_E", bias, SAME)


FAMILY = Family(
    model_type="lfm2_moe",
    read=read,
    tensors=tensors,
    aliases={
        "rms_norm_eps": ("norm_eps",),
        "tie_word_embeddings": ("tie_embedding",),
        "num_experts": ("num_local_experts",),
    },
    tiny={
        "layer_types": ["conv", "conv", "full_attention", "conv"],
        **{"num_key_value_heads": 2, "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 8},
        **{"num_dense_layers": 1, "routed_scaling_factor": 1.5},
    },
)
