"""`python -m lm few-shot`: questions as files have them, shots, scores by likelihood, and planted answers."""

import csv
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch

from corpus.tokenizer import Tokenizer
from lm.__main__ import main
from lm.config import ModelConfig
from lm.few_shot import ACCURACY, BITS, EXACT_MATCH, PER_BYTE, FewShotConfig, few_shot
from lm.few_shot_items import Item, prompt_of, read_items, shots_of
from lm.model import LanguageModel, Output
from lm.pretrained import save_pretrained
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig

_random = random.Random(0)
WORDS = ["".join(_random.choices("abcdefghijklm", k=_random.randint(2, 6))) for _ in range(40)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    texts = [" ".join(_random.choices(WORDS, k=30)) + "\n" for _ in range(60)] + ["Question: Answer:\n"] * 5
    tokenizer = Tokenizer.train(texts, 300)
    moe = MoEConfig(n_experts=4, d_expert=8, router=RouterConfig(policy=TopK(k=2)))
    model = LanguageModel(ModelConfig(vocab_size=300, d_model=16, n_layers=2, layer_plan="SF", moe=moe)).init_weights(0)
    torch.nn.init.normal_(model.head_VD, std=0.5, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("model") / "model"
    save_pretrained(folder, model.eval(), tokenizer=tokenizer)
    return folder, model, tokenizer


@pytest.fixture
def questions(tmp_path):
    draw = random.Random(1)
    records = []
    for _ in range(12):
        choices = [" ".join(draw.sample(WORDS, draw.randint(1, 4))) for _ in range(4)]
        records.append(
            {"question": " ".join(draw.choices(WORDS, k=5)), "choices": choices, "answer": draw.randrange(4)}
        )
    return write(tmp_path / "questions.jsonl", records), records


@torch.no_grad()
def nats(model, tokenizer, prompt, answer):
    before, behind = tokenizer.encode(prompt), tokenizer.encode(" " + answer)
    tokens = torch.tensor([[tokenizer.boundary_id, *before, *behind]])
    log_p = torch.log_softmax(model(tokens[:, :-1]).logits_BTV[0].double(), dim=-1)
    return -float(log_p.gather(1, tokens[0, 1:, None])[-len(behind) :].sum())


@pytest.mark.parametrize("shots", [0, 2])
def test_choices_are_scored_by_their_likelihood(model_folder, questions, tmp_path, shots):
    folder, model, tokenizer = model_folder
    path, records = questions
    config = FewShotConfig(run=folder, files=(path,), shots=(shots,), resamples=50, answers_csv=tmp_path / "a.csv")
    rows = {row.metric: row for row in few_shot(config)}
    items = read_items(path)
    right, per_byte, total_nats, total_bytes = 0, 0, 0.0, 0
    for number, (item, record) in enumerate(zip(items, records)):
        prompt = prompt_of(item, shots_of(number, shots, 0, items, None))
        assert prompt.count("Question: ") == shots + 1
        own = [nats(model, tokenizer, prompt, choice) for choice in record["choices"]]
        right += int(np.argmin(own)) == record["answer"]
        sizes = [len(choice.encode()) for choice in record["choices"]]
        per_byte += int(np.argmin(np.array(own) / sizes)) == record["answer"]
        total_nats, total_bytes = total_nats + own[record["answer"]], total_bytes + sizes[record["answer"]]
    assert rows[ACCURACY].value == right / 12
    assert rows[PER_BYTE].value == per_byte / 12
    assert rows[BITS].value == pytest.approx(total_nats / math.log(2) / total_bytes, rel=1e-4)
    assert rows[ACCURACY].chance == 0.25
    for row in rows.values():
        assert row.low <= row.value <= row.high
    with (tmp_path / "a.csv").open() as file:
        assert sum(row["right"] == "True" for row in csv.DictReader(file)) == per_byte


class Planted(LanguageModel):
    """Knows that behind a token of the alphabet comes the next one, and nothing else."""

    def forward(self, tokens_BT, cache=None, *, last_only=False, targets_BT=None):
        output = super().forward(tokens_BT, cache, last_only=last_only, targets_BT=None)
        seen_BT = tokens_BT[:, -1:] if last_only else tokens_BT
        logits_BTV = torch.zeros_like(output.logits_BTV).scatter(-1, self.follows_V[seen_BT][..., None], 20.0)
        if targets_BT is None:
            return Output(logits_BTV, output.routings_of)
        losses = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-100, reduction="none"
        ).view_as(targets_BT)
        return Output(logits_BTV[:, :0], output.routings_of, losses.mean(), losses)


def test_planted_answers_are_found_and_wrong_ones_are_not(model_folder, tmp_path, monkeypatch, capsys):
    folder, model, tokenizer = model_folder
    planted = Planted(model.config)
    planted.load_state_dict(model.state_dict())
    (newline,) = tokenizer.encode("\n")
    planted.follows_V = torch.full((300,), newline)
    chain = tokenizer.encode(": mno")
    for token, following in itertools.pairwise(chain):
        planted.follows_V[token] = following
    monkeypatch.setattr("lm.few_shot.load_pretrained", lambda *_: planted.eval())
    right = [{"prompt": "x:", "target": "mno"}] * 3
    wrong = [{"prompt": "x:", "target": "mon"}]
    rows = few_shot(FewShotConfig(run=folder, files=(write(tmp_path / "exact.jsonl", right + wrong),), resamples=50))
    assert next((row.metric, row.value) for row in rows) == (EXACT_MATCH, 0.75)
    choices = [{"question": "x", "choices": ["mon", "mno", "omn"], "answer": "B"}] * 4
    rows = few_shot(FewShotConfig(run=folder, files=(write(tmp_path / "choice.jsonl", choices),), shots=(0, 3)))
    assert [row.value for row in rows if row.metric in (ACCURACY, PER_BYTE)] == [1.0] * 4
    assert (rows[0].low, rows[0].high) == (1.0, 1.0)
    assert "exact match" in capsys.readouterr().out


def test_long_texts_lose_their_beginning(model_folder, questions):
    folder, _, _ = model_folder
    path, _ = questions
    rows = few_shot(FewShotConfig(run=folder, files=(path,), shots=(8,), window=40, resamples=10))
    assert rows[0].cut > 0
    with pytest.raises(ValueError, match="does not fit"):
        few_shot(FewShotConfig(run=folder, files=(path,), window=2, resamples=10))


def test_formats_of_public_sets(tmp_path):
    records = [
        {"question": "q", "choices": ["a", "b"], "answer": 1},
        {"question": "q", "choices": ["a", "b"], "answer": "B"},
        {"question": "q", "choices": ["x", "b"], "answer": "b"},
        {"query": "q", "choices": ["a", "b"], "gold": 1},
        {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
    ]
    for item in read_items(write(tmp_path / "c.jsonl", records)):
        assert (item.context, item.target, item.answer) == ("Question: q\nAnswer:", "b", 1)
    records = [{"prompt": "1+1=", "target": "2"}, {"question": "q", "answer": "so it is\n#### 42"}]
    assert read_items(write(tmp_path / "e.jsonl", records)) == [
        Item("1+1=", (), 0, "2"),
        Item("Question: q\nAnswer:", (), 0, "42"),
    ]


def test_shots_never_hold_the_question_and_fewer_are_the_last_of_more():
    items = [Item(f"q{number}", (), 0, "x") for number in range(10)]
    for number in range(10):
        shots = shots_of(number, 8, 3, items, None)
        assert items[number] not in shots
        assert len({shot.context for shot in shots}) == 8
        assert shots_of(number, 3, 3, items, None) == shots[-3:]
    assert shots_of(0, 4, 3, items, None) != shots_of(0, 4, 4, items, None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "questions.jsonl:1: "),
        ("[]", "not a JSON object"),
        ("{}", "no question; legal"),
        ('{"question": "q"}', "no target"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "two texts or more"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer 2; legal: a number from 0 to 1"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "C"}', "answer 'C'"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 0}\n{"prompt": "p", "target": "t"}', "a file of one kind"),
        ("", "no questions"),
    ],
)
def test_what_is_no_question_is_named(model_folder, tmp_path, capsys, line, said):
    (tmp_path / "questions.jsonl").write_text(line)
    with pytest.raises(SystemExit) as stopped:
        main(["few-shot", "--run", str(model_folder[0]), "--files", str(tmp_path / "questions.jsonl")])
    assert said in f"{stopped.value} {capsys.readouterr().err}"


def test_more_shots_than_there_are_questions_are_refused(model_folder, questions):
    path, _ = questions
    with pytest.raises(ValueError, match="at most 8"):
        FewShotConfig(run=model_folder[0], files=(path,), shots=(9,))
    few = path.with_name("few.jsonl")
    few.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(ValueError, match="has 2 other questions"):
        few_shot(FewShotConfig(run=model_folder[0], files=(few,), shots=(4,)))
