"""Compares methods on shared trunks: plan, run what is not finished, measure, and record what was compared.

    <out>/corpus/                 the prepared text
    <out>/trunks/<hash>/          one per trunk seed, shared by every comparison that agrees on model, text and budget
    <out>/branches/<name>_<hash>/ one per method, trunk seed and branch seed, shared likewise
    <out>/comparisons/<hash>/     comparison.json, table.csv, report.html, figures/

All names are functions of what was asked, so the same command finds what it has finished, and another command what both
share.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ablations.comparison.announce import asked, plan_text
from ablations.comparison.measure import MeasuringContext, budgets_of, measure
from ablations.comparison.options import Options
from ablations.comparison.records import COMPARISON_FILE, Comparison, MethodSummary, RunReference
from ablations.comparison.registry import BASELINE, find_methods, sources_of
from ablations.comparison.reliability import form_of
from ablations.method import Method
from corpus.compressors import xz_bits_per_byte
from corpus.prepare import PreparedCorpus, prepare
from foundation.command import command_line, leave_options
from foundation.environment import environment
from foundation.files import (
    CorruptFileError,
    check_seal,
    fingerprint,
    json_text,
    read_json,
    write_into_seal,
    write_json,
)
from foundation.serialize import from_dict, to_dict
from lm.config import ModelConfig
from staged_training.estimate import estimate
from staged_training.execute import Execution
from staged_training.plan import Branch, CorpusFacts, Plan
from staged_training.processes import ALONE, Processes
from staged_training.record import RESULT, set_aside
from staged_training.staging import StagingConfig, corpus_facts, make_plan, training_text
from staged_training.trained_run import TrainedRun

# What processes of a comparison's own are told it by.
SHARES_FILE = "shares.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that will run.

    Attributes:
        methods: the baseline first.
        corpus: the prepared text.
        baseline: the model of the baseline; unless another policy was asked for there, also the trunk's.
        plans: one per trunk seed; the branches of each in the order seed by seed, method by method.
    """

    methods: list[Method]
    options: Options
    corpus: PreparedCorpus
    baseline: ModelConfig
    plans: list[Plan]

    @property
    def folder(self) -> Path:
        """Of this comparison, named by what its results depend on: the same question finds its old answers."""
        identity = {
            "plans": [[plan.trunk_identity, *(to_dict(branch) for branch in plan.branches)] for plan in self.plans],
            "budget_batches": self.options.budget_batches,
        }
        return self.options.out / "comparisons" / fingerprint(identity)[:12]

    def method_of(self, branch: Branch) -> Method:
        """The method that a branch of one of the plans trains."""
        return next(method for method in self.methods if method.name == branch.method)

    def pairing_seed(self, branch: Branch) -> int:
        """The seed by which a branch is paired with the baseline's: its own, before the method shifted it."""
        return branch.seed - self.method_of(branch).seed_shift


class SharedExecution(Execution):
    """Runs one plan in folders that comparisons share: a branch's is named by what its result depends on."""

    def __init__(self, job: Job, plan: Plan, processes: Processes = ALONE) -> None:
        # Ahead of what names folders by it.
        self.budget_batches = job.options.budget_batches
        super().__init__(plan, job.corpus, job.options.out, job.options.execution, processes=processes)

    def folder_of(self, branch: Branch) -> Path:
        """Named for people by method and seeds, and told apart by a hash of everything the result depends on."""
        # The budgets a branch is evaluated at are part of its result, though not of its weights.
        identity = [self.plan.branch_identity(branch), self.budget_batches]
        return (
            self.root
            / "branches"
            / f"{branch.method}_trunk_{self.plan.trunk_seed}_seed_{branch.seed}_{fingerprint(identity)[:8]}"
        )

    @property
    def finished(self) -> bool:
        """Whether every branch of the plan has its result."""
        return all((self.folder_of(branch) / RESULT).exists() for branch in self.plan.branches)

    def set_damaged_aside(self) -> None:
        """Finished branches whose files are no longer as they were written are unfinished again: what is left of them
        is kept in `damaged/` beside the branches."""
        for branch in self.plan.branches:
            folder = self.folder_of(branch)
            if not (folder / RESULT).exists():
                continue
            try:
                check_seal(folder)
            except CorruptFileError as error:
                kept = set_aside(folder, self.root / "damaged")
                print(f"{branch.name}: {error}; kept in {kept} and trained again", flush=True)


def prepare_job(methods: list[Method], options: Options) -> Job:
    """Prepares the text and makes the plans; trains nothing.

    Args:
        methods: the baseline first, see `find_methods`.
        options: of the whole comparison.

    Raises:
        ValueError: for text, model or methods that do not fit.
    """
    longest = max(method.length for method in methods)
    corpus = training_text(prepare(options.corpus, options.out / "corpus"), options.staging, longest=longest)
    baseline = options.model.config(corpus.tokenizer.vocab_size, corpus.tokenizer.boundary_id)
    for method in methods[1:]:
        if method.kind(baseline) == "nothing":
            raise ValueError(
                f"{method.name}: it changes nothing of a baseline of layers {''.join(baseline.plan.letters)}; legal: a"
                " baseline that it changes, by --layer-plan or --n-layers"
            )
    facts, trunk_model = corpus_facts(corpus), trunk_of(options.trunk_policy, baseline)
    plans = [
        plan_of(
            *(methods, options.staging, facts, baseline),
            trunk_seed=trunk,
            seeds=range(options.seeds),
            trunk_model=trunk_model,
        )
        for trunk in range(options.trunk_seeds)
    ]
    return Job(methods=methods, options=options, corpus=corpus, baseline=baseline, plans=plans)


def trunk_of(policy: str, baseline: ModelConfig) -> ModelConfig:
    """The model that trunks are trained as.

    Args:
        policy: name of the method whose routing it has.

    Raises:
        ValueError: for a method that there is not, or one that changes more than routing.
    """
    *_, method = find_methods([policy])
    if method.name != BASELINE and (kind := method.kind(baseline)) != "routing":
        raise ValueError(f"Options.trunk_policy: {policy} changes {kind}; legal: a method that changes routing alone")
    return method.change(baseline)


def plan_of(
    methods: list[Method],
    staging: StagingConfig,
    facts: CorpusFacts,
    baseline: ModelConfig,
    *,
    trunk_seed: int,
    seeds: Iterable[int],
    trunk_model: ModelConfig | None = None,
) -> Plan:
    """A trunk, and a branch of each method for every seed.

    Args:
        methods: the baseline first.
        seeds: by which branches are paired.
        trunk_model: the trunk's; the baseline by default.

    Raises:
        ValueError: for text, model or methods that do not fit.
    """
    branches = [
        (method.name, method.change(baseline), seed + method.seed_shift) for seed in seeds for method in methods
    ]
    twins = [method.name for method in methods if method.rounding]
    return make_plan(
        *(staging, facts, trunk_model or baseline, branches),
        trunk_seed=trunk_seed,
        rounding=twins,
        lengths={method.name: method.length for method in methods},
        sources=sources_of(methods),
    )


def run_in_turn(job: Job, executions: list[SharedExecution]) -> None:
    """Trains and measures what is not finished, one run after the other."""
    for execution in executions:
        for branch in execution.plan.branches:
            run_branch(job, execution, branch)


def run_comparison(
    methods: list[Method],
    options: Options,
    run: Callable[[Job, list[SharedExecution]], None] = run_in_turn,
    *,
    jobs: int = 1,
    estimated: bool = True,
) -> Path | None:
    """Runs whatever of the comparison is not finished.

    Args:
        methods: the baseline first, see `find_methods`.
        options: of the whole comparison.
        run: does it, given one execution per trunk.
        jobs: runs that it has side by side on this machine, which the estimate counts with.
        estimated: time a few steps of each method first.

    Returns:
        The folder of the comparison; None after a dry run.

    Raises:
        ValueError: for what cannot be compared.
        foundation.stopping.Interrupted: after a stop signal, with everything saved; the same call continues.
    """
    job = prepare_job(methods, options)
    executions = [SharedExecution(job, plan) for plan in job.plans]
    # Where old code is accepted, the plans are those of its runs.
    job = dataclasses.replace(job, plans=[execution.plan for execution in executions])
    plan = plan_text(job.methods, job.plans, job.baseline, options)
    print(plan, flush=True)
    for execution in executions:
        if not options.dry_run:
            execution.set_damaged_aside()
        if estimated and not execution.finished:
            budgets = len(budgets_of(job.baseline))
            found = estimate(execution, jobs=jobs, budgets=budgets, budget_batches=options.budget_batches)
            print(f"trunk {execution.plan.trunk_seed}: {found}", flush=True)
    if options.dry_run:
        here = environment(data_hash=job.plans[0].corpus.content_hash)
        print(json.dumps({"options": to_dict(options), "environment": here}, indent=2))
        return None
    # Before the first step, so that `report` can show a comparison that is still running or was stopped.
    job.folder.mkdir(parents=True, exist_ok=True)
    described = describe_comparison(job, executions, plan)
    write_into_seal(job.folder, {COMPARISON_FILE: json_text(to_dict(described))}, anew=True)
    leave_options(job.folder)
    run(job, executions)
    return job.folder


def run_branch(job: Job, execution: SharedExecution, branch: Branch) -> None:
    """Trains and measures a branch if it is not finished."""

    # Called where it has just been trained; a branch that is finished already is not measured again.
    def summary(run: TrainedRun) -> dict:
        context = MeasuringContext(
            baseline=job.baseline,
            method=job.method_of(branch).change(job.baseline),
            pairing_seed=job.pairing_seed(branch),
            corpus=job.corpus,
            calibration=execution.calibration(branch.boundary),
            budget_batches=job.options.budget_batches,
        )
        return to_dict(measure(run, context))

    execution.branch(branch, summary=summary)


def describe_job(job: Job) -> Path:
    """Writes the file that other processes learn from what is compared, see `described_job`."""
    file = job.folder / SHARES_FILE
    write_json(file, {"methods": [method.name for method in job.methods], "options": to_dict(job.options)})
    return file


def described_job(file: Path) -> tuple[list[Method], Options]:
    """What `describe_job` has written."""
    described = read_json(file)
    return find_methods(described["methods"]), from_dict(Options, described["options"])


def describe_comparison(job: Job, executions: list[SharedExecution], printed: str) -> Comparison:
    """The record that the report is made from.

    Args:
        executions: one per plan of the job.
        printed: the plan, as it was.
    """
    # What is recorded of the first plan and its first branch holds for all: plans differ in the trunk's seed only, and
    # `Plan` refuses branches that differ in stage, boundary or freshness.
    plan = job.plans[0]
    first, tokens = plan.branches[0], plan.tokens_per_batch

    # Relative, so that the folder of all runs can be moved.
    def relative(folder: Path) -> str:
        return os.path.relpath(folder, job.folder)

    return Comparison(
        methods=tuple(
            MethodSummary(name=m.name, question=asked(m, plan), kind=m.kind(job.baseline), known=m.known)
            for m in job.methods
        ),
        trunk_seeds=tuple(plan.trunk_seed for plan in job.plans),
        branch_seeds=tuple(range(job.options.seeds)),
        n_layers=job.baseline.n_layers,
        boundary=first.boundary,
        fresh=first.fresh,
        trunk_tokens=plan.trunk.n_batches * tokens,
        branch_tokens=first.stage.n_batches * tokens,
        tokens_per_step=tokens,
        bytes_per_token=plan.corpus.train_bytes / plan.corpus.train_tokens,
        valid_bytes=plan.corpus.valid_bytes,
        xz_bits_per_byte=xz_bits_per_byte(job.corpus.valid_text()),
        plan=printed,
        command=command_line(),
        trunks=tuple(
            RunReference(
                method="trunk",
                trunk_seed=execution.plan.trunk_seed,
                branch_seed=0,
                folder=relative(execution.trunk_folder),
            )
            for execution in executions
        ),
        branches=tuple(
            RunReference(
                method=branch.method,
                trunk_seed=execution.plan.trunk_seed,
                branch_seed=job.pairing_seed(branch),
                folder=relative(execution.folder_of(branch)),
            )
            for execution in executions
            for branch in execution.plan.branches
        ),
        form=form_of(job.options.staging, job.options.trunk_policy),
        domains=job.corpus.valid_domains(),
    )
