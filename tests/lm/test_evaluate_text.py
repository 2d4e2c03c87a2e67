"""`python -m lm evaluate`: bits per byte by domain, what overlaps, and a coder whose files have the right length."""

import csv
import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corpus.compressors import ngram_bits_per_byte, xz_bits_per_byte
from corpus.contamination import overlap, overlaps
from corpus.tokenizer import Tokenizer
from lm.__main__ import main
from lm.arithmetic_coding import (
    HEADER_BYTES,
    PRECISION,
    RangeDecoder,
    RangeEncoder,
    decode_text,
    encode_text,
    intervals,
)
from lm.config import ModelConfig
from lm.evaluate_text import EvaluateConfig, Text, evaluate_documents, evaluate_text
from lm.model import LanguageModel
from lm.pretrained import save_pretrained
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig

_random = random.Random(0)
WORDS = ["".join(_random.choices("abcdefghijklm", k=_random.randint(2, 8))) for _ in range(120)]
TEXTS = [" ".join(_random.choices(WORDS, k=_random.randint(5, 60))) + "\n" for _ in range(60)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    tokenizer = Tokenizer.train(TEXTS, 300)
    moe = MoEConfig(n_experts=4, d_expert=8, router=RouterConfig(policy=TopK(k=2)))
    model = LanguageModel(ModelConfig(vocab_size=300, d_model=16, n_layers=2, layer_plan="SL", moe=moe)).init_weights(0)
    # Fresh heads are zero, which would make every token as likely as any other.
    torch.nn.init.normal_(model.head_VD, std=0.5, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("model") / "model"
    save_pretrained(folder, model.eval(), tokenizer=tokenizer)
    return folder, model, tokenizer


@pytest.fixture
def data(tmp_path):
    for name, texts in (("news", TEXTS[:30]), ("poems", TEXTS[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


@torch.no_grad()
def nats_of(model, tokenizer, text, window):
    """Token by token from the definition: windows one behind the other, each from what stands before it."""
    ids, total = [tokenizer.boundary_id, *tokenizer.encode(text)], 0.0
    for start in range(0, len(ids) - 1, window):
        piece = torch.tensor([ids[start : start + window + 1]])
        log_p = torch.log_softmax(model(piece[:, :-1]).logits_BTV[0].double(), dim=-1)
        total -= float(log_p.gather(1, piece[0, 1:, None]).sum())
    return total


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_document_costs_what_its_tokens_do(model_folder, batch_size):
    _, model, tokenizer = model_folder
    texts = [Text("x", text, tokenizer.encode(text), len(text.encode())) for text in TEXTS[:12]]
    found = evaluate_documents(
        model, tokenizer.boundary_id, texts, window=24, stride=24, batch_size=batch_size
    ).section_nats
    assert list(found) == pytest.approx([nats_of(model, tokenizer, text.text, 24) for text in texts], rel=1e-5)


def test_a_window_that_slides_over_all_is_the_whole_document(model_folder):
    _, model, tokenizer = model_folder
    texts = [Text("x", text, tokenizer.encode(text), len(text.encode())) for text in TEXTS[:6]]
    whole = evaluate_documents(model, tokenizer.boundary_id, texts, window=4096, stride=4096, batch_size=2).section_nats
    longest = max(len(text.ids) for text in texts)
    sliding = evaluate_documents(
        model, tokenizer.boundary_id, texts, window=longest, stride=3, batch_size=2
    ).section_nats
    assert list(sliding) == pytest.approx(list(whole), rel=1e-5)


def test_rows_add_up(model_folder, data, capsys, tmp_path):
    folder, _, _ = model_folder
    table = tmp_path / "table.csv"
    rows = evaluate_text(EvaluateConfig(run=folder, data=(str(data),), window=32, csv=table, resamples=200))
    news, poems, micro, macro = rows
    assert [row.domain for row in rows] == ["news", "poems", "micro", "macro"]
    assert micro.bytes == news.bytes + poems.bytes == sum(len(text.encode()) for text in TEXTS)
    assert micro.bits_per_byte * micro.bytes == pytest.approx(sum(row.bits_per_byte * row.bytes for row in rows[:2]))
    assert macro.bits_per_byte == pytest.approx((news.bits_per_byte + poems.bits_per_byte) / 2)
    assert news.xz_bits_per_byte == xz_bits_per_byte("".join(TEXTS[:30]).encode())
    assert news.ngram_bits_per_byte == ngram_bits_per_byte("".join(TEXTS[:30]).encode())
    for row in rows:
        assert row.low < row.bits_per_byte < row.high
        assert row.normalised == pytest.approx(row.bits_per_byte / row.xz_bits_per_byte, rel=0.02)
        assert row.ngram_normalised == pytest.approx(row.bits_per_byte / row.ngram_bits_per_byte, rel=0.02)
    assert "windows of 32 tokens, one behind the other" in capsys.readouterr().out
    with table.open() as file:
        assert [row["domain"] for row in csv.DictReader(file)] == ["news", "poems", "micro", "macro"]


def test_what_the_model_was_trained_on_is_named_and_left_out(model_folder, data, tmp_path):
    folder, _, _ = model_folder
    seen = tmp_path / "train" / "train.jsonl"
    seen.parent.mkdir()
    long = [number for number in range(30) if len(TEXTS[number].split()) >= 13][:4]
    seen.write_text("".join(json.dumps({"text": f"before {TEXTS[number].upper()} behind"}) + "\n" for number in long))
    files = tuple(str(data / f"{name}.jsonl") for name in ("news", "poems"))
    rows = evaluate_text(EvaluateConfig(run=folder, data=files, window=32, train_data=(str(seen),), resamples=20))
    assert [row.overlapping for row in rows] == [4, 0, 4, 4]
    assert rows[1].clean_bits_per_byte == rows[1].bits_per_byte
    kept = [TEXTS[number] for number in range(30) if number not in long]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in kept))
    without = evaluate_text(EvaluateConfig(run=folder, data=(str(tmp_path / "kept.jsonl"),), window=32, resamples=20))
    assert rows[0].clean_bits_per_byte == pytest.approx(without[0].bits_per_byte, rel=1e-5)


def test_documents_that_were_trained_on_can_be_left_out(model_folder, data, tmp_path, capsys):
    folder, _, _ = model_folder
    seen = tmp_path / "train" / "train.jsonl"
    seen.parent.mkdir()
    whole = [number for number in range(30) if len(TEXTS[number].split()) >= 30][:3]
    part = [number for number in range(30) if len(TEXTS[number].split()) >= 20 and number not in whole][:2]
    texts = [TEXTS[number] for number in whole] + [" ".join(TEXTS[number].split()[:20]) for number in part]
    seen.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = tuple(str(data / f"{name}.jsonl") for name in ("news", "poems"))
    table = tmp_path / "shared.csv"
    config = EvaluateConfig(
        run=folder, data=files, window=32, train_data=(str(seen),), resamples=20, contamination_csv=table
    )
    news, *_ = evaluate_text(config)
    assert (news.overlapping, news.overlapping_30, news.removed) == (5, 3, 0)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(TEXTS)
    shared = {row["document"].rpartition(":")[2]: row for row in rows if row["domain"] == "news"}
    assert all(shared[str(number + 1)]["shared_30"] == shared[str(number + 1)]["ngrams_30"] for number in whole)
    assert sum(int(row["shared"]) > 0 for row in rows) == 5
    for n, removed in ((13, 5), (30, 3)):
        without, _, total, _ = evaluate_text(dataclasses.replace(config, remove_contaminated=n))
        assert (without.documents, without.removed, total.removed) == (30 - removed, removed, removed)
        expected = news.clean_bits_per_byte if n == 13 else news.clean_bits_per_byte_30
        assert without.bits_per_byte == pytest.approx(expected, rel=1e-5)
        assert f"{removed} removed" in capsys.readouterr().out


def test_what_leaves_nothing_is_refused(model_folder, data):
    folder, _, _ = model_folder
    long = [text for text in TEXTS[:30] if len(text.split()) >= 13]
    (data / "only.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in long))
    only = (str(data / "only.jsonl"),)
    with pytest.raises(ValueError, match="nothing is left to evaluate"):
        evaluate_text(EvaluateConfig(run=folder, data=only, train_data=only, remove_contaminated=13))
    with pytest.raises(ValueError, match="with --train-data only"):
        EvaluateConfig(run=folder, data=only, remove_contaminated=30)


def test_overlap_counts_ngrams():
    words = [f"w{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(60)]
    held_out = [" ".join(words[:30]), " ".join(words[30:]), " ".join(words[:12])]
    found = overlap(held_out, [" ".join(words[5:25]), "other words"])
    assert found.ngrams_D.tolist() == [18, 18, 0]
    assert found.shared_D.tolist() == [8, 0, 0]
    assert found.touched_D.tolist() == [True, False, False]
    both = overlaps(held_out, [" ".join(words[:25]), " ".join(words[3:60])], (13, 20))
    assert both[13].shared_D.tolist() == [18, 18, 0]
    assert both[20].shared_D.tolist() == [11, 11, 0]


@given(
    sizes=st.lists(st.integers(1, 1 << 31), min_size=2, max_size=20),
    seed=st.integers(0, 1000),
    n=st.integers(0, 300),
)
def test_the_range_coder_gives_back_what_it_got(sizes, seed, n):
    total = sum(sizes)
    scaled = [max(size * ((1 << PRECISION) - len(sizes)) // total, 1) for size in sizes]
    scaled[0] += (1 << PRECISION) - sum(scaled)
    starts = np.concatenate(([0], np.cumsum(scaled))).tolist()
    symbols = random.Random(seed).choices(range(len(sizes)), scaled, k=n)
    encoder = RangeEncoder()
    for symbol in symbols:
        encoder.encode(starts[symbol], scaled[symbol])
    code = encoder.finish()
    decoder = RangeDecoder(code)
    for symbol in symbols:
        found = int(np.searchsorted(starts, decoder.target(), side="right")) - 1
        assert found == symbol
        decoder.decode(starts[symbol], scaled[symbol])
    bits = sum(PRECISION - math.log2(scaled[symbol]) for symbol in symbols)
    assert 8 * len(code) <= bits + 0.001 * n + 16


def test_every_token_has_an_interval():
    starts = intervals(torch.tensor([0.0, -1e4, 50.0, float("-inf")]))
    assert starts[0] == 0
    assert starts[-1] == 1 << PRECISION
    assert (np.diff(starts) >= 1).all()


def test_the_code_is_as_long_as_its_bits_and_decodes(model_folder, tmp_path, capsys):
    folder, model, tokenizer = model_folder
    text = "".join(TEXTS[:12]) + "\u4f60\u597d \U0001f600 \u2581\r\n\0"
    code, bits = encode_text(model, tokenizer, text, window=64)
    # To the byte that a number of bits is rounded up to.
    assert abs(8 * (len(code) - HEADER_BYTES) - bits) <= 0.001 * bits + 8
    # What the evaluation says of the same windows.
    windows = nats_in_fresh_windows(model, tokenizer, text, 64)
    assert bits == pytest.approx(windows / math.log(2), rel=1e-4)
    assert decode_text(model, tokenizer, code) == text
    with pytest.raises(ValueError, match="does not give the text back"):
        decode_text(model, tokenizer, code[:-40] + bytes(40))
    with pytest.raises(ValueError, match="not a text coded"):
        decode_text(model, tokenizer, b"GIF89a")
    file = tmp_path / "some.txt"
    file.write_text("".join(TEXTS[:3]))
    main(["evaluate", "--run", str(folder), "--code", str(file), "--window", "64"])
    assert "decoded bit for bit" in capsys.readouterr().out
    assert (tmp_path / "some.txt.lmac").stat().st_size < file.stat().st_size * 2


@torch.no_grad()
def nats_in_fresh_windows(model, tokenizer, text, window):
    ids, total = tokenizer.encode(text), 0.0
    for start in range(0, len(ids), window):
        piece = torch.tensor([[tokenizer.boundary_id, *ids[start : start + window]]])
        log_p = torch.log_softmax(model(piece[:, :-1]).logits_BTV[0].double(), dim=-1)
        total -= float(log_p.gather(1, piece[0, 1:, None]).sum())
    return total


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 64}, "stride: 64, must be at most the window, 32"),
        ({"data": ()}, "--data: nothing to evaluate"),
        ({"resamples": 0}, "resamples: 0, must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**{"run": "x", "data": ("y",), "window": 32, **changes})
