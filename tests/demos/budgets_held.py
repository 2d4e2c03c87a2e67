"""`python -m tests.demos.budgets_held FILE.csv --run RUN`: how well the demos' budgets hold on text that they were not
set on.

`live` is what keys and sliders set while a text grows (`demos.live`, thresholds from 8,192 tokens, every layer on what
the calibrated layers below give it). `page` is what the page's slider decides by (`lm.budget.budget_table`: the same
tokens, one forward for all budgets, layers below as trained), here run through the model. The rest of the model's own
calibration text is what both are measured on.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from demos.live import LiveModel
from foundation.tables import write_rows
from lm.budget import budget_table, experts_per_token
from lm.pretrained import find_model, load_calibration_tokens

BUDGETS = (2, 4, 8, 12, 16, 20)


@dataclasses.dataclass(frozen=True)
class HeldRow:
    """The mean number of experts per token and layer under a budget, over the layers whose number varies."""

    way: str
    asked: float
    mean: float


def held(run: Path) -> list[HeldRow]:
    live = LiveModel(find_model(run))
    used_BT = live.calibration_BT()
    assert used_BT is not None
    used = {tuple(row) for row in used_BT.tolist()}
    rest = [row for row in load_calibration_tokens(live.folder).tolist() if tuple(row) not in used]
    rest_BT = torch.tensor(rest)
    layers = live.layers
    means, threshold_ML = budget_table(live.model, used_BT)
    rows = []
    for asked in BUDGETS:
        live.set_budget(None)
        for layer in layers:
            budget = live.model.routers()[layer].policy.budget
            assert budget is not None
            budget.threshold.fill_(float(threshold_ML[means.index(asked), layer]))
        rows.append(HeldRow("page", asked, float(experts_per_token(live.model, rest_BT, layers).mean())))
        live.set_budget(None)
        live.set_budget(asked)
        rows.append(HeldRow("live", asked, float(experts_per_token(live.model, rest_BT, layers).mean())))
        print(rows[-2:], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained model or of its run")
    asked = parser.parse_args()
    write_rows(asked.csv, HeldRow, held(asked.run))


if __name__ == "__main__":
    main()
