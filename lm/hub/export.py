"""A model of our own as a folder that transformers loads with `trust_remote_code=True`, wherever it lies.

The files of the model (`modeling_hybrid_moe.py` and those it imports) are copied beside the weights. They know most of
what this project knows; what they do not know is refused here by name.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from attention.latent import latent_shape
from attention.lightning import lightning_slopes
from corpus.byte_level_tokenizer import ByteLevelTokenizer
from corpus.tokenizer import Tokenizer
from foundation.files import atomic_folder, require_space, write_json
from foundation.serialize import load_json
from lm.block import deep_residual
from lm.config import BlockConfig, ModelConfig, Residual
from lm.pretrained import CONFIG_FILE, WEIGHTS_FILE
from lm.published.checkpoint import DTYPES, Checkpoint, write_checkpoint
from routing.policies.null_experts import NullExperts
from routing.policies.random_k import RandomK
from routing.policies.skipping import Skipping
from routing.policies.threshold import ScoreThreshold
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.router import RouterConfig

HERE = Path(__file__).resolve().parent
CODE = ("configuration_hybrid_moe.py", "attention_hybrid_moe.py", "experts_hybrid_moe.py", "modeling_hybrid_moe.py")
LETTERS = "FSRrLGKDCAM"
MODEL_TYPE = "hybrid_moe_lab"
# Fields of `AttentionConfig` that go over as they are.
ATTENTION_FIELDS = (
    *("n_heads", "n_kv_heads", "head_dim", "window", "rope_base", "rotary_dim", "qk_norm", "qk_norm_whole"),
    *("unit_offset", "qkv_bias", "out_bias", "output_gate", "sink_logits", "norm_eps"),
    *("linear_shape", "key_heads", "conv_width", "mamba_groups", "short_conv_channels"),
)
# What is read of a configuration by other names, or makes no difference to what a trained model computes. Everything
# else is refused where it is not what it is by default.
MODEL_KNOWN = ("vocab_size", "d_model", "n_layers", "layer_plan", "attention", "moe", "norm", "residual", "blocks")
MODEL_KNOWN += ("norm_eps", "unit_offset", "tied_embeddings", "parametrization", "dtype")
ATTENTION_KNOWN = (
    *ATTENTION_FIELDS,
    *("rotary_fraction", "linear_heads", "linear_key_heads", "linear_key_dim", "linear_value_dim", "short_conv_dim"),
    *("mixed_linear_heads", "mixed_window", "latent_dim", "latent_shared_dim", "latent_value_dim"),
    *("latent_query_dim", "latent_scale", "chunk_size"),
)
EXPERTS_FIELDS = ("n_experts", "d_expert", "d_shared", "shared_gate", "expert_bias")
EXPERTS_KNOWN = (*EXPERTS_FIELDS, "clamped", "backend", "router")
ROUTER_FIELDS = ("score", "bias", "renormalise", "scaling")
ROUTER_KNOWN = (*ROUTER_FIELDS, "policy", "balance_coefficient", "z_coefficient", "selection_bias_step")
ROUTER_KNOWN += ("three_level_balance",)
NORMS = ("pre", "post", "sandwich")
# Names of tensors outside the blocks, ours and theirs.
OUTSIDE = {"embedding_VD": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head_VD": "lm_head.weight"}
# What training moves and a trained model does not need.
LEFT_OUT = ("router.load_E", "router.policy.budget.drift", "router.policy.budget.aim")
# Left behind by another policy, where the present one has no such columns.
NULL_COLUMNS = "router.null_weight_ZD"
OUR_THRESHOLD, THRESHOLD = "router.policy.budget.threshold", "router.threshold"
OUR_GAIN, GAIN = "router.policy.gain.root_1", "router.root_1"


def export_own(folder: Path, out: Path, shard_bytes: int) -> str:
    """Writes a model folder of ours as one that transformers loads; returns what was exported, for people to read.

    Args:
        folder: the model folder, checked.
        out: the folder to write; it may not exist yet, or is replaced.
        shard_bytes: of one file of weights, at the most.

    Raises:
        ValueError: for what the exported code does not know; names it.
        foundation.files.DiskFullError: naming the folder.
    """
    config = load_json(ModelConfig, folder / CONFIG_FILE)
    _refuse_others(config, MODEL_KNOWN)
    described = {"blocks": list(describe_blocks(config))}
    weights = Checkpoint(folder, WEIGHTS_FILE)
    with_null = tuple(
        f"blocks.{layer}.moe.{NULL_COLUMNS}"
        for layer in range(config.n_layers)
        if config.block(layer).moe.router.policy.null_columns
    )
    ours = {theirs: name for theirs, name in _names(weights) if NULL_COLUMNS not in name or name in with_null}
    if config.tied_embeddings:
        ours[OUTSIDE["head_VD"]] = "embedding_VD"
    # Every exported router has a threshold, also where its policy compares nothing with one.
    thresholds = {f"model.blocks.{layer}.moe.{THRESHOLD}" for layer in range(config.n_layers)} - ours.keys()
    sizes = dict.fromkeys(sorted(thresholds), 4)
    for theirs, name in ours.items():
        entry = weights.entries[name]
        sizes[theirs] = torch.Size(entry.shape).numel() * DTYPES[entry.dtype].itemsize

    def tensor(theirs: str) -> torch.Tensor:
        return torch.zeros(()) if theirs in thresholds else weights.read(ours[theirs])

    out.parent.mkdir(parents=True, exist_ok=True)
    require_space(out.parent, sum(sizes.values()), f"the model {out}")
    with atomic_folder(out, replace=True) as temporary:
        for name in CODE:
            (temporary / name).write_bytes((HERE / name).read_bytes())
        write_json(temporary / CONFIG_FILE, _config(config, described, _copy_tokenizer(folder, temporary, config)))
        write_checkpoint(temporary, sizes, tensor, shard_bytes)
    return (
        f"{out}: {MODEL_TYPE}, {config.n_layers} blocks {''.join(config.plan.letters)}; load it with trust_remote_code"
    )


def describe_blocks(config: ModelConfig) -> Iterator[dict[str, Any]]:
    """Every block as the exported configuration has it.

    Raises:
        ValueError: naming the block and what is not supported.
    """
    letters, source = config.plan.letters, config.plan.source
    if not set(letters) & set("FSAM"):
        raise ValueError(
            f"layer plan {''.join(letters)}: transformers' cache counts tokens in a softmax layer; legal: a plan with"
            " F, S, A or M"
        )
    windows = {config.block(layer).attention.window for layer, letter in enumerate(letters) if letter in "Sr"}
    if len(windows) > 1:
        raise ValueError(
            f"windows of {sorted(windows)} tokens: transformers' cache knows one; legal: one for all layers"
        )
    for layer, letter in enumerate(letters):
        block = config.block(layer)
        try:
            if block.shortcut:
                raise ValueError("BlockConfig.shortcut: True; legal: False")
            if block.norm not in NORMS:
                raise ValueError(f"BlockConfig.norm: {block.norm!r}; legal: {', '.join(map(repr, NORMS))}")
            if (residual := deep_residual(block.residual, config)) != Residual():
                raise ValueError(f"BlockConfig.residual: {residual}; legal: {Residual()}")
            yield {
                "letter": letter,
                "norm": block.norm,
                "source": source[layer],
                "attention": _attention(block, layer, config.n_layers),
                "experts": _experts(block),
                "router": _router(block.moe.router),
            }
        except ValueError as error:
            raise ValueError(f"block {layer} cannot be exported: {error}") from None


def _attention(block: BlockConfig, layer: int, n_layers: int) -> dict[str, Any]:
    if block.letter not in LETTERS:
        raise ValueError(f"attention {block.letter}; legal: {', '.join(LETTERS)}")
    attention = block.attention
    _refuse_others(attention, ATTENTION_KNOWN)
    described: dict[str, Any] = {name: getattr(attention, name) for name in ATTENTION_FIELDS}
    if block.letter in "LM":
        heads = attention.linear_shape[0] if block.letter == "L" else attention.mixed_heads[2]
        described["log_decays"] = [-float(slope) for slope in lightning_slopes(heads, layer, n_layers)]
    if block.letter == "M":
        described |= {"mixed_heads": attention.mixed_heads, "mixed_window": attention.mixed_window}
    if block.letter == "A":
        shape = latent_shape(attention)
        scale = attention.latent_scale * (shape.shared + shape.key) ** -0.5
        described |= {"latent_shape": tuple(shape), "latent_scale": scale}
        described["latent_query_dim"] = attention.latent_query_dim
    return described


def _experts(block: BlockConfig) -> dict[str, Any]:
    moe = block.moe
    _refuse_others(moe, EXPERTS_KNOWN)
    if moe.d_expert == 0:
        raise ValueError("MoEConfig.d_expert: 0; legal: at least 1")
    clamped = None if moe.clamped is None else {"slope": moe.clamped.slope, "limit": moe.clamped.limit}
    return {**{name: getattr(moe, name) for name in EXPERTS_FIELDS}, "clamped": clamped}


def _router(router: RouterConfig) -> dict[str, Any]:
    policy, more = router.policy, {}
    _refuse_others(router, ROUTER_KNOWN)
    match policy:
        # Those derived from it give chosen null columns something to do.
        case NullExperts() if type(policy) is NullExperts:
            rule, k, floor = "null", policy.k, policy.floor
            more = {"n_null": policy.n_null, "null_weighs": policy.null_weighs, "null_apart": policy.apart}
            more["null_gain"] = policy.start != 1.0
        case TopK() if policy.top_groups == policy.n_groups:
            rule, k, floor = "top_k", policy.k, policy.k
        case RandomK():
            rule, k, floor = "top_k", policy.k_eval, policy.k_eval
        case TopP():
            rule, k, floor = "top_p", policy.cap, policy.floor
        case ScoreThreshold():
            rule, k, floor = "threshold", policy.cap, policy.floor
        case Skipping():
            rule, k, floor = "ratio", policy.k, 0
        case _:
            groups = " with groups of experts" if isinstance(policy, TopK) else ""
            raise ValueError(
                f"policy {type(policy).__name__}{groups}; legal: TopK without groups, RandomK, TopP, ScoreThreshold,"
                " Skipping, NullExperts"
            )
    options = {name: getattr(router, name) for name in ROUTER_FIELDS}
    return {"rule": rule, "k": k, "floor": floor, **options, **more}


def _refuse_others(config: Any, known: tuple[str, ...]) -> None:
    """Refuses a field beside the known ones that is not what it is by default."""
    for field in dataclasses.fields(config):
        if field.name not in known and (value := getattr(config, field.name)) != field.default:
            raise ValueError(f"{type(config).__name__}.{field.name}: {value}; legal: {field.default}")


def _names(weights: Checkpoint) -> Iterator[tuple[str, str]]:
    """Of every tensor that is exported: its name there, and ours."""
    for name in weights.entries:
        if name.endswith(LEFT_OUT):
            continue
        yield OUTSIDE.get(name, f"model.{name}").replace(OUR_THRESHOLD, THRESHOLD).replace(OUR_GAIN, GAIN), name


def _copy_tokenizer(folder: Path, out: Path, config: ModelConfig) -> Tokenizer | None:
    """Copies the tokenizer's file, if there is one; returns it."""
    for kind in (ByteLevelTokenizer, Tokenizer):
        path = folder / kind.file_name
        if path.is_file():
            (out / path.name).write_bytes(path.read_bytes())
            byte_level = kind is ByteLevelTokenizer
            return ByteLevelTokenizer.load(path, config.vocab_size) if byte_level else Tokenizer.load(path)
    return None


def _config(config: ModelConfig, described: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    boundary = None if tokenizer is None else tokenizer.boundary_id
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["HybridMoEForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_hybrid_moe.HybridMoEConfig",
            "AutoModel": "modeling_hybrid_moe.HybridMoEModel",
            "AutoModelForCausalLM": "modeling_hybrid_moe.HybridMoEForCausalLM",
        },
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        **described,
        "norm_eps": config.norm_eps,
        "unit_offset": config.unit_offset,
        "compute_dtype": config.dtype,
        # Of the weights as they are stored.
        "dtype": "float32",
        "bos_token_id": boundary,
        "eos_token_id": boundary,
        "pad_token_id": boundary,
        "use_cache": True,
    }
