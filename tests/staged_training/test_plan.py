import dataclasses

import numpy as np
import pytest

from foundation.serialize import from_dict, to_dict
from routing.policies.null_experts import NullExperts
from routing.policies.top_p import TopP
from staged_training.describe import describe
from staged_training.optimizer import OptimizerConfig
from staged_training.plan import Plan
from staged_training.schedule import Schedule, Stage


@pytest.fixture(scope="module")
def plan(plan_of, model_config, with_policy):
    top_p, null = with_policy(TopP(target_mean=2, cap=4)), with_policy(NullExperts(k=3, n_null=2, target_mean=2))
    return plan_of(
        [
            (name, model, seed)
            for seed in (0, 1)
            for name, model in (("baseline", model_config), ("top_p", top_p), ("null", null))
        ]
    )


def test_budget_is_split_between_trunk_and_branch(plan):
    assert (plan.trunk.n_batches, plan.branches[0].stage.n_batches) == (24, 6)
    assert plan.trunk.schedule.decay_steps == 0
    stage = plan.branches[0].stage
    assert stage.schedule.value(6, 6) == 0
    assert stage.schedule.warmup_steps + stage.schedule.decay_steps == 6


def test_branches_go_on_where_the_trunk_stopped(plan):
    whole = np.concatenate([plan.trunk_batches(), plan.branch_batches()])
    assert len(set(whole.tolist())) == 30 <= plan.n_train_batches
    orders = {branch.name: plan.order_of(branch).tolist() for branch in plan.branches}
    for order in orders.values():
        assert sorted(order) == sorted(plan.branch_batches())
    assert orders["baseline-seed0"] == orders["top_p-seed0"] == orders["null-seed0"]
    assert orders["baseline-seed0"] != orders["baseline-seed1"]


def test_runs_hold_what_training_asks_of_trunk_and_branch(plan, tmp_path):
    trunk = plan.trunk_run(tmp_path)
    assert (trunk.label, trunk.method, trunk.branch_seed, trunk.seed, trunk.boundary) == ("trunk", "trunk", None, 0, 0)
    assert (trunk.stage, trunk.identity) == (plan.trunk, plan.trunk_identity)
    assert list(trunk.order) == plan.trunk_batches().tolist()
    branch = plan.branches[4]
    run = plan.branch_run(branch, tmp_path)
    assert (run.label, run.method, run.branch_seed, run.seed, run.boundary) == ("top_p-seed1", "top_p", 1, 1, 2)
    assert (run.stage, run.identity) == (branch.stage, plan.branch_identity(branch))
    assert list(run.order) == plan.order_of(branch).tolist()
    assert {trunk.optimizer, run.optimizer} == {plan.optimizer}
    assert trunk.folder == run.folder == tmp_path
    with pytest.raises(AssertionError):
        dataclasses.replace(run, order=run.order[:-1])


def test_what_is_true_of_all_branches_is_said_once(plan, plan_of, model_config):
    assert (plan.boundary, plan.fresh, plan.branch_stage) == (2, False, plan.branches[0].stage)
    alone = plan_of([])
    assert (alone.boundary, alone.fresh, alone.branch_stage) == (0, False, None)
    assert len(alone.branch_batches()) == 0
    hybrid = dataclasses.replace(model_config, layer_plan="S")
    assert plan_of([("hybrid", hybrid, 0)]).fresh


def test_calibration_text_is_spread_out_and_never_trained_on(plan, plan_of):
    for each in (plan, plan_of([], calibration_tokens=32 * 2, tokens=700 * 32)):
        held_out = each.calibration_batches().tolist()
        assert len(set(held_out)) == each.n_calibration
        assert not {*each.trunk_batches().tolist(), *each.branch_batches().tolist()} & set(held_out)
        n_batches = each.n_train_batches + each.n_calibration
        # One in the middle of each of as many equal parts.
        assert [number * each.n_calibration // n_batches for number in held_out] == list(range(each.n_calibration))
    # Several passes over a text see all of the rest.
    assert len(set(each.trunk_batches().tolist())) == each.n_train_batches
    with pytest.raises(ValueError, match=r"Plan\.n_calibration"):
        dataclasses.replace(plan, n_calibration=10**6)


def test_a_trunk_is_known_by_what_its_weights_depend_on(plan, plan_of, model_config):
    assert plan_of([("baseline", model_config, 5)], freeze=0.2).trunk_hash == plan.trunk_hash
    assert plan_of([]).trunk_hash == plan.trunk_hash
    for other in (
        {"trunk_seed": 1},
        {"learning_rate": 1e-3},
        {"optimizer": OptimizerConfig(kind="muon")},
        {"trunk_merge_share": 0.5},
        {"seq_len": 8},
        {"model": dataclasses.replace(model_config, d_model=32)},
    ):
        assert plan_of([], **other).trunk_hash != plan.trunk_hash
    # How a branch ends is the branch's.
    (branch,) = plan_of([("baseline", model_config, 0)], anneal="merge").branches
    assert plan_of([], anneal="merge").trunk_hash == plan.trunk_hash
    assert branch.stage.schedule == dataclasses.replace(plan.branches[0].stage.schedule, anneal="merge")


def test_plans_survive_json(plan):
    assert from_dict(Plan, to_dict(plan)) == plan


def test_describe_names_what_is_frozen_reused_and_taken(plan):
    text = describe(plan)
    for part in (
        f"trunk {plan.trunk_hash} (seed 0)",
        "6 branches: baseline, top_p, null; seeds 0, 1",
        "frozen     embedding and blocks 0-1",
        "trains     blocks 2-3, norm and head",
        "768 tokens (24 batches of 2 x 16",
        (
            "192 tokens each (20.0% of trunk plus branch); batches 24 to 30 of the trunk's sequence, the same set for"
            " every branch"
        ),
        "0 steps warm-up, 0 stable, 6 linear decay to 0",
        "optimizer  AdamW, weight decay 0.1",
        "re-used    the trunk's weights everywhere",
        "the optimizer's state of what trains",
        "not taken  the trunk's schedule",
        "2 new weights, initialised from the branch's seed",
        "TopP(",
    ):
        assert part in text, part
    assert text.count("NullExperts(") == 1


def test_describe_names_what_a_branch_changes(plan_of, model_config):
    wide = dataclasses.replace(model_config, attention=dataclasses.replace(model_config.attention, window=77))
    wide = dataclasses.replace(
        wide, moe=dataclasses.replace(wide.moe, router=dataclasses.replace(wide.moe.router, score="sigmoid"))
    )
    text = describe(plan_of([("baseline", model_config, 0), ("other", wide, 0)]))
    assert f"attention.window {model_config.attention.window} -> 77; moe.router.score softmax -> sigmoid" in text
    assert text.count("->") == 2


def test_describe_says_fresh(plan_of, model_config):
    hybrid = dataclasses.replace(model_config, layer_plan="S")
    text = describe(plan_of([("baseline", model_config, 0), ("hybrid", hybrid, 0)], freeze=0.7))
    assert "blocks from 3 on are FRESH in every branch" in text
    assert "because these methods change the architecture: hybrid" in text
    assert "layers FFFF -> FFFS" in text
    assert "no branches" in describe(plan_of([]))


def test_stages_refuse_ramps_longer_than_themselves():
    with pytest.raises(ValueError, match="take 7 steps, the stage has 6"):
        Stage(n_batches=6, schedule=Schedule(warmup_steps=3, decay_steps=4))


def test_mismatched_branches_are_refused(plan, with_policy):
    first, *others = plan.branches

    def with_first(**changes):
        return dataclasses.replace(plan, branches=(*others, dataclasses.replace(first, **changes)))

    shorter = dataclasses.replace(first.stage, n_batches=first.stage.n_batches - 1, schedule=Schedule())
    with pytest.raises(ValueError, match="only a control that is known to be better for it may differ"):
        dataclasses.replace(plan, branches=(first, *(dataclasses.replace(each, stage=shorter) for each in others)))
    for field, value in (("boundary", 1), ("fresh", True)):
        with pytest.raises(ValueError, match=rf"baseline-seed0 and top_p-seed0 differ in {field}"):
            with_first(**{field: value})
    with pytest.raises(
        ValueError,
        match="baseline-seed0: the layers, experts and routers below its boundary 2 are not the frozen trunk's",
    ):
        with_first(model=dataclasses.replace(plan.model, layer_plan="S"))
    with pytest.raises(ValueError, match="not the frozen trunk's"):
        with_first(model=with_policy(TopP(target_mean=2, cap=4)))
    with pytest.raises(ValueError, match=r"changes the letter or weights of blocks \[2, 3\].*fresh=True"):
        with_first(model=dataclasses.replace(plan.model, layer_plan="FFSS"))
    with pytest.raises(ValueError, match="vocab_size is 301 instead of 300"):
        with_first(model=dataclasses.replace(plan.model, vocab_size=301))
    with pytest.raises(ValueError, match="top_p-seed0 more than once"):
        dataclasses.replace(plan, branches=(*plan.branches, others[0]))


def test_too_small_a_budget_is_refused(plan_of):
    with pytest.raises(ValueError, match="40 is 1 batches of 2 x 16, too few"):
        plan_of([], tokens=40)
    with pytest.raises(ValueError, match=r"trunk_share: 1\.0"):
        plan_of([], trunk_share=1.0)


def test_a_longer_branch_begins_with_the_data_of_the_others(plan):
    first, *others = plan.branches
    longer = dataclasses.replace(
        others[-1], method="more_tokens", stage=dataclasses.replace(first.stage, n_batches=2 * first.stage.n_batches)
    )
    mixed = dataclasses.replace(plan, branches=(first, longer))
    assert mixed.order_of(first).tolist() == plan.order_of(first).tolist()
    assert set(mixed.order_of(longer).tolist()) > set(mixed.order_of(first).tolist())
    assert len(mixed.order_of(longer)) == 2 * len(mixed.order_of(first))
    assert mixed.branch_identity(first) == plan.branch_identity(first)
