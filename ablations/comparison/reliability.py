"""How far a comparison of some form can be trusted: what the recorded study of agreement found of that form."""

import csv

from ablations.comparison.registry import BASELINE
from foundation.environment import ROOT
from staged_training.staging import StagingConfig

# The form without a trunk, which the study has at half of every width.
WHOLE = "smaller_model"
STUDY = ROOT / "notes" / "results" / "agreement"


def form_of(staging: StagingConfig, trunk_policy: str = BASELINE) -> str:
    """What decides whether a comparison orders methods as full runs do, as the study names it:
    `fork85_freeze50_decay`; the trunks of the study are the baseline's."""
    if not staging.trunk_share:
        return WHOLE
    form = f"fork{100 * staging.trunk_share:.0f}_freeze{100 * staging.freeze:.0f}_{staging.anneal}"
    return form if trunk_policy == BASELINE else f"{form}_from_{trunk_policy}"


def reliability_statement(form: str) -> str:
    """One sentence for the reader.

    Args:
        form: see `form_of`.
    """
    table = STUDY / "settings.csv"
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines())) if table.exists() else []
    found = [
        f"{row['separable_agreeing']} of the {row['separable']} pairs of {row['family']} arms that full runs tell apart"
        f" ({row['agreeing']} of all {row['pairs']}), for {100 * float(row['flops']):.0f} % of their FLOPs"
        for row in rows
        if row["setting"] == form and row["family"] != "all"
    ]
    if not found:
        return (
            f"Whether comparisons of this form ({form}) order methods as full runs do has not been measured: `python -m"
            " ablations agreement` asks it."
        )
    if form == WHOLE:
        return (
            "Every arm is trained whole, which holds at this size. For models of twice every width, such a comparison"
            f" ordered, as full runs do, {'; '.join(found)}: in a recorded study of smaller runs"
            f" ({STUDY.relative_to(ROOT)})."
        )
    return (
        f"Comparisons of this form ({form}) ordered, as full runs do, {'; '.join(found)}: in a recorded study of"
        f" smaller runs ({STUDY.relative_to(ROOT)})."
    )
