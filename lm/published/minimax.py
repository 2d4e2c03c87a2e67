"""MiniMax-Text-01 (arXiv 2501.08313): lightning attention and full attention, usually 7:1; the residual stream itself
is normalised before each of both and before the experts, and weighed against what they add.

Legend: H heads, K head width.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from attention.config import AttentionConfig
from lm.config import ModelConfig, Residual
from lm.published.family import (
    Family,
    decoder_tensors,
    experts_tensors,
    read_attention,
    read_letters,
    read_sizes,
    read_softmax_experts,
    softmax_tensors,
)
from lm.published.fields import Fields
from lm.published.layouts import SAME, Stored, below, headwise

LETTERS = {"linear_attention": "L", "full_attention": "F"}
NORMS = {"stream": {"attention_norm": "input_layernorm", "moe_norm": "post_attention_layernorm"}}
# Of the norm over what lightning attention reads, whatever config.json says of the others.
OUTPUT_EPS = 1e-6


def read(fields: Fields) -> ModelConfig:
    """See `Family.read`."""
    sizes = read_sizes(fields)
    fields.only("sliding_window", None)
    # Of training.
    fields.get("router_jitter_noise", float, None)
    # In what pieces lightning attention is computed.
    fields.get("block_size", int, None)
    attention = read_attention(fields, rope_base=1_000_000.0, qk_norm=False, norm_eps=OUTPUT_EPS)
    moe = read_softmax_experts(
        fields, sizes["n_layers"], renormalise=True, d_expert=fields.get("intermediate_size", int)
    )
    usual = ["linear_attention" if layer % 2 else "full_attention" for layer in range(sizes["n_layers"])]
    config = ModelConfig(
        **sizes,
        layer_plan=read_letters(fields, LETTERS, usual),
        attention=attention,
        moe=moe,
        norm="stream",
        residual=_read_residual(fields, "full"),
    )
    linear, blocks = _read_residual(fields, "linear"), map(config.block, range(config.n_layers))
    return config.with_blocks(
        [dataclasses.replace(block, residual=linear) if block.letter == "L" else block for block in blocks]
    )


def _read_residual(fields: Fields, kind: str) -> Residual:
    """How blocks with this kind of attention add to the stream."""
    return Residual(
        attention_kept=fields.get(f"{kind}_attn_alpha_factor", float, 1.0),
        attention_added=fields.get(f"{kind}_attn_beta_factor", float, 1.0),
        experts_kept=fields.get("mlp_alpha_factor", float, 1.0),
        experts_added=fields.get("mlp_beta_factor", float, 1.0),
    )


def tensors(config: ModelConfig) -> Iterator[Stored]:
    """See `Family.tensors`."""
    yield from decoder_tensors(config, NORMS)
    for layer in range(config.n_layers):
        block = config.block(layer)
        yield from (_linear_tensors if block.letter == "L" else softmax_tensors)(layer, block.attention)
        yield from experts_tensors(layer, block.moe, f"model.layers.{layer}.block_sparse_moe", ("w1", "w3", "w2"))


def _linear_tensors(layer: int, attention: AttentionConfig) -> Iterator[Stored]:
    ours, theirs = f"blocks.{layer}.attention", f"model.layers.{layer}.self_attn"
    H, K, _ = attention.linear_shape
    # Published head by head: query, key and value of each.
    inner = below((1, 3 * H * K, headwise(H, (K, K, K))), (1, H * K, SAME))
    names = (f"{theirs}.qkv_proj.weight", f"{theirs}.output_gate.weight")
    yield Stored(f"{ours}.to_inner.weight", names, inner)
    yield Stored(f"{ours}.norm.weight", (f"{theirs}.norm.weight",), SAME)
    yield Stored(f"{ours}.to_out.weight", (f"{theirs}.out_proj.weight",), SAME)


def beside(config: ModelConfig) -> Mapping[str, str]:
    """See `Family.beside`."""
    return {r".*\.(slope_rate|query_decay|key_decay|diagonal_decay)": "decays, which follow from the layer's number"}


FAMILY = Family(
    model_type="minimax",
    read=read,
    tensors=tensors,
    aliases={"num_experts": ("num_local_experts",)},
    beside=beside,
    tiny={
        **{"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 24, "num_local_experts": 8, "block_size": 16},
        **{"full_attn_alpha_factor": 3.5, "linear_attn_alpha_factor": 2.5, "mlp_alpha_factor": 3.0},
        **{"full_attn_beta_factor": 0.9, "linear_attn_beta_factor": 1.1, "mlp_beta_factor": 1.2},
    },
)
