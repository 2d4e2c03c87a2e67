"""gpt-oss (OpenAI, arXiv 2508.10925): sliding-window and full attention in turn, with biases and a sink per head, YaRN;
experts with biases and a clamped SwiGLU, chosen by the k largest logits and weighed by their softmax.

The softmax over all experts, renormalised over the chosen, is the softmax over the chosen.
"""

import dataclasses
from collections.abc import Iterator

import torch

from lm.config import ModelConfig
from lm.published.family import (
    Family,
    decoder_tensors,
    read_attention,
    read_letters,
    read_sizes,
    read_softmax_experts,
    softmax_tensors,
)
from lm.published.fields import Fields
from lm.published.layouts import SAME, Layout, Stored
from moe.config import ClampedSwiGLU

LETTERS = {"sliding_attention": "S", "full_attention": "F"}


def read(fields: Fields) -> ModelConfig:
    """See `Family.read`."""
    # Weights of experts are published in MXFP4, and go out as bf16.
    sizes = read_sizes(fields, packed=("mxfp4",))
    # Says again what the stretched rotary embedding says.
    fields.get("initial_context_length", int, None)
    usual = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(sizes["n_layers"])]
    bias = fields.get("attention_bias", bool, True)
    attention = read_attention(
        fields,
        rope_base=150_000.0,
        qk_norm=False,
        sink_logits=True,
        qkv_bias=bias,
        out_bias=bias,
        window=fields.get("sliding_window", int),
    )
    moe = read_softmax_experts(
        fields,
        sizes["n_layers"],
        renormalise=True,
        d_expert=fields.get("intermediate_size", int),
        expert_bias=True,
        clamped=ClampedSwiGLU(
            slope=fields.get("swiglu_alpha", float, 1.702), limit=fields.get("swiglu_limit", float, 7.0)
        ),
    )
    moe = dataclasses.replace(moe, router=dataclasses.replace(moe.router, bias=True))
    return ModelConfig(**sizes, layer_plan=read_letters(fields, LETTERS, usual), attention=attention, moe=moe)


# Published column by column, a gate's and an up's in turn.
IN_TURN = Layout(
    lambda parts: torch.cat([parts[0][..., ::2], parts[0][..., 1::2]], dim=-1),
    lambda whole: [torch.stack(whole.chunk(2, dim=-1), dim=-1).flatten(-2)],
)


def tensors(config: ModelConfig) -> Iterator[Stored]:
    """See `Family.tensors`."""
    yield from decoder_tensors(config)
    for layer in range(config.n_layers):
        yield from softmax_tensors(layer, config.block(layer).attention)
        ours, theirs = f"blocks.{layer}.moe", f"model.layers.{layer}.mlp"
        yield Stored(f"{ours}.router.weight_ED", (f"{theirs}.router.weight",), SAME)
        yield Stored(f"{ours}.router.bias_E", (f"{theirs}.router.bias",), SAME)
        yield Stored(f"{ours}.experts.w_gate_up_EDF2", (f"{theirs}.experts.gate_up_proj",), IN_TURN)
        yield Stored(f"{ours}.experts.b_gate_up_EF2", (f"{theirs}.experts.gate_up_proj_bias",), IN_TURN)
        yield Stored(f"{ours}.experts.w_down_EFD", (f"{theirs}.experts.down_proj",), SAME)
        yield Stored(f"{ours}.experts.b_down_ED", (f"{theirs}.experts.down_proj_bias",), SAME)


FAMILY = Family(
    model_type="gpt_oss",
    read=read,
    tensors=tensors,
    aliases={"num_experts": ("num_local_experts",), "num_experts_per_tok": ("experts_per_token",)},
    after_export={"quantization_config": None},
    tiny={
        **{"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 24, "sliding_window": 8},
        "num_local_experts": 8,
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 150_000.0, "factor": 4.0, "truncate": False},
            **{"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 64},
        },
    },
)
