"""What the agreement study trains: full runs of every arm, and the runs of every cheap setting.

    <out>/corpus/               the prepared text
    <out>/trunks/<hash>/        full runs, those of the smaller model, and trunks, which are the baseline's
    <out>/branches/<name>_.../  branches, the same as those of `compare`
    <out>/agreement/<hash>/     tables, figure and text of this study

An arm is branched beside a baseline of its own boundary, where `python -m ablations.<arm>` would branch it: arms that
need a lower boundary or fresh blocks do not impose them on the others. Settings that agree on the trunk share it.
"""

import dataclasses
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

from ablations.agreement.arms import find_arms
from ablations.agreement.options import AgreementOptions
from ablations.agreement.settings import Setting, smaller
from ablations.comparison.compare import Job, SharedExecution, plan_of, run_branch
from ablations.method import Method
from corpus.prepare import PreparedCorpus, prepare
from foundation.files import fingerprint
from lm.config import ModelConfig
from staged_training.boundary import choose_cut
from staged_training.execute import Execution
from staged_training.loop import NonFiniteLossError
from staged_training.plan import Branch, Plan
from staged_training.record import RESULT
from staged_training.staging import corpus_facts, make_whole_plan

TRUTH = "truth"
WHOLE, BRANCHES = "full runs and trunks", "branches"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    """One run from the first token to the last, of an arm or of its smaller model.

    Attributes:
        setting: `TRUTH`, or the name of the setting whose cheap run it is.
    """

    setting: str
    arm: str
    seed: int
    plan: Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that will run.

    Attributes:
        arms: the baseline first.
        baseline: its model, which is also every trunk's.
        wholes: seed by seed, arm by arm; the full runs first.
        jobs: by setting, one for each group of arms that are branched alike, beside a baseline of their own.
    """

    options: AgreementOptions
    corpus: PreparedCorpus
    arms: list[Method]
    baseline: ModelConfig
    wholes: list[Whole]
    jobs: dict[str, list[Job]]

    @functools.cached_property
    def folder(self) -> Path:
        """Of tables and figure, named by what they depend on."""
        identity = {
            "wholes": [[whole.setting, whole.plan.trunk_identity] for whole in self.wholes],
            "branches": {
                setting: [
                    [plan.branch_identity(branch) for branch in plan.branches] for job in jobs for plan in job.plans
                ]
                for setting, jobs in self.jobs.items()
            },
        }
        return self.options.out / "agreement" / fingerprint(identity)[:12]

    @functools.cached_property
    def families(self) -> dict[str, str]:
        """By arm: "routing" or, where it changes attention, "architecture", or "baseline"."""
        kinds = [arm.kind(self.baseline).replace("attention", "architecture") for arm in self.arms[1:]]
        return dict(zip((arm.name for arm in self.arms), ("baseline", *kinds)))

    def execution(self, whole: Whole) -> Execution:
        """Of a whole run."""
        return Execution(whole.plan, self.corpus, self.options.out, self.options.execution)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One run that is to be trained. Its trunk, if it is a branch, is one of the tasks before.

    Attributes:
        folder: where it lies or will lie.
        plan, branch: what is trained: a branch of the plan, or its trunk.
        job: that a trunk or branch belongs to; None for a whole run.
        arm: that it trains; the baseline where it is a trunk.
        label: for lines of progress.
    """

    folder: Path
    plan: Plan
    branch: Branch | None
    job: Job | None
    arm: str
    label: str

    @property
    def finished(self) -> bool:
        """Whether it has its result."""
        return (self.folder / RESULT).exists()


def prepare_study(options: AgreementOptions) -> Study:
    """Prepares the text and makes all plans; trains nothing.

    Raises:
        ValueError: for text, model, arms or settings that do not fit.
    """
    corpus = prepare(options.corpus, options.out / "corpus")
    baseline = options.model.config(corpus.tokenizer.vocab_size, corpus.tokenizer.boundary_id)
    arms, facts = find_arms(options.arm_names, baseline), corpus_facts(corpus)

    def wholes(setting: str, model: ModelConfig) -> Iterator[Whole]:
        for seed in range(options.n_seeds):
            for arm in arms:
                plan = make_whole_plan(options.staging, facts, arm.change(model), seed=seed)
                yield Whole(setting=setting, arm=arm.name, seed=seed, plan=plan)

    whole = list(wholes(TRUTH, baseline))
    jobs = {}
    for setting in options.cheap:
        if setting.trunk_share is None:
            whole += wholes(
                setting.name, smaller(options.model).config(corpus.tokenizer.vocab_size, corpus.tokenizer.boundary_id)
            )
        else:
            jobs[setting.name] = jobs_of_setting(setting, options, corpus, arms)
    return Study(options=options, corpus=corpus, arms=arms, baseline=baseline, wholes=whole, jobs=jobs)


def jobs_of_setting(
    setting: Setting, options: AgreementOptions, corpus: PreparedCorpus, arms: list[Method]
) -> list[Job]:
    """One comparison for each boundary at which arms of a setting are branched, see `Study.jobs`."""
    baseline, facts = (
        options.model.config(corpus.tokenizer.vocab_size, corpus.tokenizer.boundary_id),
        corpus_facts(corpus),
    )
    staging = setting.staging(options.staging)
    groups: dict[tuple[int, bool], list[Method]] = {}
    for arm in arms[1:]:
        cut = choose_cut(baseline, {arms[0].name: baseline, arm.name: arm.change(baseline)}, setting.freeze)
        groups.setdefault((cut.boundary, cut.fresh), [arms[0]]).append(arm)
    return [
        Job(
            methods=group,
            options=options.comparison(staging),
            corpus=corpus,
            baseline=baseline,
            plans=[
                plan_of(
                    group,
                    staging,
                    facts,
                    baseline,
                    trunk_seed=trunk,
                    # Each seed branches once, from a trunk that it shares with every n-th.
                    seeds=range(trunk, options.n_seeds, options.n_trunks),
                )
                for trunk in range(options.n_trunks)
            ],
        )
        for group in groups.values()
    ]


def tasks_of(study: Study, part: str) -> list[Task]:
    """All runs of one part, finished or not, each once; those that others wait for first."""
    tasks: dict[Path, Task] = {}

    def add(execution: Execution, arm: str, label: str, job: Job | None, branch: Branch | None = None) -> None:
        # Where old code is accepted, the execution's plan is that of its runs.
        folder = execution.trunk_folder if branch is None else execution.folder_of(branch)
        task = Task(folder=folder, plan=execution.plan, branch=branch, job=job, arm=arm, label=label)
        tasks.setdefault(folder, task)

    for setting, jobs in study.jobs.items():
        for job in jobs:
            for execution in (SharedExecution(job, plan) for plan in job.plans):
                if part == WHOLE:
                    add(execution, study.arms[0].name, f"{setting} trunk seed {execution.plan.trunk_seed}", job)
                    continue
                for branch in execution.plan.branches:
                    add(execution, branch.method, f"{setting} {branch.name}", job, branch)
    if part == WHOLE:
        for whole in study.wholes:
            add(study.execution(whole), whole.arm, f"{whole.setting} {whole.arm} seed {whole.seed}", None)
    return list(tasks.values())


class Runner:
    """Trains tasks one after the other; what branches of one plan share stays in memory as long as they follow each
    other."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._shared: tuple[Plan, SharedExecution] | None = None

    def run(self, task: Task) -> bool:
        """Trains and measures a run that is not finished.

        Returns:
            Whether it is finished now; False, with a line that says why, where its loss did not stay finite.
        """
        try:
            if task.branch is not None:
                assert task.job is not None
                execution = self._execution(task)
                if not (execution.trunk_folder / RESULT).exists():
                    print(f"{task.label}: its trunk {execution.trunk_folder} is not finished", flush=True)
                    return False
                run_branch(task.job, execution, task.branch)
            else:
                self._run_whole(task)
        except NonFiniteLossError as error:
            # An arm that cannot be trained like this is left out, and no reason to lose the others.
            print(f"{task.label}: {error}", flush=True)
            return False
        # Nothing goes on from there, and a study has hundreds of them. Trunks keep theirs.
        if task.branch is not None or task.job is None:
            shutil.rmtree(task.folder / "checkpoints", ignore_errors=True)
        return True

    def _run_whole(self, task: Task) -> None:
        study = self.study
        execution = Execution(task.plan, study.corpus, study.options.out, study.options.execution)
        run = dataclasses.replace(task.plan.trunk_run(task.folder), label=task.label)
        if execution.open(run) is None:
            execution.train_trunk(run)

    def _execution(self, task: Task) -> SharedExecution:
        assert task.job is not None
        if self._shared is None or self._shared[0] is not task.plan:
            self._shared = task.plan, SharedExecution(task.job, task.plan)
        return self._shared[1]
