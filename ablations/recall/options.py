"""What the recall study can be told, and its two forms."""

import dataclasses
from pathlib import Path
from typing import Literal

from ablations.recall.associations import Segment
from attention.config import AttentionConfig
from attention.kinds import KINDS
from foundation.numbers import check_numbers
from lm.config import ModelConfig
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig
from staged_training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """What a form of the study stands for where the command line says nothing.

    Attributes:
        train, test: shapes of the texts; a batch is of one of them.
        optimizer: AdamW as published, or Muon, which takes fewer steps.
    """

    train: tuple[Segment, ...]
    test: tuple[Segment, ...]
    vocab_size: int
    widths: tuple[int, ...]
    rates: tuple[float, ...]
    steps: int
    batch_size: int
    test_rows: int
    optimizer: OptimizerConfig


FORMS = {
    # Within ten minutes on two cores that have nothing else to do.
    "small": Form(
        train=tuple(Segment(length=32, pairs=pairs) for pairs in (2, 4, 8)),
        # And twice as long a text with twice as many pairs as any of training.
        test=(*(Segment(length=32, pairs=pairs) for pairs in (2, 4, 8)), Segment(length=64, pairs=16)),
        vocab_size=96,
        widths=(32, 64),
        rates=(1e-2, 2e-2, 4e-2),
        steps=400,
        batch_size=32,
        test_rows=128,
        # AdamW has hardly begun to answer after as many steps (notes/results/recall).
        optimizer=OptimizerConfig(kind="muon", embedding_rate=10.0),
    ),
    # The settings of the published study (figure 2 of arXiv 2402.18668): 180,000 texts, 32 times, in batches of 256;
    # four rates from 1e-3 to 10^-1.5. Here every batch is drawn anew.
    "zoology": Form(
        train=(
            Segment(length=64, pairs=4, weight=5.0),
            *(Segment(length=length, pairs=pairs) for length, pairs in ((128, 8), (256, 16), (256, 32), (256, 64))),
        ),
        test=tuple(
            Segment(length=length, pairs=pairs)
            for length, pairs in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
        ),
        vocab_size=8192,
        widths=(64, 128, 256),
        rates=tuple(float(f"{10 ** (-3 + 0.5 * place):.3g}") for place in range(4)),
        steps=180_000 * 32 // 256,
        batch_size=256,
        test_rows=1000,
        optimizer=OptimizerConfig(),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallOptions:
    """How to ask what a layer plan remembers.

    Attributes:
        form: "small", or "zoology" for the settings of the published study: what every option below that is not given
            stands for.
        plans: layer plans, one letter per layer. A short convolution below the layer in question is the published
            set-up: it lets a token see the one before it, without which a layer has nothing to look up.
        widths: of the residual stream. States grow with it: a linear layer's with its square.
        rates: peak learning rates; every plan is trained at each of them, and the report shows all.
        seeds: runs of each plan, width and rate.
        steps: of a run; it ends earlier where the mean loss of a question falls below `solved`.
        batch_size: texts of a step.
        vocab_size: half of it are keys, half values.
        heads: of every layer; their width is the model's divided by it.
        window: tokens that S sees, and the softmax heads of M.
        rotary_fraction: of softmax layers; the published study has no positions.
        solved: mean loss in nats over the last steps at which a run has learnt its task.
        jobs: runs that train side by side; one per thread by default.
        out: folder of all runs.
        dry_run: print what would run, and run nothing.
        show: run nothing, and write tables and figure of what is finished.

    Raises:
        ValueError: for a number that is too small, a plan with an unknown letter, or heads that do not divide a width.
    """

    form: Literal["small", "zoology"] = "small"
    plans: tuple[str, ...] = ("CF", "CS", "CL", "CG", "CK", "CD", "CM", "GF", "SG")
    widths: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    seeds: int = 3
    steps: int | None = None
    batch_size: int | None = None
    vocab_size: int | None = None
    heads: int = 2
    window: int = 8
    rotary_fraction: float = 0.0
    solved: float = 0.02
    jobs: int = 0
    out: Path = Path("runs")
    dry_run: bool = False
    show: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, widths=1, rates=1e-12, seeds=1, steps=1, batch_size=1, vocab_size=8, heads=1, window=1)
        check_numbers(self, solved=0, jobs=0)
        if not self.plans:
            raise ValueError("RecallOptions.plans: empty, must have at least one")
        for plan in self.plans:
            if unknown := [letter for letter in plan if letter not in KINDS]:
                raise ValueError(
                    f"RecallOptions.plans: {plan!r} has the letter {unknown[0]!r}; legal: {', '.join(KINDS)}"
                )
        for width in self.tried_widths:
            if width % self.heads:
                raise ValueError(f"RecallOptions.heads: {self.heads}, must divide the width {width}")
        for segment in (*self.chosen.train, *self.chosen.test):
            segment.check(self.vocabulary)
        # Refuses what attention cannot have.
        for plan in self.plans:
            self.model(plan, self.tried_widths[0])

    @property
    def chosen(self) -> Form:
        """Of the study."""
        return FORMS[self.form]

    @property
    def tried_widths(self) -> tuple[int, ...]:
        """As given, or the form's."""
        return self.widths or self.chosen.widths

    @property
    def tried_rates(self) -> tuple[float, ...]:
        """As given, or the form's."""
        return self.rates or self.chosen.rates

    @property
    def vocabulary(self) -> int:
        """Tokens there are."""
        return self.vocab_size or self.chosen.vocab_size

    @property
    def longest(self) -> int:
        """Tokens of the longest text of the test: states are counted behind it."""
        return max(segment.length for segment in self.chosen.test)

    def model(self, plan: str, width: int) -> ModelConfig:
        """The model of a plan: its layers and nothing between them, as published. An MLP behind each only slows
        learning (notes/results/recall).

        Raises:
            ValueError: for a plan that does not parse, or attention that a layer cannot have.
        """
        return ModelConfig(
            vocab_size=self.vocabulary,
            d_model=width,
            n_layers=len(plan),
            layer_plan=plan,
            attention=AttentionConfig(
                n_heads=self.heads,
                n_kv_heads=self.heads,
                head_dim=width // self.heads,
                window=self.window,
                mixed_window=self.window,
                rotary_fraction=self.rotary_fraction,
            ),
            moe=MoEConfig(
                n_experts=1,
                d_expert=0,
                router=RouterConfig(policy=TopK(k=1), balance_coefficient=0.0, z_coefficient=0.0),
            ),
        )
