"""Families of softmax attention, with short convolutions in one of them: OLMoE, Qwen3, GLM-4.5, gpt-oss, LFM2.

Legend: D model width, E experts, F expert width.
"""

import math

from torch import Tensor

from lm.config import ModelConfig
from lm.gguf_files.architecture import (
    SIGMOID,
    Architecture,
    Keys,
    Tensors,
    dense_layers,
    dense_layers_first,
    no_dense_layers,
    renormalised,
    sigmoid_keys,
    sparse_moe,
    whole_shared_expert,
    yarn_keys,
)
from moe.config import ClampedSwiGLU


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
    return [*renormalised(model), *no_dense_layers(model)]


def _glm4_moe(model: ModelConfig) -> list[str]:
    wrong = [*dense_layers_first(model), *whole_shared_expert(model)]
    if getattr(sparse_moe(model).router.policy, "n_groups", 1) > 1:
        wrong.append("groups of experts; legal: n_group = 1")
    return wrong


def _corrections(name: str, tensor: Tensor, model: ModelConfig) -> Tensors:
    yield name.replace("e_score_correction_bias", "e_score_correction.bias"), tensor


def _gpt_oss(model: ModelConfig) -> list[str]:
    attention, wrong = model.attention, []
    letters = "".join(model.plan.letters)
    if letters != ("SF" * model.n_layers)[: model.n_layers]:
        wrong.append(f"layer plan {letters}; legal: sliding and full attention in turn")
    if model.moe.clamped != ClampedSwiGLU():
        wrong.append(f"{model.moe.clamped}; legal: {ClampedSwiGLU()}")
    if attention.yarn is not None and attention.yarn.magnitude is not None:
        usual = 0.1 * math.log(attention.yarn.factor) + 1
        if not math.isclose(attention.yarn.magnitude, usual, rel_tol=1e-6):
            wrong.append(f"magnitude of {attention.yarn.magnitude} of a stretched embedding; legal: {usual:g}")
    return wrong


def _gpt_oss_tensors(name: str, tensor: Tensor, model: ModelConfig) -> Tensors:
    """Its experts are published as what x is multiplied by from the right, a gate's and an up's columns in turn."""
    if "gate_up_proj" in name:
        kind = "bias" if name.endswith("_bias") else "weight"
        for part, at in (("gate_proj", 0), ("up_proj", 1)):
            own = tensor[..., at::2]
            before = name.partition("gate_up_proj")[0]
            yield f"{before}{part}.{kind}", own if kind == "bias" else own.transpose(1, 2)
    elif name.endswith("experts.down_proj_bias"):
        yield name.replace("_bias", ".bias"), tensor
    elif name.endswith("experts.down_proj"):
        yield f"{name}.weight", tensor.transpose(1, 2)
    else:
        yield name.replace("self_attn.sinks", "self_attn.sinks.weight"), tensor


def _gpt_oss_keys(model: ModelConfig) -> Keys:
    return {"attention.sliding_window": model.attention.window, **yarn_keys(model)}


LFM2_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def _lfm2_moe(model: ModelConfig) -> list[str]:
    wrong = [*dense_layers_first(model), *renormalised(model)]
    if sparse_moe(model).router.scaling != 1.0:
        wrong.append(f"weights of experts times {sparse_moe(model).router.scaling}; legal: routed_scaling_factor = 1")
    return wrong


def _lfm2_moe_tensors(name: str, tensor: Tensor, model: ModelConfig) -> Tensors:
    if name.endswith("expert_bias"):
        yield f"{name}.bias", tensor
    elif ".experts." in name:
        # An expert's matrices bear the names of a dense layer's, which are known for these alone.
        before, _, part = name.partition(".experts.")
        yield f"{before}.experts.{LFM2_PARTS[part.removesuffix('.weight')]}.weight", tensor
    else:
        yield name, tensor.squeeze(1) if name.endswith("conv.conv.weight") else tensor


def _lfm2_moe_keys(model: ModelConfig) -> Keys:
    return {
        # A layer without heads is a convolution.
        "attention.head_count_kv": [model.attention.n_kv_heads * (letter == "F") for letter in model.plan.letters],
        "shortconv.l_cache": model.attention.conv_width,
        "leading_dense_block_count": len(dense_layers(model)),
        "expert_gating_func": SIGMOID,
    }


SOFTMAX: dict[str, Architecture] = {
    "olmoe": Architecture(name="olmoe", check=_olmoe, pre_tokenizer="olmo"),
    "qwen3_moe": Architecture(name="qwen3moe", check=_qwen3_moe, pre_tokenizer="qwen2"),
    "glm4_moe": Architecture(
        name="glm4moe", check=_glm4_moe, pre_tokenizer="glm4", convert=_corrections, keys=sigmoid_keys
    ),
    "gpt_oss": Architecture(
        name="gpt-oss",
        check=_gpt_oss,
        pre_tokenizer="gpt-4o",
        convert=_gpt_oss_tensors,
        keys=_gpt_oss_keys,
        yarn=True,
    ),
    "lfm2_moe": Architecture(
        name="lfm2moe", check=_lfm2_moe, pre_tokenizer="lfm2", convert=_lfm2_moe_tensors, keys=_lfm2_moe_keys
    ),
}
