"""Which sequence each token of a batch belongs to, and sums over what came before in it, for policies that decide by
them (`PolicyConfig.follows_sequences`).

A decision reads a sum over its token and those before it in its document, so it is causal, and whoever decodes keeps
the sum of the last token and nothing else. Sums carry no gradient.

Legend: B sequences, S tokens of each, T = B S tokens, X numbers that are summed.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from routing.policy import Policy, Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
    """How a batch of T tokens is made of B sequences, one behind the other.

    Attributes:
        n: B.
        length: S.
        begins_BS: bool, the tokens that begin a document inside of their sequence; None where each is one document.
        before_BX: what `sums_so_far` gave for the tokens of these sequences that came before; None at their beginning.
    """

    n: int
    length: int
    begins_BS: Tensor | None = None
    before_BX: Tensor | None = None


@torch.no_grad()
def sums_so_far(values_of: Callable[[Tensor], Tensor], sequences: Sequences, device: torch.device) -> Tensor:
    """Sums over each token and those before it in its document, [B, S, X + 1] in at least fp32; the last number counts
    the tokens.

    Args:
        values_of: from the number of tokens that came before each in its document, int64 [T], what it adds, [T, X].
        sequences: how the tokens are arranged.
    """
    place_S = torch.arange(sequences.length, device=device)
    # Where the document of each token begins in its sequence.
    start_BS = torch.zeros(sequences.n, sequences.length, dtype=torch.int64, device=device)
    if sequences.begins_BS is not None:
        start_BS = torch.where(sequences.begins_BS, place_S, 0).cummax(dim=1)[0]
    place_BS = place_S - start_BS
    if sequences.before_BX is not None:
        # A document that began before.
        place_BS = place_BS + torch.where(start_BS == 0, sequences.before_BX[:, -1:].long(), 0)
    values_TX = functional.pad(values_of(place_BS.flatten()).detach(), (0, 1), value=1.0)
    values_BSX = values_TX.to(torch.promote_types(values_TX.dtype, torch.float32)).unflatten(0, place_BS.shape)
    sums_BSX = values_BSX.cumsum(dim=1)
    if sequences.begins_BS is not None:
        ahead_BSX = functional.pad(sums_BSX, (0, 0, 1, 0))
        sums_BSX = sums_BSX - ahead_BSX.gather(1, start_BS[:, :, None].expand_as(sums_BSX))
    if sequences.before_BX is not None:
        sums_BSX = sums_BSX + torch.where(start_BS[:, :, None] == 0, sequences.before_BX[:, None], 0.0)
    return sums_BSX


def followed(policy: Policy, scores: Scores, sequences: Sequences | None = None) -> tuple[Scores, Tensor]:
    """The scores with what a policy remembers of each token's document so far, and the sums that the next tokens of the
    sequences are to find. Without sequences all tokens are one."""
    one = Sequences(n=1, length=len(scores.x_TD))
    sums_BSX = sums_so_far(lambda place_T: policy.remembered(scores, place_T), sequences or one, scores.x_TD.device)
    return dataclasses.replace(scores, past_TX=sums_BSX.flatten(0, 1)), sums_BSX[:, -1]
