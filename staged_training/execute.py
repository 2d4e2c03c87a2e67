"""Runs a plan: trunk, activations at the boundary, branches, evaluation. What is finished is recognised and not run
again."""

import contextlib
import copy
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from corpus.prepare import PreparedCorpus
from corpus.sections import Sections, sections
from foundation.files import read_json
from foundation.numbers import check_numbers
from foundation.tables import write_rows
from lm.budget import calibrate_to_targets
from lm.evaluate import Share, evaluate
from lm.model import LanguageModel
from lm.pretrained import save_pretrained
from staged_training import checkpoint
from staged_training.code import code_changes
from staged_training.data import Batches, TokenBatches, in_order, prefix_activations
from staged_training.flops import branch_flops, evaluation_flops, trunk_flops
from staged_training.fork import fork, inherited_state
from staged_training.loop import Hooks, StageResult, train_stage
from staged_training.old_code import accepted, with_accepted_branches
from staged_training.plan import Branch, Plan
from staged_training.processes import ALONE, Processes
from staged_training.progress import Progress, Tracker
from staged_training.record import (
    CONFIG,
    SECTIONS,
    Ledger,
    RunRecord,
    SectionLoss,
    finish_run,
    kept_costs,
    named,
    of_other_code,
    open_run,
)
from staged_training.restored_trunk import restored_trunk
from staged_training.run import Run
from staged_training.trained_run import Summarise, TrainedRun, summarise
from staged_training.trunk_activations import TrunkSource, branch_batches
from staged_training.validation import Validation, looks


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
        processes: that train each run together, and evaluate it.

    Raises:
        ValueError: for models or batches that cannot be cut over the processes.
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
        self.device = processes.place(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
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
        for model in (plan.model, *(branch.model for branch in plan.branches)):
            processes.check(model, plan.batch_size)
        self._trunk: tuple[LanguageModel, RunRecord] | None = None
        self._moments: dict[str, Tensor] | None = None
        self._activations: tuple[Batches, Batches] | None = None
        self._calibration: dict[int, Tensor] = {}

    @functools.cached_property
    def valid_sections(self) -> Sections:
        """Of the validation text."""
        return sections(self.corpus.valid, self.corpus.tokenizer)

    def _accept_old_code(self) -> None:
        named_by_hash = self.trunk_folder == self.root / "trunks" / self.plan.trunk_hash
        self.plan, trunk_folder = accepted(self.plan, self.trunk_folder)
        if named_by_hash:
            self.trunk_folder = trunk_folder
        # Behind the trunk's, which is part of what branches' folders are named by.
        self.plan = with_accepted_branches(self.plan, self.folder_of)

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

    def trunk(self, summary: Summarise = summarise) -> tuple[LanguageModel, RunRecord]:
        """The trained trunk, trained now or before; frozen whole. Where several processes train, each has it whole, on
        the CPU, from the checkpoint that branches fork from."""
        if self._trunk is None:
            run = self.plan.trunk_run(self.trunk_folder)
            record, model = self.open(run), None
            if (
                record is not None
                and (model := restored_trunk(self.plan, run, self.processes, self.device)) is not None
            ):
                print(f"trunk {self.plan.trunk_hash}: finished before, taken from {run.folder}", flush=True)
            if record is None or model is None:
                model, record = self.train_trunk(run, summary)
                if self.processes.many:
                    model = restored_trunk(self.plan, run, self.processes, self.device)
                    assert model is not None, "its last checkpoint has just been written"
            model.requires_grad_(False)
            self._trunk = model, record
        return self._trunk

    def train_trunk(self, run: Run, summary: Summarise = summarise) -> tuple[LanguageModel, RunRecord]:
        """Trains the trunk or what is left of it, then evaluates it. All processes call it.

        Returns:
            the model, of several processes each one's part, and its record.
        """
        plan, processes = self.plan, self.processes
        with processes.exclusive(run.folder):
            model = processes.shard(LanguageModel(plan.model).init_weights(plan.trunk_seed), self.device)
            tokens = self.train_tokens, self.valid_tokens
            train, valid = (processes.own_rows(batches, plan.batch_size) for batches in tokens)
            validation = self._validation(model, valid, 0)
            # Branches fork from a calibrated trunk, also after a restart, which finds the last checkpoint only.
            training = self._train(run, model, train, validation, at_end=lambda: self._calibrate(model, 0))
            means, ledger = training.mean_experts, kept_costs(run.folder)
            ledger.add("trunk", flops=trunk_flops(plan, means), seconds=training.seconds)

            def with_means(trained: TrainedRun) -> dict[str, Any]:
                # What the branches need of the trunk to count the FLOPs of their frozen prefix.
                return {**summary(trained), "trained_mean_experts": means}

            self._pay(ledger, run, means, validation)
            return model, self._finish(run, model, valid, training, means, ledger, with_means)

    @functools.cached_property
    def _prefix(self) -> LanguageModel:
        """The trunk as what crosses the boundary is computed by it: of several processes each one's part."""
        trunk, _ = self.trunk()
        return self.processes.shard(copy.deepcopy(trunk), self.device) if self.processes.many else trunk

    def activations(self) -> tuple[Batches, Batches]:
        """Training and validation batches as the branches read them: tokens, stored activations, or a frozen prefix run
        each time. Of several processes each has its rows."""
        if self._activations is None:
            trunk, record = self.trunk()
            source = TrunkSource(
                plan=self.plan,
                whole=trunk,
                prefix=lambda: self._prefix,
                folder=self.trunk_folder,
                means=tuple(record.result["trained_mean_experts"]),
                processes=self.processes,
            )
            tokens = self.train_tokens, self.valid_tokens
            self._activations, ledger = branch_batches(source, *tokens, stored=self.config.cache)
            if ledger is not None:
                self._trunk = trunk, dataclasses.replace(record, ledger=ledger)
        return self._activations

    def calibration(self, boundary: int) -> Tensor:
        """Training text that no stage sees, as it enters block `boundary`: tokens_BT, or x_BTD from the trunk's frozen
        prefix. All processes have all of it."""
        if boundary not in self._calibration:
            inputs = [self.train_tokens[int(batch)][0] for batch in self.plan.calibration_batches()]
            if boundary:
                inputs = [prefix_activations(self._prefix, tokens_BT, boundary) for tokens_BT in inputs]
            self._calibration[boundary] = torch.cat(inputs)
        return self._calibration[boundary]

    def _calibrate(self, model: LanguageModel, boundary: int) -> int:
        """Sets budgets on text that no stage sees; returns how many tokens that took."""
        calibrated = calibrate_to_targets(model, self.calibration(boundary), boundary=boundary)
        # Every process has done it on the same text, and may have rounded otherwise.
        self.processes.align(model)
        return calibrated

    def branch(self, branch: Branch, summary: Summarise = summarise) -> RunRecord:
        """Trains and evaluates one branch, or returns what it was found to be before."""
        run = self.plan.branch_run(branch, self.folder_of(branch))
        if (record := self.open(run)) is not None:
            print(f"{run.label}: finished before, taken from {run.folder}", flush=True)
            return record
        # Ahead of the branch's lock: computing them takes the trunk's.
        self.activations()
        with self.processes.exclusive(run.folder):
            return self._train_branch(branch, run, summary)

    def _train_branch(self, branch: Branch, run: Run, summary: Summarise) -> RunRecord:
        plan, boundary = self.plan, run.boundary
        trunk, trunk_record = self.trunk()
        train, valid = self.activations()
        model = self.processes.shard(fork(trunk, branch), self.device)
        # A branch starts at its budget, not at the threshold its policy was born with.
        calibrated = self._calibrate(model, boundary)
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
        return Validation(model, valid, boundary, self.corpus, self.plan, self._share)

    @property
    def _share(self) -> Share:
        return self.processes.share(self.plan.batch_size, self.plan.seq_len)

    def _pay(self, ledger: Ledger, run: Run, means: tuple[float, ...], validation: Validation) -> None:
        """Adds to the costs what looking at the validation text on the way took: of a run that was stopped the
        seconds since."""
        n_looks = looks(run.stage.n_batches, self.config.log_every)
        flops = validation.flops(means, n_looks, cached=self.config.cache)
        ledger.add("evaluation", flops=flops, seconds=validation.seconds)

    def _train(
        self,
        run: Run,
        model: LanguageModel,
        batches: Batches,
        validation: Validation,
        at_end: Callable[[], object] | None = None,
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
        calibrated = self._calibrate(model, boundary)
        # Ahead of the evaluation: whatever that runs into, the trained model is there to be used.
        self._export(run.folder, model)
        parts = self.valid_sections
        evaluation = evaluate(
            model,
            in_order(valid),
            n_bytes=plan.corpus.valid_bytes,
            boundary=boundary,
            section_N=parts.section_N,
            share=self._share,
        )
        rows = zip(parts.document_S.tolist(), parts.n_bytes_S.tolist(), evaluation.section_nats)
        losses = [SectionLoss(document=document, n_bytes=size, nats=nats) for document, size, nats in rows]
        trained = TrainedRun(
            run=run,
            plan=plan,
            model=model,
            valid=valid,
            evaluation=evaluation,
            training=training,
            mean_experts=means,
            share=self._share,
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

        def written() -> RunRecord:
            write_rows(run.folder / SECTIONS, SectionLoss, losses)
            return finish_run(run.folder, result, ledger)

        return self.processes.from_first(written)

    def _export(self, folder: Path, model: LanguageModel) -> None:
        """The trained model for `python -m lm generate`, calibrated, with the text that it can be calibrated on to
        another budget."""
        whole, calibration_BT = self.processes.whole(model), self.calibration(0).cpu()

        def written() -> None:
            assert whole is not None, "the first process has it"
            save_pretrained(folder / "model", whole, calibration_BT, self.corpus.tokenizer)

        self.processes.from_first(written)


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
