"""`python -m lm recall`: needles are scored as a whole forward scores them, and the loss by position adds up."""

import csv
import math

import numpy as np
import pytest
import torch

from corpus.tokenizer import Tokenizer
from lm.__main__ import main
from lm.config import ModelConfig
from lm.model import LanguageModel, token_losses
from lm.pretrained import save_pretrained
from lm.recall import RecallConfig, _continuations, continuation_log_probs, recall
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig

VOCAB = 340
TEXT = "".join(
    f"Line {i}: the quick brown fox, number {i * i % 97}, jumps over {i % 13} lazy dogs.\n" for i in range(300)
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tokenizer = Tokenizer.train([TEXT], VOCAB)
    moe = MoEConfig(n_experts=4, d_expert=8, router=RouterConfig(policy=TopK(k=2)))
    model = LanguageModel(ModelConfig(vocab_size=VOCAB, d_model=16, n_layers=3, layer_plan="SGF", moe=moe))
    model.init_weights(0)
    torch.nn.init.normal_(model.head_VD, std=0.5, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("recall")
    save_pretrained(folder / "model", model.eval(), tokenizer=tokenizer)
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(name + TEXT)
    return folder, model, tokenizer


def test_endings_are_scored_as_a_whole_forward_does(trained):
    _, model, tokenizer = trained
    begun, endings = _continuations(tokenizer, "the number of Alice is", ["1", "2345", "67"])
    assert len({len(ending) for ending in endings}) > 1
    prompt = [tokenizer.boundary_id, *begun]
    scored_C = continuation_log_probs(model, prompt, endings)
    for score, ending in zip(scored_C.tolist(), endings):
        logits_TV = model(torch.tensor([[*prompt, *ending]])).logits_BTV[0].log_softmax(dim=-1)
        whole = sum(logits_TV[len(prompt) - 1 + place, token].item() for place, token in enumerate(ending))
        assert score == pytest.approx(whole, abs=2e-4)


def test_endings_begin_where_sentences_part(trained):
    _, _, tokenizer = trained
    begun, endings = _continuations(tokenizer, "x is", ["1500", "1600"])
    assert [tokenizer.decode([*begun, *ending]) for ending in endings] == ["x is 1500", "x is 1600"]
    assert endings[0][0] != endings[1][0]


def test_both_tables(trained, tmp_path, capsys):
    folder, model, tokenizer = trained
    main(
        f"recall --run {folder / 'model'} --data {folder / 'a.txt'} {folder / 'b.txt'} --lengths 100 300 --depths 0 1"
        f" --needles 2 --choices 4 --documents 2 --trained-length 150 --out {tmp_path}".split()
    )
    needles = list(csv.DictReader((tmp_path / "needles.csv").open()))
    assert [(row["length"], row["depth"]) for row in needles] == [
        (n, d) for n in ("100", "300") for d in ("0.0", "1.0")
    ]
    assert all(row["chance"] == "0.25" and 0 <= float(row["accuracy"]) <= 1 for row in needles)
    positions = list(csv.DictReader((tmp_path / "positions.csv").open()))
    ranges = [("1", "64", "0"), ("65", "128", "0"), ("129", "150", "0"), ("151", "256", "1"), ("257", "300", "1")]
    assert [(row["first"], row["last"], row["beyond"]) for row in positions] == ranges
    # By the documents' bytes in each range, the rows add up to the loss of the whole.
    nats = n_bytes = 0.0
    for name in ("a", "b"):
        ids = tokenizer.encode(name + TEXT)[:300]
        logits_BTV = model(torch.tensor([[tokenizer.boundary_id, *ids[:-1]]])).logits_BTV
        nats += token_losses(logits_BTV, torch.tensor([ids])).sum().item()
        n_bytes += len(tokenizer.decode_bytes(ids))
    shares = np.zeros(len(ranges))
    for name in ("a", "b"):
        sizes = tokenizer.n_bytes_V[tokenizer.encode(name + TEXT)[:300]]
        shares += [sizes[int(first) - 1 : int(last)].sum() for first, last, _ in ranges]
    total = sum(float(row["bits_per_byte"]) * share for row, share in zip(positions, shares))
    assert total / shares.sum() == pytest.approx(nats / n_bytes / math.log(2), rel=1e-5)
    assert "beyond the trained length" in capsys.readouterr().out


def test_the_same_seed_hides_the_same_needles(trained):
    folder, _, _ = trained
    config = RecallConfig(run=folder / "model", data=(str(folder / "a.txt"),), lengths=(100,), needles=3, depths=(0.5,))
    assert recall(config)[0] == recall(config)[0]


def test_lengths_that_no_document_has(trained):
    folder, _, _ = trained
    with pytest.raises(SystemExit) as stopped:
        main(f"recall --run {folder / 'model'} --data {folder / 'a.txt'} --lengths 90000".split())
    assert "no document has 90,000 tokens" in str(stopped.value.code)
