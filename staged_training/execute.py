"""Runs a plan: trunk, activations at the boundary, branches, evaluation. What is finished is recognised and not run
again."""

import contextlib
import dataclasses
import functools
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from corpus.prepare import PreparedCorpus
from corpus.sections import Sections, sections
from foundation.files import CorruptFileError, read_json
from foundation.numbers import check_numbers
from foundation.tables import write_rows
from lm.budget import calibrate_to_targets
from lm.evaluate import evaluate
from lm.model import LanguageModel
from lm.pretrained import save_pretrained
from staged_training import checkpoint
from staged_training.code import CODE, code_changes
from staged_training.data import Batches, PrefixBatches, TokenBatches, in_order, prefix_activations
from staged_training.flops import branch_flops, caching_flops, evaluation_flops, trunk_flops
from staged_training.fork import fork, inherited_state
from staged_training.loop import Hooks, StageResult, train_stage
from staged_training.plan import Branch, Plan
from staged_training.processes import ALONE, Processes
from staged_training.progress import Progress, Tracker
from staged_training.record import (
    CONFIG,
    RESULT,
    SECTIONS,
    Ledger,
    RunRecord,
    SectionLoss,
    add_cost,
    finish_run,
    json_differences,
    kept_costs,
    locked,
    named,
    of_other_code,
    open_run,
    reopen_run,
)
from staged_training.run import Run
from staged_training.trained_run import Summarise, TrainedRun, summarise
from staged_training.trunk_activations import trunk_activations
from staged_training.validation import Validation, looks

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a plan is run; nothing here changes its results.

    Attributes:
        cache: store the trunk's activations at the boundary; otherwise every branch recomputes them.
        save_every: steps between checkpoints.
        log_every: steps between lines of progress.
        track: "none" or "wandb".
        accept_old_code: runs that other code has trained, or begun, count as this one's and are gone on with. Otherwise
            they are left as they are, and what depends on the changed files is trained again.

    Raises:
        ValueError: for a number of steps below 1.
    """

    cache: bool = True
    save_every: int = 200
    log_every: int = 20
    track: Literal["none", "wandb"] = "none"
    accept_old_code: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, save_every=1, log_every=1)


class Execution:
    """One plan on one corpus under one folder: `trunk()` first, then `branch(b)` for each branch, or `run_plan` for
    all.

    A trunk is trained, calibrated and evaluated, or restored (`trunk`). Its activations at the boundary are stored once
    (`activations`). A branch is forked, trained from them and evaluated likewise (`branch`).

    Args:
        root: holds `trunks/<hash>` and `branches/`.
        trunk_folder: where the trunk lies or will lie; give the same to several comparisons to share it.
        device: the GPU, where there is one, by default.
        processes: that train the trunk together; branches are trained by one.
    """

    def __init__(
        self,
        plan: Plan,
        corpus: PreparedCorpus,
        root: Path,
        config: ExecutionConfig,
        *,
        trunk_folder: Path | None = None,
        device: str | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.plan, self.corpus, self.config, self.root = plan, corpus, config, root
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.processes = processes
        self.trunk_folder = trunk_folder or root / "trunks" / plan.trunk_hash
        self.train_tokens = TokenBatches(
            corpus.train.tokens, batch_size=plan.batch_size, seq_len=plan.seq_len, device=self.device
        )
        self.valid_tokens = TokenBatches(
            corpus.valid.tokens, batch_size=plan.batch_size, seq_len=plan.seq_len, device=self.device, pad=True
        )
        if config.accept_old_code:
            self._accept_old_code()
        self._trunk: tuple[LanguageModel, RunRecord] | None = None
        self._moments: dict[str, Tensor] | None = None
        self._activations: tuple[Batches, Batches] | None = None
        self._calibration: dict[int, Tensor] = {}

    @functools.cached_property
    def valid_sections(self) -> Sections:
        """Of the validation text."""
        return sections(self.corpus.valid, self.corpus.tokenizer)

    def folder_of(self, branch: Branch) -> Path:
        """Where a branch lies or will lie."""
        return self.root / "branches" / f"{branch.method}_trunk_{self.plan.trunk_seed}_seed_{branch.seed}"

    def open(self, run: Run) -> RunRecord | None:
        """The record of a finished run; None, with its folder made, for one that is to be run or continued.

        Raises:
            record.RunMismatchError: when the folder holds another run.
        """

        def opened() -> RunRecord | None:
            if not (run.folder / CONFIG).exists() and (old := of_other_code(run.folder, run.identity)):
                changed = named(code_changes(read_json(old[0] / CONFIG), run.identity))
                print(
                    f"{run.label}: {old[0]} was trained by other code: {changed} changed; trained again, which"
                    " --accept-old-code avoids",
                    flush=True,
                )
            return open_run(run.folder, run.identity, self.plan.corpus.content_hash)

        return self.processes.from_first(opened)

    def _accept_old_code(self) -> None:
        """Makes the plan one of the code that has trained it already, run by run, where the present code has not."""
        named_by_hash = self.trunk_folder == self.root / "trunks" / self.plan.trunk_hash
        for run, stored in self._of_other_code(self.trunk_folder, self.plan.trunk_identity):
            _say_accepted("trunk", run, stored, self.plan.trunk_identity)
            self.plan = dataclasses.replace(self.plan, code=stored.get(CODE, {}))
            if named_by_hash:
                self.trunk_folder = run
            break
        branches = []
        for branch in self.plan.branches:
            identity = self.plan.branch_identity(branch)
            for run, stored in self._of_other_code(self.folder_of(branch), identity):
                # Of this very trunk: from one that other code has trained it starts elsewhere.
                if not json_differences(stored["trunk"], identity["trunk"]):
                    _say_accepted(branch.name, run, stored, identity)
                    branch = dataclasses.replace(branch, code=stored["branch"].get(CODE, {}))
                    break
            branches.append(branch)
        self.plan = dataclasses.replace(self.plan, branches=tuple(branches))

    def _of_other_code(self, folder: Path, identity: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
        """Runs of other code and their identities, see `of_other_code`; none where the present code's is finished."""
        if (folder / RESULT).exists() and not json_differences(read_json(folder / CONFIG), identity):
            return []
        return [(run, read_json(run / CONFIG)) for run in of_other_code(folder, identity)]

    def trunk(self, summary: Summarise = summarise) -> tuple[LanguageModel, RunRecord]:
        """The trained trunk, trained now or before; frozen whole."""
        if self._trunk is None:
            run = self.plan.trunk_run(self.trunk_folder)
            record, model = self.open(run), None
            if record is not None and (model := self._restored_trunk(run)) is not None:
                print(f"trunk {self.plan.trunk_hash}: finished before, taken from {run.folder}", flush=True)
            if record is None or model is None:
                trained = self.train_trunk(run, summary)
                assert trained is not None, "only the first of several processes has a whole trunk"
                model, record = trained
            model.requires_grad_(False)
            self._trunk = model, record
        return self._trunk

    def train_trunk(self, run: Run, summary: Summarise = summarise) -> tuple[LanguageModel, RunRecord] | None:
        """Trains the trunk or what is left of it, then evaluates it. All processes call it.

        Returns:
            the whole model and its record; None on all processes but the first.
        """
        plan, processes = self.plan, self.processes
        with processes.exclusive(run.folder):
            model = processes.shard(LanguageModel(plan.model).init_weights(plan.trunk_seed).to(self.device))

            def calibrate() -> None:
                calibrate_to_targets(model, self.calibration(0))

            # Branches fork from a calibrated trunk, also after a restart, which finds the last checkpoint only. A trunk
            # that is cut over processes has no branches, and cannot run by itself as long as it is.
            # Nor is it measured on its way: what evaluates needs it whole.
            at_end = validation = None
            if not processes.many:
                at_end, validation = calibrate, self._validation(model, self.valid_tokens, 0)
            training = self._train(run, model, processes.own_rows(self.train_tokens), validation, at_end)
            # The other processes are done: one is enough to evaluate, and what needs it whole gets the whole model.
            if (whole := processes.whole(model)) is None:
                return None
            means, ledger = training.mean_experts, kept_costs(run.folder)
            ledger.add("trunk", flops=trunk_flops(plan, means), seconds=training.seconds)

            def with_means(trained: TrainedRun) -> dict[str, Any]:
                # What the branches need of the trunk to count the FLOPs of their frozen prefix.
                return {**summary(trained), "trained_mean_experts": means}

            self._pay(ledger, run, means, validation)
            return whole, self._finish(run, whole, self.valid_tokens, training, means, ledger, with_means)

    def _restored_trunk(self, run: Run) -> LanguageModel | None:
        """The trunk of a finished run as its branches fork from it; None where its last checkpoint is gone or damaged,
        and the run reopened: training what is missing gives the same weights again."""
        try:
            saved = checkpoint.load_latest(run.checkpoints)
        except CorruptFileError:
            # Each has been named in a warning, and none can be of use any more.
            saved = None
            shutil.rmtree(run.checkpoints)
        if saved is None or saved.step != run.stage.n_batches:
            log.warning(
                "%s: its checkpoint at step %d, which branches start from, is missing or damaged; training %s",
                run.folder,
                run.stage.n_batches,
                "again from the start" if saved is None else f"on from step {saved.step}",
            )
            reopen_run(run.folder)
            return None
        checkpoint.refuse_other_identity(saved, run.identity)
        model = LanguageModel(self.plan.model).init_weights(self.plan.trunk_seed).to(self.device)
        checkpoint.restore_model(model, saved.weights, str(saved.path))
        return model

    def activations(self) -> tuple[Batches, Batches]:
        """Training and validation batches as the branches read them: tokens, stored activations, or a frozen prefix run
        each time."""
        if self._activations is None:
            trunk, _ = self.trunk()
            if not self.plan.boundary:
                self._activations = self.train_tokens, self.valid_tokens
            elif not self.config.cache:
                self._activations = (
                    PrefixBatches(self.train_tokens, trunk, self.plan.boundary),
                    PrefixBatches(self.valid_tokens, trunk, self.plan.boundary),
                )
            else:
                used = tuple(sorted({int(batch) for batch in self.plan.branch_batches()}))
                every = tuple(range(len(self.valid_tokens)))
                self._activations = (
                    self._stored("train", self.train_tokens, used),
                    self._stored("valid", self.valid_tokens, every),
                )
        return self._activations

    def _stored(self, split: str, tokens: TokenBatches, numbers: tuple[int, ...]) -> Batches:
        """The trunk's activations for some batches, from its folder; what computing them took goes into its ledger."""
        plan, (trunk, record) = self.plan, self.trunk()
        began = time.perf_counter()
        # Branches that train side by side all come here first; one computes what is missing.
        with locked(self.trunk_folder, wait=True):
            stored, computed = trunk_activations(
                plan, trunk, tokens, split=split, numbers=numbers, folder=self.trunk_folder / "activations"
            )
            name = stored.folder.name
            # A process that died behind the activations, ahead of the ledger, has left what nobody has paid for. Other
            # comparisons may have added to the ledger since this one read it, so it is read anew.
            if computed or not Ledger.load(self.trunk_folder).holds("caching", name):
                means = tuple(record.result["trained_mean_experts"])
                flops = caching_flops(plan, means, n_batches=len(numbers))
                seconds = time.perf_counter() - began
                ledger = add_cost(self.trunk_folder, "caching", flops=flops, seconds=seconds, part=name)
                self._trunk = trunk, dataclasses.replace(record, ledger=ledger)
        if computed:
            print(
                f"activations {split}: {len(numbers)} batches, {stored.identity.n_bytes / 2**20:.1f} MiB in"
                f" {stored.folder}",
                flush=True,
            )
        return stored

    def calibration(self, boundary: int) -> Tensor:
        """Training text that no stage sees, as it enters block `boundary`: tokens_BT, or x_BTD from the trunk's frozen
        prefix."""
        if boundary not in self._calibration:
            inputs = [self.train_tokens[int(batch)][0] for batch in self.plan.calibration_batches()]
            if boundary:
                trunk, _ = self.trunk()
                inputs = [prefix_activations(trunk, tokens_BT, boundary) for tokens_BT in inputs]
            self._calibration[boundary] = torch.cat(inputs)
        return self._calibration[boundary]

    def branch(self, branch: Branch, summary: Summarise = summarise) -> RunRecord:
        """Trains and evaluates one branch, or returns what it was found to be before."""
        run = self.plan.branch_run(branch, self.folder_of(branch))
        if (record := self.open(run)) is not None:
            print(f"{run.label}: finished before, taken from {run.folder}", flush=True)
            return record
        # Ahead of the branch's lock: computing them takes the trunk's.
        self.activations()
        with locked(run.folder):
            return self._train_branch(branch, run, summary)

    def _train_branch(self, branch: Branch, run: Run, summary: Summarise) -> RunRecord:
        plan, boundary = self.plan, run.boundary
        trunk, trunk_record = self.trunk()
        train, valid = self.activations()
        model = fork(trunk, branch)
        # A branch starts at its budget, not at the threshold its policy was born with.
        calibrated = calibrate_to_targets(model, self.calibration(boundary), boundary=boundary)
        validation = self._validation(model, valid, boundary)
        inherited = inherited_state(model, trunk, branch, self._trunk_state())
        training = self._train(run, model, train, validation, inherited=inherited)
        means = tuple(trunk_record.result["trained_mean_experts"][:boundary]) + training.mean_experts
        flops = branch_flops(plan, branch, means, cached=self.config.cache, calibrated=calibrated)
        ledger = Ledger()
        ledger.add("branches", flops=flops, seconds=training.seconds)
        self._pay(ledger, run, means, validation)
        return self._finish(run, model, valid, training, means, ledger, summary)

    def _trunk_state(self) -> dict[str, Tensor]:
        """The optimizer's state where the trunk ended, read once."""
        if self._moments is None:
            saved = checkpoint.load_latest(self.trunk_folder / "checkpoints")
            assert saved is not None, "the trunk was restored from it"
            self._moments = saved.optimizer
        return self._moments

    def _validation(self, model: LanguageModel, valid: Batches, boundary: int) -> Validation:
        return Validation(model, valid, boundary, self.corpus, self.plan)

    def _pay(self, ledger: Ledger, run: Run, means: tuple[float, ...], validation: Validation | None) -> None:
        """Adds to the costs what looking at the validation text on the way took: of a run that was stopped the
        seconds since."""
        if validation is not None:
            n_looks = looks(run.stage.n_batches, self.config.log_every)
            flops = validation.flops(means, n_looks, cached=self.config.cache)
            ledger.add("evaluation", flops=flops, seconds=validation.seconds)

    def _train(
        self,
        run: Run,
        model: LanguageModel,
        batches: Batches,
        validation: Validation | None,
        at_end: Callable[[], None] | None = None,
        inherited: dict[str, Tensor] | None = None,
    ) -> StageResult:
        plan, config = self.plan, self.config
        with contextlib.ExitStack() as cleanup:
            tracker = None
            if config.track != "none" and self.processes.first:
                tracker = Tracker(config.track, run.folder, run.label, run.identity)
                # Also when training is interrupted: what was logged has to reach the tracker.
                cleanup.callback(tracker.close)
            progress = Progress(
                run.label,
                n_steps=run.stage.n_batches,
                every=config.log_every,
                tokens_per_step=plan.tokens_per_batch,
                bytes_per_token=plan.corpus.train_bytes / plan.corpus.train_tokens,
                tracker=tracker,
            )
            return train_stage(
                run,
                model,
                batches,
                save_every=config.save_every,
                progress=progress,
                hooks=Hooks(validate=validation, at_end=at_end),
                inherited=inherited,
                processes=self.processes,
            )

    def _finish(
        self,
        run: Run,
        model: LanguageModel,
        valid: Batches,
        training: StageResult,
        means: tuple[float, ...],
        ledger: Ledger,
        summary: Summarise,
    ) -> RunRecord:
        """Calibrates, exports, evaluates; leaves costs and result.

        Args:
            valid: inputs at the run's boundary.
            means: experts per token of every block, over training.
            ledger: with the cost of training.
        """
        plan, boundary = self.plan, run.boundary
        began = time.perf_counter()
        # A trunk was calibrated when its training ended: the same text sets the same thresholds again.
        calibrated = calibrate_to_targets(model, self.calibration(boundary), boundary=boundary)
        # Ahead of the evaluation: whatever that runs into, the trained model is there to be used.
        self._export(run.folder, model)
        parts = self.valid_sections
        evaluation = evaluate(
            model, in_order(valid), n_bytes=plan.corpus.valid_bytes, boundary=boundary, section_N=parts.section_N
        )
        rows = zip(parts.document_S.tolist(), parts.n_bytes_S.tolist(), evaluation.section_nats)
        losses = (SectionLoss(document=document, n_bytes=size, nats=nats) for document, size, nats in rows)
        write_rows(run.folder / SECTIONS, SectionLoss, losses)
        trained = TrainedRun(
            run=run,
            plan=plan,
            model=model,
            valid=valid,
            evaluation=evaluation,
            training=training,
            mean_experts=means,
        )
        result = summary(trained)
        flops = evaluation_flops(
            plan,
            model.config,
            means[:boundary] + evaluation.mean_experts,
            boundary=boundary,
            cached=self.config.cache,
            n_batches=len(valid),
            calibrated=calibrated,
        )
        ledger.add("evaluation", flops=flops, seconds=time.perf_counter() - began)
        print(f"{run.label} valid bpb={evaluation.bits_per_byte:.4f} on {evaluation.n_bytes:,} bytes", flush=True)
        return finish_run(run.folder, result, ledger)

    def _export(self, folder: Path, model: LanguageModel) -> None:
        """The trained model for `python -m lm generate`, calibrated, with the text that it can be calibrated on to
        another budget."""
        save_pretrained(folder / "model", model, self.calibration(0).cpu(), self.corpus.tokenizer)


def _say_accepted(label: str, run: Path, stored: dict[str, Any], identity: dict[str, Any]) -> None:
    changed = named(code_changes(stored, identity))
    print(f"{label}: {run} counts, though other code trained it: {changed} changed", flush=True)


def run_plan(
    plan: Plan, corpus: PreparedCorpus, root: Path, config: ExecutionConfig, *, trunk_folder: Path | None = None
) -> list[RunRecord]:
    """Runs whatever of the plan is not finished: the trunk's record, then one per branch.

    Raises:
        loop.NonFiniteLossError, foundation.stopping.Interrupted: everything saved; the same call continues.
        record.RunMismatchError: when a folder holds another run.
    """
    execution = Execution(plan, corpus, root, config, trunk_folder=trunk_folder)
    execution.trunk()
    branches = [execution.branch(branch) for branch in execution.plan.branches]
    # Last, because storing activations for the branches adds to its ledger.
    _, trunk = execution.trunk()
    return [trunk, *branches]
