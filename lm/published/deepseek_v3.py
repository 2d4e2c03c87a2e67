"""DeepSeek-V3 (arXiv 2412.19437) and what is published in its layout, GLM-4.7-Flash among it: latent attention, sigmoid
scores with a bias that selects, groups of experts, scaled weights, a shared expert, dense MLPs in the first layers.

Legend: H heads, K key width without the shared part, R width of the shared part, V value width, C latent width.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from attention.config import AttentionConfig
from attention.latent import latent_shape
from lm.config import ModelConfig
from lm.published.family import (
    Family,
    decoder_tensors,
    read_sigmoid_experts,
    read_sizes,
    sigmoid_experts_tensors,
    with_dense,
)
from lm.published.fields import Fields
from lm.published.layouts import SAME, Stored, below, headwise, reordered
from lm.published.rotary import read_rotary

# The norms of latents have it whatever config.json says of the others.
LATENT_EPS = 1e-6


def read(fields: Fields) -> ModelConfig:
    """See `Family.read`."""
    n_dense = fields.get("first_k_dense_replace", int, 3)
    return _read(fields, [layer < n_dense for layer in range(fields.get("num_hidden_layers", int))])


def read_lite(fields: Fields) -> ModelConfig:
    """See `Family.read`."""
    dense = read_mlp_types(fields, n_dense=1)
    # Says again what the types of the layers say.
    fields.only("first_k_dense_replace", dense.index(False) if False in dense else len(dense))
    return _read(fields, dense)


def _read(fields: Fields, dense: list[bool]) -> ModelConfig:
    sizes = read_sizes(fields)
    read_router_names(fields)
    fields.only("moe_layer_freq", 1)
    # Every other value would pair channels otherwise.
    fields.only("rope_interleave", True)
    # Modules that predict further tokens; they are not imported.
    fields.get("num_mtp_layers", int, 0)
    moe = read_sigmoid_experts(fields, fields.get("moe_intermediate_size", int))
    attention = read_latent(fields, **read_rotary(fields, 10_000.0, 1.0))
    config = ModelConfig(**sizes, layer_plan="A", attention=attention, moe=moe)
    return with_dense(config, dense, fields.get("intermediate_size", int))


def read_router_names(fields: Fields) -> None:
    """What published configurations say of the router beside its numbers."""
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    # Of training, and of how experts were spread over devices.
    fields.get("aux_loss_alpha", float, None)
    fields.get("seq_aux", bool, None)
    fields.get("ep_size", int, None)


def read_mlp_types(fields: Fields, n_dense: int) -> list[bool]:
    """Of every layer, whether it has a dense MLP, as lists of types say it.

    Args:
        n_dense: how many of the first ones have, where the file has no list.

    Raises:
        ValueError: for another type, or another number of them than of layers.
    """
    n_layers = fields.get("num_hidden_layers", int)
    usual = ["dense" if layer < n_dense else "sparse" for layer in range(n_layers)]
    types = fields.get("mlp_layer_types", list, usual)
    if len(types) != n_layers or any(kind not in ("dense", "sparse") for kind in types):
        raise ValueError(f"{fields.place}: mlp_layer_types = {types}; legal: {n_layers} of dense, sparse")
    return [kind == "dense" for kind in types]


def read_latent(fields: Fields, **options: Any) -> AttentionConfig:
    """Heads and widths of latent attention.

    Args:
        options: further fields of `AttentionConfig`.
    """
    fields.only("attention_bias", False)
    fields.only("attention_dropout", 0.0)
    n_heads, head_dim = fields.get("num_attention_heads", int), fields.get("qk_nope_head_dim", int)
    shared = fields.get("qk_rope_head_dim", int)
    fields.only("num_key_value_heads", n_heads)
    # The sum of both widths; and what has no meaning here, where heads have three.
    fields.only("qk_head_dim", head_dim + shared)
    fields.get("head_dim", int, None)
    return AttentionConfig(
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_dim,
        latent_dim=fields.get("kv_lora_rank", int),
        latent_shared_dim=shared,
        latent_value_dim=fields.get("v_head_dim", int),
        latent_query_dim=fields.get("q_lora_rank", int, None),
        **{"norm_eps": LATENT_EPS, **options},
    )


def tensors(config: ModelConfig) -> Iterator[Stored]:
    """See `Family.tensors`."""
    yield from decoder_tensors(config)
    for layer in range(config.n_layers):
        block = config.block(layer)
        yield from latent_tensors(layer, block.attention)
        yield from sigmoid_experts_tensors(layer, block.moe)


def latent_tensors(layer: int, attention: AttentionConfig, theirs: str | None = None) -> Iterator[Stored]:
    """A layer of latent attention. Published heads have the shared channels behind their own, and where positions turn
    them, the two of a pair next to each other; ours have them in front, all first ones and then all second ones.

    Args:
        theirs: the published module.
    """
    ours, theirs = f"blocks.{layer}.attention", theirs or f"model.layers.{layer}.self_attn"
    H, K, R, V, C, turned = latent_shape(attention)
    pairs = [*range(0, R, 2), *range(1, R, 2)] if turned else list(range(R))
    head = [*(K + channel for channel in pairs), *range(K)]
    queries = reordered([h * (K + R) + row for h in range(H) for row in head])
    latent = (1, C + R, reordered([*range(C), *(C + channel for channel in pairs)]))
    kv = f"{theirs}.kv_a_proj_with_mqa.weight"
    if (Q := attention.latent_query_dim) is None:
        inner = below((1, H * (K + R), queries), latent)
        yield Stored(f"{ours}.to_inner.weight", (f"{theirs}.q_proj.weight", kv), inner)
    else:
        yield Stored(f"{ours}.to_inner.weight", (f"{theirs}.q_a_proj.weight", kv), below((1, Q, SAME), latent))
        yield Stored(f"{ours}.q_norm.weight", (f"{theirs}.q_a_layernorm.weight",), SAME)
        yield Stored(f"{ours}.to_query.weight", (f"{theirs}.q_b_proj.weight",), queries)
    yield Stored(f"{ours}.kv_norm.weight", (f"{theirs}.kv_a_layernorm.weight",), SAME)
    yield Stored(f"{ours}.to_heads.weight", (f"{theirs}.kv_b_proj.weight",), headwise(H, (K, V)))
    yield Stored(f"{ours}.to_out.weight", (f"{theirs}.o_proj.weight",), SAME)


def beside(config: ModelConfig) -> Mapping[str, str]:
    """See `Family.beside`."""
    return {rf"model\.layers\.{config.n_layers}\..*": "multi-token prediction"}


TINY = {
    **{"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 12},
    **{"moe_intermediate_size": 24, "intermediate_size": 40, "n_routed_experts": 8, "n_shared_experts": 2},
    **{"routed_scaling_factor": 2.5},
}
ALIASES = {"num_mtp_layers": ("num_nextn_predict_layers",), "n_routed_experts": ("num_local_experts",)}
FAMILY = Family(
    model_type="deepseek_v3",
    read=read,
    tensors=tensors,
    aliases=ALIASES,
    beside=beside,
    after_export={"num_nextn_predict_layers": 0, "num_mtp_layers": 0},
    tiny={
        **TINY,
        **{"q_lora_rank": 16, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
            **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.7, "mscale_all_dim": 1.0},
        },
    },
)
LITE = Family(
    model_type="glm4_moe_lite",
    read=read_lite,
    tensors=tensors,
    aliases=ALIASES,
    beside=beside,
    after_export={"num_nextn_predict_layers": 0, "num_mtp_layers": 0},
    tiny={**TINY, "q_lora_rank": None},
)
