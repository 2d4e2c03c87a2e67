"""The cache of a model whose layers remember in different ways, and its size from the configuration alone.

Legend: B batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attention.config import AttentionConfig
from attention.layer_states import Alias, LayerState
from attention.plan import LayerPlan


class HybridCache:
    """One state per layer, of whatever type the layer's kind keeps.

    Everything is allocated at once for `max_length` tokens, so `nbytes()` is what `cache_bytes` says for that length
    and does not change while decoding. A forward with a cache is for inference: what the cache holds carries no
    gradients.

    Args:
        configs: of attention, one per layer.
        plan: the model's.
        batch_size: sequences decoded side by side.
        max_length: tokens of each that fit.
        dtype: of keys, values and convolution tails: the model's activations.
        device: of everything held.

    Attributes:
        layers: the state of each layer, to be passed to it as `state`.

    Raises:
        ValueError: for a size below 1, or configurations that the plan cannot have.
    """

    def __init__(
        self,
        configs: Sequence[AttentionConfig],
        plan: LayerPlan,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"HybridCache: {name}={value}; legal: at least 1")
        plan.check(configs)
        self.batch_size = batch_size
        self.max_length = max_length
        self.layers: list[LayerState] = []
        for kind, source, config in zip(plan.kinds, plan.source, configs):
            if kind.reads is None:
                state = kind.new_state(
                    config, batch_size=batch_size, max_length=max_length, dtype=dtype, device=torch.device(device)
                )
            else:
                state = Alias(self.layers[source])
            self.layers.append(state)

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

        Keys and values of all tokens can always be cropped; a ring buffer until it has overwritten what it would need;
        a linear state only back to 0 tokens.

        Raises:
            ValueError: naming the layer that cannot and why, or a length that is not between 0 and the tokens seen.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"crop to {length} tokens; legal: from 0 to the {self.length} seen")
        # All are asked before any is cropped: a cache whose layers have seen different numbers of tokens is lost.
        for index, layer in enumerate(self.layers):
            if reason := layer.refusal_to_crop(length):
                raise ValueError(f"crop to {length} of {self.length} tokens seen: layer {index} cannot: {reason}")
        for layer in self.layers:
            layer.crop(length)


def cache_bytes(
    configs: Sequence[AttentionConfig], plan: LayerPlan, length: int, batch_size: int = 1, element_size: int = 2
) -> list[int]:
    """Bytes that each layer's state takes for `length` tokens, from the configuration alone; the formulas are the
    kinds' `state_bytes`.

    Args:
        configs: of attention, one per layer.
        plan: the model's.
        length: tokens of each sequence.
        batch_size: sequences side by side.
        element_size: bytes per element of keys, values and convolution tails: 2 for bf16, 4 for fp32.

    Returns:
        One number per layer; 0 for a layer that reads another's keys and values, because the owner pays.

    Raises:
        ValueError: for a length below 0, a batch size or an element size below 1, or configurations that the plan
            cannot have.
    """
    for name, value, least in (("length", length, 0), ("batch_size", batch_size, 1), ("element_size", element_size, 1)):
        if value < least:
            raise ValueError(f"cache_bytes: {name}={value}; legal: at least {least}")
    plan.check(configs)
    return [
        batch_size * kind.state_bytes(config, length, element_size) if kind.reads is None else 0
        for kind, config in zip(plan.kinds, configs)
    ]
