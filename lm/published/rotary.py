"""What a published config.json says of rotary embeddings."""

import math
from typing import Any

from attention.yarn import Yarn
from lm.published.fields import Fields


def without_rotary(fields: Fields) -> dict[str, Any]:
    """What `AttentionConfig` says of a rotary embedding that is not there, whatever the file says of one."""
    for name in ("rope_theta", "partial_rotary_factor"):
        fields.get(name, float, None)
    for name in ("rope_scaling", "rope_parameters"):
        fields.part(name)
    return {"rotary_fraction": 0.0}


def read_rotary(fields: Fields, base: float, fraction: float, ignored: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `AttentionConfig` says of the rotary embedding, from what transformers writes since its version 5
    (`rope_parameters`), or wrote before.

    Args:
        base: where the file has none, and so `fraction`.
        ignored: fields that make no difference here.
    """
    base = fields.get("rope_theta", float, base)
    fraction = fields.get("partial_rotary_factor", float, fraction)
    before, since, yarn, scale = fields.part("rope_scaling"), fields.part("rope_parameters"), None, 1.0
    if (rope := since or before) is not None:
        rope.aliases = {"rope_type": ("type",)}
        kind = rope.get("rope_type", str, "default")
        rope.only("rope_type", "default", "yarn")
        base = rope.get("rope_theta", float, base)
        fraction = rope.get("partial_rotary_factor", float, fraction)
        if kind == "yarn":
            factor = rope.get("factor", float)
            turned, all_channels = rope.get("mscale", float, 0.0), rope.get("mscale_all_dim", float, 0.0)
            scale = growth(factor, all_channels) ** 2
            yarn = Yarn(
                factor=factor,
                original_length=rope.get("original_max_position_embeddings", int),
                fast_turns=rope.get("beta_fast", float, 32.0),
                slow_turns=rope.get("beta_slow", float, 1.0),
                magnitude=rope.get(
                    "attention_factor",
                    float,
                    growth(factor, turned) / growth(factor, all_channels) if turned and all_channels else None,
                ),
                whole_pairs=rope.get("truncate", bool, True),
            )
        rope.done(ignored)
    # The last is of latent attention alone, and the published softmax layers ignore it as ours do.
    return {"rope_base": base, "rotary_fraction": fraction, "yarn": yarn, "latent_scale": scale}


def growth(factor: float, mscale: float) -> float:
    """What YaRN multiplies queries and keys by, in DeepSeek's terms (arXiv 2405.04434)."""
    return 0.1 * mscale * math.log(factor) + 1.0
