"""Qwen3-MoE (Yang et al., arXiv 2505.09388): full attention, QK-norm per head, experts chosen by the k largest of a
softmax; single layers may have a dense MLP instead."""

from lm.config import ModelConfig
from lm.published.family import (
    Family,
    read_attention,
    read_dense_layers,
    read_sizes,
    read_softmax_experts,
    softmax_decoder,
    with_dense,
)
from lm.published.fields import Fields


def read(fields: Fields) -> ModelConfig:
    """See `Family.read`."""
    fields.only("attention_bias", False)
    fields.only("use_sliding_window", False)
    # Without effect while the window is not used.
    for name in ("sliding_window", "max_window_layers"):
        fields.get(name, int, None)
    sizes = read_sizes(fields)
    moe = read_softmax_experts(
        fields,
        sizes["n_layers"],
        renormalise=fields.get("norm_topk_prob", bool, False),
        d_expert=fields.get("moe_intermediate_size", int),
    )
    config = ModelConfig(**sizes, layer_plan="F", attention=read_attention(fields), moe=moe)
    return with_dense(config, read_dense_layers(fields, config.n_layers), fields.get("intermediate_size", int))


FAMILY = Family(
    model_type="qwen3_moe",
    read=read,
    tensors=softmax_decoder,
    aliases={"num_experts": ("num_local_experts",)},
    tiny={
        **{"num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 24, "norm_topk_prob": True},
        **{"num_experts": 8, "mlp_only_layers": [1], "intermediate_size": 40},
    },
)
