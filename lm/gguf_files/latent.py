"""Families of latent attention: DeepSeek-V3, what is published in its layout, and Kimi Linear.

Legend: H heads, K key width without the shared part, R width of the shared part, V value width, C latent width.
"""

import math

from torch import Tensor

from attention.latent import latent_shape
from lm.config import ModelConfig
from lm.gguf_files.architecture import (
    Architecture,
    Keys,
    Tensors,
    dense_layers_first,
    renormalised,
    sigmoid_keys,
    sparse_moe,
    whole_shared_expert,
    yarn_keys,
)


def _deepseek2(model: ModelConfig) -> list[str]:
    attention, wrong = model.attention, [*dense_layers_first(model), *whole_shared_expert(model)]
    if attention.latent_query_dim is None:
        wrong.append("queries without a latent of their own; legal: a q_lora_rank")
    if attention.norm_eps != model.norm_eps:
        wrong.append(f"rms_norm_eps of {model.norm_eps:g} beside {attention.norm_eps:g} of latents; legal: the same")
    if attention.yarn is not None and attention.yarn.magnitude not in (None, 1.0):
        wrong.append(f"magnitude {attention.yarn.magnitude} of a stretched embedding; legal: mscale = mscale_all_dim")
    return wrong


def _deepseek2_tensors(name: str, tensor: Tensor, model: ModelConfig) -> Tensors:
    """Keys and values of heads lie apart, a head's key as what a query is multiplied by."""
    if name.endswith("kv_b_proj.weight"):
        H, K, _, V, _, _ = latent_shape(model.attention)
        k_HKC, v_HVC = tensor.unflatten(0, (H, K + V)).split([K, V], dim=1)
        yield name.replace("kv_b_proj", "k_b_proj"), k_HKC.transpose(1, 2)
        yield name.replace("kv_b_proj", "v_b_proj"), v_HVC
    else:
        yield name.replace("e_score_correction_bias", "e_score_correction.bias"), tensor


def _deepseek2_keys(model: ModelConfig) -> Keys:
    attention, policy = model.attention, sparse_moe(model).router.policy
    _, K, R, V, C, _ = latent_shape(attention)
    keys = {
        **sigmoid_keys(model),
        # Read through the latent, as it is decoded, all heads share one key.
        "attention.head_count_kv": 1,
        "attention.key_length": C + R,
        "attention.value_length": C,
        "attention.key_length_mla": K + R,
        "attention.value_length_mla": V,
        "attention.kv_lora_rank": C,
        "attention.q_lora_rank": attention.latent_query_dim or 0,
        "rope.dimension_count": R,
        "expert_group_count": getattr(policy, "n_groups", 1),
        "expert_group_used_count": getattr(policy, "top_groups", 1),
        **yarn_keys(model),
    }
    if attention.yarn is not None:
        # All logits grow by a square, whose root grows with the logarithm of the factor.
        growth = math.sqrt(attention.latent_scale) - 1
        keys["rope.scaling.yarn_log_multiplier"] = growth / math.log(attention.yarn.factor)
    return keys


def _kimi_linear(model: ModelConfig) -> list[str]:
    # llama.cpp has one epsilon for all norms: that of the layers, where latents have a tenth of it, changes a latent by
    # some millionths of itself.
    wrong = [*dense_layers_first(model), *whole_shared_expert(model), *renormalised(model)]
    if getattr(sparse_moe(model).router.policy, "n_groups", 1) > 1:
        wrong.append("groups of experts; legal: num_expert_group = 1")
    return wrong


def _kimi_linear_tensors(name: str, tensor: Tensor, model: ModelConfig) -> Tensors:
    if name.endswith(".A_log"):
        yield name, -tensor.flatten().exp()[:, None]
    elif name.endswith(".dt_bias"):
        yield name.replace(".dt_bias", ".dt_proj.bias"), tensor
    else:
        yield from _deepseek2_tensors(name, tensor, model)


def _kimi_linear_keys(model: ModelConfig) -> Keys:
    attention = model.attention
    keys = dict(_deepseek2_keys(model))
    if attention.latent_query_dim is None:
        del keys["attention.q_lora_rank"]
    return keys | {
        # A layer without heads of keys is one of Kimi delta attention.
        "attention.head_count_kv": [int(letter == "A") for letter in model.plan.letters],
        "ssm.conv_kernel": attention.conv_width,
        "kda.head_dim": attention.linear_shape[1],
    }


LATENT: dict[str, Architecture] = {
    name: Architecture(
        name="deepseek2",
        check=_deepseek2,
        pre_tokenizer=pre_tokenizer,
        convert=_deepseek2_tensors,
        keys=_deepseek2_keys,
        yarn=True,
    )
    for name, pre_tokenizer in (("deepseek_v3", "deepseek-v3"), ("glm4_moe_lite", "glm4"))
}
LATENT["kimi_linear"] = Architecture(
    name="kimi-linear",
    check=_kimi_linear,
    pre_tokenizer="kimi-k2",
    convert=_kimi_linear_tensors,
    keys=_kimi_linear_keys,
)
