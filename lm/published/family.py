"""What an adapter says about a family of published models, and the parts that most families have in common.

Names of published tensors are data: a family gives its own where they differ.

Legend: D model width, F expert width, E experts, H query heads, G key/value heads, K head width.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from attention.config import AttentionConfig
from attention.yarn import Yarn
from lm.accounting import meta_model
from lm.config import BlockOverride, ModelConfig
from lm.published.fields import Fields
from lm.published.layouts import SAME, Stored, below, experts, headwise, rows, transposed_rows
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig

# By where a block normalises: what its norms are called here and there.
NORMS = {
    "pre": {"attention_norm": "input_layernorm", "moe_norm": "post_attention_layernorm"},
    "post": {"attention_out_norm": "post_attention_layernorm", "moe_out_norm": "post_feedforward_layernorm"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of published models.

    Attributes:
        model_type: what config.json calls it.
        read: our configuration, from the fields of a config.json; refuses what it cannot express.
        tensors: where every tensor of ours is stored, but for training state (`load_E`) and parts that the family does
            not have, which are zero.
        aliases: see `Fields`.
        beside: published tensors that are no part of the decoder, by regular expression, each with what it is: they
            are left out.
        after_export: fields of config.json that export sets where they are, because what they speak of was left out.
        tiny: fields of a small model of the family, with which `python -m lm parity` holds ours against transformers'.
        delta_rule: whether layers with a delta rule are among it: rounding grows in them, on both sides.
    """

    model_type: str
    read: Callable[[Fields], ModelConfig]
    tensors: Callable[[ModelConfig], Iterator[Stored]]
    aliases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    beside: Callable[[ModelConfig], Mapping[str, str]] = lambda config: {}
    after_export: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tiny: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    delta_rule: bool = False

    def configuration(self, values: Mapping[str, Any], place: str) -> ModelConfig:
        """Our configuration of a published config.json.

        Raises:
            ValueError: for a field or a value that is not supported; names the place.
        """
        fields = Fields(values, place, self.aliases)
        try:
            config = self.read(fields)
            # Numbers that do not fit together are refused where modules are built.
            meta_model(config)
        except ValueError as error:
            raise error if str(error).startswith(place) else ValueError(f"{place}: {error}") from error
        fields.done()
        return config


def read_sizes(fields: Fields) -> dict[str, Any]:
    """Arguments of `ModelConfig` that every family has, and what none of ours may have: tied embeddings, quantised
    weights."""
    fields.only("tie_word_embeddings", False)
    fields.only("quantization_config", None)
    fields.only("hidden_act", "silu")
    dtype = fields.get("dtype", str, None) or fields.get("torch_dtype", str, "float32")
    fields.get("torch_dtype", str, None)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{fields.place}: dtype = {dtype!r} is not supported; legal: float32, bfloat16, float16")
    return {
        "vocab_size": fields.get("vocab_size", int),
        "d_model": fields.get("hidden_size", int),
        "n_layers": fields.get("num_hidden_layers", int),
        "norm_eps": fields.get("rms_norm_eps", float),
        # Half precision is a way to store weights here, not one to compute in.
        "dtype": "bfloat16" if dtype == "bfloat16" else "float32",
    }


def read_attention(
    fields: Fields, *, rope_base: float = 10_000.0, rotary_fraction: float = 1.0, **options: Any
) -> AttentionConfig:
    """Heads, widths and rotary embedding of softmax layers.

    Args:
        rope_base: where the file has none, and so `rotary_fraction`.
        options: further fields of `AttentionConfig`.
    """
    # Dropout of attention weights exists in training only, and published models are trained without.
    fields.only("attention_dropout", 0.0)
    n_heads = fields.get("num_attention_heads", int)
    return AttentionConfig(
        n_heads=n_heads,
        n_kv_heads=fields.get("num_key_value_heads", int, n_heads),
        head_dim=fields.get("head_dim", int, fields.get("hidden_size", int) // n_heads),
        **read_rotary(fields, rope_base, rotary_fraction),
        norm_eps=fields.get("rms_norm_eps", float),
        **options,
    )


def read_rotary(fields: Fields, base: float, fraction: float) -> dict[str, Any]:
    """What `AttentionConfig` says of the rotary embedding, from what transformers writes since its version 5
    (`rope_parameters`), or wrote before.

    Args:
        base: where the file has none, and so `fraction`.
    """
    base = fields.get("rope_theta", float, base)
    fraction = fields.get("partial_rotary_factor", float, fraction)
    before, since, yarn = fields.part("rope_scaling"), fields.part("rope_parameters"), None
    if (rope := since or before) is not None:
        rope.aliases = {"rope_type": ("type",)}
        kind = rope.get("rope_type", str, "default")
        rope.only("rope_type", "default", "yarn")
        base = rope.get("rope_theta", float, base)
        fraction = rope.get("partial_rotary_factor", float, fraction)
        if kind == "yarn":
            yarn = Yarn(
                factor=rope.get("factor", float),
                original_length=rope.get("original_max_position_embeddings", int),
                fast_turns=rope.get("beta_fast", float, 32.0),
                slow_turns=rope.get("beta_slow", float, 1.0),
                magnitude=rope.get("attention_factor", float, None),
                whole_pairs=rope.get("truncate", bool, True),
            )
        rope.done(())
    return {"rope_base": base, "rotary_fraction": fraction, "yarn": yarn}


def read_softmax_experts(fields: Fields, n_layers: int, *, renormalise: bool, **options: Any) -> MoEConfig:
    """Experts chosen by the k largest of a softmax.

    The published balance loss pools all layers, ours adds up theirs: with this coefficient they agree where the load is
    even.

    Args:
        options: further fields of `MoEConfig`.
    """
    k = fields.get("num_experts_per_tok", int)
    return MoEConfig(
        n_experts=fields.get("num_experts", int),
        router=RouterConfig(
            policy=TopK(k=k),
            renormalise=renormalise,
            balance_coefficient=fields.get("router_aux_loss_coef", float, 0.0) * k / n_layers,
            z_coefficient=0.0,
        ),
        **options,
    )


def read_letters(fields: Fields, letters: Mapping[str, str], usual: Sequence[str]) -> str:
    """The layer plan, from the list of the layers' types.

    Args:
        letters: of our plan, by type.
        usual: the types where the file has no list.

    Raises:
        ValueError: for another type, or another number of them than of layers.
    """
    types = fields.get("layer_types", list, list(usual))
    if len(types) != len(usual) or any(kind not in letters for kind in types):
        raise ValueError(f"{fields.place}: layer_types = {types}; legal: {len(usual)} of {', '.join(letters)}")
    return "".join(letters[kind] for kind in types)


def read_dense_layers(fields: Fields, n_layers: int) -> tuple[bool, ...]:
    """Which layers have a dense MLP in place of experts, as Qwen's configurations say it."""
    listed, step = fields.get("mlp_only_layers", list, []), fields.get("decoder_sparse_step", int, 1)
    return tuple(layer in listed or (layer + 1) % step != 0 for layer in range(n_layers))


def with_dense(config: ModelConfig, dense: Sequence[bool], d_expert: int) -> ModelConfig:
    """The model with a dense MLP of this width in some layers: a single expert, which every token has whole.

    Args:
        dense: for every layer, whether it is one of them.
    """
    if not any(dense):
        return config
    router = RouterConfig(policy=TopK(k=1), renormalise=True, balance_coefficient=0.0, z_coefficient=0.0)
    moe = MoEConfig(n_experts=1, d_expert=d_expert, router=router)
    blocks = tuple(BlockOverride(moe=moe if is_dense else None) for is_dense in dense)
    return dataclasses.replace(config, blocks=blocks)


def decoder_tensors(config: ModelConfig) -> Iterator[Stored]:
    """Embedding, norms before attention and experts, or behind them, last norm, head."""
    yield Stored("embedding_VD", ("model.embed_tokens.weight",), SAME)
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        for our_norm, their_norm in NORMS[config.block(layer).norm].items():
            yield Stored(f"{ours}.{our_norm}.weight", (f"{theirs}.{their_norm}.weight",), SAME)
    yield Stored("norm.weight", ("model.norm.weight",), SAME)
    yield Stored("head_VD", ("lm_head.weight",), SAME)


def softmax_tensors(layer: int, attention: AttentionConfig, name: str = "self_attn") -> Iterator[Stored]:
    """A softmax layer with four projections; where it has an output gate, every head's lies behind its query."""
    ours, theirs = f"blocks.{layer}.attention", f"model.layers.{layer}.{name}"
    H, G, K = attention.n_heads, attention.n_kv_heads, attention.head_dim
    inner = tuple(f"{theirs}.{part}_proj.weight" for part in "qkv")
    if attention.output_gate:
        queries = (1, 2 * H * K, headwise(H, (K, K)))
        layout = below(queries, (1, G * K, SAME), (1, G * K, SAME))
    else:
        layout = rows(H * K, G * K, G * K)
    yield Stored(f"{ours}.to_inner.weight", inner, layout)
    yield Stored(f"{ours}.to_out.weight", (f"{theirs}.o_proj.weight",), SAME)
    if attention.qkv_bias:
        yield Stored(f"{ours}.to_inner.bias", tuple(f"{theirs}.{part}_proj.bias" for part in "qkv"), layout)
    if attention.out_bias:
        yield Stored(f"{ours}.to_out.bias", (f"{theirs}.o_proj.bias",), SAME)
    if attention.sink_logits:
        yield Stored(f"{ours}.sink_H", (f"{theirs}.sinks",), SAME)
    if attention.qk_norm:
        for part in "qk":
            yield Stored(f"{ours}.{part}_norm.weight", (f"{theirs}.{part}_norm.weight",), SAME)


def experts_tensors(layer: int, moe: MoEConfig, name: str = "mlp") -> Iterator[Stored]:
    """A router and SwiGLU experts, stored one by one; or the dense MLP in their place."""
    ours, theirs, E = f"blocks.{layer}.moe", f"model.layers.{layer}.{name}", moe.n_experts
    if E == 1:
        # Its router, which chooses nothing, is zero.
        gate_up = tuple(f"{theirs}.{part}_proj.weight" for part in ("gate", "up"))
        yield Stored(f"{ours}.experts.w_gate_up_EDF2", gate_up, experts(1, 2))
        yield Stored(f"{ours}.experts.w_down_EFD", (f"{theirs}.down_proj.weight",), experts(1, 1))
        return
    yield Stored(f"{ours}.router.weight_ED", (f"{theirs}.gate.weight",), SAME)
    for packed, parts in (("w_gate_up_EDF2", ("gate", "up")), ("w_down_EFD", ("down",))):
        stored = tuple(f"{theirs}.experts.{e}.{part}_proj.weight" for e in range(E) for part in parts)
        yield Stored(f"{ours}.experts.{packed}", stored, experts(E, len(parts)))


def softmax_decoder(config: ModelConfig) -> Iterator[Stored]:
    """A whole decoder of softmax layers and experts."""
    yield from decoder_tensors(config)
    for layer in range(config.n_layers):
        block = config.block(layer)
        yield from softmax_tensors(layer, block.attention)
        yield from experts_tensors(layer, block.moe)


def shared_tensors(layer: int, name: str) -> Iterator[Stored]:
    """A shared expert."""
    ours, theirs = f"blocks.{layer}.moe.shared_expert", f"model.layers.{layer}.{name}"
    gate_up = tuple(f"{theirs}.{part}_proj.weight" for part in ("gate", "up"))
    yield Stored(f"{ours}.w_gate_up_DF2", gate_up, transposed_rows(2))
    yield Stored(f"{ours}.w_down_FD", (f"{theirs}.down_proj.weight",), transposed_rows(1))
