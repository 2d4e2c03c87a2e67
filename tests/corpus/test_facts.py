"""Facts to learn by heart: they agree within a world, easy ones follow from one word, hard ones need both."""

import collections
import json

import pytest

from corpus.__main__ import main
from corpus.facts import FactsConfig, make_world, write_facts


def lines(path):
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return [tuple(line.split()) for text in texts for line in text.splitlines()]


def test_a_world_is_known_by_heart_and_its_two_kinds_are_what_they_say(tmp_path):
    config = FactsConfig(out=tmp_path / "facts.jsonl", documents=300, words=12, easy_share=0.25)
    assert write_facts(config) == sum(len(" ".join(line)) + 1 for line in lines(config.out))
    world, by_pair, by_first = make_world(config), {}, collections.defaultdict(set)
    for first, second, answer in lines(config.out):
        assert by_pair.setdefault((first, second), answer) == answer == world.answer(first, second)
        by_first[first].add(answer)
    assert len(by_pair) == 12 * 12
    assert {first for first, answers in by_first.items() if len(answers) == 1} == set(world.easy)
    assert len(world.easy) == 3
    # A hard word alone says hardly anything.
    assert min(len(by_first[first]) for first, _ in world.hard) >= 5


def test_texts_of_one_world_agree_and_differ(tmp_path):
    for seed in (0, 1):
        main(["facts", "--out", str(tmp_path / f"{seed}.jsonl"), "--documents", "5", "--seed", str(seed)])
    one, other = (set(lines(tmp_path / f"{seed}.jsonl")) for seed in (0, 1))
    assert one != other
    answers = collections.defaultdict(set)
    for first, second, answer in one | other:
        answers[first, second].add(answer)
    assert all(len(found) == 1 for found in answers.values())
    again = FactsConfig(out=tmp_path / "again.jsonl", documents=5)
    write_facts(again)
    assert again.out.read_bytes() == (tmp_path / "0.jsonl").read_bytes()
    other_world = make_world(FactsConfig(out=again.out, world=1))
    assert make_world(again) != other_world


def test_more_words_than_there_are_is_refused():
    with pytest.raises(ValueError, match="words: 400, must be at most 326"):
        FactsConfig(out="x.jsonl", words=400)  # type: ignore[arg-type]
