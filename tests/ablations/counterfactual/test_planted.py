"""The evidence where the truth is planted: half of the tokens need one expert, half eight. The oracle must find that
allocation, a policy that allocates so must be seen to, a blind one must score about nothing."""

import csv
import dataclasses

import numpy as np
import pytest

from ablations.counterfactual.measure import EVEN, FREQUENCY, GREEDY, HINDSIGHT, NULLS, ORACLE, OWN, REPLAYED, measure
from ablations.counterfactual.options import CounterfactualOptions, TextOptions
from ablations.counterfactual.study import counterfactual
from ablations.counterfactual.tables import EASY, HARD, POOLED
from ablations.counterfactual.text import held_out_text
from tests.ablations.counterfactual import planted as truth
from tests.test_command_lines import run as run_words


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return truth.write_planted(tmp_path_factory.mktemp("planted"))


def options(planted, name, out=None, seeds=(0,), **more):
    return CounterfactualOptions(
        run=tuple(planted / f"{name}_{seed}" for seed in seeds),
        out=out or planted / "out",
        mean=4.5,
        text=TextOptions(data=(str(planted / "text.jsonl"),)),
        resamples=200,
        **more,
    )


def test_the_oracle_recovers_the_planted_allocation(planted):
    asked = options(planted, "blind")
    text = held_out_text(asked.run, asked.text)
    measured = measure("blind", asked.run[0], text, asked)
    hard_of = dict(zip((truth.tokenizer().encode(letter)[0] for letter in truth.LETTERS), truth.HARD.tolist()))
    hard_N, easy_N = (
        np.array([hard_of.get(token) is wanted for token in text.windows.inputs_N.tolist()]) for wanted in (True, False)
    )
    for allocation in (ORACLE, GREEDY):
        experts_N = measured.runs[allocation].experts_NL[:, 0]
        assert experts_N[hard_N].mean() > 7.7, allocation
        assert experts_N[easy_N].mean() < 1.4, allocation
    # All with the same total, and the policy's own numbers given from outside are the policy.
    assert len({int(run.experts_NL.sum()) for run in measured.runs.values()}) == 1
    np.testing.assert_allclose(measured.runs[REPLAYED].nats_N, measured.runs[OWN].nats_N, atol=1e-5)


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@dataclasses.dataclass
class Found:
    """What the study of one policy wrote: rows by (part, allocation) and differences by rival, of the pooled runs or of
    the only one."""

    rows: dict
    against: dict
    verdict: str

    def share(self, allocation):
        row = self.rows["all", allocation]
        return tuple(float(row[name]) for name in ("share_low", "share", "share_high"))


@pytest.fixture(scope="module")
def found(planted):
    """By policy; three seeds of the blind one, whose score of nothing is to hold for all of them."""
    studies = {}
    for policy in truth.SHARP:
        seeds = (0, 1, 2) if policy == "blind" else (0,)
        out = counterfactual(options(planted, policy, planted / "tables" / policy, seeds=seeds))
        asked = POOLED if len(seeds) > 1 else f"{policy}_0"
        rows, differences = (
            [row for row in read(out / f"{name}.csv") if row["run"] == asked] for name in ("allocations", "differences")
        )
        studies[policy] = Found(
            rows={(row["part"], row["allocation"]): row for row in rows},
            against={row["against"]: row for row in differences},
            verdict=(out / "verdict.txt").read_text(),
        )
        assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    return studies


def test_a_policy_that_allocates_rightly_is_seen_to(found):
    low, value, _ = found["right"].share(OWN)
    assert low > 0.9
    assert value > 0.95
    _, value, high = found["wrong"].share(OWN)
    assert high < -0.8
    assert value < -0.9
    assert all(float(found["right"].against[null]["high"]) < 0 for null in NULLS)


def test_a_blind_policy_scores_about_nothing(found):
    low, value, high = found["blind"].share(OWN)
    assert abs(value) < 0.06
    assert low < 0 < high
    for null in NULLS:
        row = found["blind"].against[null]
        assert float(row["low"]) < 0 < float(row["high"])


def test_shuffles_and_frequency_know_nothing(found):
    for allocation in (*NULLS, FREQUENCY):
        assert abs(found["right"].share(allocation)[1]) < 0.1, allocation


def test_parts_add_up_and_are_where_the_effect_is(found):
    rows = found["right"].rows
    for allocation in (OWN, ORACLE):
        whole, *halves = (rows[part, allocation] for part in ("all", "domain north", "domain south"))
        total = sum(float(row["gain"]) * int(row["tokens"]) for row in halves)
        assert total == pytest.approx(float(whole["gain"]) * int(whole["tokens"]), rel=1e-4)
    # A drawn letter is a hard token, too, and needs no more for it.
    assert float(rows[HARD, OWN]["mean_experts"]) > float(rows[EASY, OWN]["mean_experts"]) + 1
    # The only layer alone is the whole model.
    assert float(rows["layer 0", OWN]["gain"]) == pytest.approx(float(rows["all", OWN]["gain"]))
    assert len({row["mean_experts"] for (part, _), row in rows.items() if part == "all"}) == 1


def test_verdicts_say_what_was_planted(found):
    assert "the policy's choice is better than an even one and takes " in found["right"].verdict
    assert "the policy's choice is worse than an even one and takes -" in found["wrong"].verdict
    assert "the policy's choice is not separable from an even one" in found["blind"].verdict


def test_a_static_model_has_an_oracle_whose_scale_is_no_luck(planted, capsys):
    """Through the command line. With three experts in the mean not all hard letters can have eight: who sees which
    letters are drawn, a tenth of them, spares their experts and seems to gain more than there is to know."""
    out = planted / "static"
    words = ["--run", str(planted / "right_0"), "--out", str(out), "--data", str(planted / "text.jsonl")]
    words += ["--policy", '{"type": "TopK", "k": 4}', "--mean", "3", "--forced", "1", "4", "8", "--documents", "20"]
    run_words("ablations", "counterfactual", *words)
    rows = {row["allocation"]: row for row in read(out / "allocations.csv") if row["part"] == "all"}
    assert OWN not in rows
    assert {float(row["mean_experts"]) for row in rows.values()} == {3}
    assert float(rows[ORACLE]["gain"]) > 0.3
    assert float(rows[HINDSIGHT]["share_low"]) > 1.03
    # Two domains, twenty documents of each, of 48 letters behind a boundary.
    assert rows[EVEN]["tokens"] == str(40 * 48)
    assert "There is something to gain" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forced": (1, 4)}, "must enclose the layers' means, 4.5"),
        ({"forced": (1, 16)}, "a token gets at most 8 experts here"),
        ({"policy": '{"type": "ExpertChoice", "k": 4}'}, "ExpertChoice looks at later tokens"),
        ({"policy": "top_p"}, "--policy 'top_p' is not JSON"),
    ],
)
def test_what_does_not_fit_is_refused(planted, change, message):
    with pytest.raises(ValueError, match=message):
        counterfactual(options(planted, "right", **change))
