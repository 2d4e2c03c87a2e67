"""One stage of adaptation from its original to its record: hidden states of the original, training, export, evaluation.

Legend: B batch, T tokens.
"""

import time
from pathlib import Path

import torch
from torch import Tensor

from corpus.mixed_tokens import MixedTokens
from corpus.packing import PackedTokens
from corpus.prepare import PreparedCorpus
from corpus.sections import sections
from foundation.files import fingerprint
from foundation.serialize import to_dict
from foundation.source import code_of
from foundation.tables import write_rows
from lm.accounting import model_cost
from lm.budget import calibrate_to_targets, set_budget
from lm.evaluate import Evaluation, evaluate, evaluating
from lm.model import LanguageModel
from lm.pretrained import save_pretrained
from staged_training.activation_cache import weights_hash
from staged_training.adapt.distillation import (
    Distillation,
    TaughtBatches,
    Teacher,
    divergence_BT,
    teacher_states,
)
from staged_training.adapt.model import adapted_config, adapted_model, experts_of
from staged_training.adapt.options import AdaptConfig
from staged_training.adapt.teaching import Phases, budgets_of
from staged_training.code import CODE, code_behind
from staged_training.data import Batches, TokenBatches, in_order
from staged_training.loop import Hooks, StageResult, train_stage
from staged_training.plan import Plan
from staged_training.progress import Progress
from staged_training.record import SECTIONS, Ledger, RunRecord, SectionLoss, finish_run, locked, open_run
from staged_training.run import Run
from staged_training.staging import corpus_facts

# Added to the threshold that the stage begins with; scores, and so levels, are of the order of 0.01 to 1.
MARGIN = 1e-4


class Adaptation:
    """One original, one text, one thing taught.

    Attributes:
        plan: the text's batches and which of them no step sees.
        stage_run: the stage as the loop trains it.
    """

    def __init__(self, config: AdaptConfig, original: LanguageModel, corpus: PreparedCorpus) -> None:
        self.config, self.teach, self.original, self.corpus = config, config.teach, original, corpus
        self.device = original.embedding_VD.device
        self.k = experts_of(original.config)
        self.model_config = adapted_config(original.config, self.teach.method, self.teach.mean)
        facts, teach = corpus_facts(corpus), self.teach
        size = teach.batch_size * teach.seq_len
        n_calibration = max(1, min(-(-teach.calibration_tokens // size), facts.train_tokens // size // 20))
        self.plan = Plan(
            corpus=facts,
            model=self.model_config,
            batch_size=teach.batch_size,
            seq_len=teach.seq_len,
            n_calibration=n_calibration,
            trunk=teach.stage,
            trunk_seed=teach.seed,
            optimizer=config.optimizer,
        )
        self.train_tokens = self._batches(corpus.train)
        self.valid_tokens = self._batches(corpus.valid, pad=True)
        self.stage_run = self._run()
        self._calibration: Tensor | None = None

    def _batches(self, packed: PackedTokens | MixedTokens, *, pad: bool = False) -> TokenBatches:
        teach = self.teach
        return TokenBatches(
            packed.tokens, batch_size=teach.batch_size, seq_len=teach.seq_len, device=self.device, pad=pad
        )

    def _run(self) -> Run:
        teach = self.teach
        order = self.plan.numbers(teach.first_batch, teach.n_steps)
        code = {**code_behind(self.model_config), **code_of((__name__,))}
        identity = {
            "teach": to_dict(teach),
            "original": weights_hash(self.original.state_dict()),
            "model": to_dict(self.model_config),
            "corpus": to_dict(self.plan.corpus),
            "n_calibration": self.plan.n_calibration,
            "optimizer": to_dict(self.config.optimizer),
            CODE: code,
        }
        name = f"{teach.method}_mean_{teach.mean:g}_seed_{teach.seed}_{fingerprint(identity)[:12]}"
        return Run(
            label=f"adapt {teach.method}",
            method=teach.method,
            branch_seed=None,
            stage=teach.stage,
            optimizer=self.config.optimizer,
            seed=teach.seed,
            boundary=0,
            order=tuple(order.tolist()),
            identity=identity,
            folder=self.config.out / name,
        )

    def describe(self) -> str:
        """What will be done, for people."""
        teach, stage, config = self.teach, self.stage_run.stage, self.model_config
        cost = model_cost(config, length=teach.seq_len, mean_experts=teach.mean)
        before = model_cost(self.original.config, length=teach.seq_len, mean_experts=float(self.k))
        own = cost.total_parameters - before.total_parameters
        # In fp32.
        states = 4 * config.d_model * self.plan.tokens_per_batch * len(set(self.stage_run.order)) / 2**20
        router_steps = teach.router_steps
        rest = f", then {teach.then} in {stage.n_batches - router_steps}" if router_steps < stage.n_batches else ""
        return "\n".join(
            [
                f"adapt      {self.config.run} to {teach.method}, mean {teach.mean:g} of its {self.k} experts",
                (
                    f"  model    {config.n_layers} layers, width {config.d_model}; active parameters per token"
                    f" {before.active_parameters:,.0f} before, {cost.active_parameters:,.0f} after; {own:,} new ones"
                ),
                (
                    f"  trains   routers in {router_steps} steps{rest}; {stage.n_batches} batches of"
                    f" {teach.batch_size} x {teach.seq_len}, from position {teach.first_batch}"
                ),
                (
                    f"  budget   from {self.k} to {teach.mean:g} over {teach.ramp_steps} steps, then held"
                    if self.varies
                    else f"  budget   none: a number drawn in every step, {teach.mean:g} outside training"
                ),
                (
                    f"  loss     {1 - teach.distill_share:g} text + {teach.distill_share:g} original at temperature"
                    f" {teach.temperature:g}; its hidden states take {states:,.0f} MiB"
                    f"{'' if self.config.cache else ' and are not stored'}"
                ),
                f"  folder   {self.stage_run.folder}",
            ]
        )

    @property
    def varies(self) -> bool:
        """Whether tokens differ in their number of experts, held by a budget."""
        return self.model_config.moe.router.policy.held_mean is not None

    def run(self) -> RunRecord:
        """Teaches what is not taught yet."""
        run = self.stage_run
        if (record := open_run(run.folder, run.identity, self.plan.corpus.content_hash)) is not None:
            print(f"{run.label}: finished before, taken from {run.folder}", flush=True)
            return record
        ledger = Ledger()
        states = self._states(ledger)
        with locked(run.folder):
            teacher = Teacher(self.original)
            model = self.start()
            start_kl = self.divergence(model)
            print(f"{run.label} begins {start_kl:.5f} nats per token from its original", flush=True)
            training = train_stage(
                run,
                model,
                TaughtBatches(self.train_tokens, states),
                save_every=self.config.save_every,
                progress=self._progress(),
                objective=Distillation(teacher, share=self.teach.distill_share, temperature=self.teach.temperature),
                hooks=Hooks(
                    before_step=Phases(model, self.teach, self.k),
                    at_end=lambda: calibrate_to_targets(model, self.calibration()),
                ),
            )
            ledger.add("adaptation", flops=self._flops(training), seconds=training.seconds)
            return self._finish(model, training, ledger, start_kl)

    def start(self) -> LanguageModel:
        """The model before its first step: on the calibration text all of the original's experts are in use."""
        model = adapted_model(self.original, self.model_config)
        if self.varies:
            first = self.teach.mean_at(0, self.k)
            set_budget(model, first, self.calibration())
            for budget in budgets_of(model):
                budget.move_target(self.teach.mean, first)
                # The threshold is the highest of all levels: in another batch its slot may lie above it by rounding.
                budget.threshold += MARGIN
        return model

    def _states(self, ledger: Ledger) -> Batches:
        """What the original's last block makes of the stage's batches. Computing it counts in the ledger of every stage
        that reads it, in FLOPs; in seconds where this process had to."""
        began, cache = time.perf_counter(), self.config.out / "teachers"
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache, wait=True):
            states, n_computed = teacher_states(
                self.original,
                self.train_tokens,
                self.stage_run.order,
                text=self.plan.corpus.content_hash,
                folder=cache if self.config.cache else None,
            )
        cost = model_cost(self.original.config, length=self.teach.seq_len, mean_experts=float(self.k))
        flops = cost.flops(head=False) * self.stage_run.stage.n_batches * self.plan.tokens_per_batch
        ledger.add("caching", flops=flops, seconds=time.perf_counter() - began)
        if n_computed:
            print(f"the original's hidden states: {n_computed} batches computed, below {cache}", flush=True)
        return states

    def _progress(self) -> Progress:
        corpus = self.plan.corpus
        return Progress(
            self.stage_run.label,
            n_steps=self.stage_run.stage.n_batches,
            every=self.config.log_every,
            tokens_per_step=self.plan.tokens_per_batch,
            bytes_per_token=corpus.train_bytes / corpus.train_tokens,
        )

    def calibration(self) -> Tensor:
        """Tokens of the training text that no step sees, int64 [B, T]."""
        if self._calibration is None:
            batches = [self.train_tokens[int(number)][0] for number in self.plan.calibration_batches()]
            self._calibration = torch.cat(batches)
        return self._calibration

    @torch.no_grad()
    def divergence(self, model: LanguageModel) -> float:
        """KL(original || model) on the calibration text, nats per token."""
        nats = []
        with evaluating(model), evaluating(self.original):
            for tokens_BT in self.calibration().split(self.teach.batch_size):
                own, theirs = model(tokens_BT).logits_BTV, self.original(tokens_BT).logits_BTV
                nats.append(divergence_BT(own, theirs).double().mean())
        # Rounding may leave equal models below zero.
        return max(0.0, float(torch.stack(nats).mean()))

    def _flops(self, training: StageResult) -> float:
        """Of the steps. Behind the routers' phase all weights count as trained, in it none: gradients of activations
        are one forward more, those of weights another."""
        teach, tokens = self.teach, self.plan.tokens_per_batch
        cost = model_cost(self.model_config, length=teach.seq_len, mean_experts=training.mean_experts)
        router_steps, n_steps = teach.router_steps, teach.n_steps
        passes = 2 * router_steps + 3 * (n_steps - router_steps)
        taught = cost.head_flops * n_steps
        return (cost.flops() * passes + taught) * tokens

    def _finish(self, model: LanguageModel, training: StageResult, ledger: Ledger, start_kl: float) -> RunRecord:
        """Exports, evaluates beside the original; leaves costs and result."""
        teach, run, began = self.teach, self.stage_run, time.perf_counter()
        calibrate_to_targets(model, self.calibration())
        # Ahead of the evaluation: whatever that runs into, the adapted model is there to be used.
        save_pretrained(run.folder / "model", model, self.calibration().cpu(), self.corpus.tokenizer)
        own = self._evaluated(model, run.folder)
        before = self._evaluated(self.original)
        cut = None
        if teach.mean == int(teach.mean):
            # As it would do without being taught: the same weights, the best `mean` experts of each token.
            set_budget(self.original, teach.mean, self.calibration())
            cut = self._evaluated(self.original).bits_per_byte
            set_budget(self.original, self.k, self.calibration())
        flops = 0.0
        for config, evaluation, passes in ((self.model_config, own, 1), (self.original.config, before, 2)):
            cost = model_cost(config, length=teach.seq_len, mean_experts=evaluation.mean_experts)
            flops += cost.flops() * passes * len(self.valid_tokens) * self.plan.tokens_per_batch
        ledger.add("evaluation", flops=flops, seconds=time.perf_counter() - began)
        experts = _routed_mean(model, own)
        result = {
            "method": teach.method,
            "mean": teach.mean,
            "bits_per_byte": own.bits_per_byte,
            "mean_experts": own.mean_experts,
            "mean_experts_routed": experts,
            "original_experts": self.k,
            "original_bits_per_byte": before.bits_per_byte,
            "untaught_bits_per_byte": cut,
            "valid_tokens": own.tokens,
            "valid_bytes": own.n_bytes,
            "start_divergence": start_kl,
            "end_divergence": self.divergence(model),
            "trained_tokens": training.steps * self.plan.tokens_per_batch,
            "steps": training.steps,
            "skipped_checkpoints": training.skipped,
        }
        change = own.bits_per_byte / before.bits_per_byte - 1
        untaught = "" if cut is None else f"; untaught at {teach.mean:g} {cut:.4f}"
        print(
            f"{run.label}: {own.bits_per_byte:.4f} bits per byte at {experts:.2f} experts, the original"
            f" {before.bits_per_byte:.4f} at {self.k} ({change:+.2%}){untaught}; {run.folder}",
            flush=True,
        )
        return finish_run(run.folder, result, ledger)

    def _evaluated(self, model: LanguageModel, folder: Path | None = None) -> Evaluation:
        """On the validation text; losses by section go into `folder`."""
        parts = sections(self.corpus.valid, self.corpus.tokenizer)
        n_bytes = self.plan.corpus.valid_bytes
        evaluation = evaluate(model, in_order(self.valid_tokens), n_bytes=n_bytes, section_N=parts.section_N)
        if folder is not None:
            rows = zip(parts.document_S.tolist(), parts.n_bytes_S.tolist(), evaluation.section_nats)
            losses = (SectionLoss(document=document, n_bytes=size, nats=nats) for document, size, nats in rows)
            write_rows(folder / SECTIONS, SectionLoss, losses)
        return evaluation


def _routed_mean(model: LanguageModel, evaluation: Evaluation) -> float:
    """Experts per token in the mean of the blocks that choose."""
    means = [
        mean for router, mean in zip(model.routers(), evaluation.mean_experts, strict=True) if router.n_experts > 1
    ]
    return sum(means) / len(means)
