"""The kinds of attention there are: the one registry of layer-plan letters.

Plan, cache, accounting, help texts and errors loop over it. A new kind is a file that declares an `AttentionKind`
beside its layer, and its name in the list below.
"""

from attention.config import AttentionConfig
from attention.gated_delta_net import GATED_DELTA_NET
from attention.kimi_delta import KIMI_DELTA
from attention.kind import AttentionKind, AttentionLayer
from attention.latent import LATENT
from attention.lightning import LIGHTNING
from attention.mamba2 import MAMBA2
from attention.mixed import MIXED
from attention.short_conv import SHORT_CONV
from attention.softmax import FULL, FULL_SHARED, SLIDING, SLIDING_SHARED

KINDS: dict[str, AttentionKind] = {
    kind.letter: kind
    for kind in (
        FULL,
        SLIDING,
        FULL_SHARED,
        SLIDING_SHARED,
        LIGHTNING,
        GATED_DELTA_NET,
        KIMI_DELTA,
        MIXED,
        LATENT,
        MAMBA2,
        SHORT_CONV,
    )
}


def describe_letters() -> str:
    """Every letter with its sentence, for help texts and errors."""
    return ", ".join(f"{kind.letter} ({kind.sentence})" for kind in KINDS.values())


def build_attention(
    letter: str, config: AttentionConfig, *, d_model: int, layer_index: int, n_layers: int
) -> AttentionLayer:
    """The attention layer that `letter` stands for, with weights yet to be made by `init_weights`.

    Args:
        config: heads, widths and options of this layer.
        d_model: width of the residual stream.
        layer_index: from 0 at the embedding.
        n_layers: depth of the model.

    Raises:
        ValueError: for an unknown letter, or a configuration that its kind cannot have.
    """
    if letter not in KINDS:
        raise ValueError(f"attention layer {layer_index}: unknown letter {letter!r}; legal: {', '.join(KINDS)}")
    kind = KINDS[letter]
    kind.check(config)
    return kind.layer(kind, config, d_model=d_model, layer_index=layer_index, n_layers=n_layers)
