"""The cache of a model whose layers remember in different ways, and its size from the configuration alone.

Legend: B batch.
"""

import torch
from torch import Tensor

from attention.config import AttentionConfig
from attention.layer_states import Alias, GrowingKV, MixedState, RecurrentState, RingKV
from attention.plan import OWNER, LayerPlan

# Recurrent states are fp32 whatever the model computes in: they sum over the whole text.
STATE_ELEMENT_SIZE = 4


class HybridCache:
    """One state per layer: growing K/V (F), ring buffer (S), alias (R, r), fixed state (L), fixed state and convolution
    tail (G, K), K/V and fixed state (M).

    Everything is allocated at once for `max_length` tokens, so `nbytes()` is what `cache_bytes` says for that length
    and does not change while decoding. A forward with a cache is for inference: what the cache holds carries no
    gradients.

    Args:
        config, plan: those of the model.
        batch_size: sequences decoded side by side.
        max_length: tokens of each that fit.
        dtype: of keys, values and convolution tails: the model's activations.

    Attributes:
        layers: the state of each layer, to be passed to it as `state`.

    Raises:
        ValueError: for a size below 1.
    """

    def __init__(
        self,
        config: AttentionConfig,
        plan: LayerPlan,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"HybridCache: {name}={value}; legal: at least 1")
        self.batch_size = batch_size
        self.max_length = max_length
        device = torch.device(device)
        heads = (config.n_kv_heads, config.head_dim)
        self.layers: list[GrowingKV | RingKV | RecurrentState | MixedState | Alias] = []
        for letter, source in zip(plan.letters, plan.source):
            if letter in OWNER:
                owner = self.layers[source]
                assert isinstance(owner, GrowingKV | RingKV)
                self.layers.append(Alias(owner))
            elif letter == "F":
                self.layers.append(GrowingKV(batch_size, max_length, heads, dtype, device))
            elif letter == "S":
                self.layers.append(RingKV(batch_size, max_length, config.window, heads, dtype, device))
            elif letter == "M":
                self.layers.append(_mixed_state(config, batch_size, max_length, dtype, device))
            else:
                conv = (config.conv_channels, config.conv_width) if letter in "GK" else None
                self.layers.append(RecurrentState(batch_size, max_length, config.linear_shape, conv, dtype, device))

    @property
    def length(self) -> int:
        """Tokens seen: the position of the next one."""
        return self.layers[0].length

    def nbytes(self) -> int:
        """Bytes of memory held by all layers."""
        return sum(layer.nbytes() for layer in self.layers)

    def reorder(self, index_B: Tensor) -> None:
        """Sequence i becomes what sequence index_B[i] was, in every layer; the batch takes the length of the index
        (beams, samples of one prompt).

        Raises:
            ValueError: for an index that is not a 1-dimensional integer tensor of sequences in the batch.
        """
        if index_B.dim() != 1 or index_B.dtype not in (torch.int64, torch.int32) or len(index_B) == 0:
            raise ValueError(
                f"reorder: index of shape {tuple(index_B.shape)} and dtype {index_B.dtype}; legal: a 1-dimensional"
                " integer tensor"
            )
        lowest, highest = int(index_B.min()), int(index_B.max())
        if lowest < 0 or highest >= self.batch_size:
            raise ValueError(f"reorder: index from {lowest} to {highest}; legal: from 0 to {self.batch_size - 1}")
        for layer in self.layers:
            layer.reorder(index_B)
        self.batch_size = len(index_B)

    def crop(self, length: int) -> None:
        """Forgets the tokens from `length` on, in every layer or, where one cannot, in none.

        Full attention can always; a ring buffer until it has overwritten what it would need; a linear state only back
        to 0 tokens.

        Raises:
            ValueError: naming the layer that cannot and why, or a length that is not between 0 and the tokens seen.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"crop to {length} tokens; legal: from 0 to the {self.length} seen")
        for index, layer in enumerate(self.layers):
            if reason := layer.refusal_to_crop(length):
                raise ValueError(f"crop to {length} of {self.length} tokens seen: layer {index} cannot: {reason}")
        for layer in self.layers:
            layer.crop(length)


def cache_bytes(
    config: AttentionConfig, plan: LayerPlan, length: int, batch_size: int = 1, element_size: int = 2
) -> list[int]:
    """Bytes that each layer's state takes for `length` tokens, from the configuration alone.

    Per sequence, with G key/value heads of width K and s bytes per element: 2 G K s length for F, 2 G K s min(length,
    window) for S, 0 for R and r (the owner pays), and whatever the length 4 H K V for L, the same and X (W - 1) s for
    the convolution tail for G and K. M is F or S and L, each with its share of the heads.

    Args:
        element_size: the s above, bytes per element of keys, values and convolution tails: 2 for bf16, 4 for fp32.

    Raises:
        ValueError: for a length below 0, a batch size or an element size below 1.
    """
    for name, value, least in (("length", length, 0), ("batch_size", batch_size, 1), ("element_size", element_size, 1)):
        if value < least:
            raise ValueError(f"cache_bytes: {name}={value}; legal: at least {least}")
    H, K, V = config.linear_shape
    kv_per_token = 2 * config.n_kv_heads * config.head_dim * element_size
    recurrent = STATE_ELEMENT_SIZE * H * K * V
    conv_tail = config.conv_channels * (config.conv_width - 1) * element_size
    per_sequence = {
        "F": kv_per_token * length,
        "S": kv_per_token * min(length, config.window),
        "R": 0,
        "r": 0,
        "L": recurrent,
        "G": recurrent + conv_tail,
        "K": recurrent + conv_tail,
    }
    if "M" in plan.letters:
        _, G, J = config.mixed_heads
        kept = min(length, config.mixed_window or length)
        per_sequence["M"] = 2 * G * config.head_dim * element_size * kept + STATE_ELEMENT_SIZE * J * K * V
    return [batch_size * per_sequence[letter] for letter in plan.letters]


def _mixed_state(
    config: AttentionConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
) -> MixedState:
    (_, G, J), (_, K, V) = config.mixed_heads, config.linear_shape
    heads = (G, config.head_dim)
    if config.mixed_window is None:
        kv = GrowingKV(batch_size, max_length, heads, dtype, device)
    else:
        kv = RingKV(batch_size, max_length, config.mixed_window, heads, dtype, device)
    return MixedState(kv, RecurrentState(batch_size, max_length, (J, K, V), None, dtype, device))
