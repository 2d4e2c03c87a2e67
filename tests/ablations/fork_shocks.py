"""What joining a top-k trunk does to its function, of every registered method: the loss of the first step, ahead of any
update, beside the baseline's.

    python tests/ablations/fork_shocks.py OUT FILE.csv        a trunk of 180,000 tokens, two minutes

From the root of the checkout; OUT keeps the trunk. The test beside it does the same with a smaller one.
"""

import dataclasses
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, ".")

from ablations.comparison.compare import SharedExecution, prepare_job
from ablations.comparison.options import Options
from ablations.comparison.registry import all_methods, find_methods
from corpus.prepare import CorpusConfig
from foundation.tables import write_rows
from lm.budget import calibrate_to_targets
from lm.options import ModelOptions
from staged_training.fork import fork
from staged_training.staging import StagingConfig
from staged_training.step import next_token


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForkShock:
    """A method's first step, in the mean over some batches: its loss minus the baseline's in nats per token, of the
    baseline its loss; and the experts per token and layer that it used."""

    method: str
    nats: float
    experts: float


def fork_shocks(options: Options, *, n_batches: int) -> list[ForkShock]:
    """Of every method that changes routing or attention alone, the baseline first, on the first batches of its branch.
    Trains the trunk, if it is not there."""
    baseline = options.model.config(vocab_size=options.corpus.vocab_size)
    joining = [name for name, method in all_methods().items() if method.kind(baseline) in ("routing", "attention")]
    job = prepare_job(find_methods(joining), options)
    (plan,) = job.plans
    execution = SharedExecution(job, plan)
    trunk, _ = execution.trunk()
    rows: list[ForkShock] = []
    for branch in plan.branches:
        model = fork(trunk, branch)
        calibrate_to_targets(model, execution.calibration(0))
        model.train()
        losses, experts = [], []
        for step, batch in enumerate(plan.order_of(branch)[:n_batches].tolist()):
            model.begin_step(step, branch.seed)
            with torch.no_grad():
                forward = next_token(model, *execution.train_tokens[batch], 0)
            losses.append(float(forward.loss))
            experts += [len(each.assignments.token_N) / each.assignments.n_tokens for each in forward.output.routings]
        loss = sum(losses) / len(losses)
        first = rows[0].nats if rows else 0.0
        rows.append(ForkShock(method=branch.method, nats=loss - first, experts=sum(experts) / len(experts)))
    return rows


if __name__ == "__main__":
    rows = fork_shocks(
        Options(
            seeds=1,
            out=Path(sys.argv[1]),
            model=ModelOptions(
                **{"n_layers": 4, "layer_plan": "SF", "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16},
                **{"window": 64, "n_experts": 32, "d_expert": 16, "k": 6, "dtype": "float32"},
            ),
            staging=StagingConfig(tokens=200_000, trunk_share=0.9, seq_len=256, calibration_tokens=8192),
            corpus=CorpusConfig(vocab_size=1024),
        ),
        n_batches=6,
    )
    write_rows(Path(sys.argv[2]), ForkShock, rows)
    for row in rows:
        print(f"{row.method:<24} {row.nats:+.5f} {row.experts:6.2f}")
