"""A published model, with the tokenizer it was published with, is taught and used like any other."""

import dataclasses
import json
import re

import pytest

from corpus.prepare import open_prepared
from lm.__main__ import main as lm
from lm.pretrained import load_pretrained, load_tokenizer
from lm.published.families import FAMILIES
from lm.published.parity import published_model
from routing.policies.null_experts import NullExperts
from staged_training.__main__ import main

pytest.importorskip("transformers", reason="transformers is not installed (the extra `hub`)")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (the extra `hub`)")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A model folder of an olmoe, whose router does not renormalise, with a byte-level tokenizer."""
    at = tmp_path_factory.mktemp("imported")
    family = FAMILIES["olmoe"]
    sizes = {"vocab_size": 320, "num_hidden_layers": 2}
    published_model(dataclasses.replace(family, tiny={**family.tiny, **sizes}), 0).save_pretrained(at / "published")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the same words again and again"], trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True)])
    (at / "published" / "tokenizer.json").write_text(tokenizer.to_str())
    (at / "published" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    lm(["import", str(at / "published"), str(at / "model")])
    return at / "model"


def test_it_begins_unchanged_and_every_command_takes_it(imported, documents, tmp_path, capsys):
    original = load_pretrained(imported)
    assert not original.config.moe.router.renormalise
    command = ["adapt", "--run", str(imported), "--out", str(tmp_path), "--data", str(documents), "--mean", "1.5"]
    main([*command, "--tokens", "256", "--batch-size", "2", "--seq-len", "16"])
    said = capsys.readouterr().out
    (begins,) = re.findall(r"begins ([\d.]+) nats per token from its original", said)
    assert float(begins) < 1e-5
    (folder,) = tmp_path.glob("zero_experts_mean_1.5_*")
    model = load_pretrained(folder / "model")
    assert all(isinstance(router.policy.config, NullExperts) for router in model.routers())
    (prepared,) = (tmp_path / "corpus").iterdir()
    assert open_prepared(prepared).tokenizer.hash() == load_tokenizer(folder / "model", model).hash()
    lm(["generate", "--run", str(folder), "--prompt", "document", "--max-new-tokens", "4"])
    text = documents / "0.txt"
    lm(["evaluate", "--run", str(folder), "--data", str(text), "--window", "32", "--experts", "2"])
    assert "2.00 experts per token" in capsys.readouterr().out
    # Found done, on the text that was prepared.
    main([*command, "--tokens", "256", "--batch-size", "2", "--seq-len", "16"])
    assert "finished before" in capsys.readouterr().out
