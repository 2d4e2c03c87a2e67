"""Generated text that has to be known by heart, of two difficulties that are known by construction.

A line is a question of two words and its answer. Answers never change: they are drawn once, by the seed of the world.
An easy answer follows from the first word alone, a hard one from the pair, so that a model has to store one answer per
word, or one per pair of words. Which words are of which kind is drawn with the world too. Nothing else can be learnt
from such text: the questions are drawn evenly.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from foundation.files import write_text
from foundation.numbers import check_numbers

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
LINES = 32


@dataclass(frozen=True, kw_only=True)
class FactsConfig:
    """Write generated facts to learn by heart.

    Attributes:
        out: The .jsonl file to write; a document has a text and its domain, "facts".
        documents: How many documents of 32 facts.
        words: Words that a question's first and second place are each drawn from, and answers.
        easy_share: Share of the first words whose answer does not depend on the second.
        world: Seed of the facts themselves; texts of one world agree.
        seed: Seed of the questions.
    """

    out: Path
    documents: int = 4000
    words: int = 32
    easy_share: float = 0.5
    world: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, documents=1, words=2)
        if self.words > len(CONSONANTS) * len(VOWELS) * len(CONSONANTS) // 3:
            raise ValueError(f"FactsConfig.words: {self.words}, must be at most 326: there are no more short words")
        if not 0 <= self.easy_share <= 1:
            raise ValueError(f"FactsConfig.easy_share: {self.easy_share}, must be a share, from 0 to 1")


@dataclass(frozen=True)
class World:
    """What is true: answers by first word, or by both words of a question."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    easy: dict[str, str]
    hard: dict[tuple[str, str], str]

    def answer(self, first: str, second: str) -> str:
        """The answer to a question."""
        return self.easy[first] if first in self.easy else self.hard[first, second]


def make_world(config: FactsConfig) -> World:
    """The facts of `config.world`; equal on every platform."""
    rng = random.Random(f"facts/{config.world}")
    all_words = [a + b + c for a in CONSONANTS for b in VOWELS for c in CONSONANTS]
    rng.shuffle(all_words)
    first, second, answers = (all_words[place * config.words : (place + 1) * config.words] for place in range(3))
    n_easy = round(config.easy_share * config.words)
    easy = {word: rng.choice(answers) for word in first[:n_easy]}
    hard = {(one, two): rng.choice(answers) for one in first[n_easy:] for two in second}
    return World(tuple(first), tuple(second), easy, hard)


def write_facts(config: FactsConfig) -> int:
    """Writes the documents.

    Returns:
        their UTF-8 bytes.

    Raises:
        files.DiskFullError: naming the file.
    """
    world, rng = make_world(config), random.Random(f"facts/{config.world}/{config.seed}")
    texts = []
    for _ in range(config.documents):
        lines = []
        for _ in range(LINES):
            first, second = rng.choice(world.first), rng.choice(world.second)
            lines.append(f"{first} {second} {world.answer(first, second)}\n")
        texts.append("".join(lines))
    write_text(config.out, "".join(json.dumps({"text": text, "domain": "facts"}) + "\n" for text in texts))
    return sum(map(len, texts))
