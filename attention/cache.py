"""The cache of a model whose layers remember in different ways, and its size from the configuration alone.

Prompts of different lengths are read one by one, each into a cache of its own, and stacked: no token is padded, so
there is nothing that a convolution, a sum over the text or a router would have to be told to leave out, and each
sequence is what it would be alone. From then on they go on together, a token at a time.

Legend: B batch.
"""

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from attention.config import AttentionConfig
from attention.kv_states import EIGHT_BITS
from attention.layer_states import Alias, LayerState, Saved
from attention.plan import LayerPlan


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A moment of a cache, see `HybridCache.snapshot`."""

    layers: tuple[Saved, ...]
    moment: object
    sums: dict[int, Tensor]

    def nbytes(self) -> int:
        """Bytes of memory that it holds."""
        tensors = [tensor for layer in self.layers for tensor in layer.tensors.values()]
        tensors += self.sums.values()
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


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
        eight_bits: keys and values are stored as int8 or fp8, one of `attention.kv_states.EIGHT_BITS`, with a scale per
            token and head; latents, linear states and tails as they are.

    Attributes:
        layers: the state of each layer, to be passed to it as `state`.
        sums: by layer, [B, X], what a router has to remember of each sequence, where it follows them; a new tensor
            after every token, and never changed.

    Raises:
        ValueError: for a size below 1, another `eight_bits`, or configurations that the plan cannot have.
    """

    def __init__(
        self,
        configs: Sequence[AttentionConfig],
        plan: LayerPlan,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        eight_bits: str | None = None,
    ) -> None:
        if eight_bits is not None and eight_bits not in EIGHT_BITS:
            raise ValueError(f"HybridCache: eight_bits={eight_bits!r}; legal: None, {', '.join(map(repr, EIGHT_BITS))}")
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"HybridCache: {name}={value}; legal: at least 1")
        plan.check(configs)
        self.batch_size = batch_size
        self.max_length = max_length
        # Of the snapshots that can be restored, oldest first.
        self._moments: list[object] = []
        self.sums: dict[int, Tensor] = {}
        self.layers: list[LayerState] = []
        for kind, source, config in zip(plan.kinds, plan.source, configs):
            if kind.reads is None:
                state = kind.new_state(
                    config, batch_size=batch_size, max_length=max_length, dtype=dtype, device=torch.device(device)
                )
                state = state.in_eight_bits(eight_bits) if eight_bits else state
            else:
                state = Alias(self.layers[source])
            self.layers.append(state)

    @classmethod
    def stack(cls, caches: "Sequence[HybridCache]") -> "HybridCache":
        """One cache of all sequences, in order, with room for as many tokens as the largest of them: a copy. They may
        have seen different numbers of tokens; then they go on a token at a time.

        Args:
            caches: of one model, at least one. To add a sequence to those that are under way, stack it onto their
                cache; to drop some, `reorder` the others.

        Raises:
            ValueError: for no cache, or caches of different models or dtypes.
        """
        if not caches:
            raise ValueError("stack: no caches; legal: at least one")
        first = caches[0]
        for place, cache in enumerate(caches):
            if difference := first._difference(cache):
                raise ValueError(f"stack: cache {place} is of another model than cache 0: {difference}")
        new = copy.copy(first)
        new.layers, new._moments = [], []
        for index, layer in enumerate(first.layers):
            if isinstance(layer, Alias):
                owner = next(place for place, other in enumerate(first.layers) if other is layer.owner)
                new.layers.append(Alias(new.layers[owner]))
            else:
                new.layers.append(layer.joined([cache.layers[index] for cache in caches[1:]]))
        new.sums = {layer: torch.cat([cache.sums[layer] for cache in caches]) for layer in first.sums}
        new.batch_size = sum(cache.batch_size for cache in caches)
        new.max_length = max(cache.max_length for cache in caches)
        return new

    def _difference(self, other: "HybridCache") -> str | None:
        if len(self.layers) != len(other.layers):
            return f"{len(other.layers)} layers, not {len(self.layers)}"
        for index, (own, its) in enumerate(zip(self.layers, other.layers)):
            if type(own) is not type(its):
                return f"layer {index} is a {type(its).__name__}, not a {type(own).__name__}"
            for name, tensor in own.tensors.items():
                new = its.tensors[name]
                # Keys, values and latents lie by rows of tokens, of which caches may have different numbers.
                if new.dtype != tensor.dtype or new.device != tensor.device or new.shape[2:] != tensor.shape[2:]:
                    return f"{name} of layer {index} is {new.dtype} {tuple(new.shape)} on {new.device}"
        return None

    @property
    def length(self) -> int:
        """Tokens seen by the longest sequence."""
        return self.layers[0].length

    @property
    def lengths_B(self) -> Tensor:
        """Tokens that each sequence has seen, int64 on the cache's device."""
        return self.layers[0].lengths_B

    @property
    def position(self) -> int | Tensor:
        """Of the next token: where a layer is told to `start`. One number, or one per sequence where they differ."""
        return self.length if self.layers[0].behind_B is None else self.lengths_B

    def nbytes(self) -> int:
        """Bytes of memory held by all layers."""
        return sum(layer.nbytes() for layer in self.layers) + sum(sums_BX.nbytes for sums_BX in self.sums.values())

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
        self.sums = {layer: sums_BX[index_B] for layer, sums_BX in self.sums.items()}
        self.batch_size = len(index_B)
        self._moments.clear()

    def crop(self, length: int) -> None:
        """Forgets the tokens from position `length` on, in every layer or, where one cannot, in none.

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
        if self.sums and 0 < length < self.length:
            raise ValueError(
                f"crop to {length} of {self.length} tokens seen: a router's sum over a text cannot forget some of them"
            )
        for layer in self.layers:
            layer.crop(length)
        if length == 0:
            self.sums = {}
        self._moments.clear()

    def grow(self, max_length: int) -> None:
        """Makes room for more tokens of each sequence. What is held is copied, where its size depends on the text.

        Raises:
            ValueError: for a length below the one that the cache was made for.
        """
        if max_length < self.max_length:
            raise ValueError(f"grow to {max_length} tokens; legal: at least the {self.max_length} it was made for")
        for layer in self.layers:
            layer.grow(max_length)
        self.max_length = max_length

    def snapshot(self) -> Snapshot:
        """This moment, to come back to after tokens that turn out not to be wanted (speculation), also where a linear
        state could not forget them. Keys and values of all tokens are not copied: what comes later lies behind them."""
        self._moments.append(object())
        return Snapshot(tuple(layer.save() for layer in self.layers), self._moments[-1], dict(self.sums))

    def restore(self, snapshot: Snapshot) -> None:
        """Forgets what has come since `snapshot`, which can be restored again; later ones cannot.

        Raises:
            ValueError: for a snapshot of another cache, or of this one before it was reordered or cropped.
        """
        if snapshot.moment not in self._moments:
            raise ValueError(
                "restore: the snapshot is of another cache, or of this one before it was reordered, cropped or taken"
                " further back; legal: one that only tokens have followed"
            )
        del self._moments[self._moments.index(snapshot.moment) + 1 :]
        for layer, saved in zip(self.layers, snapshot.layers):
            layer.restore(saved)
        self.sums = dict(snapshot.sums)


def cache_bytes(
    configs: Sequence[AttentionConfig],
    plan: LayerPlan,
    length: int,
    batch_size: int = 1,
    element_size: int = 2,
    *,
    eight_bits: bool = False,
) -> list[int]:
    """Bytes that each layer's state takes for `length` tokens, from the configuration alone; the formulas are the
    kinds' `state_bytes`.

    Args:
        configs: of attention, one per layer.
        plan: the model's.
        length: tokens of each sequence.
        batch_size: sequences side by side.
        element_size: bytes per element of keys, values and convolution tails: 2 for bf16, 4 for fp32.
        eight_bits: keys and values are stored in 8 bits with a scale per token and head.

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
    own = [kind.eight_bit_bytes if eight_bits else kind.state_bytes for kind in plan.kinds]
    return [
        batch_size * n_bytes(config, length, element_size) if kind.reads is None else 0
        for kind, n_bytes, config in zip(plan.kinds, own, configs)
    ]
