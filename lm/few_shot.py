"""`python -m lm few-shot`: questions from files, with solved ones before them, by the likelihoods of the model.

A choice is scored by log p of its tokens behind the question; the accuracy of the likeliest, and of the likeliest per
UTF-8 byte, which long choices do not lose by their length. An exact answer is what greedy decoding gives up to the end
of the line. Beside both stand the bits per byte of the right answers, which say more than right and wrong where a model
is small. Intervals are percentiles over resampled questions.

Legend: I questions, R resamples.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from corpus.tokenizer import Tokenizer
from foundation.command import refuse_unwritable
from foundation.numbers import check_numbers
from foundation.tables import write_rows
from lm.evaluate import evaluate
from lm.evaluate_text import window_batches
from lm.few_shot_items import CHOICE, Item, joined, prompt_of, read_items, shots_of
from lm.generate import generate_batch
from lm.model import LanguageModel
from lm.pretrained import find_model, load_pretrained, load_tokenizer
from lm.sampling import SamplingConfig, StopStrings

MOST_SHOTS = 8
ACCURACY, PER_BYTE, EXACT_MATCH, BITS = "accuracy", "accuracy per byte", "exact match", "bits per byte"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotConfig:
    """Answers of a model to questions from JSONL files, with solved questions before each.

    Attributes:
        run: folder of a trained model, or of the run that trained it.
        files: questions: question, choices and answer, or prompt and target; a file is a task.
        shots: solved questions before each, 0 to 8; several numbers are several rows.
        shots_file: where they are drawn from; from the other questions of the file unless told.
        window: tokens that the model sees; of longer texts the beginning is cut.
        max_new_tokens: of an exact answer.
        batch_size: texts at once.
        resamples: of the questions, for the intervals.
        seed: of the shots and the resamples.
        csv: file for the table.
        answers_csv: file for every question's answer.
    """

    run: Path
    files: tuple[Path, ...]
    shots: tuple[int, ...] = (0,)
    shots_file: Path | None = None
    window: int = 2048
    max_new_tokens: int = 64
    batch_size: int = 8
    resamples: int = 1000
    seed: int = 0
    csv: Path | None = None
    answers_csv: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self, shots=0, window=2, max_new_tokens=1, batch_size=1, resamples=1, seed=0)
        if not self.files or not self.shots:
            raise ValueError("--files, --shots: at least one of each is needed")
        if max(self.shots) > MOST_SHOTS:
            raise ValueError(f"FewShotConfig.shots: {self.shots}, must be at most {MOST_SHOTS}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotRow:
    """One measure of one task.

    Attributes:
        low, high: 95 % interval over the questions.
        chance: what guessing gives; None for a measure that guessing has no value of.
        cut: texts whose beginning did not fit the window.
    """

    task: str
    shots: int
    questions: int
    metric: str
    value: float
    low: float
    high: float
    chance: float | None
    cut: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """What the model says to one question.

    Attributes:
        answer: the likeliest choice per byte, or what was generated.
        nats: of the right answer.
        n_bytes: of the right answer, UTF-8.
    """

    task: str
    shots: int
    question: int
    answer: str
    target: str
    right: bool
    nats: float
    n_bytes: int


def few_shot(config: FewShotConfig) -> list[FewShotRow]:
    """Asks, prints the table, and returns its rows.

    Raises:
        ValueError: for files that hold no questions, too few of them to draw shots from, or a model that is none.
    """
    for option, path in (("--csv", config.csv), ("--answers-csv", config.answers_csv)):
        refuse_unwritable(option, path)
    tasks = {str(path): read_items(path) for path in config.files}
    others = None if config.shots_file is None else read_items(config.shots_file)
    for name, items in tasks.items():
        enough = len(items) - 1 if others is None else len(others)
        if max(config.shots) > enough:
            raise ValueError(
                f"--shots {max(config.shots)}: {name} has {enough} other questions; legal: at most as many"
            )
        if others is not None and others[0].kind != items[0].kind:
            raise ValueError(f"--shots-file {config.shots_file}: {others[0].kind}, but {name} is {items[0].kind}")
    folder = find_model(config.run)
    model = load_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu")
    asked = Asked(model, load_tokenizer(folder, model), config)
    rows: list[FewShotRow] = []
    answers: list[AnswerRow] = []
    for name, items in tasks.items():
        for shots in config.shots:
            solved = [shots_of(number, shots, config.seed, items, others) for number in range(len(items))]
            prompts = [prompt_of(item, before) for item, before in zip(items, solved)]
            found, own = asked.task(Path(name).stem, shots, items, prompts)
            rows, answers = rows + found, answers + own
    print(table(rows))
    if config.csv is not None:
        write_rows(config.csv, FewShotRow, rows)
    if config.answers_csv is not None:
        write_rows(config.answers_csv, AnswerRow, answers)
    return rows


class Asked:
    """A model that is asked."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, config: FewShotConfig) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config

    def task(
        self, name: str, shots: int, items: Sequence[Item], prompts: Sequence[str]
    ) -> tuple[list[FewShotRow], list[AnswerRow]]:
        """The rows of one task with one number of shots, and the answers."""
        choices = [item.choices or (item.target,) for item in items]
        nats, cut = self.nats(prompts, choices)
        n_bytes = [[len(choice.encode()) for choice in own] for own in choices]
        right_nats = np.array([own[item.answer] for own, item in zip(nats, items)])
        right_bytes = np.array([own[item.answer] for own, item in zip(n_bytes, items)])
        measures: list[tuple[str, np.ndarray, float | None]] = []
        if items[0].kind == CHOICE:
            likeliest = [int(np.argmin(own)) for own in nats]
            per_byte = [int(np.argmin(np.array(own) / size)) for own, size in zip(nats, n_bytes)]
            chance = float(np.mean([1 / len(own) for own in choices]))
            for metric, chosen in ((ACCURACY, likeliest), (PER_BYTE, per_byte)):
                measures.append((metric, _equal(chosen, [item.answer for item in items]), chance))
            said = [own[place] for own, place in zip(choices, per_byte)]
        else:
            said = self.generated(prompts)
            measures.append((EXACT_MATCH, _equal(said, [item.target for item in items]), None))
        rows = [self._row((name, shots, cut), measure) for measure in measures]
        rows.append(self._row((name, shots, cut), (BITS, right_nats / math.log(2), None), right_bytes))
        answers = [
            AnswerRow(
                task=name,
                shots=shots,
                question=number,
                answer=answer,
                target=item.target,
                right=answer == item.target,
                nats=float(right_nats[number]),
                n_bytes=int(right_bytes[number]),
            )
            for number, (item, answer) in enumerate(zip(items, said))
        ]
        return rows, answers

    def nats(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> tuple[list[list[float]], int]:
        """-log p of every choice behind its prompt, and how many texts were cut."""
        windows: list[tuple[int, list[int], int]] = []
        cut = 0
        for prompt, own in zip(prompts, choices):
            before = [self.tokenizer.boundary_id, *self.tokenizer.encode(prompt)]
            for choice in own:
                answer = self.tokenizer.encode(joined(prompt, choice))
                if len(answer) > self.config.window:
                    raise ValueError(
                        f"--window {self.config.window}: an answer of {len(answer)} tokens does not fit it"
                    )
                tokens = [*before, *answer]
                cut += len(tokens) > self.config.window + 1
                windows.append((len(windows), tokens[-(self.config.window + 1) :], len(answer)))
        # Windows of one length together: little padding.
        ordered = sorted(windows, key=lambda one: -len(one[1]))
        section_N = np.concatenate([np.full(counted, number) for number, _, counted in ordered])
        batches = window_batches(ordered, self.config.batch_size, self.model.embedding_VD.device)
        found = iter(evaluate(self.model, batches, n_bytes=1, section_N=section_N).section_nats)
        return [[next(found) for _ in own] for own in choices], cut

    def generated(self, prompts: Sequence[str]) -> list[str]:
        """What the model says behind each prompt, up to the end of the line."""
        found: list[str] = []
        for first in range(0, len(prompts), self.config.batch_size):
            found += self._generated(prompts[first : first + self.config.batch_size])
        return found

    def _generated(self, prompts: Sequence[str]) -> list[str]:
        # What the first space costs is the answer's: a prompt ends in front of it.
        stops = [StopStrings(("\n",)) for _ in prompts]
        decoders = [self.tokenizer.stream_decoder() for _ in prompts]
        texts = [""] * len(prompts)
        contexts = [[self.tokenizer.boundary_id, *self.tokenizer.encode(prompt)] for prompt in prompts]
        most = self.config.window - self.config.max_new_tokens
        for step in generate_batch(
            self.model,
            [context[-max(most, 1) :] for context in contexts],
            max_new_tokens=self.config.max_new_tokens,
            sampling=SamplingConfig(temperature=0.0),
            stop=self.tokenizer.boundary_id,
            ends=lambda text, _: stops[text].stopped,
        ):
            texts[step.text] += stops[step.text].push(decoders[step.text].push(step.token))
        return [
            (text + stop.push(decoder.flush()) + stop.flush()).strip()
            for text, stop, decoder in zip(texts, stops, decoders)
        ]

    def _row(
        self,
        place: tuple[str, int, int],
        measure: tuple[str, np.ndarray, float | None],
        weight_I: np.ndarray | None = None,
    ) -> FewShotRow:
        """A mean over the questions, or a ratio of sums, with its interval."""
        (name, shots, cut), (metric, value_I, chance) = place, measure
        weight_I = np.ones(len(value_I)) if weight_I is None else weight_I
        drawn_RI = np.random.default_rng(self.config.seed).integers(
            len(value_I), size=(self.config.resamples, len(value_I))
        )
        resampled_R = value_I[drawn_RI].sum(axis=1) / weight_I[drawn_RI].sum(axis=1)
        low, high = np.quantile(resampled_R, (0.025, 0.975)).tolist()
        return FewShotRow(
            task=name,
            shots=shots,
            questions=len(value_I),
            metric=metric,
            value=float(value_I.sum() / weight_I.sum()),
            low=low,
            high=high,
            chance=chance,
            cut=cut,
        )


def _equal(found: Sequence[object], right: Sequence[object]) -> np.ndarray:
    return np.array([a == b for a, b in zip(found, right)], dtype=np.float64)


def table(rows: Sequence[FewShotRow]) -> str:
    """One line per task, shots and measure."""
    lines = [f"{'task':<24} {'shots':>5} {'questions':>9} {'measure':<18} {'value, 95 %':>26} {'chance':>7}"]
    for row in rows:
        value = f"{row.value:.4f} [{row.low:.4f}, {row.high:.4f}]"
        chance = "" if row.chance is None else f"{row.chance:.4f}"
        cut = f"  {row.cut:,} texts cut" if row.cut else ""
        lines.append(
            f"{row.task[:24]:<24} {row.shots:>5} {row.questions:>9,} {row.metric:<18} {value:>26} {chance:>7}{cut}"
        )
    return "\n".join(lines)
