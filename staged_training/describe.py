"""A plan in words: what is trained, frozen, fresh and re-used, on which tokens, and what a branch takes from the
trunk."""

from typing import Any

from foundation.serialize import to_dict
from lm.accounting import ModelCost, model_cost
from lm.config import ModelConfig
from staged_training.boundary import added_weights, frozen_share
from staged_training.optimizer import OptimizerConfig
from staged_training.plan import Branch, Plan
from staged_training.schedule import Stage


def describe(plan: Plan) -> str:
    """What will run, for people, before it runs."""
    model, cost = plan.model, _cost(plan.model, plan.seq_len)
    trunk_tokens = plan.trunk.n_batches * plan.tokens_per_batch
    lines = [
        f"trunk {plan.trunk_hash} (seed {plan.trunk_seed})",
        (
            f"  model      {model.n_layers} layers {''.join(model.plan.letters)}, width {model.d_model},"
            f" {model.moe.n_experts} experts; {cost.total_parameters:,} parameters, {cost.active_parameters:,.0f}"
            f" active per token; {model.dtype}"
        ),
        (
            f"  trains     everything, on {_tokens(trunk_tokens)} ({plan.trunk.n_batches} batches of {plan.batch_size}"
            f" x {plan.seq_len}, {plan.trunk.n_batches / plan.n_train_batches:.2f} passes over the text)"
        ),
        f"  rate       {_schedule(plan.trunk)}",
        f"  optimizer  {_optimizer(plan.optimizer)}, in every stage",
    ]
    boundary, stage = plan.boundary, plan.branch_stage
    if stage is None:
        return "\n".join([*lines, "no branches"])
    branch_tokens = stage.n_batches * plan.tokens_per_batch
    share = frozen_share(model, boundary)
    methods = list(dict.fromkeys(branch.method for branch in plan.branches))
    seeds = sorted({branch.seed for branch in plan.branches})
    lines += [
        f"{len(plan.branches)} branches: {', '.join(methods)}; seeds {', '.join(map(str, seeds))}",
        *(f"  decided    {decision}" for decision in plan.decisions),
        f"  frozen     {_frozen(boundary)}, {share:.1%} of the parameters",
        f"  trains     {_trained(boundary, model.n_layers)}, {1 - share:.1%} of the parameters",
        (
            f"  tokens     {_tokens(branch_tokens)} each ({branch_tokens / (trunk_tokens + branch_tokens):.1%} of trunk"
            f" plus branch); batches {plan.trunk.n_batches} to {plan.trunk.n_batches + stage.n_batches} of the trunk's"
            " sequence, the same set for every branch, in the order of the branch's seed"
        ),
        f"  rate       {_schedule(stage)}",
        f"  re-used    {_reused(plan.fresh, boundary)}",
        "  not taken  the trunk's schedule, the state of a routing policy",
    ]
    lines += [
        f"  {branch.method:<22} {changes_text(plan, branch)}"
        for branch in {branch.method: branch for branch in plan.branches}.values()
    ]
    return "\n".join(lines)


def changed_blocks(plan: Plan, branch: Branch) -> list[int]:
    """The blocks in which a branch differs from the first one, the baseline's, lowest first."""
    first = plan.branches[0].model
    return [layer for layer in range(first.n_layers) if branch.model.block(layer) != first.block(layer)]


def blocks_text(blocks: list[int], n_layers: int) -> str:
    """Blocks as a reader would name them: `all 4 blocks`, `block 3 of 4`, `blocks 1, 3 of 4`."""
    if len(blocks) == n_layers:
        return f"all {n_layers} blocks"
    return f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))} of {n_layers}"


def changes_text(plan: Plan, branch: Branch) -> str:
    """How a branch differs from the trunk's model, and from the first branch's training."""
    model, first = plan.model, plan.branches[0]
    parts = _changes(model, branch.model)
    if (added := added_weights(model, branch.model)) and not plan.fresh:
        parts.append(f"{len(added)} new weights, initialised from the branch's seed")
    if branch.stage != first.stage:
        parts.append(f"{branch.stage.n_batches} batches instead of {first.stage.n_batches}")
    if branch.rounding:
        parts.append("weights that differ by rounding")
    if not {each.seed for each in plan.branches if each.method == branch.method} <= {
        each.seed for each in plan.branches if each.method == first.method
    }:
        parts.append("other branch seeds")
    return "; ".join(parts) or f"the trunk's model: layers {''.join(model.plan.letters)}, {model.moe.router.policy}"


def _changes(trunk: ModelConfig, branch: ModelConfig) -> list[str]:
    """What blocks have in place of the trunk's: `attention.window 64 -> 256`. Below the boundary they have nothing."""
    changes: dict[str, None] = {}
    if branch.plan.letters != trunk.plan.letters:
        changes[f"layers {''.join(trunk.plan.letters)} -> {''.join(branch.plan.letters)}"] = None
    for layer in range(trunk.n_layers):
        old, new = trunk.block(layer), branch.block(layer)
        if old.moe.router.policy != new.moe.router.policy:
            changes[f"policy {old.moe.router.policy} -> {new.moe.router.policy}"] = None
        before, after = (_places(to_dict(block)) for block in (old, new))
        for place in before | after:
            said = place == "letter" or place.startswith("moe.router.policy")
            if not said and before.get(place) != after.get(place):
                changes[f"{place} {before.get(place)} -> {after.get(place)}"] = None
    return list(changes)


def _places(value: Any, place: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts by its path."""
    if not isinstance(value, dict):
        return {place: value}
    return {
        inner: leaf
        for key, part in value.items()
        for inner, leaf in _places(part, f"{place}.{key}" if place else key).items()
    }


def _cost(config: ModelConfig, seq_len: int) -> ModelCost:
    return model_cost(config, length=seq_len, mean_experts=config.moe.router.policy.assumed_experts)


def _frozen(boundary: int) -> str:
    return f"embedding and blocks 0-{boundary - 1}" if boundary else "nothing"


def _trained(boundary: int, n_layers: int) -> str:
    return f"blocks {boundary}-{n_layers - 1}, norm and head" if boundary else "everything"


def _reused(fresh: bool, boundary: int) -> str:
    if not fresh:
        return "the trunk's weights everywhere, the optimizer's state of what trains, the load and bias of the routers"
    below = f"the frozen blocks 0-{boundary - 1}, " if boundary else ""
    return (
        f"{below}embedding, norm and head with their optimizer's state; blocks from {boundary} on are FRESH in every"
        " branch, from the branch's seed"
    )


def _schedule(stage: Stage) -> str:
    schedule = stage.schedule
    stable = stage.n_batches - schedule.warmup_steps - schedule.decay_steps
    end = "no decay"
    if schedule.merges:
        end = f"{schedule.decay_steps} at the peak whose weights are averaged as a {schedule.decay_shape} decay would"
    elif schedule.decay_steps:
        end = f"{schedule.decay_steps} {schedule.decay_shape} decay to 0"
    return f"peak {schedule.peak:g}: {schedule.warmup_steps} steps warm-up, {stable} stable, {end}"


def _optimizer(config: OptimizerConfig) -> str:
    decay = f"weight decay {config.weight_decay:g}, gradients clipped at {config.clip:g}"
    if config.embedding_rate != 1:
        decay = f"the embedding at {config.embedding_rate:g} times the rate; {decay}"
    if config.kind == "adamw":
        return f"AdamW, {decay}"
    routers = ", routers" if config.muon_routers else ""
    return (
        f"Muon for the matrices of attention, experts{routers} (momentum {config.muon_momentum:g},"
        f" {config.muon_scale}), AdamW for the rest; {decay}"
    )


def _tokens(count: int) -> str:
    return f"{count / 1e6:.2f}M tokens" if count >= 100_000 else f"{count:,} tokens"
