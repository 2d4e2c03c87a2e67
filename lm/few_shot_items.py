"""Questions of a few-shot test, from JSONL files of the formats that public sets have, and the text a model reads.

    {"question": "…", "choices": ["…", "…"], "answer": 1}       also a letter, or the right choice itself
    {"question": "…", "choices": {"text": […], "label": ["A", …]}, "answerKey": "B"}        as ARC has it
    {"query": "…", "choices": ["…"], "gold": 0}
    {"prompt": "…", "target": "…"}                              an answer that is generated and must be exact
    {"question": "…", "answer": "… #### 42"}                    as GSM8K has it: what stands behind ####

A file has questions of one kind.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundation.permutations import permutation

CHOICE, EXACT = "multiple choice", "exact match"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FINAL = "####"
LEGAL = "question, choices and answer, or prompt and target"


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        context: the question as the model reads it, up to where an answer begins.
        choices: possible answers, none where it is generated.
        answer: number of the right choice; 0 without choices.
        target: the right answer.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    target: str

    @property
    def kind(self) -> str:
        return CHOICE if self.choices else EXACT


def read_items(path: Path) -> list[Item]:
    """All questions of a file.

    Raises:
        ValueError: naming file and line of what is no question, and for questions of two kinds, or none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    items: list[Item] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            items.append(_item(record))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if items[-1].kind != items[0].kind:
            raise ValueError(f"{path}:{number}: {items[-1].kind}, above it {items[0].kind}; legal: a file of one kind")
    if not items:
        raise ValueError(f"{path}: no questions; legal: one JSON object a line, with {LEGAL}")
    return items


def _item(record: Mapping[str, Any]) -> Item:
    question = next((record[name] for name in ("question", "query", "prompt") if name in record), None)
    if not isinstance(question, str) or not question:
        raise ValueError(f"no question; legal: {LEGAL}")
    context = question if "prompt" in record else f"Question: {question}\nAnswer:"
    if "choices" not in record:
        target = record.get("target", record.get("answer"))
        if not isinstance(target, str) or not target.strip():
            raise ValueError(f"no target; legal: {LEGAL}")
        return Item(context, (), 0, target.rpartition(FINAL)[2].strip())
    choices, labels = record["choices"], list(LETTERS)
    if isinstance(choices, Mapping):
        labels, choices = [str(label) for label in choices.get("label", labels)], choices.get("text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(x, str) and x for x in choices):
        raise ValueError("choices; legal: a list of two texts or more, none of them empty")
    answer = next((record[name] for name in ("answer", "answerKey", "gold", "label") if name in record), None)
    return Item(context, tuple(choices), place := _place(answer, choices, labels), choices[place])


def _place(answer: Any, choices: Sequence[str], labels: Sequence[str]) -> int:
    """The number of the right choice, from 0."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        if choices.count(answer) == 1:
            return list(choices).index(answer)
        if answer in labels[: len(choices)]:
            return list(labels).index(answer)
        if answer.isdigit() and int(answer) < len(choices):
            return int(answer)
    raise ValueError(
        f"answer {answer!r}; legal: a number from 0 to {len(choices) - 1}, a letter, or one of the choices"
    )


def joined(context: str, answer: str) -> str:
    """An answer as it stands behind its context: apart by one space, unless either brings its own."""
    return answer if context[-1:].isspace() or answer[:1].isspace() else f" {answer}"


def shots_of(number: int, n: int, seed: int, items: Sequence[Item], others: Sequence[Item] | None) -> list[Item]:
    """The solved questions that stand before question `number`: equal seed, equal ones, and fewer are the last of more.

    Args:
        others: to draw from; without them from the other questions of the file.
    """
    drawn = permutation(len(others or items), seed, number).tolist()
    if others is None:
        drawn = [place for place in drawn if place != number]
    return [(others or items)[place] for place in reversed(drawn[:n])]


def prompt_of(item: Item, shots: Sequence[Item]) -> str:
    """The shots with their answers, a blank line behind each, and the question."""
    solved = (f"{shot.context}{joined(shot.context, shot.target)}\n\n" for shot in shots)
    return f"{''.join(solved)}{item.context}"
