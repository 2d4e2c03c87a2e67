"""Generated texts whose difficulty is known by construction: addition, recall of key-value pairs, word problems.

What is not the label is held fixed or drawn independently of it: every sum has the same number of digits, and the
asked-for pair stands anywhere.
"""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

from foundation.files import read_json_lines, write_text
from foundation.serialize import from_dict

DIGITS = 8
MOST_PAIRS, MOST_STEPS = 16, 8
NAMES = ("Ann", "Ben", "Cara", "Dan", "Eve", "Finn", "Gus", "Hana")
THINGS = ("apples", "books", "coins", "stones", "pens", "cards", "shells", "nuts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A text that ends in its answer.

    Attributes:
        task: "addition", "recall" or "word_problem".
        level: the label of difficulty: carry length, number of pairs, number of steps.
        answer_start: characters before the answer (all ASCII, so also bytes).
    """

    text: str
    task: str
    level: int
    answer_start: int


def addition(rng: random.Random) -> Problem:
    """A sum of two numbers of `DIGITS` digits with one run of carries, of length `level` in 0..DIGITS-1."""
    length = rng.randrange(DIGITS)
    # The run ends below the highest digit, so that the sum has as many digits as its terms.
    first = rng.randrange(DIGITS - length)
    pairs = []
    for place in range(DIGITS):
        carried_in = first < place <= first + length and length > 0
        carries_out = first <= place < first + length
        lowest = 1 if place == DIGITS - 1 else 0
        legal = [
            (a, b) for a in range(lowest, 10) for b in range(lowest, 10) if (a + b + carried_in >= 10) == carries_out
        ]
        pairs.append(rng.choice(legal))
    left, right = (int("".join(str(pair[side]) for pair in reversed(pairs))) for side in (0, 1))
    return _problem("addition", length, f"{left} + {right} = ", str(left + right))


def carry_length(left: int, right: int) -> int:
    """The longest run of consecutive carries in left + right."""
    longest = run = carry = 0
    while left or right:
        carry = int(left % 10 + right % 10 + carry >= 10)
        run = run + 1 if carry else 0
        longest, left, right = max(longest, run), left // 10, right // 10
    return longest


def recall(rng: random.Random) -> Problem:
    """`level` pairs of a key and a two-digit value, then one of the keys; the answer is its value."""
    n_pairs = rng.randint(1, MOST_PAIRS)
    keys: dict[str, int] = {}
    while len(keys) < n_pairs:
        keys["".join(rng.choice(letters) for letters in ("bdfgklmnprst", "aeiou", "bdfgklmnprst"))] = rng.randrange(
            10, 100
        )
    asked = rng.choice(list(keys))
    listed = ", ".join(f"{key} {value}" for key, value in keys.items())
    return _problem("recall", n_pairs, f"Remember: {listed}. What is {asked}? ", str(keys[asked]))


def word_problem(rng: random.Random) -> Problem:
    """A count that changes in `level` steps; the answer is given without working."""
    n_steps, name, thing = rng.randint(1, MOST_STEPS), rng.choice(NAMES), rng.choice(THINGS)
    count = rng.randint(2, 20)
    sentences = [f"{name} has {count} {thing}."]
    for _ in range(n_steps):
        change = rng.randint(1, 9)
        if count > change and rng.random() < 0.5:
            count -= change
            sentences.append(f"{name} gives away {change}.")
        else:
            count += change
            sentences.append(f"{name} gets {change} more.")
    return _problem("word_problem", n_steps, f"{' '.join(sentences)} How many {thing} does {name} have? ", str(count))


TASKS = {"addition": addition, "recall": recall, "word_problem": word_problem}


def generate(count: int, seed: int) -> list[Problem]:
    """Problems of all tasks in turn.

    Args:
        count: how many different ones.
        seed: equal seed, equal problems, on every platform.
    """
    rng, problems = random.Random(f"difficulty/{seed}"), {}
    makers = list(TASKS.values())
    while len(problems) < count:
        problem = makers[len(problems) % len(makers)](rng)
        problems[problem.text] = problem
    return list(problems.values())


def write_problems(problems: Sequence[Problem], path: Path) -> None:
    """One JSON object per line; the corpus reads its "text"."""
    write_text(path, "".join(json.dumps(dataclasses.asdict(problem)) + "\n" for problem in problems))


def read_problems(path: Path) -> dict[str, Problem]:
    """What `write_problems` wrote, by text."""
    problems = (from_dict(Problem, line, place=str(path)) for line in read_json_lines(path))
    return {problem.text: problem for problem in problems}


def _problem(task: str, level: int, question: str, answer: str) -> Problem:
    return Problem(text=question + answer + "\n", task=task, level=level, answer_start=len(question))
