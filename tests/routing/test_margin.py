"""The margin of a routing decision, read from what was dispatched."""

import pytest
import torch

from routing.assignments import Assignments
from routing.diagnostics import routing_statistics

PROBS_TE = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])


@pytest.mark.parametrize("padded", [False, True])
def test_margin_is_the_gap_at_the_cut(padded):
    expert_TK = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 0]])
    keep_TK = torch.tensor([[True, True], [True, False], [True, False], [False, False]])
    rows = Assignments.from_slots(expert_TK, torch.ones(4, 2), keep_TK, n_experts=3, padded=padded)
    # Token 2 was given its second best, token 3 nothing.
    expected = ((0.3 - 0.2) + (0.6 - 0.3) + (0.3 - 0.5)) / 3
    assert float(routing_statistics(rows, PROBS_TE).margin) == pytest.approx(expected, abs=1e-6)


def test_no_margin_without_a_choice():
    rows = Assignments.from_slots(torch.arange(3).expand(4, 3), torch.ones(4, 3), n_experts=3)
    assert routing_statistics(rows, PROBS_TE).margin.isnan()
    nothing = Assignments.from_slots(torch.zeros(0, 1, dtype=torch.int64), torch.ones(0, 1), n_experts=3)
    assert routing_statistics(nothing, PROBS_TE[:0]).margin.isnan()
