"""What one layer remembers of the tokens it has seen: the entries of a `HybridCache`.

Every state is allocated once, at its full size, so that its bytes are known before the first token and do not move
afterwards. States hold no gradients: what is stored is detached, because a cache is for inference.

Legend: B batch, T tokens, S keys, G key/value heads, H linear heads, K key width, V value width, C capacity in tokens,
X convolution channels, W convolution width.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class KV(NamedTuple):
    """Keys and values in order of position, the newest last, or as a ring holds them; what a layer hands to the layers
    that reuse them."""

    k_BSGK: Tensor
    v_BSGV: Tensor


class LayerState(Protocol):
    """What a `HybridCache` asks of each of its entries.

    Attributes:
        length: tokens seen so far.
        max_length: tokens the cache was made for.
        batch_size: sequences side by side.
        tensors: everything held, batch first.
    """

    @property
    def length(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def tensors(self) -> dict[str, Tensor]: ...

    def nbytes(self) -> int:
        """Bytes of memory held, used or not yet."""
        ...

    def reorder(self, index_B: Tensor) -> None:
        """Sequence i becomes what sequence index_B[i] was; the batch takes the length of the index."""
        ...

    def refusal_to_crop(self, length: int) -> str | None:
        """Why the tokens from `length` on cannot be forgotten, or None where they can."""
        ...

    def crop(self, length: int) -> None:
        """Forgets the tokens from `length` on; ValueError where it cannot."""
        ...


class TensorState:
    """Common part of states that hold tensors: counts tokens, reorders sequences, counts bytes."""

    def __init__(self, max_length: int, **tensors: Tensor) -> None:
        self.length = 0
        self.max_length = max_length
        self.tensors = tensors

    @property
    def batch_size(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def nbytes(self) -> int:
        """Bytes of memory held, used or not yet."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    def reorder(self, index_B: Tensor) -> None:
        """Sequence i becomes what sequence index_B[i] was; the batch takes the length of the index."""
        self.tensors = {name: tensor.index_select(0, index_B) for name, tensor in self.tensors.items()}

    def refusal_to_crop(self, length: int) -> str | None:
        """Why the tokens from `length` on cannot be forgotten, or None where they can."""
        raise NotImplementedError

    def crop(self, length: int) -> None:
        """Forgets the tokens from `length` on.

        Raises:
            ValueError: where `length` is not between 0 and the tokens seen, or the state no longer holds what it needs
                for that.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"crop to {length} tokens of {self.length} seen; legal: from 0 to {self.length}")
        if reason := self.refusal_to_crop(length):
            raise ValueError(f"crop to {length} tokens of {self.length} seen: {reason}")
        self.length = length

    def _check(self, name: str, new: Tensor) -> None:
        held = self.tensors[name]
        if new.dtype != held.dtype or new.device != held.device:
            raise ValueError(
                f"cache holds {name} as {held.dtype} on {held.device}, got {new.dtype} on {new.device}; legal: the same"
            )


class GrowingKV(TensorState):
    """Keys and values of every token seen.

    Args:
        batch_size: sequences side by side.
        max_length: tokens of each that fit.
        heads: key/value heads and their width.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(
        self, batch_size: int, max_length: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch_size, max_length, *heads)
        super().__init__(
            max_length,
            k=torch.empty(shape, dtype=dtype, device=device),
            v=torch.empty(shape, dtype=dtype, device=device),
        )

    def update(self, k_BTGK: Tensor, v_BTGV: Tensor) -> KV:
        """Appends T tokens; returns the keys and values of all tokens so far, as views."""
        end = self.length + k_BTGK.shape[1]
        for name, new in (("k", k_BTGK), ("v", v_BTGV)):
            self._check(name, new)
            self.tensors[name][:, self.length : end] = new.detach()
        self.length = end
        return KV(self.tensors["k"][:, :end], self.tensors["v"][:, :end])

    def next_row(self, new: Tensor) -> tuple[int, KV]:
        """Counts one more token, `new` being its key or value: the row that it is to be written to, and all rows in use
        then."""
        self._check("k", new)
        self.length += 1
        return self.length - 1, KV(self.tensors["k"][:, : self.length], self.tensors["v"][:, : self.length])

    def refusal_to_crop(self, length: int) -> str | None:
        return None


class RingKV(TensorState):
    """Keys and values of the last `window` tokens: the token at position p lies in slot p modulo the capacity.

    Args:
        window: tokens kept, or fewer where `max_length` is shorter; the others as in `GrowingKV`.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        window: int,
        heads: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = min(window, max_length)
        shape = (batch_size, self.capacity, *heads)
        super().__init__(
            max_length,
            k=torch.empty(shape, dtype=dtype, device=device),
            v=torch.empty(shape, dtype=dtype, device=device),
        )

    def update(self, k_BTGK: Tensor, v_BTGV: Tensor) -> KV:
        """Adds T tokens; returns all keys and values that any of the T may see.

        For a single token that is the ring itself, as a view. Its slots are rotated then, which attention of one query
        over keys that it sees all of does not notice. Several tokens need their predecessors in order, and before they
        are overwritten: a copy.
        """
        T = k_BTGK.shape[1]
        for name, new in (("k", k_BTGK), ("v", v_BTGV)):
            self._check(name, new)
        if T == 1:
            self._write(k_BTGK, v_BTGV)
            held = min(self.length, self.capacity)
            return KV(self.tensors["k"][:, :held], self.tensors["v"][:, :held])
        seen = KV(self._with_predecessors("k", k_BTGK), self._with_predecessors("v", v_BTGV))
        self._write(k_BTGK, v_BTGV)
        return seen

    def next_row(self, new: Tensor) -> tuple[int, KV]:
        """As `GrowingKV.next_row`."""
        self._check("k", new)
        row = self.length % self.capacity
        self.length += 1
        held = min(self.length, self.capacity)
        return row, KV(self.tensors["k"][:, :held], self.tensors["v"][:, :held])

    def _with_predecessors(self, name: str, new: Tensor) -> Tensor:
        if self.length == 0:
            return new
        ring = self.tensors[name]
        if self.length <= self.capacity:
            return torch.cat([ring[:, : self.length], new], dim=1)
        # A full ring starts with its oldest token where the next one would be written.
        oldest = self.length % self.capacity
        return torch.cat([ring[:, oldest:], ring[:, :oldest], new], dim=1)

    def _write(self, k_BTGK: Tensor, v_BTGV: Tensor) -> None:
        end = self.length + k_BTGK.shape[1]
        # Of more tokens than slots only the newest stay.
        kept = min(k_BTGK.shape[1], self.capacity)
        slot = (end - kept) % self.capacity
        before_wrap = min(kept, self.capacity - slot)
        for name, new in (("k", k_BTGK), ("v", v_BTGV)):
            newest = new[:, new.shape[1] - kept :].detach()
            self.tensors[name][:, slot : slot + before_wrap] = newest[:, :before_wrap]
            self.tensors[name][:, : kept - before_wrap] = newest[:, before_wrap:]
        self.length = end

    def refusal_to_crop(self, length: int) -> str | None:
        if length in (0, self.length) or self.length <= self.capacity:
            return None
        return (
            f"the ring buffer of {self.capacity} tokens has overwritten tokens that the window before token {length}"
            " needs"
        )


class FixedState(TensorState):
    """Common part of states whose size does not depend on the text, because tokens are folded into them: they forget
    everything or nothing."""

    forgetting: str = "a state of fixed size cannot forget some tokens"

    def crop(self, length: int) -> None:
        super().crop(length)
        if length == 0:
            for tensor in self.tensors.values():
                tensor.zero_()

    def refusal_to_crop(self, length: int) -> str | None:
        if length in (0, self.length):
            return None
        return f"{self.forgetting}; start again from 0, or keep a copy"


class RecurrentState(FixedState):
    """The fp32 matrix per head of a linear layer, and the last W - 1 inputs of its short convolution where it has one.

    The matrices are fp32 whatever the model computes in: they sum over the whole text.

    Args:
        batch_size: sequences side by side.
        max_length: tokens of each that the cache is for; memory does not depend on it.
        shape: heads, key width and value width.
        conv: channels and width W of the convolution, or None.
        dtype: of the convolution's inputs.
        device: where all of it lies.
    """

    forgetting = "a linear-attention state is a sum over all tokens seen and cannot forget some of them"

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        shape: tuple[int, int, int],
        conv: tuple[int, int] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        tensors = {"state": torch.zeros((batch_size, *shape), dtype=torch.float32, device=device)}
        if conv is not None:
            channels, width = conv
            tensors["tail"] = torch.zeros((batch_size, channels, width - 1), dtype=dtype, device=device)
        super().__init__(max_length, **tensors)

    @staticmethod
    def matrix_bytes(shape: tuple[int, int, int]) -> int:
        """Bytes per sequence of the matrices alone."""
        return torch.float32.itemsize * math.prod(shape)

    @property
    def state_BHKV(self) -> Tensor:
        return self.tensors["state"]

    @property
    def tail_BXW(self) -> Tensor:
        return self.tensors["tail"]

    def update(self, n_tokens: int, state_BHKV: Tensor, tail_BXW: Tensor | None = None) -> None:
        """Replaces the state by the one after `n_tokens` more tokens."""
        self.tensors["state"].copy_(state_BHKV.detach())
        if tail_BXW is not None:
            self._check("tail", tail_BXW)
            self.tensors["tail"].copy_(tail_BXW.detach())
        self.length += n_tokens


class Alias:
    """The entry of a layer that reuses another's keys and values: holds nothing and follows its owner, which `reorder`
    and `crop` act on."""

    def __init__(self, owner: LayerState) -> None:
        self.owner = owner

    @property
    def length(self) -> int:
        return self.owner.length

    @property
    def max_length(self) -> int:
        return self.owner.max_length

    @property
    def batch_size(self) -> int:
        return self.owner.batch_size

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {}

    def nbytes(self) -> int:
        return 0

    def reorder(self, index_B: Tensor) -> None:
        pass

    def refusal_to_crop(self, length: int) -> str | None:
        return None

    def crop(self, length: int) -> None:
        pass
