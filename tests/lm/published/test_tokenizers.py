"""Model folders with a tokenizer.json, or with a SentencePiece model: text in and out, and bits per byte, by both."""

import dataclasses
import json
import math
import re

import pytest
import torch

from corpus.byte_level_tokenizer import ByteLevelTokenizer
from corpus.tokenizer import PROBES, Tokenizer
from lm.__main__ import main
from lm.model import token_losses
from lm.pretrained import load_calibration_tokens, load_pretrained, load_tokenizer, save_pretrained
from lm.published.families import FAMILIES
from lm.published.parity import published_model

pytest.importorskip("transformers", reason="transformers is not installed (the extra `hub`)")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (the extra `hub`)")

TEXT = "The key opens the door. 钥匙打开门。 def main(argv):\n    return len(argv)\n" * 40
VOCABULARY = 320


def trained(*, normalizer=None):
    """A byte-level tokenizer with a boundary, a token of its own that is plain text, and merges of TEXT."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", special=False)])
    return tokenizer


@pytest.fixture(scope="module")
def files():
    """tokenizer.json and tokenizer_config.json."""
    return trained().to_str(), json.dumps({"bos_token": None, "eos_token": {"content": "<|end|>"}})


@pytest.fixture(scope="module", params=["tokenizer.json", "tokenizer.model"])
def folder(request, files, tmp_path_factory):
    """A model folder, imported together with a tokenizer and a text."""
    at = tmp_path_factory.mktemp("tokenized")
    family = FAMILIES["olmoe"]
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 2}
    published_model(dataclasses.replace(family, tiny={**family.tiny, **sizes}), 0).save_pretrained(at / "published")
    if request.param == "tokenizer.json":
        for name, text in zip((request.param, "tokenizer_config.json"), files):
            (at / "published" / name).write_text(text, encoding="utf-8")
    else:
        Tokenizer.train([TEXT], VOCABULARY).save(at / "published" / request.param)
    (at / "text.txt").write_text(TEXT, encoding="utf-8")
    main(["import", str(at / "published"), str(at / "model"), "--text", str(at / "text.txt")])
    return at / "model"


def test_bits_per_byte_are_those_of_the_text(folder, capsys):
    model = load_pretrained(folder)
    tokenizer = load_tokenizer(folder, model)
    ids = [tokenizer.boundary_id, *tokenizer.encode(TEXT)]
    nats = 0.0
    with torch.no_grad():
        for at in range(0, len(ids) - 1, 64):
            piece = torch.tensor([ids[at : at + 65]])
            nats += token_losses(model(piece[:, :-1]).logits_BTV, piece[:, 1:]).double().sum().item()
    main(["evaluate", "--run", str(folder), "--data", str(folder.parent / "text.txt"), "--window", "64"])
    (said,) = re.findall(r"^micro +1 +([\d,]+) +([\d.]+) ", capsys.readouterr().out, re.MULTILINE)
    assert said == (f"{len(TEXT.encode()):,}", f"{nats / math.log(2) / len(TEXT.encode()):.4f}")


def test_it_generates_text_and_runs_with_fewer_experts(folder, capsys):
    main(["generate", "--run", str(folder), "--prompt", "def main(", "--max-new-tokens", "5"])
    captured = capsys.readouterr()
    assert captured.out.startswith("def main(")
    assert "5 tokens" in captured.err
    main(["evaluate", "--run", str(folder), "--data", str(folder.parent / "text.txt"), "--experts", "1"])
    assert "1.00 experts per token" in capsys.readouterr().out
    calibration_BT = load_calibration_tokens(folder)
    assert load_tokenizer(folder, load_pretrained(folder)).decode(calibration_BT.flatten().numpy()) in TEXT


def test_what_is_exported_has_the_tokenizer_again(folder, tmp_path):
    main(["export", str(folder), str(tmp_path / "back")])
    for path in (folder.parent / "published").glob("tokenizer*"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_a_tokenizer_goes_on_with_its_model(folder, tmp_path):
    model = load_pretrained(folder)
    tokenizer = load_tokenizer(folder, model)
    save_pretrained(tmp_path / "model", model, tokenizer=tokenizer)
    assert load_tokenizer(tmp_path / "model", model).hash() == tokenizer.hash()


def test_every_text_comes_back_and_none_spells_the_boundary(files):
    tokenizer = ByteLevelTokenizer(*files)
    for text in (*PROBES, TEXT, "<think>no</think>", "<|end|>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.n_bytes_V[ids].sum() == len(text.encode())
        assert tokenizer.boundary_id not in ids
    assert len(tokenizer.encode("<think>")) == 1
    assert tokenizer.decode([tokenizer.boundary_id]) == ""
    decoder = tokenizer.stream_decoder()
    assert "".join(map(decoder.push, tokenizer.encode("钥匙"))) + decoder.flush() == "钥匙"


def test_a_normalising_tokenizer_is_taken_as_it_is(files):
    tokenizer = ByteLevelTokenizer(trained(normalizer=tokenizers.normalizers.NFC()).to_str(), files[1])
    assert tokenizer.decode(tokenizer.encode("A\u030a")) == "\u00c5"


def test_what_cannot_be_used_is_named(files, tmp_path):
    with pytest.raises(ValueError, match="no tokenizer"):
        ByteLevelTokenizer("{", files[1])
    with pytest.raises(ValueError, match="names no bos_token and no eos_token"):
        ByteLevelTokenizer(files[0], "{}")
    with pytest.raises(ValueError, match=r"\d+ tokens, the model's vocabulary has 290"):
        ByteLevelTokenizer(*files, vocab_size=290)
    other = trained()
    other.decoder = tokenizers.decoders.Metaspace()
    with pytest.raises(ValueError, match="its decoder is 'Metaspace'; legal: 'ByteLevel'"):
        ByteLevelTokenizer(other.to_str(), files[1])
    with pytest.raises(ValueError, match="lone surrogate"):
        ByteLevelTokenizer(*files).encode("\ud800")
    with pytest.raises(ValueError, match="No such file"):
        ByteLevelTokenizer.load(tmp_path / "tokenizer.json")
