"""A router in a decode step that is one call of C: what the call must know of it, and its routing afterwards.

Where the call cannot decide as a router does, it asks the router itself, in the middle of the step, and computes the
experts of whatever rows that gives: all that a policy needs for this is to be one.

Legend: B sequences, T tokens, D model width, E experts.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from routing.assignments import Assignments
from routing.router import Router, Routing
from routing.sequences import Sequences
from triton_kernels.native.decode_step import NativeBlock, NotInOneCall, Watch


def describe_router(router: Router, block: NativeBlock, watch: Watch) -> None:
    """Fills in the router's part of a block.

    Raises:
        NotInOneCall: for a router of another kind, or one that somebody listens to.
    """
    policy = router.policy
    if type(router) is not Router:
        raise NotInOneCall(f"a {type(router).__name__}")
    for module in (router, policy, *([] if policy.budget is None else [policy.budget])):
        watch.module(module)
    watch.same(router, "config")
    watch.same(policy, "config")
    watch.answers(lambda: policy.is_told)
    block.alone = policy.decides_alone
    block.experts = router.n_experts
    try:
        _describe_decision(router, block, watch)
    except NotInOneCall:
        block.outside, block.slots, block.columns, block.returns = True, 0, 0, False


def _describe_decision(router: Router, block: NativeBlock, watch: Watch) -> None:
    """How it decides; raises NotInOneCall where the call cannot."""
    policy, config, budget = router.policy, router.config, router.policy.budget
    if policy.is_told or router.bias_E is not None or config.scaling != 1.0 or config.renormalise_eps:
        raise NotInOneCall("numbers of experts from outside, a bias, or weights that are not plain")
    policy.describe(block, watch)
    block.use_sigmoid, block.renormalise = config.score == "sigmoid", config.renormalise
    block.router = watch.parameter(router, "weight_ED", router.n_experts, router.d_model)
    block.bias = watch.buffer(router, "selection_bias_E", router.n_experts)
    if block.columns:
        block.null_router = watch.parameter(router, "null_weight_ZD", block.columns, router.d_model)
    if budget is not None:
        block.threshold, block.drift, block.aim = (watch.buffer(budget, name) for name in ("threshold", "drift", "aim"))


class OutsideDecisions:
    """The routers of a step that decide outside of the call.

    Attributes:
        asked: what the call asks by.
        routings: by layer, what they decided in the last step.
    """

    def __init__(self, routers: Sequence[Router], blocks: Sequence[NativeBlock], batch_size: int) -> None:
        self._routers, self._blocks, self._batch_size = routers, blocks, batch_size
        self._length = 1
        self._inputs: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        self._error: BaseException | None = None
        self.routings: dict[int, Routing] = {}

    def begin(self, real: Tensor, sums: dict[int, Tensor], length: int) -> None:
        """A step of `length` tokens of each sequence that writes what is routed to `real`; `sums` are those of its
        cache (`HybridCache.sums`)."""
        self.routings, self._sums, self._error, self._length = {}, sums, None, length
        for layer, block in enumerate(self._blocks):
            if block.outside:
                n_tokens = self._batch_size * (1 if block.alone else length)
                size = n_tokens * self._routers[layer].d_model
                self._inputs[layer] = real[block.real_at : block.real_at + size].view(n_tokens, -1)

    def decide(self, layer: int) -> int:
        """The router's own decision, left where the call reads it; 1 where it raised something, see `refuse`."""
        try:
            sequences = Sequences(n=self._batch_size, length=self._length, before_BX=self._sums.get(layer))
            routing = self.routings[layer] = self._routers[layer](self._inputs[layer], sequences)
            if routing.sums_BX is not None:
                self._sums[layer] = routing.sums_BX
            _hand_over(routing, self._blocks[layer])
        except BaseException as error:
            # Nothing passes through a call of C.
            self._error = error
            return 1
        return 0

    def refuse(self) -> None:
        """Raises what a router raised in the last step."""
        if self._error is not None:
            raise self._error


def _hand_over(routing: Routing, block: NativeBlock) -> None:
    """Where the rows lie, which the routing keeps alive."""
    rows, decision = routing.assignments, block.decision
    for name, tensor in (
        ("token", rows.token_N),
        ("weight", rows.weight_N),
        ("expert_offsets", rows.expert_offsets),
        ("token_offsets", rows.token_offsets),
        ("row_of_slot", rows.row_of_slot_N),
        ("returned", routing.identity_T),
        ("added", routing.constant_TD),
    ):
        wanted = torch.float32 if name in ("weight", "returned", "added") else torch.int64
        assert tensor is None or (tensor.dtype == wanted and tensor.is_contiguous()), name
        setattr(decision, name, None if tensor is None else tensor.data_ptr())
    decision.rows = len(rows.token_N)


def routing_of(
    router: Router, assignments: Assignments, x_TD: Tensor, logits: Tensor, identity_T: Tensor | None
) -> Routing:
    """The routing of tokens that the call has assigned, from what it wrote down: its input, its logits (of null columns
    too), and what of the token is returned."""
    scores = router.scores_of(x_TD, logits)
    return Routing(assignments, scores.probs_TE, partial(router.losses, scores), identity_T, scores=scores)
