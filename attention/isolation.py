"""Documents packed into one row, kept apart in attention: every layer sees each document as if it stood alone.

A document is cut out of its row, and documents of about one length go through a layer side by side, padded at their
ends. Every kind of attention reads its past only and begins without one, so what is behind a document's end changes
nothing in it, its positions begin at 0, states and convolutions begin empty, and no kind has to know. A piece of a
document that began in the row before is a document of its own.

Legend: B batch, T tokens, D model width, N documents of a group, L tokens of its longest, P tokens of its documents.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from attention.kind import AttentionLayer
from attention.layer_states import KV


class Group(NamedTuple):
    """Documents that go through a layer side by side.

    Attributes:
        source_NL: int64, where each token stands among the B T of the batch; behind a document's end its last token.
        inside_NL: bool, which of them are the document's.
    """

    source_NL: Tensor
    inside_NL: Tensor


Documents = tuple[Group, ...]


def find_documents(tokens_BT: Tensor, boundary: int) -> Documents | None:
    """The documents of a batch, in groups whose lengths differ by less than a factor of two; None where every row is
    one document, which a layer takes as it is.

    Args:
        boundary: token that begins a document.
    """
    B, T = tokens_BT.shape
    begins_BT = tokens_BT == boundary
    begins_BT[:, 0] = True
    starts = begins_BT.flatten().nonzero()[:, 0]
    if len(starts) == B:
        return None
    lengths = torch.diff(starts, append=starts.new_full((1,), B * T))
    # Of a length n the bits that n - 1 takes: 1, 2, 3 to 4, 5 to 8, ...
    sizes = torch.ceil(torch.log2(lengths.double())).long()
    groups = []
    for size in sizes.unique().tolist():
        start_N, length_N = starts[sizes == size], lengths[sizes == size]
        place_L = torch.arange(int(length_N.max()), device=tokens_BT.device)
        inside_NL = place_L < length_N[:, None]
        groups.append(Group(start_N[:, None] + torch.minimum(place_L, length_N[:, None] - 1), inside_NL))
    return tuple(groups)


def beginnings(documents: Documents, batch_size: int, length: int) -> Tensor:
    """The tokens that documents begin with, bool [B, T]."""
    begins_BT = torch.zeros(batch_size * length, dtype=torch.bool, device=documents[0].source_NL.device)
    for group in documents:
        begins_BT[group.source_NL[:, 0]] = True
    return begins_BT.view(batch_size, length)


def attend_apart(
    layer: AttentionLayer, x_BTD: Tensor, documents: Documents, shared: tuple[KV | None, ...] | None
) -> tuple[Tensor, tuple[KV | None, ...]]:
    """What `layer(x_BTD)` gives, document by document.

    Args:
        shared: what the layer whose keys and values it reads returned here; None for a layer that reads none.

    Returns:
        y_BTD, and what the layer offers for reuse, group by group.
    """
    x_PD, y_PD, kvs = x_BTD.flatten(0, 1), None, []
    for place, (source_NL, inside_NL) in enumerate(documents):
        y_NLD, kv = layer(x_PD[source_NL], shared=None if shared is None else shared[place])
        y_PD = torch.empty_like(x_PD, dtype=y_NLD.dtype) if y_PD is None else y_PD
        y_PD = y_PD.index_copy(0, source_NL[inside_NL], y_NLD[inside_NL])
        kvs.append(cast(KV | None, kv))
    assert y_PD is not None, "a batch has documents"
    return y_PD.view_as(x_BTD), tuple(kvs)
