"""What an adapter says about a family of published models, and the parts that most families have in common.

Names of published tensors are data: a family gives its own where they differ.

Legend: D model width, F expert width, E experts, H query heads, G key/value heads, K head width.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from attention.config import AttentionConfig
from lm.accounting import meta_model
from lm.config import BlockOverride, ModelConfig
from lm.published.fields import Fields
from lm.published.layouts import SAME, Stored, below, experts, headwise, rows, transposed_rows
from lm.published.rotary import read_rotary, without_rotary
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig

# By where a block normalises: what its norms are called here and there.
NORMS = {
    "pre": {"attention_norm": "input_layernorm", "moe_norm": "post_attention_layernorm"},
    "post": {"attention_out_norm": "post_attention_layernorm", "moe_out_norm": "post_feedforward_layernorm"},
}
# What the two or three matrices of an MLP are called: gate, up, down.
PARTS = ("gate_proj", "up_proj", "down_proj")
# What is said of quantised weights beside the method, and shows in the files themselves.
QUANTISED = ("modules_to_not_convert", "dequantize")


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
        other_names: what files also call tensors, by regular expression, each with what turns it into the name that
            `tensors` has; export writes the latter.
        pieces: published tensors that hold several things below each other of which ours are apart: the names that
            `tensors` has for these, and their heights.
        stacked: published tensors [E, R, C] of all experts of a layer: what the parts of each expert, below each other,
            are called by `tensors`, and their heights; export writes these.
        kept: published tensors that are stored, and that nothing reads, by regular expression, each with what it is:
            import keeps them beside the model, export writes them again.
        after_export: fields of config.json that export sets where they are, because what they speak of was left out;
            to None: that it leaves out.
        tiny: fields of a small model of the family, with which `python -m lm parity` holds ours against transformers'.
        delta_rule: whether layers with a delta rule are among it: rounding grows in them, on both sides.
    """

    model_type: str
    read: Callable[[Fields], ModelConfig]
    tensors: Callable[[ModelConfig], Iterator[Stored]]
    aliases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    beside: Callable[[ModelConfig], Mapping[str, str]] = lambda config: {}
    other_names: Callable[[ModelConfig], Mapping[str, str]] = lambda config: {}
    pieces: Callable[[ModelConfig], Mapping[str, Mapping[str, int]]] = lambda config: {}
    stacked: Callable[[ModelConfig], Mapping[str, Sequence[Mapping[str, int]]]] = lambda config: {}
    kept: Callable[[ModelConfig], Mapping[str, str]] = lambda config: {}
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


def read_sizes(
    fields: Fields, *, n_layers: int | None = None, tied: bool = False, packed: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Arguments of `ModelConfig` that every family has.

    Args:
        packed: ways to quantise weights that `Checkpoint.unpack` reads.
        n_layers: where it is not the file's number.
        tied: whether the head is the embedding, where the file does not say.
    """
    if (quantised := fields.part("quantization_config")) is not None:
        method = quantised.get("quant_method", str, "")
        if method not in packed:
            raise ValueError(
                f"{fields.place}: quantization_config with quant_method = {method!r} is not supported; legal:"
                f" {', '.join((*map(repr, packed), 'none at all'))}: dequantise the weights and save them first"
            )
        # Which modules are not, the file of weights shows.
        quantised.done(QUANTISED)
    fields.only("hidden_act", "silu")
    dtype = fields.get("dtype", str, None) or fields.get("torch_dtype", str, "float32")
    fields.get("torch_dtype", str, None)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{fields.place}: dtype = {dtype!r} is not supported; legal: float32, bfloat16, float16")
    return {
        "vocab_size": fields.get("vocab_size", int),
        "d_model": fields.get("hidden_size", int),
        "n_layers": fields.get("num_hidden_layers", int) if n_layers is None else n_layers,
        "norm_eps": fields.get("rms_norm_eps", float),
        "tied_embeddings": fields.get("tie_word_embeddings", bool, tied),
        # Half precision is a way to store weights here, not one to compute in.
        "dtype": "bfloat16" if dtype == "bfloat16" else "float32",
    }


def read_attention(
    fields: Fields,
    *,
    rope_base: float = 10_000.0,
    rotary_fraction: float = 1.0,
    positions: bool = True,
    ignored: tuple[str, ...] = (),
    **options: Any,
) -> AttentionConfig:
    """Heads, widths and rotary embedding of softmax layers.

    Args:
        rope_base: where the file has none, and so `rotary_fraction`.
        positions: whether there is a rotary embedding.
        ignored: what is said of it that makes no difference to texts.
        options: further fields of `AttentionConfig`.
    """
    # Dropout of attention weights exists in training only, and published models are trained without.
    fields.only("attention_dropout", 0.0)
    n_heads = fields.get("num_attention_heads", int)
    return AttentionConfig(
        n_heads=n_heads,
        n_kv_heads=fields.get("num_key_value_heads", int, n_heads),
        head_dim=fields.get("head_dim", int, fields.get("hidden_size", int) // n_heads),
        **(read_rotary(fields, rope_base, rotary_fraction, ignored) if positions else without_rotary(fields)),
        **{"norm_eps": fields.get("rms_norm_eps", float), **options},
    )


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


def read_sigmoid_router(fields: Fields) -> RouterConfig:
    """The router of DeepSeek-V3 (arXiv 2412.19437): sigmoid scores, a bias that selects and never weighs, groups,
    scaled weights, no balance loss."""
    return RouterConfig(
        policy=TopK(
            k=fields.get("num_experts_per_tok", int),
            n_groups=fields.get("n_group", int, 1),
            top_groups=fields.get("topk_group", int, 1),
        ),
        score="sigmoid",
        renormalise=fields.get("norm_topk_prob", bool, True),
        scaling=fields.get("routed_scaling_factor", float, 1.0),
        balance_coefficient=0.0,
        z_coefficient=0.0,
    )


def read_sigmoid_experts(fields: Fields, d_expert: int) -> MoEConfig:
    """Experts that such a router chooses, and a shared one as wide as several of them."""
    return MoEConfig(
        n_experts=fields.get("n_routed_experts", int),
        d_expert=d_expert,
        d_shared=fields.get("n_shared_experts", int, 1) * d_expert,
        router=read_sigmoid_router(fields),
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


def single_expert(width: int, **options: Any) -> MoEConfig:
    """A dense MLP of this width: a single expert, which every token has whole; of width 0, none.

    Args:
        options: further fields of `MoEConfig`.
    """
    router = RouterConfig(policy=TopK(k=1), renormalise=True, balance_coefficient=0.0, z_coefficient=0.0)
    return MoEConfig(n_experts=1, d_expert=width, router=router, **options)


def with_dense(config: ModelConfig, dense: Sequence[bool], d_expert: int) -> ModelConfig:
    """The model with a dense MLP of this width in some layers.

    Args:
        dense: for every layer, whether it is one of them.
    """
    if not any(dense):
        return config
    moe = single_expert(d_expert)
    blocks = tuple(BlockOverride(moe=moe if is_dense else None) for is_dense in dense)
    return dataclasses.replace(config, blocks=blocks)


def decoder_tensors(
    config: ModelConfig, norms: Mapping[str, Mapping[str, str]] = NORMS, last_norm: str = "norm"
) -> Iterator[Stored]:
    """Embedding, norms before attention and experts, or behind them, last norm, head.

    Args:
        norms: what they are called, and `last_norm`.
    """
    yield Stored("embedding_VD", ("model.embed_tokens.weight",), SAME)
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        for our_norm, their_norm in norms[config.block(layer).norm].items():
            yield Stored(f"{ours}.{our_norm}.weight", (f"{theirs}.{their_norm}.weight",), SAME)
    yield Stored("norm.weight", (f"model.{last_norm}.weight",), SAME)
    if not config.tied_embeddings:
        yield Stored("head_VD", ("lm_head.weight",), SAME)


def softmax_tensors(
    layer: int, attention: AttentionConfig, theirs: str | None = None, out: str = "o_proj", norm: str = "{}_norm"
) -> Iterator[Stored]:
    """A softmax layer with four projections; where it has an output gate, every head's lies behind its query.

    Args:
        theirs: the published module.
        out: what its last projection is called.
        norm: what its norms of queries and keys are called, with a place for q or k.
    """
    ours, theirs = f"blocks.{layer}.attention", theirs or f"model.layers.{layer}.self_attn"
    H, G, K = attention.n_heads, attention.n_kv_heads, attention.head_dim
    inner = tuple(f"{theirs}.{part}_proj.weight" for part in "qkv")
    if attention.output_gate:
        queries = (1, 2 * H * K, headwise(H, (K, K)))
        layout = below(queries, (1, G * K, SAME), (1, G * K, SAME))
    else:
        layout = rows(H * K, G * K, G * K)
    yield Stored(f"{ours}.to_inner.weight", inner, layout)
    yield Stored(f"{ours}.to_out.weight", (f"{theirs}.{out}.weight",), SAME)
    if attention.qkv_bias:
        yield Stored(f"{ours}.to_inner.bias", tuple(f"{theirs}.{part}_proj.bias" for part in "qkv"), layout)
    if attention.out_bias:
        yield Stored(f"{ours}.to_out.bias", (f"{theirs}.{out}.bias",), SAME)
    if attention.sink_logits:
        yield Stored(f"{ours}.sink_H", (f"{theirs}.sinks",), SAME)
    if attention.qk_norm:
        for part in "qk":
            yield Stored(f"{ours}.{part}_norm.weight", (f"{theirs}.{norm.format(part)}.weight",), SAME)


def experts_tensors(
    layer: int,
    moe: MoEConfig,
    theirs: str | None = None,
    parts: Sequence[str] = PARTS,
    dense_parts: Sequence[str] | None = None,
) -> Iterator[Stored]:
    """A router and experts, stored one by one; or the dense MLP in their place.

    Args:
        theirs: the published module.
        parts: what an expert's matrices are called, and `dense_parts` those of the dense MLP, if otherwise.
    """
    ours, theirs, E = f"blocks.{layer}.moe", theirs or f"model.layers.{layer}.mlp", moe.n_experts
    if E == 1:
        # Its router, which chooses nothing, is zero.
        *gate_up, down = (f"{theirs}.{part}.weight" for part in dense_parts or parts)
        yield Stored(f"{ours}.experts.w_gate_up_EDF2", tuple(gate_up), experts(1, len(gate_up)))
        yield Stored(f"{ours}.experts.w_down_EFD", (down,), experts(1, 1))
        return
    yield Stored(f"{ours}.router.weight_ED", (f"{theirs}.gate.weight",), SAME)
    for packed, inside in (("w_gate_up_EDF2", parts[:-1]), ("w_down_EFD", parts[-1:])):
        stored = tuple(f"{theirs}.experts.{e}.{part}.weight" for e in range(E) for part in inside)
        yield Stored(f"{ours}.experts.{packed}", stored, experts(E, len(inside)))


def sigmoid_experts_tensors(
    layer: int,
    moe: MoEConfig,
    theirs: str | None = None,
    parts: Sequence[str] = PARTS,
    shared_parts: Sequence[str] = PARTS,
) -> Iterator[Stored]:
    """Experts of `read_sigmoid_experts`, or the dense MLP in their place, whose matrices are called as the shared
    expert's; see `experts_tensors`."""
    theirs = theirs or f"model.layers.{layer}.mlp"
    yield from experts_tensors(layer, moe, theirs, parts, shared_parts)
    if moe.n_experts > 1:
        bias = f"{theirs}.gate.e_score_correction_bias"
        yield Stored(f"blocks.{layer}.moe.router.selection_bias_E", (bias,), SAME)
    if moe.d_shared:
        yield from shared_tensors(layer, f"{theirs}.shared_experts", shared_parts)


def softmax_decoder(config: ModelConfig) -> Iterator[Stored]:
    """A whole decoder of softmax layers and experts."""
    yield from decoder_tensors(config)
    for layer in range(config.n_layers):
        block = config.block(layer)
        yield from softmax_tensors(layer, block.attention)
        yield from experts_tensors(layer, block.moe)


def shared_tensors(layer: int, theirs: str, parts: Sequence[str] = PARTS) -> Iterator[Stored]:
    """A shared expert.

    Args:
        theirs: the published module.
        parts: what its matrices are called.
    """
    ours = f"blocks.{layer}.moe.shared_expert"
    *gate_up, down = (f"{theirs}.{part}.weight" for part in parts)
    yield Stored(f"{ours}.w_gate_up_DF2", tuple(gate_up), transposed_rows(len(gate_up)))
    yield Stored(f"{ours}.w_down_FD", (down,), transposed_rows(1))
