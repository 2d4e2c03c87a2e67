"""What one layer remembers of the tokens it has seen: the entries of a `HybridCache`.

Every state is allocated once, at its full size, so that its bytes are known before the first token and do not move
afterwards. States hold no gradients: what is stored is detached, because a cache is for inference.

Legend: B batch, S keys, G key/value heads, H linear heads, K key width, V value width, X convolution channels, W
convolution width.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor


class KV(NamedTuple):
    """Keys and values in order of position, the newest last, or as a ring holds them; what a layer hands to the layers
    that reuse them."""

    k_BSGK: Tensor
    v_BSGV: Tensor


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a state was: its counts, and copies of those tensors that going on writes over."""

    length: int
    behind_B: Tensor | None
    tensors: dict[str, Tensor]


class LayerState(Protocol):
    """What a `HybridCache` asks of each of its entries.

    Attributes:
        length: tokens seen so far, by the longest sequence.
        behind_B: int64, how many fewer each sequence has seen; None where all have seen as many.
        lengths_B: int64, tokens that each sequence has seen.
        max_length: tokens the cache was made for.
        batch_size: sequences side by side.
        tensors: everything held, batch first.
    """

    @property
    def length(self) -> int: ...

    @property
    def behind_B(self) -> Tensor | None: ...

    @property
    def lengths_B(self) -> Tensor: ...

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

    def joined(self, others: "Sequence[Self]") -> "Self":
        """A new state of this one's sequences, then of the others'."""
        ...

    def grow(self, max_length: int) -> None:
        """Makes room for so many tokens of each sequence, at least as many as before."""
        ...

    def in_eight_bits(self, name: str) -> "LayerState":
        """An empty state like this empty one, its keys and values stored in 8 bits, as `name` of
        `attention.kv_states.EIGHT_BITS` says; itself where it has none."""
        ...

    def save(self) -> Saved:
        """What `restore` needs to come back to this moment."""
        ...

    def restore(self, saved: Saved) -> None:
        """Forgets what has come since `save`, of the same sequences."""
        ...


class TensorState:
    """Common part of states that hold tensors: counts tokens, moves sequences, counts bytes.

    Attributes:
        writes_over: whether going on writes over what is held, which `save` must copy then.
    """

    writes_over = True

    def __init__(self, max_length: int, **tensors: Tensor) -> None:
        self.length = 0
        self.behind_B: Tensor | None = None
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
        if self.behind_B is not None:
            self._count(self.length - self.behind_B[index_B])

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
        if self.behind_B is None:
            self.length = length
        else:
            self._count((self.length - self.behind_B).clamp(max=length))

    def joined(self, others: Sequence[Self]) -> Self:
        """A new state of this one's sequences, then of the others', with room for as many tokens as the largest."""
        states = [copy.copy(state) for state in (self, *others)]
        for state in states:
            state.grow(max(each.max_length for each in states))
        new, length_B = states[0], torch.cat([state.lengths_B for state in states])
        new.tensors = {name: torch.cat([state.tensors[name] for state in states]) for name in new.tensors}
        new._count(length_B)
        return new

    def grow(self, max_length: int) -> None:
        """Makes room for so many tokens of each sequence, at least as many as before."""
        self.max_length = max_length

    def in_eight_bits(self, name: str) -> LayerState:
        """See `LayerState`."""
        return self

    def save(self) -> Saved:
        """What `restore` needs to come back to this moment."""
        kept = {name: tensor.clone() for name, tensor in self.tensors.items()} if self.writes_over else {}
        return Saved(self.length, self.behind_B, kept)

    def restore(self, saved: Saved) -> None:
        """Forgets what has come since `save`, of the same sequences."""
        for name in self.tensors.keys() & saved.tensors.keys():
            self.tensors[name].copy_(saved.tensors[name])
        self.length, self.behind_B = saved.length, saved.behind_B

    @property
    def lengths_B(self) -> Tensor:
        """Tokens that each sequence has seen, int64."""
        device = next(iter(self.tensors.values())).device
        length_B = torch.full((self.batch_size,), self.length, dtype=torch.int64, device=device)
        return length_B if self.behind_B is None else length_B - self.behind_B

    def _count(self, length_B: Tensor) -> None:
        self.length = int(length_B.max())
        behind_B = self.length - length_B
        self.behind_B = behind_B if bool(behind_B.any()) else None

    def _lengthen(self, rows: int) -> None:
        """More rows behind those that the tensors have."""
        self.tensors = {
            name: torch.cat([tensor, tensor.new_empty(len(tensor), rows - tensor.shape[1], *tensor.shape[2:])], dim=1)
            for name, tensor in self.tensors.items()
        }

    def _write_row(self, row_B: Tensor, **new: Tensor) -> None:
        """One token of each sequence, into a row of its own."""
        sequence_B = torch.arange(len(row_B), device=row_B.device)
        for name, tensor in new.items():
            self.tensors[name][sequence_B, row_B] = tensor[:, 0].detach()

    def _check(self, name: str, new: Tensor) -> None:
        held = self.tensors[name]
        if new.dtype != held.dtype or new.device != held.device:
            raise ValueError(
                f"cache holds {name} as {held.dtype} on {held.device}, got {new.dtype} on {new.device}; legal: the same"
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
    """The entry of a layer that reuses another's keys and values: holds nothing and follows its owner, which is what
    is moved, cropped and saved."""

    def __init__(self, owner: LayerState) -> None:
        self.owner = owner

    @property
    def length(self) -> int:
        return self.owner.length

    @property
    def behind_B(self) -> Tensor | None:
        return self.owner.behind_B

    @property
    def lengths_B(self) -> Tensor:
        return self.owner.lengths_B

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

    def joined(self, others: Sequence[Self]) -> Self:
        raise AssertionError("a cache joins the owner and makes another alias of it")

    def grow(self, max_length: int) -> None:
        pass

    def in_eight_bits(self, name: str) -> "Alias":
        return self

    def save(self) -> Saved:
        return Saved(self.length, self.behind_B, {})

    def restore(self, saved: Saved) -> None:
        pass
