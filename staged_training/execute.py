"""Runs a plan: trunk, activations at the boundary, branches, evaluation. What is finished is recognised and not run
again."""

import dataclasses
import time
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from corpus.prepare import PreparedCorpus
from foundation.files import fingerprint
from lm.accounting import model_cost
from lm.budget import calibrate_to_targets
from lm.evaluate import evaluate
from lm.model import RESIDUAL_DTYPE, LanguageModel
from lm.pretrained import save_pretrained
from staged_training import checkpoint
from staged_training.activation_cache import CacheIdentity, cached_activations, weights_hash
from staged_training.data import Batches, PrefixBatches, TokenBatches, in_order, prefix_activations
from staged_training.fork import fork
from staged_training.loop import StageResult, train_stage
from staged_training.plan import Branch, Plan
from staged_training.progress import Progress, Tracker
from staged_training.record import Ledger, RunRecord, finish_run, locked, open_run
from staged_training.trained_run import Summarise, TrainedRun, summarise


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a plan is run; nothing here changes its results.

    Attributes:
        cache: store the trunk's activations at the boundary; otherwise every branch recomputes them.
        save_every: steps between checkpoints.
        log_every: steps between lines of progress.
        track: "none" or "wandb".
    """

    cache: bool = True
    save_every: int = 200
    log_every: int = 20
    track: Literal["none", "wandb"] = "none"


class Execution:
    """One plan on one corpus under one folder: `trunk()` first, then `branch(b)` for each branch, or `run_plan` for
    all.

    Args:
        root: holds `trunks/<hash>` and `branches/`.
        trunk_folder: where the trunk lies or will lie; give the same to several comparisons to share it.
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
    ) -> None:
        self.plan, self.corpus, self.config, self.root = plan, corpus, config, root
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.trunk_folder = trunk_folder or root / "trunks" / plan.trunk_hash
        size = {"batch_size": plan.batch_size, "seq_len": plan.seq_len, "device": self.device}
        self.train_tokens = TokenBatches(corpus.train.tokens, **size)
        self.valid_tokens = TokenBatches(corpus.valid.tokens, pad=True, **size)
        self._trunk: tuple[LanguageModel, RunRecord] | None = None
        self._activations: tuple[Batches, Batches] | None = None
        self._calibration: dict[int, Tensor] = {}

    def trunk(self, summary: Summarise = summarise) -> tuple[LanguageModel, RunRecord]:
        """The trained trunk, trained now or before."""
        if self._trunk is None:
            plan, folder = self.plan, self.trunk_folder
            record = open_run(folder, plan.trunk_identity, plan.corpus.content_hash)
            model = LanguageModel(plan.model).init_weights(plan.trunk_seed).to(self.device)
            if record is None:
                with locked(folder):
                    record = self._run_trunk(model, folder, summary)
            else:
                print(f"trunk {plan.trunk_hash}: finished before, taken from {folder}", flush=True)
                self._restore_trunk(model)
            model.requires_grad_(False)
            self._trunk = model, record
        return self._trunk

    def branch(self, branch: Branch, folder: Path | None = None, summary: Summarise = summarise) -> RunRecord:
        """Trains and evaluates one branch, or returns what it was found to be before."""
        plan = self.plan
        folder = folder or self.folder_of(branch)
        if (record := open_run(folder, plan.branch_identity(branch), plan.corpus.content_hash)) is not None:
            print(f"{branch.name}: finished before, taken from {folder}", flush=True)
            return record
        self.activations()
        with locked(folder):
            return self._run_branch(branch, folder, summary)

    def _run_trunk(self, model: LanguageModel, folder: Path, summary: Summarise) -> RunRecord:
        return self.finish_trunk(model, folder, self._train(None, model, self.train_tokens, folder), summary)

    def finish_trunk(
        self,
        model: LanguageModel,
        folder: Path,
        training: StageResult,
        summary: Summarise = summarise,
        label: str = "trunk",
    ) -> RunRecord:
        """Exports and evaluates a trunk whose training is over, and leaves its record."""
        plan, ledger = self.plan, Ledger()
        cost = model_cost(plan.model, length=plan.seq_len, mean_experts=training.mean_experts)
        ledger.add(
            "trunk", flops=cost.training_flops * plan.trunk.n_batches * plan.tokens_per_batch, seconds=training.seconds
        )
        return self._evaluate_and_finish(
            None, label, folder, model, self.valid_tokens, training, training.mean_experts, ledger, summary
        )

    def _run_branch(self, branch: Branch, folder: Path, summary: Summarise) -> RunRecord:
        plan = self.plan
        trunk, trunk_record = self.trunk()
        train, valid = self.activations()
        model = fork(trunk, branch)
        # A branch starts at its budget, not at the threshold its policy was born with.
        calibrated = calibrate_to_targets(model, self.calibration(branch.boundary), boundary=branch.boundary)
        training = self._train(branch, model, train, folder)
        means = tuple(trunk_record.result["trained_mean_experts"][: branch.boundary]) + training.mean_experts
        ledger, tokens = Ledger(), branch.stage.n_batches * plan.tokens_per_batch
        cost = model_cost(branch.model, length=plan.seq_len, mean_experts=means)
        flops = 3 * cost.flops(first=branch.boundary)
        if not self.config.cache:
            flops += cost.flops(last=branch.boundary, head=False)
        ledger.add(
            "branches", flops=flops * tokens + cost.flops(first=branch.boundary) * calibrated, seconds=training.seconds
        )
        return self._evaluate_and_finish(branch, branch.name, folder, model, valid, training, means, ledger, summary)

    def folder_of(self, branch: Branch) -> Path:
        return self.root / "branches" / f"{branch.method}_trunk_{self.plan.trunk_seed}_seed_{branch.seed}"

    def activations(self) -> tuple[Batches, Batches]:
        """Training and validation batches as the branches read them: tokens, stored activations, or a frozen prefix run
        each time."""
        if self._activations is None:
            trunk, _ = self.trunk()
            boundary = self.plan.branches[0].boundary if self.plan.branches else 0
            if not boundary:
                self._activations = self.train_tokens, self.valid_tokens
            elif not self.config.cache:
                self._activations = (
                    PrefixBatches(self.train_tokens, trunk, boundary),
                    PrefixBatches(self.valid_tokens, trunk, boundary),
                )
            else:
                used = tuple(sorted({int(batch) for batch in self.plan.branch_batches()}))
                every = tuple(range(len(self.valid_tokens)))
                self._activations = (
                    self._cache("train", self.train_tokens, used, boundary),
                    self._cache("valid", self.valid_tokens, every, boundary),
                )
        return self._activations

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

    def _cache(self, split: str, batches: TokenBatches, numbers: tuple[int, ...], boundary: int) -> Batches:
        trunk, record = self.trunk()
        plan, model, weights = self.plan, self.plan.model, trunk.state_dict()
        identity = CacheIdentity(
            trunk=plan.trunk_hash,
            weights=weights_hash({name: weights[name] for name in trunk.frozen_names(boundary)}),
            boundary=boundary,
            tokens=f"{split} {plan.corpus.content_hash}",
            batches=numbers,
            shape=(plan.batch_size, plan.seq_len, model.d_model),
            dtype=RESIDUAL_DTYPE,
        )
        # The name says which activations, the manifest whose: a trunk trained anew finds its old cache stale.
        folder = self.trunk_folder / "activations" / f"{split}_boundary_{boundary}_{fingerprint(numbers)[:8]}"
        computed = False

        def compute(tokens_BT: Tensor) -> Tensor:
            nonlocal computed
            computed = True
            return prefix_activations(trunk, tokens_BT, boundary)

        began = time.perf_counter()
        with locked(self.trunk_folder):
            cached = cached_activations(folder, identity, batches, compute)
        if computed:
            cost = model_cost(model, length=plan.seq_len, mean_experts=tuple(record.result["trained_mean_experts"]))
            flops = cost.flops(last=boundary, head=False) * len(numbers) * plan.tokens_per_batch
            record.ledger.add("caching", flops=flops, seconds=time.perf_counter() - began)
            record.ledger.save(self.trunk_folder)
            print(
                f"activations {split}: {len(numbers)} batches, {identity.n_bytes / 2**20:.1f} MiB in {folder}",
                flush=True,
            )
        return cached

    def _train(self, branch: Branch | None, model: LanguageModel, batches: Batches, folder: Path) -> StageResult:
        plan, config = self.plan, self.config
        if branch is None:
            label, stage, seed, boundary, order, identity = (
                "trunk",
                plan.trunk,
                plan.trunk_seed,
                0,
                plan.trunk_batches(),
                plan.trunk_identity,
            )
        else:
            label, stage, seed, boundary = branch.name, branch.stage, branch.seed, branch.boundary
            order, identity = plan.order_of(branch), plan.branch_identity(branch)
        tracker = Tracker(config.track, folder, label, identity) if config.track != "none" else None
        progress = Progress(
            label,
            n_steps=stage.n_batches,
            every=config.log_every,
            tokens_per_step=plan.tokens_per_batch,
            bytes_per_token=plan.corpus.train_bytes / plan.corpus.train_tokens,
            tracker=tracker,
        )
        try:
            return train_stage(
                model,
                batches,
                order,
                stage=stage,
                optimizer_config=plan.optimizer,
                seed=seed,
                boundary=boundary,
                folder=folder,
                identity=identity,
                save_every=config.save_every,
                progress=progress,
            )
        finally:
            if tracker is not None:
                tracker.close()

    def _evaluate_and_finish(
        self,
        branch: Branch | None,
        label: str,
        folder: Path,
        model: LanguageModel,
        valid: Batches,
        training: StageResult,
        means: tuple[float, ...],
        ledger: Ledger,
        summary: Summarise,
    ) -> RunRecord:
        plan, boundary = self.plan, branch.boundary if branch is not None else 0
        began = time.perf_counter()
        calibrated = calibrate_to_targets(model, self.calibration(boundary), boundary=boundary)
        self._export(folder, model)
        evaluation = evaluate(model, in_order(valid), n_bytes=plan.corpus.valid_bytes, boundary=boundary)
        trained = TrainedRun(
            plan=plan,
            branch=branch,
            folder=folder,
            model=model,
            valid=valid,
            evaluation=evaluation,
            training=training,
            mean_experts=means,
        )
        result = {**summary(trained), "trained_mean_experts": means} if branch is None else summary(trained)
        evaluated_means = means[:boundary] + evaluation.mean_experts
        cost = model_cost(model.config, length=plan.seq_len, mean_experts=evaluated_means)
        first = boundary if self.config.cache else 0
        flops = cost.flops(first=first) * len(valid) * plan.tokens_per_batch + cost.flops(first=boundary) * calibrated
        ledger.add("evaluation", flops=flops, seconds=time.perf_counter() - began)
        print(f"{label} valid bpb={evaluation.bits_per_byte:.4f} on {evaluation.n_bytes:,} bytes", flush=True)
        return finish_run(folder, result, ledger)

    def _export(self, folder: Path, model: LanguageModel) -> None:
        """The trained model for `python -m lm generate`, calibrated, with the text that it can be calibrated on to
        another budget."""
        save_pretrained(folder / "model", model, self.calibration(0).cpu())
        self.corpus.tokenizer.save(folder / "model" / "tokenizer.model")

    def _restore_trunk(self, model: LanguageModel) -> None:
        saved = checkpoint.load_latest(self.trunk_folder / "checkpoints")
        if saved is None or saved.step != self.plan.trunk.n_batches:
            at = "none" if saved is None else f"step {saved.step}"
            raise checkpoint.CheckpointMismatchError(
                f"{self.trunk_folder}: branches start from step {self.plan.trunk.n_batches} of the trunk, its newest"
                f" usable checkpoint is {at}"
            )
        checkpoint.refuse_other_identity(saved, self.plan.trunk_identity)
        checkpoint.restore_model(model, saved.weights, str(saved.path))


def run_plan(
    plan: Plan, corpus: PreparedCorpus, root: Path, config: ExecutionConfig, *, trunk_folder: Path | None = None
) -> list[RunRecord]:
    """Runs whatever of the plan is not finished: the trunk's record, then one per branch.

    Raises:
        loop.NonFiniteLossError, stopping.Interrupted: everything saved; the same call continues.
        record.RunMismatchError: when a folder holds another run.
    """
    execution = Execution(plan, corpus, root, config, trunk_folder=trunk_folder)
    _, trunk_record = execution.trunk()
    return [trunk_record, *(execution.branch(branch) for branch in plan.branches)]
