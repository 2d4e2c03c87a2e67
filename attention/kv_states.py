"""Keys and values of a softmax layer, of all tokens or of a window, as they are or in 8 bits.

Legend: B batch, T tokens, S keys, G key/value heads, K key width, V value width.
"""

from typing import Any

import torch
from torch import Tensor

from attention.layer_states import KV, TensorState

Rows = dict[str, Tensor]

# How keys and values are stored in 8 bits, by name: the dtype, and the largest number that it holds.
EIGHT_BITS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


class KVState(TensorState):
    """Common part: how keys and values are stored, which the two classes below leave to it.

    Args:
        rows: of memory, in each sequence; the others as in `GrowingKV`.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        rows: int,
        heads: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(max_length, **self._allocated((batch_size, rows, *heads), dtype, device))

    def _allocated(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
        return {name: torch.empty(shape, dtype=dtype, device=device) for name in ("k", "v")}

    def _stored(self, k_BTGK: Tensor, v_BTGV: Tensor) -> Rows:
        """New rows as they lie in memory."""
        for name, new in (("k", k_BTGK), ("v", v_BTGV)):
            self._check(name, new)
        return {"k": k_BTGK.detach(), "v": v_BTGV.detach()}

    def _read(self, rows: Rows) -> KV:
        """Rows of memory as keys and values."""
        return KV(rows["k"], rows["v"])

    @property
    def heads(self) -> tuple[int, int]:
        """G and K."""
        return self.tensors["k"].shape[2], self.tensors["k"].shape[3]


class GrowingKV(KVState):
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
        super().__init__(batch_size, max_length, max_length, heads, dtype, device)

    def update(self, k_BTGK: Tensor, v_BTGV: Tensor) -> KV:
        """Appends T tokens, one where sequences are behind; returns the keys and values of all tokens so far, where
        they are stored as they are as views."""
        end, stored = self.length + k_BTGK.shape[1], self._stored(k_BTGK, v_BTGV)
        if self.behind_B is None:
            for name, new in stored.items():
                self.tensors[name][:, self.length : end] = new
        else:
            self._write_row(self.length - self.behind_B, **stored)
        self.length = end
        return self._read({name: tensor[:, :end] for name, tensor in self.tensors.items()})

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

    def in_eight_bits(self, name: str) -> "EightBitGrowingKV":
        held = self.tensors["k"]
        return EightBitGrowingKV(self.batch_size, self.max_length, self.heads, held.dtype, held.device, name=name)


class RingKV(KVState):
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
        super().__init__(batch_size, max_length, self.capacity, heads, dtype, device)

    def update(self, k_BTGK: Tensor, v_BTGV: Tensor) -> KV:
        """Adds T tokens; returns all keys and values that any of the T may see.

        For a single token that is the ring itself, stored as it is a view. Its slots are rotated then, which attention
        of one query over keys that it sees all of does not notice. Several tokens need their predecessors in order, and
        before they are overwritten: a copy.
        """
        T, stored = k_BTGK.shape[1], self._stored(k_BTGK, v_BTGV)
        if T == 1:
            if self.behind_B is None:
                self._write(stored, T)
            else:
                self._write_row((self.length - self.behind_B) % self.capacity, **stored)
                self.length += 1
            held = min(self.length, self.capacity)
            return self._read({name: tensor[:, :held] for name, tensor in self.tensors.items()})
        seen = self._read({name: self._with_predecessors(name, new) for name, new in stored.items()})
        self._write(stored, T)
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

    def _write(self, stored: Rows, T: int) -> None:
        end = self.length + T
        # Of more tokens than slots only the newest stay.
        kept = min(T, self.capacity)
        slot = (end - kept) % self.capacity
        before_wrap = min(kept, self.capacity - slot)
        for name, new in stored.items():
            newest = new[:, T - kept :]
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

    def in_eight_bits(self, name: str) -> "EightBitRingKV":
        held, sizes = self.tensors["k"], (self.batch_size, self.max_length, self.window, self.heads)
        return EightBitRingKV(*sizes, held.dtype, held.device, name=name)


class EightBits(KVState):
    """Stored as int8 or fp8 (e4m3) with a scale of their own for each token's key and value in each head (fp32): (K +
    4) bytes where fp32 takes 4 K. What is read is rounded, as int8 by at most 1/254 of the head's largest number, as
    fp8 by at most 1/16 of itself, for the token that has just come as for all others, so that reading a prompt in
    pieces changes nothing.

    Args:
        sizes: as of the class that stores them as they are.
        name: one of `EIGHT_BITS`.
    """

    dtype: torch.dtype

    def __init__(self, *sizes: Any, name: str = "int8") -> None:
        self.stored, self.largest = EIGHT_BITS[name]
        super().__init__(*sizes)

    def _allocated(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
        self.dtype = dtype
        # Few operators know fp8: its bytes are kept.
        whole = super()._allocated(shape, torch.uint8 if self.stored.is_floating_point else self.stored, device)
        scales = {f"{name}_scale": torch.empty(shape[:-1], dtype=torch.float32, device=device) for name in whole}
        return whole | scales

    def _stored(self, k_BTGK: Tensor, v_BTGV: Tensor) -> Rows:
        stored: Rows = {}
        for name, new in (("k", k_BTGK), ("v", v_BTGV)):
            if new.dtype != self.dtype:
                raise ValueError(f"cache stores {name} of {self.dtype}, got {new.dtype}; legal: the same")
            exact = new.detach().float()
            scale_BTG = exact.abs().amax(dim=-1) / self.largest
            # A head of zeros has no scale, and needs none.
            steps = exact / scale_BTG.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
            if self.stored.is_floating_point:
                # By rounding the largest one may lie above the largest number, which fp8 has no neighbour of.
                rounded = steps.clamp(-self.largest, self.largest).to(self.stored).view(torch.uint8)
            else:
                rounded = steps.round().to(self.stored)
            stored |= {name: rounded, f"{name}_scale": scale_BTG}
        return stored

    def _read(self, rows: Rows) -> KV:
        read = {name: rows[name].view(self.stored).float() * rows[f"{name}_scale"][..., None] for name in ("k", "v")}
        return KV(read["k"].to(self.dtype), read["v"].to(self.dtype))


class EightBitGrowingKV(EightBits, GrowingKV):
    """`GrowingKV` in 8 bits."""


class EightBitRingKV(EightBits, RingKV):
    """`RingKV` in 8 bits."""
