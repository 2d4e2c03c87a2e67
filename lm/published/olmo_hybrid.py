"""OLMo Hybrid (AI2): gated DeltaNet with eigenvalues from -1 to 1 behind a norm, and full attention before one, usually
3:1 and without positions; dense MLPs.

Legend: H heads of values, J heads of keys, K key width, V value width, W convolution width.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from attention.config import AttentionConfig
from lm.config import ModelConfig
from lm.published.family import (
    Family,
    decoder_tensors,
    experts_tensors,
    read_attention,
    read_letters,
    read_sizes,
    single_expert,
    softmax_tensors,
)
from lm.published.fields import Fields
from lm.published.layouts import SAME, Stored, below, reshaped, rows

LETTERS = {"linear_attention": "G", "full_attention": "F"}
NORMS = {
    "pre": {"attention_norm": "attention_layer_norm", "moe_norm": "feedforward_layer_norm"},
    "post": {"attention_out_norm": "post_attention_layernorm", "moe_out_norm": "post_feedforward_layernorm"},
}
# Of the norm over what a gated DeltaNet reads, whatever config.json says of the others.
OUTPUT_EPS = 1e-5


def read(fields: Fields) -> ModelConfig:
    """See `Family.read`."""
    sizes = read_sizes(fields)
    fields.only("attention_bias", False)
    # How weights were drawn.
    for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor"):
        fields.get(f"linear_{name}", float, None)
    heads = fields.get("num_attention_heads", int)
    key_heads = fields.get("linear_num_key_heads", int, heads)
    key_dim = fields.get("linear_key_head_dim", int, int(0.75 * sizes["d_model"] / key_heads))
    attention = read_attention(
        fields,
        positions=_has_positions(fields),
        qk_norm_whole=True,
        linear_heads=fields.get("linear_num_value_heads", int, heads),
        linear_key_heads=key_heads,
        linear_key_dim=key_dim,
        linear_value_dim=fields.get("linear_value_head_dim", int, 2 * key_dim),
        negative_eigenvalues=fields.get("linear_allow_neg_eigval", bool, True),
        conv_width=fields.get("linear_conv_kernel_dim", int, 4),
    )
    usual = ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(sizes["n_layers"])]
    if "full_attention" not in usual:
        usual[-1] = "full_attention"
    moe = single_expert(fields.get("intermediate_size", int))
    plan = read_letters(fields, LETTERS, usual)
    config = ModelConfig(**sizes, layer_plan=plan, attention=attention, moe=moe, norm="post")
    linear = dataclasses.replace(attention, norm_eps=OUTPUT_EPS)
    blocks = map(config.block, range(config.n_layers))
    return config.with_blocks(
        [dataclasses.replace(b, attention=linear, norm="pre") if b.letter == "G" else b for b in blocks]
    )


def _has_positions(fields: Fields) -> bool:
    """Whether full attention has a rotary embedding: unless its base is null.

    Raises:
        ValueError: where null stands for all that is said of it, which its authors and transformers read otherwise.
    """
    values = fields.values
    rope = values.get("rope_parameters")
    if "rope_parameters" in values and rope is None and "rope_theta" not in values:
        raise ValueError(
            f"{fields.place}: rope_parameters = None is read in two ways; legal: an object, whose rope_theta is None"
            " where there are no positions"
        )
    return (rope if isinstance(rope, dict) else values).get("rope_theta", 0.0) is not None


def tensors(config: ModelConfig) -> Iterator[Stored]:
    """See `Family.tensors`."""
    yield from decoder_tensors(config, NORMS)
    for layer in range(config.n_layers):
        block = config.block(layer)
        yield from (_linear_tensors if block.letter == "G" else softmax_tensors)(layer, block.attention)
        yield from experts_tensors(layer, block.moe)


def _linear_tensors(layer: int, attention: AttentionConfig) -> Iterator[Stored]:
    ours, theirs = f"blocks.{layer}.attention", f"model.layers.{layer}.linear_attn"
    (H, K, V), J, W = attention.linear_shape, attention.key_heads, attention.conv_width
    names = ("q_proj", "k_proj", "v_proj", "g_proj", "a_proj", "b_proj")
    inner = rows(J * K, J * K, H * V, H * V, H, H)
    yield Stored(f"{ours}.to_inner.weight", tuple(f"{theirs}.{name}.weight" for name in names), inner)
    taps = reshaped((-1, W), (-1, 1, W))
    convolutions = tuple(f"{theirs}.{part}_conv1d.weight" for part in "qkv")
    # transformers writes three of equal height, whatever the widths of queries, keys and values.
    layout = below((1, J * K, taps), (1, J * K, taps), (1, H * V, taps))
    yield Stored(f"{ours}.conv_XW", convolutions, layout, any_heights=True)
    same = {"decay_gate.A_log_H": "A_log", "decay_gate.dt_bias": "dt_bias"}
    same |= {"norm.weight": "o_norm.weight", "to_out.weight": "o_proj.weight"}
    for our_name, their_name in same.items():
        yield Stored(f"{ours}.{our_name}", (f"{theirs}.{their_name}",), SAME)


def other_names(config: ModelConfig) -> Mapping[str, str]:
    """See `Family.other_names`: transformers calls this norm of full attention so when it writes, and reads both."""
    return {
        rf"model\.layers\.{at}\.feedforward_layer_norm\.weight": f"model.layers.{at}.post_attention_layernorm.weight"
        for at in range(config.n_layers)
        if config.block(at).letter == "F"
    }


FAMILY = Family(
    model_type="olmo_hybrid",
    read=read,
    tensors=tensors,
    tiny={
        **{"num_key_value_heads": 2, "intermediate_size": 40, "linear_key_head_dim": 6, "linear_value_head_dim": 12},
        "rope_parameters": {"rope_type": "default", "rope_theta": None},
    },
    other_names=other_names,
    delta_rule=True,
)
