"""`python -m lm eval` on tasks of a folder: what comes out is what the model says of each answer alone."""

import csv
import json
import math

import pytest
import torch

from corpus.tokenizer import Tokenizer
from lm.__main__ import main
from lm.config import ModelConfig
from lm.generate import generate
from lm.model import LanguageModel, token_losses
from lm.pretrained import save_pretrained
from lm.sampling import SamplingConfig
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra `eval`)")

QUESTIONS = [
    {"question": f"{a} plus {b} is", "choices": [str(a + b), str(a * b + 7), "no number at all"], "answer": 0}
    for a in range(2, 6)
    for b in range(3, 5)
]
SHOTS = [{"question": "1 plus 1 is", "choices": ["2", "3", "5"], "answer": 0}]
TEXTS = ["A small text, and another.\n", "Zwölf Boxkämpfer jagen Viktor quer.\n" * 40]
COMMON = "dataset_path: json\ndataset_kwargs:\n  data_files:\n"
TASKS = {
    "sums": COMMON
    + "    test: {at}/questions.jsonl\n    train: {at}/shots.jsonl\n"
    + "test_split: test\nfewshot_split: train\noutput_type: multiple_choice\n"
    + 'doc_to_text: "{{{{question}}}}"\ndoc_to_choice: "{{{{choices}}}}"\ndoc_to_target: answer\n'
    + "metric_list:\n  - metric: acc\n  - metric: acc_bytes\n",
    "texts": COMMON
    + "    test: {at}/texts.jsonl\ntest_split: test\noutput_type: loglikelihood_rolling\n"
    + 'doc_to_text: ""\ndoc_to_target: "{{{{text}}}}"\nmetric_list:\n  - metric: bits_per_byte\n',
    "answers": COMMON
    + "    test: {at}/questions.jsonl\ntest_split: test\noutput_type: generate_until\n"
    + 'doc_to_text: "{{{{question}}}}"\ndoc_to_target: "{{{{choices[0]}}}}"\n'
    + 'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 6\nmetric_list:\n  - metric: exact_match\n',
}


@pytest.fixture(scope="module")
def model():
    tokenizer = Tokenizer.train([*TEXTS, *(question["question"] for question in QUESTIONS)], 330)
    moe = MoEConfig(n_experts=4, d_expert=8, router=RouterConfig(policy=TopK(k=2)))
    model = LanguageModel(ModelConfig(vocab_size=330, d_model=16, n_layers=4, layer_plan="SGLF", moe=moe))
    model.init_weights(0)
    torch.nn.init.normal_(model.head_VD, std=0.5, generator=torch.Generator().manual_seed(0))
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def at(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    save_pretrained(folder / "model", model[0], tokenizer=model[1])
    for name, lines in (("questions", QUESTIONS), ("shots", SHOTS), ("texts", [{"text": text} for text in TEXTS])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tasks").mkdir()
    for name, content in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n" + content.format(at=folder))
    return folder


def run(at, *words):
    """The rows of the table."""
    main(["eval", "--run", str(at / "model"), "--task-folder", str(at / "tasks"), "--csv", str(at / "out.csv"), *words])
    return {(row["task"], row["metric"]): row for row in csv.DictReader((at / "out.csv").open())}


@torch.no_grad()
def log_prob(model, tokenizer, before, answer):
    """Of an answer, from one forward over all of it."""
    context = tokenizer.encode(before)
    ids = [tokenizer.boundary_id, *tokenizer.encode(before + answer)]
    first = 1 + len(context)
    logits_TV = model(torch.tensor([ids[:-1]])).logits_BTV[0].log_softmax(dim=-1)
    return sum(logits_TV[place - 1, ids[place]].item() for place in range(first, len(ids)))


@pytest.mark.parametrize(("shots", "batch_size"), [(0, 4), (1, 16)])
def test_choices_are_scored_as_each_would_be_alone(at, model, shots, batch_size, monkeypatch):
    from lm.eval_model import HarnessModel

    scored = []
    score = HarnessModel._loglikelihood_tokens

    def watched(self, requests, **options):
        found = score(self, requests, **options)
        scored.extend((*texts, value) for (texts, _, _), (value, _) in zip(requests, found))
        return found

    monkeypatch.setattr(HarnessModel, "_loglikelihood_tokens", watched)
    rows = run(at, "--tasks", "sums", "--fewshot", str(shots), "--batch-size", str(batch_size))
    assert rows["sums", "acc"]["documents"] == str(len(QUESTIONS))
    assert rows["sums", "acc"]["fewshot"] == str(shots)
    assert len(scored) == 3 * len(QUESTIONS)
    right = right_by_bytes = 0
    for question in QUESTIONS:
        own = [one for one in scored if question["question"] in one[0].split("\n")[-1]]
        assert len(own) == 3
        assert all(("1 plus 1 is" in context) == (shots == 1) for context, _, _ in own)
        values = [log_prob(*model, context, answer) for context, answer, _ in own]
        assert [value for *_, value in own] == pytest.approx(values, abs=2e-4)
        right += max(range(3), key=values.__getitem__) == question["answer"]
        # The harness puts a space ahead of every choice, and leaves it out of what it divides by.
        by_bytes = [value / len(choice.encode()) for value, choice in zip(values, question["choices"])]
        right_by_bytes += max(range(3), key=by_bytes.__getitem__) == question["answer"]
    assert float(rows["sums", "acc"]["value"]) == pytest.approx(right / len(QUESTIONS))
    assert float(rows["sums", "acc_bytes"]["value"]) == pytest.approx(right_by_bytes / len(QUESTIONS))


def test_bits_per_byte_of_whole_texts(at, model):
    rows = run(at, "--tasks", "texts")
    nats = 0.0
    for text in TEXTS:
        ids = torch.tensor([[model[1].boundary_id, *model[1].encode(text)]])
        nats += token_losses(model[0](ids[:, :-1]).logits_BTV, ids[:, 1:]).sum().item()
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert float(rows["texts", "bits_per_byte"]["value"]) == pytest.approx(nats / n_bytes / math.log(2), rel=1e-4)


def test_generated_answers_and_a_limit(at, model, monkeypatch):
    from lm.eval_model import HarnessModel

    seen = []
    answer = HarnessModel.generate_until

    def watched(self, requests, **options):
        found = answer(self, requests, **options)
        seen.extend(zip([request.args[0] for request in requests], found))
        return found

    monkeypatch.setattr(HarnessModel, "generate_until", watched)
    rows = run(at, "--tasks", "answers", "--limit", "3", "--batch-size", "2")
    assert rows["answers", "exact_match"]["documents"] == "3"
    network, tokenizer = model
    for context, found in seen:
        prompt = [tokenizer.boundary_id, *tokenizer.encode(context)]
        steps = generate(
            network, prompt, max_new_tokens=6, sampling=SamplingConfig(temperature=0), stop=tokenizer.boundary_id
        )
        assert found == tokenizer.decode([step.token for step in steps]).split("\n")[0]
    assert len(seen) == 3


def test_an_unknown_task_is_refused_with_the_nearest(at, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(at, "--tasks", "sum")
    assert "--tasks sum: not a task of" in str(stopped.value.code)
    assert "sums" in str(stopped.value.code)
