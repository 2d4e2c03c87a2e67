"""The table of tokenizers: counts that hold, and rules of ours and of others that are told apart."""

import csv
import io

import pytest
import sentencepiece
import tokenizers

from corpus.__main__ import main
from corpus.tokenizer_table import TokenizersConfig, compare_tokenizers
from tests.corpus.refining import chinese, english, write_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "manual.jsonl", english()[:60])
    write_jsonl(folder / "stories.jsonl", chinese(40))
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A SentencePiece model with the library's defaults, and a byte-level BPE."""
    folder = tmp_path_factory.mktemp("others")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(english()[60:120]).splitlines()),
        model_writer=model,
        vocab_size=400,
        minloglevel=2,
    )
    (folder / "defaults.model").write_bytes(model.getvalue())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*english()[60:120], "2026 2026 2026 2026"], trainer)
    bpe.save(str(folder / "bytes.json"))
    return folder / "defaults.model", folder / "bytes.json"


def test_ours_beside_others(data, others, tmp_path, capsys):
    words = ["--vocab-sizes", "400", "700", "--files", *map(str, others), "--csv", str(tmp_path / "t.csv")]
    main(["tokenizers", "--data", str(data), *words])
    assert "bytes/token" in capsys.readouterr().out
    with (tmp_path / "t.csv").open() as file:
        rows = {(row["tokenizer"], row["domain"]): row for row in csv.DictReader(file)}
    assert len(rows) == 8
    for (name, domain), row in rows.items():
        assert row["language"] == ("zh" if domain == "stories" else "other")
        assert float(row["bytes_per_token"]) == pytest.approx(int(row["bytes"]) / int(row["tokens"]), abs=1e-3)
        ours = name.startswith("ours")
        lossless = ours or name.endswith("bytes.json")
        assert (float(row["round_trip"]) == 1) == lossless, row
        assert (row["bytes_fall_back"] == "True") == lossless
        assert (row["digits_split"] == "True") >= ours
    for domain in ("manual", "stories"):
        small, large = (float(rows[f"ours {size}", domain]["bytes_per_token"]) for size in (400, 700))
        assert small < large
    # Each character of Chinese is a token or more for a vocabulary that knows no Chinese: three bytes, three tokens.
    assert float(rows[str(others[1]), "stories"]["fertility"]) > 2.5


def test_what_cannot_be_used_is_named(data, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    for files, message in (((broken,), "broken.json: not a tokenizer.json"), ((tmp_path / "x.bin",), "legal are")):
        with pytest.raises(ValueError, match=message):
            compare_tokenizers(TokenizersConfig(data=(str(data),), files=files))
    few = write_jsonl(tmp_path / "few.jsonl", ["one"])
    with pytest.raises(ValueError, match="documents to learn from"):
        compare_tokenizers(TokenizersConfig(data=(str(few),)))
