"""From a layer plan's letter to the layer."""

from attention.config import AttentionConfig
from attention.gated_delta_net import GatedDeltaNet
from attention.kimi_delta import KimiDeltaAttention
from attention.layer import AttentionLayer
from attention.lightning import LightningAttention
from attention.mixed import MixedAttention
from attention.plan import LETTERS
from attention.softmax import SoftmaxAttention

LAYERS = {
    "F": SoftmaxAttention,
    "S": SoftmaxAttention,
    "R": SoftmaxAttention,
    "r": SoftmaxAttention,
    "L": LightningAttention,
    "G": GatedDeltaNet,
    "K": KimiDeltaAttention,
    "M": MixedAttention,
}


def build_attention(
    letter: str, config: AttentionConfig, *, d_model: int, layer_index: int, n_layers: int
) -> AttentionLayer:
    """The attention layer that `letter` stands for, with weights yet to be drawn by `init_weights`.

    Raises:
        ValueError: for an unknown letter.
    """
    if letter not in LAYERS:
        raise ValueError(f"attention layer {layer_index}: unknown letter {letter!r}; legal: {', '.join(LETTERS)}")
    return LAYERS[letter](letter, config, d_model=d_model, layer_index=layer_index, n_layers=n_layers)
