"""Qwen3-Next and the text models of Qwen3.5-MoE: gated DeltaNet (arXiv 2412.06464) and gated full attention (arXiv
2505.06708) at 3:1, a shared expert behind a gate, norms whose weights are their difference from one.

The two differ in how the linear layers' projections are packed: in Qwen3-Next by head of keys, in Qwen3.5 by what they
compute.

Legend: H heads of values, J heads of keys, K key width, V value width.
"""

from collections.abc import Iterator, Mapping, Sequence

from attention.config import AttentionConfig
from lm.config import ModelConfig
from lm.published.family import (
    PARTS,
    Family,
    decoder_tensors,
    experts_tensors,
    read_attention,
    read_dense_layers,
    read_letters,
    read_sizes,
    read_softmax_experts,
    shared_tensors,
    softmax_tensors,
    with_dense,
)
from lm.published.fields import Fields
from lm.published.layouts import SAME, Stored, headwise, reshaped, rows

LETTERS = {"linear_attention": "G", "full_attention": "F"}


def read(fields: Fields) -> ModelConfig:
    """See `Family.read`."""
    config = _read(fields, renormalise=fields.get("norm_topk_prob", bool, True))
    return with_dense(config, read_dense_layers(fields, config.n_layers), fields.get("intermediate_size", int, 1))


def read_qwen3_5(fields: Fields) -> ModelConfig:
    """See `Family.read`. The weights of the chosen are always renormalised, and no layer is dense."""
    # Left over from the dense models of the family.
    fields.get("intermediate_size", int, None)
    fields.only("mlp_only_layers", [])
    fields.only("attn_output_gate", True)
    # Of states that are fp32 here, and of modules that are left out.
    fields.only("mamba_ssm_dtype", "float32")
    fields.get("mtp_num_hidden_layers", int, 0)
    fields.get("mtp_use_dedicated_embeddings", bool, False)
    # How positions in a picture share the rotated channels: of a text they are one and the same.
    return _read(fields, renormalise=True, ignored=("mrope_section", "mrope_interleaved"))


def _read(fields: Fields, *, renormalise: bool, ignored: tuple[str, ...] = ()) -> ModelConfig:
    fields.only("attention_bias", False)
    fields.only("use_sliding_window", False)
    sizes = read_sizes(fields)
    interval = fields.get("full_attention_interval", int, 4)
    usual = ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(sizes["n_layers"])]
    attention = read_attention(
        fields,
        rotary_fraction=0.25,
        ignored=ignored,
        unit_offset=True,
        output_gate=True,
        linear_heads=fields.get("linear_num_value_heads", int),
        linear_key_heads=fields.get("linear_num_key_heads", int),
        linear_key_dim=fields.get("linear_key_head_dim", int),
        linear_value_dim=fields.get("linear_value_head_dim", int),
        conv_width=fields.get("linear_conv_kernel_dim", int),
    )
    moe = read_softmax_experts(
        fields,
        sizes["n_layers"],
        renormalise=renormalise,
        d_expert=fields.get("moe_intermediate_size", int),
        d_shared=fields.get("shared_expert_intermediate_size", int),
        shared_gate=True,
    )
    plan = read_letters(fields, LETTERS, usual)
    return ModelConfig(**sizes, layer_plan=plan, attention=attention, moe=moe, unit_offset=True)


def tensors(config: ModelConfig) -> Iterator[Stored]:
    """See `Family.tensors`."""
    yield from _tensors(config, packed=True)


def tensors_qwen3_5(config: ModelConfig) -> Iterator[Stored]:
    """See `Family.tensors`."""
    yield from _tensors(config, packed=False)


def _tensors(config: ModelConfig, *, packed: bool) -> Iterator[Stored]:
    yield from decoder_tensors(config)
    for layer in range(config.n_layers):
        block = config.block(layer)
        if block.letter == "G":
            yield from _linear_tensors(layer, block.attention, packed=packed)
        else:
            yield from softmax_tensors(layer, block.attention)
        yield from experts_tensors(layer, block.moe)
        if block.moe.d_shared:
            yield from shared_tensors(layer, f"model.layers.{layer}.mlp.shared_expert")
            gate = f"model.layers.{layer}.mlp.shared_expert_gate.weight"
            yield Stored(f"blocks.{layer}.moe.shared_gate_D", (gate,), reshaped((-1,), (1, -1)))


def _linear_tensors(layer: int, attention: AttentionConfig, *, packed: bool) -> Iterator[Stored]:
    ours, theirs = f"blocks.{layer}.attention", f"model.layers.{layer}.linear_attn"
    (H, K, V), J = attention.linear_shape, attention.key_heads
    if packed:
        # A head of keys holds its query, its key, and the values and gates of the heads that share them; then what
        # each of those writes by and forgets by, which are the other way round here.
        served = H // J
        inner = headwise(J, (K, K, served * V, served * V), (served, served), order=(0, 1, 2, 3, 5, 4))
        yield Stored(f"{ours}.to_inner.weight", _weights(theirs, "in_proj_qkvz", "in_proj_ba"), inner)
    else:
        inner = rows(attention.conv_channels, H * V, H, H)
        names = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b")
        yield Stored(f"{ours}.to_inner.weight", _weights(theirs, *names), inner)
    W = attention.conv_width
    yield Stored(f"{ours}.conv_XW", _weights(theirs, "conv1d"), reshaped((-1, W), (-1, 1, W)))
    yield Stored(f"{ours}.decay_gate.A_log_H", (f"{theirs}.A_log",), SAME)
    yield Stored(f"{ours}.decay_gate.dt_bias", (f"{theirs}.dt_bias",), SAME)
    yield Stored(f"{ours}.norm.weight", _weights(theirs, "norm"), SAME)
    yield Stored(f"{ours}.to_out.weight", _weights(theirs, "out_proj"), SAME)


def _weights(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}.weight" for name in names)


TINY = {
    "num_experts": 8,
    **{"num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
}


def beside(config: ModelConfig) -> Mapping[str, str]:
    """See `Family.beside`."""
    return {r"mtp\..*": "multi-token prediction"}


def beside_qwen3_5(config: ModelConfig) -> Mapping[str, str]:
    """See `Family.beside`."""
    return {**beside(config), r"model\.visual\..*": "a vision tower"}


def other_names(config: ModelConfig) -> Mapping[str, str]:
    """See `Family.other_names`: of the decoder in a model that also sees."""
    return {r"model\.language_model\.(.+)": r"model.\1"}


def stacked(config: ModelConfig) -> Mapping[str, Sequence[Mapping[str, int]]]:
    """See `Family.stacked`: how models that also see are released."""
    found = {}
    for layer in range(config.n_layers):
        moe = config.block(layer).moe
        for whole, parts, height in (
            ("gate_up_proj", PARTS[:-1], moe.d_expert),
            ("down_proj", PARTS[-1:], config.d_model),
        ):
            experts = f"model.layers.{layer}.mlp.experts"
            found[f"{experts}.{whole}"] = [
                {f"{experts}.{e}.{part}.weight": height for part in parts} for e in range(moe.n_experts)
            ]
    return found


FAMILY = Family(
    model_type="qwen3_next",
    read=read,
    tensors=tensors,
    aliases={"num_experts": ("num_local_experts",)},
    beside=beside,
    tiny={**TINY, "mlp_only_layers": [2], "intermediate_size": 40},
    delta_rule=True,
)
QWEN3_5 = Family(
    model_type="qwen3_5_moe_text",
    read=read_qwen3_5,
    tensors=tensors_qwen3_5,
    aliases={"num_experts": ("num_local_experts",)},
    beside=beside_qwen3_5,
    other_names=other_names,
    stacked=stacked,
    after_export={"mtp_num_hidden_layers": 0},
    tiny=TINY,
    delta_rule=True,
)
