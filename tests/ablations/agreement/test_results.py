"""From a table of runs written by hand to the table of settings."""

import dataclasses

import pytest

from ablations.agreement.report import findings, frozen_text
from ablations.agreement.results import CACHING, TRUNK, TRUTH, RunRow, cost_share, scores
from ablations.agreement.table import setting_rows

BITS = {"baseline": 2.0, "static_2": 2.1, "top_p": 1.9, "sliding": 2.2, "linear": 1.8}
FAMILIES = {"baseline": "baseline", "static_2": "routing", "top_p": "routing"}
# Where arms are branched; the baseline is branched at both.
CUTS = {"static_2": (7, 0), "top_p": (7, 0), "sliding": (6, 1), "linear": (6, 1)}
SETTING, REVERSED = "fork85_freeze0_decay", "fork85_freeze85_decay"


def run(setting, arm, seed, bits, *, cut=(0, 0), flops=100.0):
    return RunRow(
        setting=setting,
        arm=arm,
        family=FAMILIES.get(arm, "architecture") if arm in BITS else "baseline",
        seed=seed,
        trunk_seed=seed,
        boundary=cut[0],
        fresh=cut[1],
        bits_per_byte=bits,
        flops=flops,
        seconds=2 * flops,
        folder="",
    )


@pytest.fixture
def runs():
    rows = [run(TRUTH, arm, seed, bits + 0.1 * seed) for arm, bits in BITS.items() for seed in range(3)]
    for setting, sign in ((SETTING, 1), (REVERSED, -1)):
        for seed in range(3):
            rows.append(run(setting, TRUNK, seed, 2.3, flops=80))
            rows += [run(setting, CACHING, seed, float("nan"), cut=(boundary, 0), flops=5) for boundary in (7, 6)]
            # Fresh blocks are worse, which is no difference between arms.
            for cut, level in (((7, 0), 2.1), ((6, 1), 3.0)):
                rows.append(run(setting, "baseline", seed, level, cut=cut, flops=10))
                rows += [
                    run(setting, arm, seed, level + sign * (BITS[arm] - 2.0) / 3, cut=cut, flops=10)
                    for arm, own in CUTS.items()
                    if own == cut
                ]
    return rows


def test_arms_are_compared_with_the_baseline_of_their_own_boundary(runs):
    found = scores(runs, SETTING, "all", seeds=3)
    assert found.arms == tuple(BITS)
    assert found.cheap_AS.mean(axis=1) == pytest.approx([0, 0.1 / 3, -0.1 / 3, 0.2 / 3, -0.2 / 3])
    assert found.truth_AS[:, 2] == pytest.approx([bits + 0.2 for bits in BITS.values()])
    assert scores(runs, SETTING, "routing", seeds=3).arms == ("baseline", "static_2", "top_p")


def test_cost_is_what_the_arms_of_a_family_need(runs):
    everything = cost_share(runs, SETTING, tuple(BITS))
    # Three trunks, two stored boundaries, four arms and two baselines of each seed, over five full runs.
    assert everything.flops == pytest.approx((80 + 2 * 5 + 6 * 10) / 500)
    assert everything.seconds == pytest.approx(everything.flops)
    routing = cost_share(runs, SETTING, ("baseline", "static_2", "top_p"))
    assert routing.flops == pytest.approx((80 + 5 + 3 * 10) / 300)


def test_an_arm_without_all_runs_is_left_out(runs):
    runs = [row for row in runs if (row.setting, row.arm, row.seed) != (SETTING, "top_p", 1)]
    found = scores(runs, SETTING, "all", seeds=3)
    assert found.missing == ("top_p",)
    assert found.arms == ("baseline", "static_2", "sliding", "linear")
    rows = setting_rows(runs, [SETTING], seeds=3, resamples=20)
    # Of routing arms one is left, which has no order.
    assert [row.family for row in rows] == ["architecture", "all"]
    assert "all arms: left out for lack of a run: top_p." in findings(rows)


def test_without_a_full_run_of_the_baseline_nothing_is_measured(runs):
    runs = [row for row in runs if (row.setting, row.arm, row.seed) != (TRUTH, "baseline", 2)]
    with pytest.raises(ValueError, match="the full run of baseline with seed 2 did not finish"):
        scores(runs, SETTING, "all", seeds=3)


def test_the_findings_say_what_is_trustworthy_and_where_freezing_misleads(runs):
    rows = setting_rows(runs, [SETTING, REVERSED], seeds=3, resamples=50)
    assert [(row.setting, row.family) for row in rows] == [
        (setting, family) for setting in (SETTING, REVERSED) for family in ("routing", "architecture", "all")
    ]
    whole, frozen = (row for row in rows if row.family == "all")
    assert (whole.reliability, frozen.reliability) == (
        "10 of 10 separable pairs as in full runs",
        "0 of 10 separable pairs as in full runs",
    )
    said = findings(rows)
    assert any(f"all arms: most trustworthy is {SETTING}, 10 of 10 separable pairs" in line for line in said)
    assert f"all arms: cannot be told from guessing: {REVERSED}." in said
    (line,) = frozen_text("all arms", [whole, frozen])
    assert "0: 10 of 10, 0.85: 0 of 10; freezing loses 10 at 0.85, beyond its interval" in line
    assert "a frozen prefix misleads there" in line
    same = dataclasses.replace(whole, setting=REVERSED)
    assert "freezing loses none of them" in frozen_text("all arms", [whole, same])[0]
