"""One model trained on one text, and what its validation text costs, domain by domain: what studies of text repeat."""

import math
from pathlib import Path

import numpy as np

from corpus.prepare import PreparedCorpus
from foundation.tables import read_rows
from staged_training.execute import Execution, ExecutionConfig
from staged_training.plan import Plan
from staged_training.record import SECTIONS, SectionLoss

MACRO, MICRO = "macro", "micro"


def train_whole(
    plan: Plan, corpus: PreparedCorpus, out: Path, config: ExecutionConfig, domains: tuple[str, ...]
) -> dict[str, float]:
    """Bits per byte of a plan's trunk, trained now or before: of every domain in the order of their names, their mean
    ("macro"), and all text together ("micro").

    Args:
        domains: of the validation documents.
    """
    execution = Execution(plan, corpus, out, config)
    run = plan.trunk_run(execution.trunk_folder)
    if execution.open(run) is None:
        execution.train_trunk(run)
    nats, n_bytes = dict.fromkeys(sorted(set(domains)), 0.0), dict.fromkeys(domains, 0)
    for section in read_rows(run.folder / SECTIONS, SectionLoss):
        nats[domains[section.document]] += section.nats
        n_bytes[domains[section.document]] += section.n_bytes
    found = {domain: total / (n_bytes[domain] * math.log(2)) for domain, total in nats.items()}
    both = {
        MACRO: float(np.mean(list(found.values()))),
        MICRO: sum(nats.values()) / sum(n_bytes.values()) / math.log(2),
    }
    return {**found, **both}
