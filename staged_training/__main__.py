"""`python -m staged_training run`: trains a trunk and, unless told otherwise, the baseline branch that decays from it.
`parallel`: one model, one stage, in several processes under torchrun. `sweep`: optimizers and learning rates on equal
terms. `adapt`: a trained model learns a variable number of experts. `diagnostics`: what the routers of a run did, by
layer and over time. `profile`: where a training step and a decode step spend their time.

Started again by the same command it continues where it was, or says that it is finished. A stop signal leaves
everything saved; exit codes are those of `foundation.command`.
"""

import foundation.starting  # noqa: F401

# isort: split

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from corpus.prepare import CorpusConfig, prepare
from foundation.command import leave_options, run_command
from foundation.environment import environment
from foundation.numbers import check_numbers
from foundation.serialize import to_dict
from lm.options import ModelOptions
from staged_training.adapt.command import adapt
from staged_training.adapt.options import AdaptConfig
from staged_training.describe import describe
from staged_training.diagnostics import DiagnosticsConfig, show_diagnostics
from staged_training.estimate import estimate
from staged_training.execute import Execution, ExecutionConfig
from staged_training.parallel import ParallelConfig, train_in_parallel
from staged_training.profile import ProfileConfig, profile
from staged_training.record import CONFIG
from staged_training.staging import StagingConfig, corpus_facts, make_plan, training_text
from staged_training.sweep import SweepConfig, sweep


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Trains one model in two stages.

    Attributes:
        out: folder of the run; the prepared text is kept in `corpus/` below it.
        corpus: the text; this machine's Python standard library by default.
        model: the network; its vocabulary is the tokenizer's.
        staging: the token budget and how it is spent.
        execution: saving, printing, tracking.
        trunk_seed: of the trunk's weights, data order and routers' draws.
        branch_seed: of the branch's data order and routers' draws.
        branch: also train the baseline branch.
        dry_run: print the resolved configuration, the environment and the plan, and leave.
    """

    out: Path = Path("runs/staged")
    corpus: Annotated[CorpusConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=CorpusConfig)
    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ModelOptions)
    staging: Annotated[StagingConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=StagingConfig)
    execution: Annotated[ExecutionConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=ExecutionConfig
    )
    trunk_seed: int = 0
    branch_seed: int = 0
    branch: bool = True
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, trunk_seed=0, branch_seed=0)


def run(config: RunConfig) -> None:
    """Trains whatever is not finished.

    Raises:
        ValueError: for text, model or staging that do not fit.
        loop.NonFiniteLossError, foundation.stopping.Interrupted: everything saved; the same call continues.
    """
    corpus = training_text(prepare(config.corpus, config.out / "corpus"), config.staging)
    model = config.model.config(corpus.tokenizer.vocab_size, corpus.tokenizer.boundary_id)
    facts = corpus_facts(corpus)
    branches = [("baseline", model, config.branch_seed)] if config.branch else []
    plan = make_plan(config.staging, facts, model, branches, trunk_seed=config.trunk_seed)
    print(describe(plan), flush=True)
    if config.dry_run:
        here = environment(data_hash=facts.content_hash)
        print(json.dumps({"config": to_dict(config), "model": to_dict(model), "environment": here}, indent=2))
        return
    execution = Execution(plan, corpus, config.out, config.execution)
    # Beside the run, since runs of other options may share the folder above it; what lies there already has its own.
    for folder in [execution.folder_of(branch) for branch in execution.plan.branches] or [execution.trunk_folder]:
        if not (folder / CONFIG).exists():
            leave_options(folder)
    print(estimate(execution), flush=True)
    execution.trunk()
    for branch in execution.plan.branches:
        execution.branch(branch)


def run_any(config: RunConfig | ParallelConfig | SweepConfig | AdaptConfig | DiagnosticsConfig | ProfileConfig) -> None:
    """What each configuration asks for."""
    if isinstance(config, RunConfig):
        run(config)
    elif isinstance(config, ParallelConfig):
        train_in_parallel(config)
    elif isinstance(config, SweepConfig):
        sweep(config)
    elif isinstance(config, AdaptConfig):
        adapt(config)
    elif isinstance(config, ProfileConfig):
        profile(config)
    else:
        show_diagnostics(config)


def main(arguments: list[str] | None = None) -> None:
    run_command(
        lambda given: tyro.extras.subcommand_cli_from_dict(
            {
                "run": RunConfig,
                "parallel": ParallelConfig,
                "sweep": SweepConfig,
                "adapt": AdaptConfig,
                "diagnostics": DiagnosticsConfig,
                "profile": ProfileConfig,
            },
            prog="python -m staged_training",
            description=__doc__,
            args=given,
            config=(tyro.conf.AvoidSubcommands,),
        ),
        run_any,
        arguments,
        continues=True,
    )


if __name__ == "__main__":
    main()
