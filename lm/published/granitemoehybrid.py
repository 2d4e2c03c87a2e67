"""Granite 4 (IBM): Mamba-2 and a little full attention, usually without positions; experts chosen by the k largest
logits and weighed by their softmax, or none, beside an MLP for every token; and four multipliers."""

from collections.abc import Iterator

from lm.config import ModelConfig, Residual
from lm.published.family import (
    Family,
    decoder_tensors,
    read_attention,
    read_letters,
    read_sizes,
    read_softmax_experts,
    single_expert,
    softmax_tensors,
)
from lm.published.fields import Fields
from lm.published.layouts import SAME, TRANSPOSED, Stored, experts, transposed_rows
from lm.published.mamba import mamba_tensors, read_step_limits

LETTERS = {"linear_attention": "D", "mamba": "D", "full_attention": "F", "attention": "F"}


def read(fields: Fields) -> ModelConfig:
    """See `Family.read`."""
    sizes = read_sizes(fields)
    fields.only("normalization_function", "rmsnorm")
    fields.only("mamba_conv_bias", True)
    fields.only("mamba_proj_bias", False)
    # How weights were drawn; in what pieces kernels compute.
    fields.get("init_method", str, None)
    fields.get("mamba_chunk_size", int, None)
    fields.only("position_embedding_type", None, "rope", "nope")
    heads = fields.get("mamba_n_heads", int, 128)
    inner = fields.get("mamba_expand", int, 2) * sizes["d_model"]
    bias = fields.get("attention_bias", bool, False)
    attention = read_attention(
        fields,
        positions=fields.get("position_embedding_type", str, "nope") == "rope",
        qk_norm=False,
        qkv_bias=bias,
        out_bias=bias,
        softmax_scale=fields.get("attention_multiplier", float, 1.0),
        linear_heads=heads,
        linear_key_dim=fields.get("mamba_d_state", int, 256),
        linear_value_dim=fields.get("mamba_d_head", int, inner // heads),
        mamba_groups=fields.get("mamba_n_groups", int, 1),
        mamba_step_floor=read_step_limits(fields),
        conv_width=fields.get("mamba_d_conv", int, 4),
    )
    plan = read_letters(fields, LETTERS, ["linear_attention"] * sizes["n_layers"])
    width, shared = fields.get("intermediate_size", int), fields.get("shared_intermediate_size", int, 1024)
    if fields.get("num_experts", int, 8):
        moe = read_softmax_experts(fields, sizes["n_layers"], renormalise=True, d_expert=width, d_shared=shared)
    else:
        # What there is of a router's settings is without effect.
        fields.get("num_experts_per_tok", int, None)
        fields.get("router_aux_loss_coef", float, None)
        moe = single_expert(shared)
    added = fields.get("residual_multiplier", float, 1.0)
    return ModelConfig(
        **sizes,
        layer_plan=plan,
        attention=attention,
        moe=moe,
        embedding_scale=fields.get("embedding_multiplier", float, 1.0),
        residual=Residual(attention_added=added, experts_added=added),
        logit_scale=1.0 / fields.get("logits_scaling", float, 1.0),
    )


def tensors(config: ModelConfig) -> Iterator[Stored]:
    """See `Family.tensors`."""
    yield from decoder_tensors(config)
    for layer in range(config.n_layers):
        block, theirs = config.block(layer), f"model.layers.{layer}"
        if block.letter == "D":
            yield from mamba_tensors(layer, block.attention, f"{theirs}.mamba")
        else:
            yield from softmax_tensors(layer, block.attention)
        ours, shared = f"blocks.{layer}.moe", f"{theirs}.shared_mlp"
        into, out = (f"{shared}.input_linear.weight",), (f"{shared}.output_linear.weight",)
        if block.moe.n_experts == 1:
            yield Stored(f"{ours}.experts.w_gate_up_EDF2", into, experts(1, 1))
            yield Stored(f"{ours}.experts.w_down_EFD", out, experts(1, 1))
            continue
        yield Stored(f"{ours}.shared_expert.w_gate_up_DF2", into, transposed_rows(1))
        yield Stored(f"{ours}.shared_expert.w_down_FD", out, transposed_rows(1))
        routed = f"{theirs}.block_sparse_moe"
        yield Stored(f"{ours}.router.weight_ED", (f"{routed}.router.layer.weight",), SAME)
        yield Stored(f"{ours}.experts.w_gate_up_EDF2", (f"{routed}.input_linear.weight",), TRANSPOSED)
        yield Stored(f"{ours}.experts.w_down_EFD", (f"{routed}.output_linear.weight",), TRANSPOSED)


FAMILY = Family(
    model_type="granitemoehybrid",
    read=read,
    tensors=tensors,
    aliases={"num_experts": ("num_local_experts",), "layer_types": ("layers_block_type",)},
    tiny={
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        **{"num_key_value_heads": 2, "intermediate_size": 24, "shared_intermediate_size": 20, "num_local_experts": 8},
        **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "attention_bias": True},
        **{"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0},
        **{"attention_multiplier": 0.2, "tie_word_embeddings": True, "position_embedding_type": "rope"},
    },
)
