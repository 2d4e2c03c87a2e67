"""One run of the recall study: a small model trained on associations, then asked about others.

A run takes seconds to minutes on the small form and leaves one file, so there is nothing in between to continue from:
one that is stopped begins anew.

Legend: B rows, T tokens, V vocabulary.
"""

import dataclasses
import math
import time
from collections import deque

import numpy as np
import torch

from ablations.recall.associations import Segment, draw_batch
from lm.config import ModelConfig
from lm.evaluate import evaluating
from lm.model import IGNORED_TARGET, LanguageModel
from routing.router import NonFiniteScoresError
from staged_training.optimizer import OptimizerConfig, build_optimizer, clip_gradients, update
from staged_training.schedule import Schedule

# Of batches drawn for training; those of the test have a stream of their own.
TRAIN, TEST = 0, 1
# Steps whose mean loss says that a run has learnt its task.
SOLVED_STEPS = 20
# Logits of the test that exist at once.
MOST_LOGITS = 2**26


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallRun:
    """What a run is: everything that its numbers depend on.

    Attributes:
        plan, width: of the model.
        rate: peak learning rate; it rises over the first tenth and falls to zero over the second half.
        solved: see `RecallOptions`.
        test_rows: texts of each segment of the test, the same for every run.
    """

    plan: str
    width: int
    rate: float
    seed: int
    model: ModelConfig
    optimizer: OptimizerConfig
    train: tuple[Segment, ...]
    test: tuple[Segment, ...]
    steps: int
    batch_size: int
    solved: float
    test_rows: int

    @property
    def label(self) -> str:
        """For lines of progress."""
        return f"{self.plan} width {self.width} rate {self.rate:g} seed {self.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallResult:
    """What a run came to.

    Attributes:
        steps: done; fewer than asked for where the task was learnt before, or the loss was not finite.
        loss: nats per question in the mean of the last steps.
        accuracies: of the test's segments, in their order: the share of questions whose answer is the likeliest token.
        diverged: whether loss or scores stopped being finite; accuracies are 0 then.
        seconds: of training and test.
    """

    steps: int
    loss: float
    accuracies: tuple[float, ...]
    diverged: bool
    seconds: float

    @property
    def accuracy(self) -> float:
        """Mean over the segments: every text counts as much, however many questions it asks."""
        return sum(self.accuracies) / len(self.accuracies)


def train_run(run: RecallRun) -> RecallResult:
    """Trains a model and tests it, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    model = LanguageModel(run.model).init_weights(run.seed).to(device).train()
    optimizer = build_optimizer(model, run.optimizer, 0)
    schedule = Schedule(peak=run.rate, warmup_steps=max(1, run.steps // 10), decay_steps=run.steps // 2)
    weights = np.array([segment.weight for segment in run.train])
    recent: deque[float] = deque(maxlen=SOLVED_STEPS)
    step, diverged = 0, False
    with model.its_threads():
        while step < run.steps:
            # A step's texts depend on seed and step alone.
            generator = np.random.default_rng([TRAIN, run.seed, step])
            segment = run.train[int(generator.choice(len(weights), p=weights / weights.sum()))]
            tokens_BT, targets_BT = draw_batch(segment, run.model.vocab_size, run.batch_size, generator, held_out=False)
            try:
                output = model.run(tokens_BT.to(device), 0, targets_BT.to(device))
            except NonFiniteScoresError:
                diverged = True
                break
            # The mean of the questions, not of all tokens: clipping is by the gradient's size.
            loss = output.loss * (targets_BT.numel() / (run.batch_size * segment.pairs))
            if not math.isfinite(value := loss.item()):
                diverged = True
                break
            loss.backward()
            clip_gradients(optimizer, run.optimizer.clip)
            update(optimizer, schedule.value(step, run.steps))
            recent.append(value)
            step += 1
            if len(recent) == SOLVED_STEPS and sum(recent) / SOLVED_STEPS < run.solved:
                break
    accuracies = tuple(0.0 if diverged else accuracy(model, run, place) for place in range(len(run.test)))
    return RecallResult(
        steps=step,
        loss=sum(recent) / max(1, len(recent)),
        accuracies=accuracies,
        diverged=diverged,
        seconds=time.perf_counter() - began,
    )


@torch.no_grad()
def accuracy(model: LanguageModel, run: RecallRun, place: int) -> float:
    """The share of right answers to the questions of the test's segment `place`, whose associations training never
    shows."""
    segment = run.test[place]
    generator = np.random.default_rng([TEST, place])
    rows = max(1, min(run.test_rows, MOST_LOGITS // (segment.length * run.model.vocab_size)))
    right = asked = 0
    with evaluating(model):
        while asked < run.test_rows * segment.pairs:
            tokens_BT, targets_BT = draw_batch(
                segment,
                run.model.vocab_size,
                min(rows, run.test_rows - asked // segment.pairs),
                generator,
                held_out=True,
            )
            answers_BT = model(tokens_BT.to(model.embedding_VD.device)).logits_BTV.argmax(dim=-1).cpu()
            counted_BT = targets_BT != IGNORED_TARGET
            right += int((answers_BT == targets_BT)[counted_BT].sum())
            asked += int(counted_BT.sum())
    return right / asked
