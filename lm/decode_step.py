"""A decode step in one call of C: a described model and its cache, and what a call leaves for its callers.

    LanguageModel.forward -> DecodeStep.run -> decode_step.c

Whatever the call does not know (`NotInOneCall`) takes the layers' own way, with the same results.

Legend: B sequences, V vocabulary, D model width, E experts, K slots per token, N rows.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attention.cache import HybridCache
from attention.layer_states import Alias, LayerState
from routing.assignments import Assignments
from routing.decode_step import OutsideDecisions, routing_of
from routing.router import Router, Routing
from triton_kernels.native.decode_step import DECIDE, NativeBlock, NativeModel, NotInOneCall, Watch
from triton_kernels.native.library import MOST_TOKENS, call, is_native, threads

# Of more sequences blocked products win, see `attention.projection`.
MOST_SEQUENCES = MOST_TOKENS // 4


class DecodeStep:
    """One model with one cache, described for `decode_step.c`.

    Args:
        native: filled in but for its blocks.
        blocks: filled in, one per layer.
        watch: over all that both point at.
        routers: of the layers.
        cache: whose states the blocks point at. It is not kept: a step lives as long as its cache.
        dtype: of the logits.
    """

    def __init__(
        self,
        native: NativeModel,
        blocks: Sequence[NativeBlock],
        watch: Watch,
        routers: Sequence[Router],
        cache: HybridCache,
        dtype: torch.dtype,
    ) -> None:
        self.native, self.watch, self.routers, self.dtype = native, watch, routers, dtype
        watch.begin()
        self.layers, self.states = cache.layers, list(cache.layers)
        self.n_whole = self.n_real = 0
        B, D = native.batch, native.width
        for block in blocks:
            block.whole_at, block.real_at = self.n_whole, self.n_real
            self.n_whole += 3 * B * block.slots + block.experts + 1 + B + 1
            self.n_real += B * (block.slots + D + block.experts + block.columns + block.returns)
        self.blocks = (NativeBlock * len(blocks))(*blocks)
        native.blocks, native.block = len(blocks), ctypes.cast(self.blocks, ctypes.POINTER(NativeBlock))
        self.outside = OutsideDecisions(routers, list(self.blocks), B)
        native.decide = DECIDE(self.outside.decide)

    def holds(self, cache: HybridCache) -> bool:
        """Whether model and cache are still the ones described."""
        return cache.layers is self.layers and self.layers == self.states and self.watch.holds()

    def ready(self, tokens_BT: Tensor) -> bool:
        """Whether these tokens can be the next ones. Where they cannot, the layers say why not."""
        length = self.states[0].length
        return (
            all(state.length == length < state.max_length for state in self.states)
            and len(tokens_BT) == self.native.batch
            and all(0 <= token < self.native.vocabulary for (token,) in tokens_BT.tolist())
        )

    def run(self, tokens_BT: Tensor, cache: HybridCache) -> tuple[Tensor, Callable[[], tuple[Routing, ...]]]:
        """Logits of the next token [B, 1, V], and what gives the routing of every layer. The cache has seen the tokens
        then.

        Raises:
            NonFiniteScoresError: as a router does, like whatever else one that decides outside of the call raises.
        """
        position, behind_B = self.states[0].length, self.states[0].behind_B
        logits_B1V = torch.empty(self.native.batch, 1, self.native.vocabulary)
        whole, real = torch.empty(self.n_whole, dtype=torch.int64), torch.empty(self.n_real)
        self.outside.begin(real, cache.sums)
        failed = call(
            "decode_step",
            *(ctypes.addressof(self.native), tokens_BT.contiguous(), position, behind_B),
            *(logits_B1V, whole, real, threads()),
        )
        # Layers count what they have seen also where a router above them stops.
        for state in self.states[: failed or None]:
            if not isinstance(state, Alias):
                _count(state)
        if failed:
            self.outside.refuse()
            raise self.routers[failed - 1].non_finite()
        return logits_B1V.to(self.dtype), partial(self._routings, whole, real, self.outside.routings)

    def _routings(self, whole: Tensor, real: Tensor, outside: dict[int, Routing]) -> tuple[Routing, ...]:
        B, D = self.native.batch, self.native.width
        routings = []
        for layer, (block, router) in enumerate(zip(self.blocks, self.routers)):
            if layer in outside:
                routings.append(outside[layer])
                continue
            E, Z, n = block.experts, block.columns, B * block.slots
            token_N, expert_N, row_of_slot_N, expert_offsets, token_offsets = whole[block.whole_at :][
                : 3 * n + E + B + 2
            ].split([n, n, n, E + 1, B + 1])
            sizes = [n, B * D, B * E, B * Z, B * block.returns]
            weight_N, x, logits, null_logits, returned_B = real[block.real_at :][: sum(sizes)].split(sizes)
            logits = torch.cat([logits.view(B, E), null_logits.view(B, Z)], dim=1)
            n = int(token_offsets[-1])
            assignments = Assignments(
                token_N=token_N[:n],
                expert_N=expert_N[:n],
                weight_N=weight_N[:n],
                expert_offsets=expert_offsets,
                token_offsets=token_offsets,
                row_of_slot_N=row_of_slot_N[:n],
            )
            identity_B = returned_B if block.returns else None
            routings.append(routing_of(router, assignments, x.view(B, D), logits, identity_B))
        return tuple(routings)


# By cache: a copy of a cache lies elsewhere.
STEPS: WeakKeyDictionary[HybridCache, DecodeStep] = WeakKeyDictionary()


def takes_one_call(tokens_BT: Tensor, weight: Tensor) -> bool:
    """Whether this moment is one for a step in one call: one token of each of few sequences on a CPU, without
    gradients."""
    return (
        tokens_BT.dim() == 2
        and tokens_BT.shape[1] == 1
        and 1 <= len(tokens_BT) <= MOST_SEQUENCES
        and tokens_BT.dtype == torch.int64
        and tokens_BT.device.type == "cpu"
        and is_native(weight, 1)
        and not torch.is_autocast_enabled("cpu")
        and not torch.nn.modules.module._has_any_global_hook()
    )


def step_of(cache: HybridCache, describe: Callable[[], DecodeStep]) -> DecodeStep | None:
    """The step prepared for this cache, prepared anew where something has moved; None where one call cannot do it."""
    step = STEPS.get(cache)
    if step is None or not step.holds(cache):
        STEPS.pop(cache, None)
        try:
            step = STEPS[cache] = describe()
        except NotInOneCall:
            return None
    return step


def _count(state: LayerState) -> None:
    state.length += 1  # pyright: ignore[reportAttributeAccessIssue]
