"""Nemotron-H and Nemotron 3 (NVIDIA, arXiv 2504.03624, 2512.20848): Mamba-2 and a little full attention without
positions, experts and MLPs of squared rectifiers without gates, the router of DeepSeek-V3.

Every published layer is one of these alone. A layer that mixes across tokens is one block here with the experts or MLP
that follow it, or a block without.
"""

from collections.abc import Iterator, Mapping, Sequence

from lm.config import BlockConfig, ModelConfig
from lm.published.family import (
    Family,
    read_attention,
    read_sigmoid_router,
    read_sizes,
    sigmoid_experts_tensors,
    single_expert,
    softmax_tensors,
)
from lm.published.fields import Fields
from lm.published.layouts import SAME, TRANSPOSED, Stored
from lm.published.mamba import mamba_tensors
from moe.config import MoEConfig

MIXERS = {"linear_attention": "D", "mamba": "D", "full_attention": "F", "attention": "F"}
MLPS, NOTHING = ("moe", "mlp"), ""
PATTERN = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
PARTS = ("up_proj", "down_proj")


def read(fields: Fields) -> ModelConfig:
    """See `Family.read`."""
    layers = _read_layers(fields)
    sizes = read_sizes(fields, n_layers=len(layers))
    _refuse_unknown(fields)
    attention = read_attention(
        fields,
        positions=False,
        qk_norm=False,
        linear_heads=fields.get("mamba_num_heads", int),
        linear_key_dim=fields.get("ssm_state_size", int),
        linear_value_dim=fields.get("mamba_head_dim", int),
        mamba_groups=fields.get("n_groups", int, 8),
        # The published forward pass has it, for prompts and training; its step for a single token does not.
        mamba_step_floor=fields.get("time_step_min", float, 0.001),
        conv_width=fields.get("conv_kernel", int, 4),
    )
    mlp = single_expert(fields.get("intermediate_size", int), gated=False)
    by_kind = {"moe": _read_experts(fields, used=any(kind == "moe" for _, kind in layers)) or mlp, "mlp": mlp}
    by_kind[NOTHING] = single_expert(0)
    blocks = [BlockConfig(letter=MIXERS[mixer], attention=attention, moe=by_kind[kind]) for mixer, kind in layers]
    return ModelConfig(**sizes, attention=attention, moe=by_kind["moe"]).with_blocks(blocks)


def _read_experts(fields: Fields, *, used: bool) -> MoEConfig | None:
    """Experts and router; None of a model without, whatever the file says of them."""
    if not used:
        for name in ("n_routed_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size"):
            fields.get(name, int, None)
        for name in ("moe_latent_size", "num_experts_per_tok", "n_group", "topk_group"):
            fields.get(name, int, None)
        fields.get("norm_topk_prob", bool, None)
        fields.get("routed_scaling_factor", float, None)
        return None
    return MoEConfig(
        n_experts=fields.get("n_routed_experts", int),
        d_expert=fields.get("moe_intermediate_size", int),
        d_shared=fields.get("moe_shared_expert_intermediate_size", int),
        d_latent=fields.get("moe_latent_size", int, 0),
        gated=False,
        router=read_sigmoid_router(fields),
    )


def _read_layers(fields: Fields) -> list[tuple[str, str]]:
    """Of every block here, what mixes across tokens and what follows it: one of `MLPS`, or `NOTHING`.

    Raises:
        ValueError: for another type of layer, or an MLP or experts that follow others.
    """
    pattern = fields.get("hybrid_override_pattern", str, "")
    kinds: Sequence[str] = fields.get("layers_block_type", list, [PATTERN.get(letter, letter) for letter in pattern])
    # Says again how many there are.
    fields.only("num_hidden_layers", len(kinds))
    blocks: list[tuple[str, str]] = []
    for at, kind in enumerate(kinds):
        if kind in MIXERS:
            blocks.append((kind, NOTHING))
        elif kind in MLPS and blocks and blocks[-1][1] == NOTHING:
            blocks[-1] = (blocks[-1][0], kind)
        else:
            raise ValueError(
                f"{fields.place}: layer {at} is {kind!r}; legal: {', '.join(MIXERS)}, and one of {', '.join(MLPS)}"
                " behind each of them"
            )
    if not blocks:
        raise ValueError(f"{fields.place}: neither layers_block_type nor hybrid_override_pattern names a layer")
    return blocks


def _refuse_unknown(fields: Fields) -> None:
    fields.only("mlp_hidden_act", "relu2")
    fields.only("mamba_hidden_act", "silu")
    fields.only("n_shared_experts", 1)
    fields.only("sliding_window", None)
    fields.only("hidden_dropout", 0.0)
    fields.only("use_conv_bias", True)
    for bias in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias"):
        fields.only(bias, False)
    # How weights were drawn, how states are kept, which kernels compute them in what pieces, how wide x would be if the
    # heads did not say it.
    for name in ("time_step_max", "time_step_floor"):
        fields.get(name, float, None)
    fields.get("time_step_limit", list, None)
    for name in ("chunk_size", "expand", "num_logits_to_keep"):
        fields.get(name, int, None)
    for name in ("use_mamba_kernels", "rescale_prenorm_residual", "residual_in_fp32", "moe_shared_expert_overlap"):
        fields.get(name, bool, None)
    fields.get("mamba_ssm_cache_dtype", str, None)
    # Modules that predict further tokens; they are not imported.
    fields.get("num_nextn_predict_layers", int, 0)
    fields.get("mtp_layers_block_type", list, None)
    fields.get("mtp_hybrid_override_pattern", str, None)


def tensors(config: ModelConfig) -> Iterator[Stored]:
    """See `Family.tensors`."""
    yield Stored("embedding_VD", ("backbone.embeddings.weight",), SAME)
    at = 0
    for layer in range(config.n_layers):
        block, ours, theirs = config.block(layer), f"blocks.{layer}", f"backbone.layers.{at}"
        yield Stored(f"{ours}.attention_norm.weight", (f"{theirs}.norm.weight",), SAME)
        yield from (mamba_tensors if block.letter == "D" else softmax_tensors)(
            layer, block.attention, f"{theirs}.mixer"
        )
        at += 1
        if block.moe.d_expert:
            theirs = f"backbone.layers.{at}"
            yield Stored(f"{ours}.moe_norm.weight", (f"{theirs}.norm.weight",), SAME)
            yield from sigmoid_experts_tensors(layer, block.moe, f"{theirs}.mixer", PARTS, PARTS)
            if block.moe.d_latent:
                latent = {"latent_in_DL": "fc1_latent_proj", "latent_out_LD": "fc2_latent_proj"}
                for our_name, their_name in latent.items():
                    yield Stored(f"{ours}.moe.{our_name}", (f"{theirs}.mixer.{their_name}.weight",), TRANSPOSED)
            at += 1
    yield Stored("norm.weight", ("backbone.norm_f.weight",), SAME)
    if not config.tied_embeddings:
        yield Stored("head_VD", ("lm_head.weight",), SAME)


def beside(config: ModelConfig) -> Mapping[str, str]:
    """See `Family.beside`."""
    return {r"mtp\..*": "multi-token prediction"}


FAMILY = Family(
    model_type="nemotron_h",
    read=read,
    tensors=tensors,
    aliases={
        "rms_norm_eps": ("layer_norm_epsilon", "norm_eps"),
        "layers_block_type": ("layer_types",),
        "n_routed_experts": ("num_local_experts",),
        "head_dim": ("attention_head_dim",),
        **{"n_groups": ("mamba_n_groups",), "conv_kernel": ("mamba_d_conv",), "expand": ("mamba_expand",)},
        **{"time_step_min": ("mamba_dt_min",), "time_step_max": ("mamba_dt_max",)},
        **{"time_step_limit": ("mamba_dt_limit",), "time_step_floor": ("mamba_dt_init_floor",)},
        **{"use_conv_bias": ("mamba_conv_bias",), "chunk_size": ("mamba_chunk_size",)},
    },
    beside=beside,
    after_export={"num_nextn_predict_layers": 0},
    tiny={
        "layers_block_type": [
            *("linear_attention", "moe", "linear_attention", "full_attention", "moe", "linear_attention", "mlp")
        ],
        **{"num_key_value_heads": 2, "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 6, "ssm_state_size": 8},
        **{"n_groups": 2, "n_routed_experts": 8, "moe_intermediate_size": 24, "intermediate_size": 40},
        **{
            "moe_latent_size": 20,
            "moe_shared_expert_intermediate_size": 20,
            "routed_scaling_factor": 2.5,
            "n_group": 4,
            "topk_group": 2,
        },
        # Shorter than any step: transformers' step for a single token has no shortest one.
        "time_step_min": 1e-6,
    },
)
