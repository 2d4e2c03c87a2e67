"""What a comparison can be told. Without options it is the quick run that `make ablation` makes on two CPU cores:
ten minutes.

`--tokens` is the dial: the token budget of one method, trunk plus one branch. Everything else can stay. Model, text and
training have the options and the defaults of every other command: `lm.options`, `corpus.prepare`,
`staged_training.staging`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from corpus.prepare import CorpusConfig
from foundation.numbers import check_numbers
from lm.options import ModelOptions
from staged_training.execute import ExecutionConfig
from staged_training.staging import StagingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to compare.

    Attributes:
        seeds: branches per method and trunk, paired by seed with the baseline's.
        trunk_seeds: trunks; more than one puts trunk noise into the intervals, at the price of that many trunks.
        trunk_policy: name of a routing method that trunks are trained with, from which every branch, the baseline's
            too, forks to its own policy: "random_k" favours none of them, where "baseline" has trained the incumbent.
        jobs: runs that train side by side, in processes that share the threads; 0 for one per thread on a CPU and one
            on a GPU. Results do not depend on it. On a cluster, jobs; 0 for one per run.
        processes: that train and evaluate each run together on this machine, each with its part of the weights and its
            rows of every batch, for models that are too large for one device; where torchrun starts them, leave it
            alone. Results do not depend on it, up to rounding.
        expert_parallel: processes that share one set of experts, each with its part of them; 0 for all processes.
        executor: "local" for processes of this machine, "slurm" for jobs of a cluster, see `comparison.slurm`.
        slurm: what jobs ask of the cluster, as words KEY=VALUE with submitit's names: partition=gpu time=120
            gpus_per_node=1; time in minutes.
        out: folder of all runs. Comparisons under the same folder share their corpus, trunks and branches.
        dry_run: print the plan, the resolved options and the environment, and run nothing.
        budget_batches: validation batches on which the trained weights are evaluated at other mean numbers of experts.

    Raises:
        ValueError: for a number below 1, or words for a cluster that are none, naming the option.
    """

    seeds: int = 3
    trunk_seeds: int = 1
    trunk_policy: str = "baseline"
    jobs: int = 0
    processes: int = 1
    expert_parallel: int = 0
    executor: Literal["local", "slurm"] = "local"
    slurm: tuple[str, ...] = ()
    out: Path = Path("runs")
    dry_run: bool = False
    budget_batches: int = 2
    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ModelOptions)
    staging: Annotated[StagingConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=StagingConfig)
    corpus: Annotated[CorpusConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=CorpusConfig)
    execution: Annotated[ExecutionConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=ExecutionConfig
    )

    def __post_init__(self) -> None:
        check_numbers(self, seeds=1, trunk_seeds=1, jobs=0, budget_batches=1, processes=1, expert_parallel=0)
        if self.trunk_policy != "baseline" and not self.staging.trunk_share:
            raise ValueError(
                f"Options.trunk_policy: {self.trunk_policy} without a trunk (trunk_share 0); legal: baseline"
            )
        if self.processes > 1 and (self.jobs > 1 or self.executor != "local"):
            raise ValueError(
                f"Options.processes: {self.processes} train one run after the other, here; legal: --jobs 0 or 1 and"
                " --executor local beside them"
            )
        if self.slurm and self.executor != "slurm":
            raise ValueError(f"Options.slurm: {' '.join(self.slurm)}, needs --executor slurm")
        for word in self.slurm:
            if not all(word.partition("=")):
                raise ValueError(f"Options.slurm: {word!r}, must be KEY=VALUE")
