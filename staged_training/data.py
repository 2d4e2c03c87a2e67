"""Training data as batches of fixed composition, visited in an order that is a pure function of seed and position.

Batch i is always the same B x T tokens of the packed stream. A seed permutes the order of the batches and never what
lies in one, so activations stored once per batch serve every method and every seed, and recomputing a batch gives the
same bits. The reader's position is one integer.

Legend: B batch, T tokens, D model width, N batches in a sequence.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from foundation.permutations import permutation
from lm.model import IGNORED_TARGET, LanguageModel

# Keeps the draws for a branch's order apart from those for the trunk's epochs.
_TRUNK, _BRANCH = 0, 1


class TokenStream(Protocol):
    """Token ids as one sequence: an array, a memory map, or the corpus's shards."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> Any: ...


class Batches(Protocol):
    """Inputs and targets_BT of batch `index`; inputs are tokens_BT, or the x_BTD that crosses the boundary."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...


def in_order(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """All batches, first to last."""
    for index in range(len(batches)):
        yield batches[index]


class TokenBatches:
    """The packed stream as batches of `batch_size` rows of `seq_len` consecutive tokens, each token's target being the
    next one.

    Args:
        tokens: one-dimensional stream of token ids, memory-mapped or not.
        pad: keep the incomplete last batch, with targets of `IGNORED_TARGET` behind the end of the text, so that an
            evaluation covers every token; training leaves it out.

    Raises:
        ValueError: when the stream does not fill a single batch.
    """

    def __init__(
        self,
        tokens: TokenStream,
        *,
        batch_size: int,
        seq_len: int,
        device: torch.device | str = "cpu",
        pad: bool = False,
    ) -> None:
        self.tokens = tokens
        self.batch_size, self.seq_len, self.device = batch_size, seq_len, device
        # Every token but the last has a target.
        n_predicted, size = len(tokens) - 1, batch_size * seq_len
        self._length = -(-n_predicted // size) if pad else n_predicted // size
        if self._length < 1:
            raise ValueError(
                f"the text has {len(tokens)} tokens; one batch of {batch_size} rows of {seq_len} tokens needs"
                f" {size + 1}"
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(f"batch {index} of {self._length}")
        size = self.batch_size * self.seq_len
        chunk = np.asarray(self.tokens[index * size : (index + 1) * size + 1], dtype=np.int64)
        tokens, targets = np.zeros(size, dtype=np.int64), np.full(size, IGNORED_TARGET, dtype=np.int64)
        tokens[: len(chunk) - 1], targets[: len(chunk) - 1] = chunk[:-1], chunk[1:]
        shape = (self.batch_size, self.seq_len)
        return torch.from_numpy(tokens).view(shape).to(self.device), torch.from_numpy(targets).view(shape).to(
            self.device
        )


class PrefixBatches:
    """Batches whose inputs are what the frozen prefix makes of the tokens, computed on each access."""

    def __init__(self, batches: Batches, model: LanguageModel, boundary: int) -> None:
        self.batches, self.model, self.boundary = batches, model, boundary

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens_BT, targets_BT = self.batches[index]
        return prefix_activations(self.model, tokens_BT, self.boundary), targets_BT


def own_rows(batch_size: int, rank: int, n_processes: int) -> slice:
    """The rows of each batch that are one process's: consecutive ones, as many for each of `n_processes`.

    Raises:
        ValueError: when the rows cannot be divided evenly.
    """
    if batch_size % n_processes:
        raise ValueError(f"batch_size: {batch_size} rows cannot be divided evenly over {n_processes} processes")
    n_rows = batch_size // n_processes
    return slice(rank * n_rows, (rank + 1) * n_rows)


class OwnRows:
    """Some rows of each batch."""

    def __init__(self, batches: Batches, rows: slice) -> None:
        self.batches, self.rows = batches, rows

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets_BT = self.batches[index]
        return inputs[self.rows], targets_BT[self.rows]


@torch.no_grad()
def prefix_activations(model: LanguageModel, tokens_BT: Tensor, boundary: int) -> Tensor:
    """The x_BTD at the boundary as in inference: frozen routers neither draw nor count."""
    frozen = list(model.blocks[:boundary])
    were_training = [block.training for block in frozen]
    for block in frozen:
        block.eval()
    with model.its_threads():
        x_BTD = model.prefix(tokens_BT, boundary)
    for block, was_training in zip(frozen, were_training):
        block.train(was_training)
    return x_BTD


def trunk_order(n_batches: int, seed: int, start: int, count: int) -> np.ndarray:
    """Batch numbers at positions [start, start + count) of the trunk's endless sequence: one permutation of all batches
    per epoch.

    Returns:
        int64 [count], from (seed, epoch) alone, so any position can be computed without those before it.
    """
    positions_N = np.arange(start, start + count)
    order_N = np.empty(count, dtype=np.int64)
    for epoch in np.unique(positions_N // n_batches):
        here_N = positions_N // n_batches == epoch
        order_N[here_N] = permutation(n_batches, seed, _TRUNK, int(epoch))[positions_N[here_N] % n_batches]
    return order_N


def branch_order(batches_N: np.ndarray, seed: int) -> np.ndarray:
    """The branch's batches, the same set for every seed, in the order of `seed`."""
    return batches_N[permutation(len(batches_N), seed, _BRANCH)]
