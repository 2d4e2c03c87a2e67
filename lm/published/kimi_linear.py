"""Kimi Linear (arXiv 2510.26692): Kimi delta attention and latent attention without positions, usually 3:1; experts as
in DeepSeek-V3.

Legend: H heads, K key width, W convolution width.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from attention.config import AttentionConfig
from lm.config import ModelConfig
from lm.published.deepseek_v3 import LATENT_EPS, beside, latent_tensors, read_latent, read_mlp_types
from lm.published.family import (
    Family,
    decoder_tensors,
    read_letters,
    read_sigmoid_experts,
    read_sizes,
    sigmoid_experts_tensors,
    with_dense,
)
from lm.published.fields import Fields
from lm.published.layouts import SAME, Stored, below, reshaped, rows
from lm.published.rotary import without_rotary

LETTERS = {"linear_attention": "K", "full_attention": "A"}


def read(fields: Fields) -> ModelConfig:
    """See `Family.read`."""
    sizes = read_sizes(fields)
    fields.only("mla_use_nope", True)
    fields.only("moe_router_activation_func", "sigmoid")
    fields.only("moe_layer_freq", 1)
    # Says again what the numbers of groups say.
    fields.get("use_grouped_topk", bool, None)
    fields.get("max_position_embeddings", int, None)
    # Modules that predict further tokens; they are not imported.
    fields.get("num_nextn_predict_layers", int, 0)
    linear = fields.part("linear_attn_config") or Fields({}, fields.place)
    head_dim = linear.get("head_dim", int, fields.get("linear_head_dim", int, 128))
    attention = read_latent(
        fields,
        **without_rotary(fields),
        linear_heads=linear.get("num_heads", int, fields.get("linear_num_heads", int, 32)),
        linear_key_dim=head_dim,
        linear_value_dim=head_dim,
        conv_width=linear.get("short_conv_kernel_size", int, fields.get("linear_conv_kernel_dim", int, 4)),
        norm_eps=sizes["norm_eps"],
    )
    plan = read_letters(fields, LETTERS, _usual_types(fields, linear, sizes["n_layers"]))
    linear.done(())
    moe = read_sigmoid_experts(fields, fields.get("moe_intermediate_size", int))
    config = ModelConfig(**sizes, layer_plan=plan, attention=attention, moe=moe)
    dense = read_mlp_types(fields, n_dense=fields.get("first_k_dense_replace", int, 1))
    config = with_dense(config, dense, fields.get("intermediate_size", int))
    latent = dataclasses.replace(attention, norm_eps=LATENT_EPS)
    blocks = map(config.block, range(config.n_layers))
    return config.with_blocks(
        [dataclasses.replace(block, attention=latent) if block.letter == "A" else block for block in blocks]
    )


def _usual_types(fields: Fields, linear: Fields, n_layers: int) -> list[str]:
    """The layers' types where the file has no list of them, by the numbers of the layers, which begin at one."""
    layers = range(1, n_layers + 1)
    full = linear.get("full_attn_layers", list, list(range(5, n_layers + 1, 4)))
    kda = linear.get("kda_layers", list, [layer for layer in layers if layer not in full])
    if sorted([*full, *kda]) != list(layers):
        raise ValueError(
            f"{fields.place}: linear_attn_config: full_attn_layers = {full} and kda_layers = {kda}; legal: each of the"
            f" layers 1 to {n_layers} in one of them"
        )
    return ["full_attention" if layer in full else "linear_attention" for layer in layers]


def tensors(config: ModelConfig) -> Iterator[Stored]:
    """See `Family.tensors`."""
    yield from decoder_tensors(config)
    for layer in range(config.n_layers):
        block = config.block(layer)
        yield from (latent_tensors if block.letter == "A" else _linear_tensors)(layer, block.attention)
        name = "mlp" if block.moe.n_experts == 1 else "block_sparse_moe"
        yield from sigmoid_experts_tensors(layer, block.moe, f"model.layers.{layer}.{name}", ("w1", "w3", "w2"))


def _linear_tensors(layer: int, attention: AttentionConfig) -> Iterator[Stored]:
    ours, theirs = f"blocks.{layer}.attention", f"model.layers.{layer}.self_attn"
    (H, K, _), W = attention.linear_shape, attention.conv_width
    names = ("q_proj", "k_proj", "v_proj", "g_a_proj", "f_a_proj", "b_proj")
    inner = rows(H * K, H * K, H * K, K, K, H)
    yield Stored(f"{ours}.to_inner.weight", tuple(f"{theirs}.{name}.weight" for name in names), inner)
    taps = (1, H * K, reshaped((-1, W), (-1, 1, W)))
    convolutions = tuple(f"{theirs}.{part}_conv1d.weight" for part in "qkv")
    yield Stored(f"{ours}.conv_XW", convolutions, below(taps, taps, taps))
    yield Stored(f"{ours}.decay_gate.A_log_H", (f"{theirs}.A_log",), reshaped((H,), (1, 1, H, 1)))
    yield Stored(f"{ours}.decay_gate.dt_bias", (f"{theirs}.dt_bias",), SAME)
    renamed = {"to_gate": "g_b_proj", "to_decay": "f_b_proj", "norm": "o_norm", "to_out": "o_proj"}
    for ours_name, theirs_name in renamed.items():
        yield Stored(f"{ours}.{ours_name}.weight", (f"{theirs}.{theirs_name}.weight",), SAME)


def other_names(config: ModelConfig) -> Mapping[str, str]:
    """See `Family.other_names`: transformers calls dense MLPs so when it writes, and reads both."""
    return {r"(.*)\.block_sparse_moe\.((gate|up|down)_proj\.weight)": r"\1.mlp.\2"}


FAMILY = Family(
    model_type="kimi_linear",
    read=read,
    tensors=tensors,
    aliases={
        "max_position_embeddings": ("model_max_length",),
        "norm_topk_prob": ("moe_renormalize",),
        "n_group": ("num_expert_group",),
        "n_routed_experts": ("num_experts", "num_local_experts"),
        "num_experts_per_tok": ("num_experts_per_token",),
        "n_shared_experts": ("num_shared_experts",),
    },
    beside=beside,
    other_names=other_names,
    after_export={"num_nextn_predict_layers": 0},
    tiny={
        **{"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 12},
        **{"moe_intermediate_size": 24, "intermediate_size": 40, "num_local_experts": 8, "n_shared_experts": 1},
        **{"linear_head_dim": 8, "linear_num_heads": 4, "first_k_dense_replace": 1},
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    },
    delta_rule=True,
)
