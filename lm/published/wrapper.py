"""A decoder inside of a model that also sees: its config.json describes the decoder in `text_config`, and what is read
here, and exported, is the decoder alone."""

from collections.abc import Mapping
from typing import Any

from lm.published.fields import WITHOUT_EFFECT, Fields

# Of such models: what their decoder's configuration and class are called.
WRAPPERS = {"qwen3_5_moe": ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM")}
# What may be said of the whole in place of the decoder.
OF_BOTH = frozenset({"dtype", "torch_dtype", "tie_word_embeddings", "quantization_config"})
# What else they say: which tokens stand for pictures, and what reads those.
OF_PICTURES = frozenset(
    {
        *("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
        "language_model_only",
    }
)


def decoder_of(values: Any, place: str) -> Any:
    """The config.json of the decoder in a model that has one inside; any other as it is.

    Raises:
        ValueError: for a model without its decoder's configuration, one that says two things of it, or a field that
            nothing here knows.
    """
    if not isinstance(values, Mapping) or values.get("model_type") not in WRAPPERS:
        return values
    model_type, architecture = WRAPPERS[values["model_type"]]
    fields = Fields(values, place)
    if (text := fields.part("text_config")) is None:
        raise ValueError(f"{place}: text_config is missing; legal: the fields of a {model_type}")
    text.only("model_type", model_type)
    shared = {name: values[name] for name in OF_BOTH if values.get(name) is not None}
    for name, value in shared.items():
        text.only(name, value)
    fields.done(WITHOUT_EFFECT | OF_PICTURES | OF_BOTH)
    return {**text.values, **shared, "model_type": model_type, "architectures": [architecture]}
