"""OLMoE (Muennighoff et al., arXiv 2409.02060): full attention, QK-norm over the whole projection, experts chosen by
the k largest of a softmax without renormalisation; and FlexOlmo (Shi et al., arXiv 2507.07024), which normalises what
comes out of attention and experts in place of what goes in."""

from lm.config import ModelConfig
from lm.published.family import Family, read_attention, read_sizes, read_softmax_experts, softmax_decoder
from lm.published.fields import Fields


def read(fields: Fields) -> ModelConfig:
    """See `Family.read`."""
    return _read(fields, norm="pre")


def read_flex(fields: Fields) -> ModelConfig:
    """See `Family.read`."""
    return _read(fields, norm="post")


def _read(fields: Fields, *, norm: str) -> ModelConfig:
    fields.only("attention_bias", False)
    fields.only("clip_qkv", None)
    sizes = read_sizes(fields)
    return ModelConfig(
        **sizes,
        layer_plan="F",
        norm=norm,
        attention=read_attention(fields, qk_norm_whole=True),
        moe=read_softmax_experts(
            fields,
            sizes["n_layers"],
            renormalise=fields.get("norm_topk_prob", bool, False),
            d_expert=fields.get("intermediate_size", int),
        ),
    )


TINY = {"num_experts": 8, "num_key_value_heads": 2, "intermediate_size": 24}
FAMILY = Family(
    model_type="olmoe",
    read=read,
    tensors=softmax_decoder,
    aliases={"num_experts": ("num_local_experts",)},
    tiny=TINY,
)
FLEX = Family(
    model_type="flex_olmo",
    read=read_flex,
    tensors=softmax_decoder,
    aliases={"num_experts": ("num_local_experts",)},
    tiny=TINY,
)
