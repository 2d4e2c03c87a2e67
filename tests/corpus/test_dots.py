"""Walks over symbols of eight dots: every answer follows from the symbol before and the change between, as many dots
change as was asked for, and a vocabulary holds the symbols whole."""

import json
from pathlib import Path

import pytest

from corpus.__main__ import main
from corpus.dots import DOTS, FIRST, STEPS, DotsConfig, write_dots
from corpus.tokenizer import Tokenizer

NOTES = Path(__file__).parents[2] / "notes"


def texts(path, domain="dots"):
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {record["domain"] for record in records} == {domain}
    return [record["text"] for record in records]


def steps(text):
    """(before, change, after) of every step, each a set of dots as a number."""
    assert len(text) == 1 + 3 * STEPS
    before = ord(text[0]) - FIRST
    for at in range(1, len(text), 3):
        mark, change, after = text[at], ord(text[at + 1]) - FIRST, ord(text[at + 2]) - FIRST
        assert mark == "^"
        yield before, change, after
        before = after


def test_answers_follow_and_are_as_hard_as_asked(tmp_path):
    out = tmp_path / "dots.jsonl"
    words = ["--documents", "100", "--easy-share", "0.25", "--hard-dots", "6", "--domain", "six"]
    main(["dots", "--out", str(out), *words])
    found = [step for text in texts(out, "six") for step in steps(text)]
    assert all(before ^ change == after for before, change, after in found)
    assert all(0 <= symbol < 1 << DOTS for step in found for symbol in step)
    sizes = [change.bit_count() for _, change, _ in found]
    assert set(sizes) == {1, 6}
    assert sizes.count(1) / len(sizes) == pytest.approx(0.25, abs=0.03)
    # Drawn evenly: 8 changes of one dot, 28 of six.
    assert len({change for _, change, _ in found}) == 8 + 28
    assert len({after for *_, after in found}) == 1 << DOTS


def test_equal_seeds_give_equal_texts(tmp_path):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        write_dots(DotsConfig(out=tmp_path / name, documents=3, seed=seed))
    one, same, other = ((tmp_path / name).read_bytes() for name in ("one", "same", "other"))
    assert one == same != other


def test_a_vocabulary_learnt_beside_other_text_holds_the_symbols_whole(tmp_path):
    """Alone they would fill it with pairs of symbols."""
    out = tmp_path / "dots.jsonl"
    n_bytes = write_dots(DotsConfig(out=out, documents=240))
    found = texts(out)
    assert sum(len(text.encode()) for text in found) == n_bytes
    tokenizer = Tokenizer.train([*found, *(path.read_text() for path in NOTES.glob("*.md"))], 1024)
    assert all(len(ids) == 1 + 3 * STEPS for ids in tokenizer.encode_batch(found))


@pytest.mark.parametrize(("change", "said"), [({"hard_dots": 9}, "at most 8"), ({"easy_share": 2.0}, "from 0 to 1")])
def test_what_there_is_not_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        DotsConfig(out="x.jsonl", **change)  # type: ignore[arg-type]
