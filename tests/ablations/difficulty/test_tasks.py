"""Generated problems: the label is what it says, and the answer is right."""

import collections
import random
import re

import pytest

from ablations.difficulty.tasks import (
    DIGITS,
    TASKS,
    addition,
    carry_length,
    generate,
    read_problems,
    recall,
    word_problem,
    write_problems,
)


@pytest.mark.parametrize("seed", range(200))
def test_addition(seed):
    problem = addition(random.Random(seed))
    left, right, total = map(int, re.fullmatch(r"(\d+) \+ (\d+) = (\d+)\n", problem.text).groups())
    assert left + right == total
    assert carry_length(left, right) == problem.level
    assert len(str(left)) == len(str(right)) == len(str(total)) == DIGITS
    assert problem.text[problem.answer_start :] == f"{total}\n"


def test_carry_length_by_hand():
    assert [carry_length(*pair) for pair in ((1, 1), (5, 5), (95, 5), (999, 1), (909, 91), (55, 50))] == [
        0,
        1,
        2,
        3,
        3,
        1,
    ]


@pytest.mark.parametrize("seed", range(50))
def test_recall(seed):
    problem = recall(random.Random(seed))
    listed, asked = re.fullmatch(r"Remember: (.*)\. What is (\w+)\? \d+\n", problem.text).groups()
    values = dict(pair.split() for pair in listed.split(", "))
    assert len(values) == problem.level
    assert problem.text[problem.answer_start :] == f"{values[asked]}\n"


@pytest.mark.parametrize("seed", range(50))
def test_word_problem(seed):
    problem = word_problem(random.Random(seed))
    count = int(re.search(r"has (\d+)", problem.text)[1])
    changes = re.findall(r"(gets|gives away) (\d+)", problem.text)
    for verb, number in changes:
        count += int(number) if verb == "gets" else -int(number)
        assert count > 0
    assert len(changes) == problem.level
    assert problem.text[problem.answer_start :] == f"{count}\n"


def test_generate_is_a_function_of_its_seed_and_has_every_level(tmp_path):
    problems = generate(900, seed=3)
    assert problems == generate(900, seed=3)
    assert not {problem.text for problem in problems} & {problem.text for problem in generate(900, seed=4)}
    assert len({problem.text for problem in problems}) == 900
    assert collections.Counter(problem.task for problem in problems) == dict.fromkeys(TASKS, 300)
    assert {problem.level for problem in problems if problem.task == "addition"} == set(range(DIGITS))
    write_problems(problems, tmp_path / "problems.jsonl")
    assert list(read_problems(tmp_path / "problems.jsonl").values()) == problems
