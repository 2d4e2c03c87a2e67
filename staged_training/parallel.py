"""`staged_training parallel --processes N`, or `torchrun --nproc-per-node N -m staged_training parallel` where there is
more than one machine: one model, one stage, trained by N processes together.

Same loop, data order, optimizer, checks and run folder as `run`. Where N differs, losses differ in their last bits
only: whatever is counted is counted over the whole batch. A run continues with any N, from checkpoints of any other.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from corpus.prepare import CorpusConfig, prepare
from foundation.command import given_words, leave_options
from foundation.environment import under_torchrun
from foundation.numbers import check_numbers
from foundation.option_files import without_option
from foundation.serialize import from_dict
from lm.options import ModelOptions
from routing.router import RouterConfig
from staged_training.describe import describe
from staged_training.execute import Execution, ExecutionConfig
from staged_training.launch import launch
from staged_training.plan import CorpusFacts, Plan
from staged_training.staging import StagingConfig, corpus_facts, make_whole_plan, training_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Trains one model in several processes.

    Attributes:
        processes: how many to start on this machine; where torchrun starts them, on several machines, leave it alone.
        out: folder of the run, which all processes must reach; the prepared text is kept in `corpus/` below it.
        corpus: the text; this machine's Python standard library by default.
        model: the network; its vocabulary is the tokenizer's.
        policy: routing policy as JSON, as config.json stores it: '{"type": "TopP", "target_mean": 4, "cap": 8}'; the
            model's own when empty.
        expert_parallel: processes that share one set of experts, each with its part of them; 0 for all processes.
        staging: the token budget, of which the part behind `trunk_share` anneals; nothing is frozen. batch_size
            counts the rows of all processes together.
        execution: saving, printing, tracking; nothing is cached.
        seed: weights, data order, routers' draws.
    """

    processes: int = 1
    out: Path = Path("runs/parallel")
    corpus: Annotated[CorpusConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=CorpusConfig)
    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ModelOptions)
    policy: str = ""
    expert_parallel: int = 0
    staging: Annotated[StagingConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=StagingConfig)
    execution: Annotated[ExecutionConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=ExecutionConfig
    )
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, processes=1, expert_parallel=0, seed=0)


def train_in_parallel(config: ParallelConfig) -> None:
    """Trains the model, or what is left of its training. All processes call it; the first prints and writes.

    Raises:
        ValueError: for sizes that the processes cannot share, or a policy that needs the whole batch in one place.
        foundation.stopping.Interrupted: after a stop signal to any process, everything saved.
    """
    if config.processes > 1:
        if under_torchrun():
            raise ValueError(f"--processes {config.processes}: torchrun has started them already; legal: none")
        words = without_option(given_words(), "--processes")
        return launch(config.processes, ["staged_training", "parallel", *words])
    # A second of imports that a run in one process need not wait for.
    from staged_training.many_processes import joined

    with joined(config.expert_parallel) as processes:
        processes.from_first(lambda: prepare(config.corpus, config.out / "corpus") and leave_options(config.out))
        corpus = training_text(prepare(config.corpus, config.out / "corpus"), config.staging)
        plan = plan_of(config, corpus_facts(corpus), corpus.tokenizer.vocab_size, corpus.tokenizer.boundary_id)
        print(f"{describe(plan)}\n{processes}", flush=True)
        execution = Execution(
            plan,
            corpus,
            config.out,
            config.execution,
            trunk_folder=config.out,
            processes=processes,
        )
        run = dataclasses.replace(execution.plan.trunk_run(config.out), label="parallel")
        if execution.open(run) is not None:
            print(f"finished before: {run.folder}", flush=True)
            return
        execution.train_trunk(run)


def plan_of(config: ParallelConfig, facts: CorpusFacts, vocab_size: int, boundary_id: int) -> Plan:
    """One stage without branches. Nothing of it depends on the number of processes.

    Raises:
        ValueError: for a routing policy that does not parse.
    """
    model = config.model.config(vocab_size, boundary_id)
    if config.policy:
        try:
            stored: dict[str, Any] = json.loads(config.policy)
        except ValueError as error:
            raise ValueError(f"--policy {config.policy!r} is not JSON: {error}") from None
        policy = from_dict(RouterConfig, {"policy": stored}, place="--policy").policy
        router = dataclasses.replace(model.moe.router, policy=policy)
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, router=router))
    return make_whole_plan(config.staging, facts, model, seed=config.seed)
