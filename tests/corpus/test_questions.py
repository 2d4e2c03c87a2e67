"""Questions made of documents: what `lm few-shot` reads, and nothing that gives an answer away."""

import itertools
import json

import pytest

from corpus.__main__ import main
from corpus.questions import LONGEST, SHORTEST, QuestionsConfig, spans, write_questions
from lm.few_shot_items import CHOICE, EXACT, read_items
from tests.corpus.refining import chinese, english, write_jsonl

GSM = "A farmer has {n} cows and buys two.\nHow many?\nHe has {n}+2=<<{n}+2=9>>9 cows.\n#### {n}"


def records_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def data(tmp_path):
    write_jsonl(tmp_path / "data" / "prose.jsonl", english()[:40])
    write_jsonl(tmp_path / "data" / "zh.jsonl", chinese(20))
    return tmp_path / "data"


def test_one_of_the_sentences_stands_next_and_the_others_elsewhere(data, tmp_path, capsys):
    out = tmp_path / "cloze.jsonl"
    main(["questions", "--data", str(data), "--out", str(out), "--questions", "15", "--context", "80"])
    assert "zh                       15" in capsys.readouterr().out
    items, records = read_items(out), records_of(out)
    assert len(items) == 30
    texts = {"prose": english()[:40], "zh": chinese(20)}
    for item, record in zip(items, records):
        assert item.kind == CHOICE
        assert len(set(item.choices)) == 4
        assert len(item.context) <= 80
        bare = ["".join(text.split()) for text in texts[record["domain"]]]
        stretch = "".join(f"{item.context}{item.target}".split())
        assert [text for text in bare if stretch in text]
        own = next(text for text in bare if stretch in text)
        # A sentence may stand in several of the Chinese documents; the right one alone stands next.
        assert not [c for c in item.choices if c != item.target and "".join(f"{item.context}{c}".split()) in own]
        assert all(SHORTEST <= len(choice) <= LONGEST for choice in item.choices)
    assert len({item.answer for item in items}) == 4


def test_the_same_documents_give_the_same_questions(data, tmp_path):
    outs = [tmp_path / f"{number}.jsonl" for number in range(3)]
    for out, names, seed in zip(outs, (("prose", "zh"), ("zh", "prose"), ("zh", "prose")), (0, 0, 1)):
        write_questions(QuestionsConfig(data=tuple(str(data / f"{name}.jsonl") for name in names), out=out, seed=seed))
    one, same, other = (out.read_bytes() for out in outs)
    assert one == same
    assert one != other


def test_final_answers_are_those_of_the_last_lines(tmp_path):
    path = write_jsonl(tmp_path / "math.jsonl", [GSM.format(n=n) for n in range(9)] + ["no question", "#### 3"])
    counts = write_questions(QuestionsConfig(data=(str(path),), out=tmp_path / "out.jsonl", form="final"))
    assert counts == {"math": 9}
    items = read_items(tmp_path / "out.jsonl")
    assert {item.kind for item in items} == {EXACT}
    assert sorted(item.target for item in items) == [str(n) for n in range(9)]
    assert all(item.context.startswith("Question: A farmer has ") for item in items)


def test_text_without_questions_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["too short.", "a" * 100_000])
    for form in ("cloze", "final"):
        with pytest.raises(ValueError, match=f"--form {form}: no question in 2 documents"):
            write_questions(QuestionsConfig(data=(str(path),), out=tmp_path / "out.jsonl", form=form))
    assert not (tmp_path / "out.jsonl").exists()


def test_spans_are_sentences_as_they_stand():
    text = "A sentence of some length. Short! \u201cAnother one, which is long enough.\u201d  Without an end"
    found = spans(text)
    assert [text[start:end].strip() for start, end in found] == [
        "A sentence of some length.",
        "\u201cAnother one, which is long enough.\u201d",
    ]
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(found))
