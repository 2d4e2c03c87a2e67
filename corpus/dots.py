"""Generated text of which one next token needs several computations at once, as many as its difficulty says.

A document is a walk over the 256 symbols of Braille, U+2800 to U+28FF, which are the sets of eight dots: a symbol, then
`^` and the dots that change, then the symbol that this makes of it (the exclusive or of the two), and so on:

    ⡇^⠁⡆^⠗⡑...

Every answer is one symbol of eight parts, and each dot that changes is a step of its own, which depends on one part of
the symbol before and one of what is between. An easy change is of one dot, a hard one of several, so how hard a token
is is known by construction and can be read off the token before it. What changes is drawn evenly, so that nothing else
can be learnt.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from foundation.files import write_text
from foundation.numbers import check_numbers

DOTS, FIRST = 8, 0x2800
STEPS = 64


@dataclass(frozen=True, kw_only=True)
class DotsConfig:
    """Write generated walks over symbols of eight dots.

    Attributes:
        out: The .jsonl file to write; a document has a text and its domain.
        documents: How many documents of 64 changes.
        easy_share: Share of the changes that are of one dot.
        hard_dots: Dots of every other change.
        domain: What documents say that they are of, so that studies can tell easy texts from hard ones.
        seed: Seed of the walks.
    """

    out: Path
    documents: int = 4000
    easy_share: float = 0.5
    hard_dots: int = 5
    domain: str = "dots"
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, documents=1, hard_dots=1, seed=0)
        if self.hard_dots > DOTS:
            raise ValueError(f"DotsConfig.hard_dots: {self.hard_dots}, must be at most {DOTS}")
        if not 0 <= self.easy_share <= 1:
            raise ValueError(f"DotsConfig.easy_share: {self.easy_share}, must be a share, from 0 to 1")


def walk(rng: random.Random, config: DotsConfig) -> str:
    """One document."""
    symbol = rng.randrange(1 << DOTS)
    parts = [chr(FIRST + symbol)]
    for _ in range(STEPS):
        n_dots = 1 if rng.random() < config.easy_share else config.hard_dots
        change = sum(1 << dot for dot in rng.sample(range(DOTS), n_dots))
        symbol ^= change
        parts.append(f"^{chr(FIRST + change)}{chr(FIRST + symbol)}")
    return "".join(parts)


def write_dots(config: DotsConfig) -> int:
    """Writes the documents.

    Returns:
        their UTF-8 bytes.

    Raises:
        files.DiskFullError: naming the file.
    """
    rng = random.Random(f"dots/{config.seed}")
    texts = [walk(rng, config) for _ in range(config.documents)]
    lines = (json.dumps({"text": text, "domain": config.domain}, ensure_ascii=False) + "\n" for text in texts)
    write_text(config.out, "".join(lines))
    return sum(len(text.encode()) for text in texts)
