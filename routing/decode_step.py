"""A router in a decode step that is one call of C: what the call must know of it, and its routing afterwards.

Legend: T tokens, D model width, E experts.
"""

from functools import partial

from torch import Tensor

from routing.assignments import Assignments
from routing.router import Router, Routing
from triton_kernels.experts.expert_slots import RULES
from triton_kernels.native.decode_step import NativeBlock, NotInOneCall, Watch


def describe_router(router: Router, block: NativeBlock, watch: Watch) -> None:
    """Fills in the router's part of a block.

    Raises:
        NotInOneCall: where it or its policy decides by more than scores, a bias and a threshold.
    """
    policy, budget = router.policy, router.policy.budget
    rule = policy.config.fused_rule
    others = {*policy.parameters(), *policy.buffers()} - set([] if budget is None else budget.buffers())
    plain = router.config.scaling == 1.0 and not router.config.renormalise_eps
    known = type(router) is Router and router.bias_E is None and plain
    if not known or rule is None or policy.config.null_columns or others:
        raise NotInOneCall(f"a {type(router).__name__} with {type(policy).__name__}")
    if policy.told_by_token or (budget is not None and budget.calibrates):
        raise NotInOneCall("numbers of experts from outside, or a threshold that is none yet or not one for all")
    for module in (router, policy):
        watch.module(module)
    watch.same(router, "config")
    watch.same(policy, "config", "counts_T")
    block.experts, block.slots, block.floor = router.n_experts, rule.k, rule.floor
    block.rule, block.use_sigmoid = RULES.index(rule.rule), router.config.score == "sigmoid"
    block.renormalise = router.config.renormalise
    block.router = watch.parameter(router, "weight_ED", router.n_experts, router.d_model)
    block.bias = watch.buffer(router, "selection_bias_E", router.n_experts)
    if budget is not None:
        watch.module(budget)
        watch.same(budget, "_calibrate_to", "threshold_T1")
        block.threshold, block.drift, block.aim = (watch.buffer(budget, name) for name in ("threshold", "drift", "aim"))


def routing_of(router: Router, assignments: Assignments, x_TD: Tensor, logits_TE: Tensor) -> Routing:
    """The routing of tokens that the call has assigned, from what it wrote down: its input and its logits."""
    scores = router.scores_of(x_TD, logits_TE)
    return Routing(assignments, scores.probs_TE, partial(router.losses, scores), scores=scores)
