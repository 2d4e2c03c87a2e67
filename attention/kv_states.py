"""Keys and values of a softmax layer, of all tokens or of a window.

Legend: B batch, T tokens, G key/value heads, K key width, V value width.
"""

import torch
from torch import Tensor

from attention.layer_states import KV, TensorState


class GrowingKV(TensorState):
    """Keys and values of every token seen, in each sequence from the first row on.

    Args:
        batch_size: sequences side by side.
        max_length: tokens of each that fit.
        heads: key/value heads and their width.
        dtype: of keys and values.
        device: where they lie.
    """

    writes_over = False

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
        """Appends T tokens, one where sequences are behind; returns the keys and values of all tokens so far, as
        views."""
        end = self.length + k_BTGK.shape[1]
        for name, new in (("k", k_BTGK), ("v", v_BTGV)):
            self._check(name, new)
            if self.behind_B is None:
                self.tensors[name][:, self.length : end] = new.detach()
        if self.behind_B is not None:
            self._write_row(self.length - self.behind_B, k=k_BTGK, v=v_BTGV)
        self.length = end
        return KV(self.tensors["k"][:, :end], self.tensors["v"][:, :end])

    def next_row(self, new: Tensor) -> tuple[int, KV]:
        """Counts one more token, `new` being its key or value: the row that it is to be written to, and all rows in use
        then."""
        self._check("k", new)
        self.length += 1
        return self.length - 1, KV(self.tensors["k"][:, : self.length], self.tensors["v"][:, : self.length])

    def grow(self, max_length: int) -> None:
        super().grow(max_length)
        self._lengthen(max_length)

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
        self.window = window
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
            if self.behind_B is None:
                self._write(k_BTGK, v_BTGV)
            else:
                self._write_row((self.length - self.behind_B) % self.capacity, k=k_BTGK, v=v_BTGV)
                self.length += 1
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

    def grow(self, max_length: int) -> None:
        # A ring that is shorter than its window has not gone round: its tokens lie from the first slot on.
        super().grow(max_length)
        self.capacity = min(self.window, max_length)
        self._lengthen(self.capacity)

    def refusal_to_crop(self, length: int) -> str | None:
        if length in (0, self.length) or self.length <= self.capacity:
            return None
        return (
            f"the ring buffer of {self.capacity} tokens has overwritten tokens that the window before token {length}"
            " needs"
        )
