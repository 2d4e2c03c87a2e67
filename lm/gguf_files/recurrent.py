"""Families whose layers are mostly recurrent: gated DeltaNet in Qwen3-Next and Qwen3.5, Mamba-2 in Granite 4 and
Nemotron-H.

Legend: H heads of values, J heads of keys, K key width, V value width, W convolution width.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lm.config import ModelConfig
from lm.gguf_files.architecture import (
    SIGMOID,
    Architecture,
    Keys,
    Tensors,
    no_dense_layers,
    renormalised,
    sparse_moe,
)


def _qwen3_next(model: ModelConfig) -> list[str]:
    letters, wrong = model.plan.letters, [*renormalised(model), *no_dense_layers(model)]
    interval = letters.index("F") + 1 if "F" in letters else 0
    if not interval or any((letter == "F") != ((at + 1) % interval == 0) for at, letter in enumerate(letters)):
        wrong.append(f"layer plan {''.join(letters)}; legal: full attention in every n-th layer and no other")
    _, K, V = model.attention.linear_shape
    if K != V:
        wrong.append(f"linear heads with keys of {K} and values of {V}; legal: as wide")
    return wrong


def _qwen3_next_tensors(name: str, tensor: Tensor, model: ModelConfig) -> Tensors:
    (H, K, V), J = model.attention.linear_shape, model.attention.key_heads
    if name.endswith(".A_log"):
        yield name, -tensor.exp()
    elif name.endswith(".dt_bias"):
        yield name.replace(".dt_bias", ".dt_proj.bias"), tensor
    elif "conv1d" in name:
        yield name, tensor.squeeze(1)
    elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        # The scale itself, in place of what it has beyond one.
        yield name, tensor + 1
    elif "in_proj_qkvz" in name:
        # A head of keys holds its query, its key, and values and gates of those that share them; here all queries come
        # first, then all keys, then all values.
        served = H // J * V
        q, k, v, z = (part.flatten(0, 1) for part in tensor.unflatten(0, (J, -1)).split([K, K, served, served], dim=1))
        before = name.removesuffix("in_proj_qkvz.weight")
        yield f"{before}in_proj_qkv.weight", torch.cat([q, k, v])
        yield f"{before}in_proj_z.weight", z
    else:
        yield name, tensor


def _qwen3_5_tensors(name: str, tensor: Tensor, model: ModelConfig) -> Tensors:
    """As in Qwen3-Next, but for the order of the heads of values: there those that share a head of keys stand side by
    side; in the file the first of every head of keys come first."""
    (H, K, V), J = model.attention.linear_shape, model.attention.key_heads
    part = name.rsplit("linear_attn.", 1)[-1].removesuffix(".weight")

    def in_turn(rows: Tensor, width: int = 1) -> Tensor:
        return rows.unflatten(0, (J, H // J, width)).transpose(0, 1).flatten(0, 2)

    if part in ("in_proj_a", "in_proj_b", "A_log", "dt_bias"):
        tensor = in_turn(tensor)
    elif part == "in_proj_z":
        tensor = in_turn(tensor, V)
    elif part in ("in_proj_qkv", "conv1d"):
        keys, values = tensor.split([2 * J * K, H * V])
        tensor = torch.cat([keys, in_turn(values, V)])
    elif part == "out_proj":
        tensor = in_turn(tensor.T, V).T
    yield from _qwen3_next_tensors(name, tensor, model)


def _qwen3_next_keys(model: ModelConfig) -> Keys:
    attention, moe = model.attention, model.moe
    (H, K, V), J = attention.linear_shape, attention.key_heads
    return {
        "ssm.conv_kernel": attention.conv_width,
        "ssm.state_size": K,
        "ssm.group_count": J,
        "ssm.time_step_rank": H,
        "ssm.inner_size": H * V,
        "full_attention_interval": model.plan.letters.index("F") + 1,
        "expert_shared_feed_forward_length": moe.d_shared,
    }


def _qwen3_5_keys(model: ModelConfig) -> Keys:
    # How many pairs of the rotary embedding time, height and width turn, in turns; all by the same number in a text. A
    # pair that none of them turned would stay as it is.
    third = math.ceil(model.attention.rotary_dim / 2 / 3)
    return {**_qwen3_next_keys(model), "rope.dimension_sections": [third, third, third, 0]}


def _granite(model: ModelConfig) -> list[str]:
    attention, wrong = model.attention, no_dense_layers(model)
    if attention.rotary_fraction:
        wrong.append("positions; legal: position_embedding_type = nope")
    if attention.mamba_groups != 1:
        wrong.append(f"{attention.mamba_groups} groups of Mamba-2 under one norm; legal: 1")
    if attention.mamba_step_floor:
        wrong.append(f"shortest time step of {attention.mamba_step_floor}; legal: 0")
    return wrong


def _granite_tensors(name: str, tensor: Tensor, model: ModelConfig) -> Tensors:
    if name.endswith("block_sparse_moe.input_linear.weight"):
        for part, own in zip(("w1", "w3"), tensor.chunk(2, dim=1)):
            yield name.replace("input_linear", f"experts.{part}"), own
    elif name.endswith("shared_mlp.input_linear.weight"):
        for part, own in zip(("gate_proj", "up_proj"), tensor.chunk(2)):
            yield name.replace("shared_mlp.input_linear", f"mlp.shared_expert.{part}"), own
    else:
        yield from _mamba_tensors(name, tensor, model)


def _mamba_tensors(name: str, tensor: Tensor, model: ModelConfig) -> Tensors:
    if name.endswith(".A_log"):
        yield name, -tensor.exp()[:, None]
    elif name.endswith(".D"):
        yield name, tensor[:, None]
    elif name.endswith(".dt_bias"):
        yield name.replace(".dt_bias", ".dt_proj.bias"), tensor
    elif name.endswith("conv1d.weight"):
        yield name, tensor.squeeze(1)
    elif name.endswith(("mamba.norm.weight", "mixer.norm.weight")):
        yield name, tensor.unflatten(0, (model.attention.mamba_groups, -1))
    else:
        yield name, tensor


def _mamba_keys(model: ModelConfig) -> Keys:
    attention = model.attention
    H, K, V = attention.linear_shape
    return {
        "ssm.conv_kernel": attention.conv_width,
        "ssm.state_size": K,
        "ssm.group_count": attention.mamba_groups,
        "ssm.time_step_rank": H,
        "ssm.inner_size": H * V,
    }


def _granite_keys(model: ModelConfig) -> Keys:
    return {
        **_mamba_keys(model),
        # A layer without heads is Mamba-2.
        "attention.head_count_kv": [model.attention.n_kv_heads * (letter == "F") for letter in model.plan.letters],
        "attention.scale": model.attention.softmax_scale or model.attention.head_dim**-0.5,
        "embedding_scale": model.embedding_scale,
        "residual_scale": model.residual.attention_added,
        "logit_scale": 1.0 / model.logit_scale,
        "expert_shared_feed_forward_length": model.moe.d_shared,
        "rope.scaling.finetuned": False,
    }


def _nemotron_h(model: ModelConfig) -> list[str]:
    blocks, wrong = [model.block(layer) for layer in range(model.n_layers)], []
    experts = [block.moe for block in blocks if block.moe.n_experts > 1]
    if experts and any(block.moe.n_experts == 1 and block.moe.d_expert for block in blocks):
        wrong.append("MLPs beside experts; legal: either")
    if any(getattr(moe.router.policy, "n_groups", 1) > 1 for moe in experts):
        wrong.append("groups of experts; legal: n_group = 1")
    # llama.cpp has none, as transformers' step for a single token; a thousandth is what published models have.
    if model.attention.mamba_step_floor > 1e-3:
        wrong.append(f"shortest time step of {model.attention.mamba_step_floor}; legal: up to 0.001")
    return wrong


def _nemotron_h_layers(model: ModelConfig) -> list[tuple[str, int]]:
    """Published layers: "D" or "F" where one mixes across tokens, "" for experts or an MLP, and the latter's width."""
    layers = []
    for block in map(model.block, range(model.n_layers)):
        layers.append((block.letter, 0))
        if block.moe.d_expert:
            layers.append(("", block.moe.d_expert))
    return layers


def _nemotron_h_tensors(name: str, tensor: Tensor, model: ModelConfig) -> Tensors:
    if ".mixer.experts." in name:
        yield name.replace("backbone.", "model.").replace(".mixer.", ".mlp."), tensor
    elif name.endswith("e_score_correction_bias"):
        yield name.replace("e_score_correction_bias", "e_score_correction.bias"), tensor
    else:
        yield from _mamba_tensors(name, tensor, model)


def _nemotron_h_dense_keys(model: ModelConfig) -> Keys:
    layers = _nemotron_h_layers(model)
    return {
        **_mamba_keys(model),
        # llama.cpp asks for it under either name.
        "attention.layer_norm_epsilon": model.norm_eps,
        # A layer without heads and without width is Mamba-2, one with a width an MLP or experts.
        "attention.head_count_kv": [model.attention.n_kv_heads * (letter == "F") for letter, _ in layers],
        "feed_forward_length": [width for _, width in layers],
    }


def _nemotron_h_keys(model: ModelConfig) -> Keys:
    moe = sparse_moe(model)
    return {
        **_nemotron_h_dense_keys(model),
        "expert_shared_count": 1,
        "expert_shared_feed_forward_length": moe.d_shared,
        "expert_gating_func": SIGMOID,
        "expert_weights_norm": moe.router.renormalise,
        "expert_weights_scale": moe.router.scaling,
        **({"moe_latent_size": moe.d_latent} if moe.d_latent else {}),
    }


def _nemotron_h_architecture(name: str, keys: Callable[[ModelConfig], Keys], **more: Any) -> Architecture:
    return Architecture(
        name=name,
        check=_nemotron_h,
        pre_tokenizer="pixtral",
        convert=_nemotron_h_tensors,
        keys=keys,
        layers=lambda model: len(_nemotron_h_layers(model)),
        **more,
    )


RECURRENT: dict[str, Architecture] = {
    "qwen3_next": Architecture(
        name="qwen3next",
        check=_qwen3_next,
        pre_tokenizer="qwen2",
        convert=_qwen3_next_tensors,
        keys=_qwen3_next_keys,
    ),
    "qwen3_5_moe_text": Architecture(
        name="qwen35moe",
        check=_qwen3_next,
        pre_tokenizer="qwen35",
        convert=_qwen3_5_tensors,
        keys=_qwen3_5_keys,
    ),
    "granitemoehybrid": Architecture(
        name="granitehybrid",
        check=_granite,
        pre_tokenizer="refact",
        convert=_granite_tensors,
        keys=_granite_keys,
    ),
    "nemotron_h": _nemotron_h_architecture(
        "nemotron_h_moe",
        _nemotron_h_keys,
        without_experts=_nemotron_h_architecture("nemotron_h", _nemotron_h_dense_keys),
    ),
}
