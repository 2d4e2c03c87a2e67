"""Questions for a few-shot test, made from documents that a model has not read: `python -m lm few-shot` asks them.

cloze: a stretch of text, and several sentences of which one stands next. The others come from other documents of the
same domain and are about as long, so that neither subject matter of a domain nor length gives the answer away.

final: documents whose last line is `#### answer`, as GSM8K has them: the first line is the question, the rest its
answer.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from corpus.readers import Document
from corpus.sources import read_paths
from foundation.files import write_text
from foundation.numbers import check_numbers

_SENTENCE_END = re.compile(r"[.!?。！？…]+[\"'”’」』)）]*\s*")
# Characters of a sentence that is a choice, and how many are drawn for each wrong one: the nearest in length is taken.
SHORTEST, LONGEST, DRAWN = 20, 200, 20
FINAL = "#### "


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    """Make questions for a few-shot test from documents.

    Attributes:
        data: Files and folders of documents that were held out; a document's domain is its field `domain`, or the name
            of its file.
        out: The .jsonl file to write.
        form: cloze: which sentence stands next; final: what the last line says behind ####.
        text_field: Key or column that holds the text; meta.text for one inside of another.
        choices: Sentences of a cloze, the right one among them.
        context: Characters before a cloze, at most.
        questions: Questions of each domain, at most.
        seed: Of what is drawn.
    """

    data: tuple[str, ...]
    out: Path
    form: Literal["cloze", "final"] = "cloze"
    text_field: str = "text"
    choices: int = 4
    context: int = 300
    questions: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, choices=2, context=1, questions=1, seed=0)
        if not self.data:
            raise ValueError("--data names nothing to ask about")


def write_questions(config: QuestionsConfig) -> dict[str, int]:
    """Writes the file; the same documents in any order give the same questions.

    Returns:
        how many questions of each domain.

    Raises:
        ValueError: where no document has a question in it.
    """
    domains: dict[str, list[str]] = {}
    for item in read_paths(config.data, text_field=config.text_field):
        if isinstance(item, Document):
            domains.setdefault(item.domain, []).append(item.text)
    make = clozes if config.form == "cloze" else finals
    found: dict[str, list[dict[str, Any]]] = {}
    for domain, texts in sorted(domains.items()):
        own = list(make(sorted(set(texts)), config, random.Random(f"{config.seed} {domain}")))
        if own:
            found[domain] = own[: config.questions]
    if not found:
        raise ValueError(f"--form {config.form}: no question in {sum(map(len, domains.values())):,} documents")
    records = [{**record, "domain": domain} for domain, own in found.items() for record in own]
    write_text(config.out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return {domain: len(own) for domain, own in found.items()}


def clozes(texts: Sequence[str], config: QuestionsConfig, rng: random.Random) -> Iterator[dict[str, Any]]:
    """One question of each document that has a sentence of fitting length behind its beginning; in an order that is
    drawn."""
    sentences = [(number, text[start:end].strip()) for number, text in enumerate(texts) for start, end in spans(text)]
    for number in rng.sample(range(len(texts)), len(texts)) if sentences else ():
        text = texts[number]
        places = [(start, end) for start, end in spans(text) if start > SHORTEST]
        if not places:
            continue
        start, end = rng.choice(places)
        choices = [text[start:end].strip()]
        for _ in range(config.choices - 1):
            drawn = [sentence for other, sentence in rng.choices(sentences, k=DRAWN) if other != number]
            fresh = [sentence for sentence in drawn if sentence not in choices]
            choices += sorted(fresh, key=lambda sentence: abs(len(sentence) - len(choices[0])))[:1]
        # A domain of hardly any sentences may have no others.
        if len(choices) == config.choices:
            answer = rng.randrange(config.choices)
            choices[0], choices[answer] = choices[answer], choices[0]
            prompt = text[max(start - config.context, 0) : start].strip()
            yield {"prompt": prompt, "choices": choices, "answer": answer}


def finals(texts: Sequence[str], config: QuestionsConfig, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Questions and answers as they stand; in an order that is drawn."""
    for text in rng.sample(texts, len(texts)):
        question, _, answer = text.strip().partition("\n")
        if answer.rpartition("\n")[2].startswith(FINAL) and question.strip():
            yield {"question": question.strip(), "answer": answer}


def spans(text: str) -> list[tuple[int, int]]:
    """Of the sentences that can be a choice: of one line, and neither very short nor very long."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    found = []
    for start, end in zip([0, *ends], ends):
        bare = text[start:end].strip()
        if SHORTEST <= len(bare) <= LONGEST and "\n" not in bare:
            found.append((start, end))
    return found
