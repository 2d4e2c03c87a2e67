"""What is said before a comparison runs: every method's question with what it changes here, the plan, and what it will
cost beside full runs."""

from collections.abc import Sequence

from ablations.comparison.measure import budgets_of
from ablations.comparison.options import Options
from ablations.method import Method
from lm.config import ModelConfig
from staged_training.describe import blocks_text, changed_blocks, describe
from staged_training.flops import assumed_experts, planned, planned_caching, whole_flops
from staged_training.plan import Plan
from staged_training.validation import VALIDATED, looks


def plan_text(methods: Sequence[Method], plans: Sequence[Plan], baseline: ModelConfig, options: Options) -> str:
    """What will run, for people.

    Args:
        methods: the baseline first.
        plans: one per trunk; they differ in its seed alone.
        baseline: its model.
    """
    n_branches = sum(len(plan.branches) for plan in plans)
    seeds = len({branch.seed for branch in plans[0].branches if branch.method == methods[0].name})
    lines = [f"methods {len(methods)}, branch seeds {seeds}, trunks {len(plans)}: {n_branches} branches"]
    lines += [f"  {method.name:<22} {asked(method, plans[0])}" for method in methods]
    return "\n".join([*lines, describe(plans[0]), cost_text(methods, plans, baseline, options)])


def asked(method: Method, plan: Plan) -> str:
    """The method's question, and of which blocks this plan asks it."""
    branch = next(branch for branch in plan.branches if branch.method == method.name)
    if not (blocks := changed_blocks(plan, branch)):
        return method.question
    before, after = ("".join(model.plan.letters) for model in (plan.branches[0].model, branch.model))
    layers = f", {after} instead of {before}" if before != after else ""
    frozen = ""
    if plan.boundary:
        below = f"blocks 0-{plan.boundary - 1} are" if plan.boundary > 1 else "block 0 is"
        frozen = f"; {below} the trunk's, frozen"
    return f"{method.question} Here: in {blocks_text(blocks, plan.model.n_layers)}{layers}{frozen}."


def cost_text(methods: Sequence[Method], plans: Sequence[Plan], baseline: ModelConfig, options: Options) -> str:
    """FLOPs of the whole comparison, finished runs included, as a share of training its methods from scratch."""
    staged, scratch, cached = 0.0, 0.0, options.execution.cache
    judged = [method for method in methods if not method.is_control]
    for plan in plans:
        costs = [planned(plan, branch, cached=cached) for branch in (None, *plan.branches)]
        staged += sum(cost.training for cost in costs)
        # Beside the whole validation text: some of it in the course of training, and at other budgets.
        n_valid = -(-plan.corpus.valid_tokens // plan.tokens_per_batch)
        for run, cost in zip((None, *plan.branches), costs):
            stage = plan.trunk if run is None else run.stage
            more = looks(stage.n_batches, options.execution.log_every) * VALIDATED
            more += 0 if run is None else len(budgets_of(baseline)) * options.budget_batches
            staged += cost.evaluation * (1 + more / n_valid)
        staged += planned_caching(plan) if cached and plan.boundary else 0.0
        n_batches = plan.trunk.n_batches + plan.branches[0].stage.n_batches
        for method in judged:
            model = method.change(baseline)
            n_seeds = sum(branch.method == method.name for branch in plan.branches)
            scratch += n_seeds * whole_flops(plan, model, assumed_experts(model), n_batches=n_batches)
    n_runs = sum(len(plan.branches) for plan in plans) // len(methods)
    share = staged / scratch
    what = f"training {len(judged)} method{'s' * (len(judged) > 1)} from scratch"
    shares = [f"{100 * share:.0f} % of {what} with {n_runs} seeds", f"{100 * n_runs * share:.0f} % of {what} once"]
    text = f"cost       {staged:.2g} FLOPs, controls and evaluation included: {', '.join(shares[n_runs == 1 :])}"
    if share > 1:
        text += "\n           MORE than full runs with as many seeds: branches save less than trunk and controls cost"
    return text
