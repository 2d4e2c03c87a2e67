"""Seconds per token of a model under several policies, on real text: prefill, and decoding of one and of several
sequences.

Policies take turns, so that a disturbance of the machine hits all alike, and the weights stay where they are.

Legend: B sequences, T tokens.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from foundation.timing import wall_seconds
from lm.model import LanguageModel
from routing.policy import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seconds:
    """Medians over turns, in seconds per token.

    Attributes:
        prefill: of a sequence that is read at once.
        decode: by number of sequences, of a step by their number.
    """

    prefill: float
    decode: dict[int, float]


def policies_of(model: LanguageModel) -> list[Policy]:
    """Those of all layers, which `set_policies` puts back."""
    return [router.policy for router in model.routers()]


def set_policies(model: LanguageModel, policies: Sequence[Policy]) -> None:
    """Installs policies that `policies_of` gave, thresholds and all."""
    for router, policy in zip(model.routers(), policies):
        router.policy = policy


@torch.no_grad()
def seconds_per_token(
    model: LanguageModel,
    policies: Mapping[str, Sequence[Policy]],
    stream_N: Tensor,
    *,
    prefill: int,
    decode: int,
    sequences: Sequence[int],
    repeats: int,
) -> dict[str, Seconds]:
    """Times the model under each of some policies.

    Args:
        policies: by name, of all layers.
        stream_N: tokens of real text: how many experts a policy uses depends on it. Taken again from the beginning
            where it ends.
        prefill, decode: tokens that a sequence is read for at once, and that it is then continued by.
        sequences: numbers of sequences to decode at once.
        repeats: turns that count; one more warms up.
    """
    prefills: dict[str, list[float]] = {name: [] for name in policies}
    decodes: dict[str, dict[int, list[float]]] = {name: {n: [] for n in sequences} for name in policies}
    for turn in range(repeats + 1):
        for name, own in policies.items():
            set_policies(model, own)
            found = _turn(model, stream_N, prefill, decode, sequences)
            if turn:
                prefills[name].append(found.prefill)
                for n in sequences:
                    decodes[name][n].append(found.decode[n])
    return {
        name: Seconds(
            prefill=statistics.median(prefills[name]),
            decode={n: statistics.median(times) for n, times in decodes[name].items()},
        )
        for name in policies
    }


def _turn(model: LanguageModel, stream_N: Tensor, prefill: int, decode: int, sequences: Sequence[int]) -> Seconds:
    device = model.embedding_VD.device
    by_number = {}
    for n in sequences:
        tokens_BT = _rows(stream_N, n, prefill + decode).to(device)
        cache = model.new_cache(n, prefill + decode)
        model(tokens_BT[:, :prefill], cache, last_only=True)
        steps = [
            wall_seconds(partial(model, tokens_BT[:, at : at + 1], cache, last_only=True), device.type)
            for at in range(prefill, prefill + decode)
        ]
        # The first step describes the model to the call that computes the others.
        by_number[n] = statistics.median(steps[1:]) / n
    tokens_BT = _rows(stream_N, 1, prefill).to(device)
    seconds = wall_seconds(lambda: model(tokens_BT, model.new_cache(1, prefill), last_only=True), device.type)
    return Seconds(prefill=seconds / prefill, decode=by_number)


def _rows(stream_N: Tensor, n: int, length: int) -> Tensor:
    repeats = -(-n * length // len(stream_N))
    return stream_N.repeat(repeats)[: n * length].view(n, length)
