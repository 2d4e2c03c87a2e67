"""GLM-4.5 and its successors (GLM team, arXiv 2508.06471): full attention with biases and a partial rotary embedding,
DeepSeek-V3's router (arXiv 2412.19437: sigmoid scores, a bias that selects, groups, scaled weights), a shared expert,
dense MLPs in the first layers."""

from collections.abc import Iterator, Mapping

from lm.config import ModelConfig
from lm.published.family import (
    Family,
    decoder_tensors,
    read_attention,
    read_sigmoid_experts,
    read_sizes,
    sigmoid_experts_tensors,
    softmax_tensors,
    with_dense,
)
from lm.published.fields import Fields
from lm.published.layouts import Stored


def read(fields: Fields) -> ModelConfig:
    """See `Family.read`."""
    sizes = read_sizes(fields)
    # Modules that predict further tokens; they are not imported.
    fields.get("num_mtp_layers", int, 0)
    attention = read_attention(
        fields,
        rotary_fraction=0.5,
        qk_norm=fields.get("use_qk_norm", bool, False),
        qkv_bias=fields.get("attention_bias", bool, False),
    )
    moe = read_sigmoid_experts(fields, fields.get("moe_intermediate_size", int))
    config = ModelConfig(**sizes, layer_plan="F", attention=attention, moe=moe)
    n_dense = fields.get("first_k_dense_replace", int, 1)
    return with_dense(
        config, [layer < n_dense for layer in range(config.n_layers)], fields.get("intermediate_size", int)
    )


def tensors(config: ModelConfig) -> Iterator[Stored]:
    """See `Family.tensors`."""
    yield from decoder_tensors(config)
    for layer in range(config.n_layers):
        block = config.block(layer)
        yield from softmax_tensors(layer, block.attention)
        yield from sigmoid_experts_tensors(layer, block.moe)


def beside(config: ModelConfig) -> Mapping[str, str]:
    """See `Family.beside`."""
    return {rf"model\.layers\.{config.n_layers}\..*": "multi-token prediction"}


FAMILY = Family(
    model_type="glm4_moe",
    read=read,
    tensors=tensors,
    aliases={"num_mtp_layers": ("num_nextn_predict_layers",), "n_routed_experts": ("num_local_experts",)},
    beside=beside,
    after_export={"num_nextn_predict_layers": 0, "num_mtp_layers": 0},
    tiny={
        **{"num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 24, "intermediate_size": 40},
        **{"use_qk_norm": True, "attention_bias": True, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
        **{"routed_scaling_factor": 2.5, "n_shared_experts": 2},
    },
)
