"""LongCat-Flash (Meituan, arXiv 2509.01322): latent attention everywhere, and experts of which some compute nothing:
they return the token.

A published layer is two blocks here. Its experts read what the first one's dense MLP reads, and are added behind the
second one (`BlockConfig.shortcut`); that MLP is the first block's shared expert, the other one is the second block's.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from lm.config import BlockConfig, ModelConfig
from lm.published.deepseek_v3 import latent_tensors, read_latent
from lm.published.family import (
    PARTS,
    Family,
    experts_tensors,
    read_sizes,
    shared_tensors,
    single_expert,
)
from lm.published.fields import Fields
from lm.published.layouts import SAME, Stored
from lm.published.rotary import read_rotary
from moe.config import MoEConfig
from routing.policies.zero_computation import ZeroComputationExperts
from routing.router import RouterConfig

ROPE_BASE = 10_000_000.0


def read(fields: Fields) -> ModelConfig:
    """See `Family.read`."""
    n_layers = 2 * fields.get("num_layers", int)
    # Says it again, where it is there.
    fields.only("num_hidden_layers", n_layers, n_layers // 2)
    sizes = read_sizes(fields, n_layers=n_layers)
    fields.only("attention_method", "MLA")
    for name in ("mla_scale_q_lora", "mla_scale_kv_lora"):
        fields.only(name, True)
    # The width of the channels that are turned; another one would turn the published model's otherwise.
    fields.only("head_dim", fields.get("qk_rope_head_dim", int))
    attention = read_latent(fields, **read_rotary(fields, ROPE_BASE, 1.0))
    if not attention.latent_query_dim or not attention.latent_dim:
        raise ValueError(f"{fields.place}: q_lora_rank = {attention.latent_query_dim} is not supported; legal: above 0")
    # Queries grow by a factor of their own, and so do all logits.
    attention = dataclasses.replace(
        attention,
        latent_scale=attention.latent_scale * (sizes["d_model"] / attention.latent_query_dim) ** 0.5,
        latent_gain=(sizes["d_model"] / attention.latent_dim) ** 0.5,
    )
    width, moe = fields.get("intermediate_size", int), _read_experts(fields)
    first = BlockConfig(letter="A", attention=attention, moe=dataclasses.replace(moe, d_shared=width), shortcut=True)
    second = BlockConfig(letter="A", attention=attention, moe=single_expert(width))
    return ModelConfig(**sizes, attention=attention, moe=moe).with_blocks([first, second] * (n_layers // 2))


def _read_experts(fields: Fields) -> MoEConfig:
    fields.only("zero_expert_type", "identity")
    fields.only("router_bias", False)
    fields.only("norm_topk_prob", False)
    return MoEConfig(
        n_experts=fields.get("n_routed_experts", int),
        d_expert=fields.get("moe_intermediate_size", int),
        router=RouterConfig(
            policy=ZeroComputationExperts(
                k=fields.get("num_experts_per_tok", int),
                n_null=fields.get("zero_expert_num", int),
                target_mean=None,
                column_bias=True,
            ),
            renormalise=False,
            scaling=fields.get("routed_scaling_factor", float, 1.0),
            balance_coefficient=0.0,
            z_coefficient=0.0,
        ),
    )


def tensors(config: ModelConfig) -> Iterator[Stored]:
    """See `Family.tensors`."""
    yield Stored("embedding_VD", ("model.embed_tokens.weight",), SAME)
    for layer in range(config.n_layers):
        block, ours = config.block(layer), f"blocks.{layer}"
        theirs, part = f"model.layers.{layer // 2}", layer % 2
        norms = {"attention_norm": "input_layernorm", "moe_norm": "post_attention_layernorm"}
        for our_name, their_name in norms.items():
            yield Stored(f"{ours}.{our_name}.weight", (f"{theirs}.{their_name}.{part}.weight",), SAME)
        yield from latent_tensors(layer, block.attention, f"{theirs}.self_attn.{part}")
        if not block.shortcut:
            yield from experts_tensors(layer, block.moe, f"{theirs}.mlps.{part}")
            continue
        yield from shared_tensors(layer, f"{theirs}.mlps.{part}")
        for stored in experts_tensors(layer, block.moe, f"{theirs}.mlp"):
            if not stored.ours.endswith("router.weight_ED"):
                yield stored
        router = f"{theirs}.mlp.router"
        for our_name, their_name in {
            **{"weight_ED": "classifier.weight.real", "null_weight_ZD": "classifier.weight.zero"},
            "selection_bias_E": "e_score_correction_bias.real",
            "policy.column_bias_Z": "e_score_correction_bias.zero",
        }.items():
            yield Stored(f"{ours}.moe.router.{our_name}", (f"{router}.{their_name}",), SAME)
    yield Stored("norm.weight", ("model.norm.weight",), SAME)
    if not config.tied_embeddings:
        yield Stored("head_VD", ("lm_head.weight",), SAME)


def pieces(config: ModelConfig) -> Mapping[str, Mapping[str, int]]:
    """See `Family.pieces`: experts that compute and others have one router."""
    found = {}
    for layer in range(0, config.n_layers, 2):
        moe = config.block(layer).moe
        for name in ("classifier.weight", "e_score_correction_bias"):
            whole = f"model.layers.{layer // 2}.mlp.router.{name}"
            found[whole] = {f"{whole}.real": moe.n_experts, f"{whole}.zero": moe.router.policy.null_columns}
    return found


def kept(config: ModelConfig) -> Mapping[str, str]:
    """See `Family.kept`: transformers gives experts that compute nothing two of three matrices."""
    moe = config.block(0).moe
    columns = range(moe.n_experts, moe.n_experts + moe.router.policy.null_columns)
    numbers = "|".join(map(str, columns))
    return {rf"model\.layers\.\d+\.mlp\.experts\.({numbers})\.({'|'.join(PARTS)})\.weight": "zero experts"}


def beside(config: ModelConfig) -> Mapping[str, str]:
    """See `Family.beside`."""
    return {r"model\.mtp\..*": "multi-token prediction"}


FAMILY = Family(
    model_type="longcat_flash",
    read=read,
    tensors=tensors,
    aliases={
        **{"num_experts_per_tok": ("moe_topk",), "moe_intermediate_size": ("expert_ffn_hidden_size",)},
        **{"intermediate_size": ("ffn_hidden_size",), "n_routed_experts": ("num_local_experts",)},
    },
    beside=beside,
    pieces=pieces,
    kept=kept,
    tiny={
        **{"num_layers": 2, "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "head_dim": 4},
        **{"v_head_dim": 6, "kv_lora_rank": 12, "q_lora_rank": 16, "ffn_hidden_size": 40, "moe_topk": 3},
        **{"expert_ffn_hidden_size": 24, "n_routed_experts": 8, "zero_expert_num": 4, "routed_scaling_factor": 6.0},
    },
)
