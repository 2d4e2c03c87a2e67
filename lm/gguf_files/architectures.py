"""What llama.cpp calls the families of published models, what it takes for granted about each, and how it wants their
tensors.

Its graphs know no options where the published models of a family have none: whether weights of experts are renormalised
is part of the architecture, and not of the file. What a model of ours must be for a file of it to compute the same is
asked here, and refused by name.

Legend: D model width, H heads of values, J heads of keys, K key width, V value width, W convolution width.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from foundation.serialize import nearest
from lm.config import ModelConfig

Tensors = Iterator[tuple[str, Tensor]]


def _as_it_is(name: str, tensor: Tensor, model: ModelConfig) -> Tensors:
    yield name, tensor


def _nothing(model: ModelConfig) -> Mapping[str, int | float | bool]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One of llama.cpp's.

    Attributes:
        name: as the file has it.
        check: what of a model does not fit, as sentences; none where all does.
        pre_tokenizer: the rule by which texts are cut before merges, of a byte-level tokenizer.
        convert: from a published tensor, experts of a layer stacked, to those that the file has in its place, under
            published names.
        keys: further keys of the file, by their name behind the architecture's.
    """

    name: str
    check: Callable[[ModelConfig], list[str]]
    pre_tokenizer: str
    convert: Callable[[str, Tensor, ModelConfig], Tensors] = _as_it_is
    keys: Callable[[ModelConfig], Mapping[str, int | float | bool]] = _nothing


def _dense_layers(model: ModelConfig) -> list[int]:
    return [layer for layer in range(model.n_layers) if model.block(layer).moe.n_experts == 1]


def sparse_block(model: ModelConfig) -> int:
    """A layer with experts."""
    return next(layer for layer in range(model.n_layers) if model.block(layer).moe.n_experts > 1)


def _no_dense_layers(model: ModelConfig) -> list[str]:
    dense = _dense_layers(model)
    return [f"dense layers ({', '.join(map(str, dense))}); legal: experts in every layer"] if dense else []


def _renormalised(model: ModelConfig) -> list[str]:
    if model.moe.router.renormalise:
        return []
    return ["weights of experts as they are (norm_topk_prob = false); legal: true"]


def _olmoe(model: ModelConfig) -> list[str]:
    attention, wrong = model.attention, []
    if attention.n_kv_heads != attention.n_heads:
        wrong.append(f"{attention.n_kv_heads} key heads of {attention.n_heads}; legal: as many")
    if attention.n_heads * attention.head_dim != model.d_model:
        wrong.append(f"heads of {attention.head_dim}; legal: {model.d_model // attention.n_heads}, the width by heads")
    if model.moe.router.renormalise:
        wrong.append("renormalised weights of experts (norm_topk_prob = true); legal: false")
    return wrong


def _qwen3_moe(model: ModelConfig) -> list[str]:
    return [*_renormalised(model), *_no_dense_layers(model)]


def _glm4_moe(model: ModelConfig) -> list[str]:
    moe, dense, wrong = model.block(sparse_block(model)).moe, _dense_layers(model), []
    if dense != list(range(len(dense))):
        wrong.append(f"dense layers ({', '.join(map(str, dense))}); legal: the first ones")
    if getattr(moe.router.policy, "n_groups", 1) > 1:
        wrong.append("groups of experts; legal: n_group = 1")
    if moe.d_shared % moe.d_expert:
        wrong.append(f"shared expert of {moe.d_shared}; legal: a multiple of {moe.d_expert}")
    return wrong


def _glm4_moe_tensors(name: str, tensor: Tensor, model: ModelConfig) -> Tensors:
    yield name.replace("e_score_correction_bias", "e_score_correction.bias"), tensor


def _glm4_moe_keys(model: ModelConfig) -> Mapping[str, int | float | bool]:
    moe = model.block(sparse_block(model)).moe
    return {
        "expert_shared_count": moe.d_shared // moe.d_expert,
        "leading_dense_block_count": len(_dense_layers(model)),
        # Sigmoid.
        "expert_gating_func": 2,
        "expert_weights_scale": moe.router.scaling,
        "expert_weights_norm": moe.router.renormalise,
    }


def _qwen3_next(model: ModelConfig) -> list[str]:
    letters, wrong = model.plan.letters, [*_renormalised(model), *_no_dense_layers(model)]
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


def _qwen3_next_keys(model: ModelConfig) -> Mapping[str, int | float | bool]:
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


ARCHITECTURES: dict[str, Architecture] = {
    "olmoe": Architecture(name="olmoe", check=_olmoe, pre_tokenizer="olmo"),
    "qwen3_moe": Architecture(name="qwen3moe", check=_qwen3_moe, pre_tokenizer="qwen2"),
    "glm4_moe": Architecture(
        name="glm4moe", check=_glm4_moe, pre_tokenizer="glm4", convert=_glm4_moe_tensors, keys=_glm4_moe_keys
    ),
    "qwen3_next": Architecture(
        name="qwen3next",
        check=_qwen3_next,
        pre_tokenizer="qwen2",
        convert=_qwen3_next_tensors,
        keys=_qwen3_next_keys,
    ),
}


def architecture_of(model_type: str, model: ModelConfig, place: str) -> Architecture:
    """The architecture of a family, for a model that it can compute.

    Raises:
        ValueError: for a family without one, and for what of the model it has not; names it.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(f"{place}: no GGUF file of {model_type} can be written; {nearest(model_type, ARCHITECTURES)}")
    found = ARCHITECTURES[model_type]
    if wrong := found.check(model):
        raise ValueError(f"{place}: llama.cpp's {found.name} has no {'; no '.join(wrong)}")
    return found
