"""The cost ledger against numbers computed by hand."""

import pytest

from ablations.comparison.cost import compare_costs, cost_rows, cost_text, duration
from ablations.comparison.records import read_records


def test_ledger_against_hand_computed_numbers(comparison_folder):
    costs = compare_costs(read_records(comparison_folder))
    # One trunk; 4 methods x 3 seeds = 12 branches of 2e11 FLOPs and 4 s, evaluated for 9e10 FLOPs and 1 s, other
    # budgets for 1e10 FLOPs; and 2 controls x 3 seeds.
    assert [(cost.flops, cost.seconds) for cost in costs.phases.values()] == [
        (8e12, 80.0),
        (1e12, 5.0),
        (pytest.approx(12 * 2e11), 48.0),
        (pytest.approx(12 * 1e11), 12.0),
        (pytest.approx(6 * 3e11), 30.0),
    ]
    assert costs.staged.flops == pytest.approx(8e12 + 1e12 + 2.4e12 + 1.2e12 + 1.8e12)
    assert costs.staged.seconds == 175.0
    # From scratch: (8 M + 2 M tokens) x 6e5 FLOPs per token = 6e12 each, at the trunk's 8e12 FLOPs in 80 s: 60 s each.
    assert [cost.flops for cost in costs.per_method.values()] == pytest.approx([6e12] * 4)
    # What nobody would train is not in the denominator.
    assert list(costs.per_method) == ["baseline", "top_p", "null_experts", "random_k"]
    assert costs.scratch_once.flops == pytest.approx(2.4e13)
    assert costs.scratch_once.seconds == pytest.approx(240.0)
    assert costs.scratch_all_seeds.flops == pytest.approx(7.2e13)
    assert costs.share_of_once == pytest.approx(14.4 / 24)
    assert costs.share_of_all_seeds == pytest.approx(14.4 / 72)


def test_two_trunks_cost_two_trunks(write_synthetic):
    costs = compare_costs(read_records(write_synthetic(trunk_seeds=(0, 1), branch_seeds=(0, 1))))
    assert costs.phases["trunk"].flops == 1.6e13
    assert costs.phases["branches"].flops == pytest.approx(16 * 2e11)
    assert costs.seeds == 4
    assert costs.scratch_all_seeds.flops == pytest.approx(4 * 2.4e13)


def test_text_holds_every_row_and_the_ratio(comparison_folder):
    costs = compare_costs(read_records(comparison_folder))
    text = cost_text(costs)
    for what, *_ in cost_rows(costs):
        assert what in text
    assert (
        "The staged runs, controls included, cost 60 % of the FLOPs of training 4 methods from scratch once each, 20 %"
        " of training each with 3 seeds."
    ) in text


def test_one_seed_shows_no_second_estimate(write_synthetic):
    costs = compare_costs(read_records(write_synthetic(branch_seeds=(0,))))
    assert len(cost_rows(costs)) == 7


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.42, "0.4 s"),
        (42, "42 s"),
        (99.7, "1 min 40 s"),
        (200, "3 min 20 s"),
        (18420, "5 h 07 min"),
        (86400, "24 h 00 min"),
    ],
)
def test_durations_read_like_durations(seconds, shown):
    assert duration(seconds) == shown
