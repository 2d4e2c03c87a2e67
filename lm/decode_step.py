"""A decode step or a prompt in one call of C: a described model and its cache, and what a call leaves for its callers.

    LanguageModel.forward -> DecodeStep.run -> decode_step.c

Whatever the call does not know (`NotInOneCall`) takes the layers' own way, with the same results.

Legend: B sequences, T tokens of each, V vocabulary, D model width, E experts, K slots per token, N rows.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attention.cache import HybridCache
from attention.layer_states import Alias, LayerState
from attention.positions import rotary_of
from routing.assignments import Assignments
from routing.decode_step import OutsideDecisions, routing_of
from routing.router import Router, Routing
from triton_kernels.native.decode_step import DECIDE, NativeBlock, NativeModel, NotInOneCall, Watch
from triton_kernels.native.library import MOST_TOKENS, call, is_native, products_here, rounds_products, threads, wide

# Of more sequences blocked products win, see `attention.projection`.
MOST_SEQUENCES = MOST_TOKENS // 4
# What the call writes down of every token takes memory.
MOST_PROMPT_TOKENS = 2**14
FP32_BITS = 32


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
        self.blocks = (NativeBlock * len(blocks))(*blocks)
        native.blocks, native.block = len(blocks), ctypes.cast(self.blocks, ctypes.POINTER(NativeBlock))
        native.bf16 = rounds_products(dtype)
        self.outside = OutsideDecisions(routers, list(self.blocks), native.batch)
        native.decide = DECIDE(self.outside.decide)
        # Packed experts are known for few tokens only.
        self.takes_prompts = dtype in products_here() and all(
            block.gate_up.bits == block.down.bits == FP32_BITS for block in blocks
        )

    def holds(self, cache: HybridCache) -> bool:
        """Whether model and cache are still the ones described."""
        return cache.layers is self.layers and self.layers == self.states and self.watch.holds()

    def ready(self, tokens_BT: Tensor) -> bool:
        """Whether these tokens can be the next ones. Where they cannot, the layers say why not."""
        length, T = self.states[0].length, tokens_BT.shape[1]
        lowest, highest = tokens_BT.aminmax()
        return (
            all(state.length == length <= state.max_length - T for state in self.states)
            and len(tokens_BT) == self.native.batch
            and 0 <= int(lowest) <= int(highest) < self.native.vocabulary
            # A prompt stands at one place in all sequences.
            and (T == 1 or (self.takes_prompts and self.states[0].behind_B is None))
        )

    def run(self, tokens_BT: Tensor, cache: HybridCache) -> tuple[Tensor, Callable[[], tuple[Routing, ...]]]:
        """Logits of the token after these [B, 1, V], and what gives the routing of every layer. The cache has seen the
        tokens then.

        Raises:
            NonFiniteScoresError: as a router does, like whatever else one that decides outside of the call raises.
        """
        position, behind_B, (B, T) = self.states[0].length, self.states[0].behind_B, tokens_BT.shape
        logits_B1V = torch.empty(B, 1, self.native.vocabulary)
        n_whole, n_real = self._lay_out(B, T)
        whole, real = torch.empty(n_whole, dtype=torch.int64), torch.empty(n_real)
        tables = self._turn(position, T) if T > 1 else None
        self.outside.begin(real, cache.sums, T)
        failed = call(
            "decode_step",
            *(ctypes.addressof(self.native), tokens_BT.contiguous(), T, position, behind_B),
            *(logits_B1V, whole, real, threads()),
        )
        del tables
        # Layers count what they have seen also where a router above them stops.
        for state in self.states[: failed or None]:
            if not isinstance(state, Alias):
                _count(state, T)
        if failed:
            self.outside.refuse()
            raise self.routers[failed - 1].non_finite()
        return logits_B1V.to(self.dtype), partial(self._routings, B, T, whole, real, self.outside.routings)

    def _routed(self, B: int, T: int) -> list[tuple[NativeBlock, int]]:
        """The blocks, and how many tokens each of them routes: the last one, where it can, those that are asked for."""
        return [(block, B if block.alone else B * T) for block in self.blocks]

    def _lay_out(self, B: int, T: int) -> tuple[int, int]:
        """Where the blocks write down how their tokens are routed; the sizes of both pieces of memory."""
        n_whole = n_real = 0
        for block, n_tokens in self._routed(B, T):
            block.whole_at, block.real_at = n_whole, n_real
            n_whole += 3 * n_tokens * block.slots + block.experts + 1 + n_tokens + 1
            n_real += n_tokens * (block.slots + self.native.width + block.experts + block.columns + block.returns)
        return n_whole, n_real

    def _turn(self, position: int, n_tokens: int) -> dict[tuple[int, float], list[Tensor]]:
        """Gives the blocks the angles of so many tokens; what must live as long as they are used."""
        tables: dict[tuple[int, float], list[Tensor]] = {}
        for block in self.blocks:
            kind = 2 * block.half, block.rope_base
            if kind not in tables:
                rotary = rotary_of(
                    position, n_tokens, rotary_dim=kind[0], base=kind[1], device=torch.device("cpu"), yarn=None
                )
                tables[kind] = [wide(table_TP) for table_TP in rotary]
            block.cosine, block.sine = (table_TP.data_ptr() for table_TP in tables[kind])
        return tables

    def _routings(
        self, B: int, T: int, whole: Tensor, real: Tensor, outside: dict[int, Routing]
    ) -> tuple[Routing, ...]:
        self._lay_out(B, T)
        D, routings = self.native.width, []
        for layer, ((block, n_tokens), router) in enumerate(zip(self._routed(B, T), self.routers)):
            if layer in outside:
                routings.append(outside[layer])
                continue
            E, Z, n = block.experts, block.columns, n_tokens * block.slots
            token_N, expert_N, row_of_slot_N, expert_offsets, token_offsets = whole[block.whole_at :][
                : 3 * n + E + n_tokens + 2
            ].split([n, n, n, E + 1, n_tokens + 1])
            sizes = [n, n_tokens * D, n_tokens * E, n_tokens * Z, n_tokens * block.returns]
            weight_N, x, logits, null_logits, returned_T = real[block.real_at :][: sum(sizes)].split(sizes)
            logits = torch.cat([logits.view(n_tokens, E), null_logits.view(n_tokens, Z)], dim=1)
            n = int(token_offsets[-1])
            assignments = Assignments(
                token_N=token_N[:n],
                expert_N=expert_N[:n],
                weight_N=weight_N[:n],
                expert_offsets=expert_offsets,
                token_offsets=token_offsets,
                row_of_slot_N=row_of_slot_N[:n],
            )
            identity_T = returned_T if block.returns else None
            routings.append(routing_of(router, assignments, x.view(n_tokens, D), logits, identity_T))
        return tuple(routings)


# By cache: a copy of a cache lies elsewhere.
STEPS: WeakKeyDictionary[HybridCache, DecodeStep] = WeakKeyDictionary()


def takes_one_call(tokens_BT: Tensor, weight: Tensor, last_only: bool) -> bool:
    """Whether this moment is one for a step in one call: one token of each of few sequences on a CPU, without
    gradients, or a prompt of which the last logits are asked for."""
    return (
        tokens_BT.dim() == 2
        and (tokens_BT.shape[1] == 1 or (last_only and 1 < tokens_BT.numel() <= MOST_PROMPT_TOKENS))
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


def _count(state: LayerState, n_tokens: int) -> None:
    state.length += n_tokens  # pyright: ignore[reportAttributeAccessIssue]
