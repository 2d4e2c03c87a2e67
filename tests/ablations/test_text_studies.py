"""What a corpus is worth and which tokenizer to take: equal tokens, equal compute, equal validation text."""

import csv
import json
import random

import pytest

from ablations.text.corpora import compare_corpora
from ablations.text.options import CorporaOptions, TokenizerOptions
from ablations.text.tokenizers import choose_tokenizer
from corpus.prepare import CorpusConfig
from lm.options import ModelOptions
from staged_training.staging import StagingConfig

MODEL = ModelOptions(
    n_layers=1, d_model=16, layer_plan="F", n_heads=2, n_kv_heads=1, head_dim=8, n_experts=4, d_expert=8, k=2
)
STAGING = StagingConfig(tokens=16 * 512, batch_size=16, seq_len=32, calibration_tokens=32, trunk_share=0.7)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Text of a small vocabulary, the same with as much noise, and held-out text without."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(30)]

    def write(name, count, noise):
        path = folder / f"{name}.jsonl"
        with path.open("w") as file:
            for number in range(count):
                noisy = number % 2 < noise
                text = "".join(draw.choices("ijklmnop ", k=300)) if noisy else " ".join(draw.choices(words, k=60))
                file.write(json.dumps({"text": text}) + "\n")
        return str(path)

    return write("raw", 60, 1), write("clean", 60, 0), write("valid", 12, 0)


def test_clean_text_is_worth_more_on_clean_text(texts, tmp_path, capsys):
    raw, clean, valid = texts
    options = CorporaOptions(
        arms=(f"raw={raw}", f"clean={clean}"),
        valid=(valid,),
        out=tmp_path,
        seeds=2,
        vocab_size=300,
        model=MODEL,
        staging=STAGING,
    )
    rows = compare_corpora(options)
    by_domain = {row.domain: row for row in rows}
    assert by_domain["micro"].difference == pytest.approx(by_domain["valid"].difference)
    assert by_domain["micro"].difference < -0.1
    assert (rows[0].arm, rows[0].against) == ("clean", "raw")
    printed = capsys.readouterr().out
    assert "evaluated on 11 documents" in printed
    with (tmp_path / "runs.csv").open() as file:
        assert {row["arm"] for row in csv.DictReader(file)} == {"raw", "clean"}
    # One tokenizer, one validation text; what is finished is not trained again.
    hashes = {json.loads(path.read_text())["tokenizer_hash"] for path in tmp_path.glob("corpus/*/manifest.json")}
    assert len(hashes) == 1
    compare_corpora(options)
    assert "step" not in capsys.readouterr().out


def test_tokenizers_are_compared_at_equal_compute(texts, tmp_path):
    raw, clean, _ = texts
    options = TokenizerOptions(
        out=tmp_path,
        vocab_sizes=(270, 400),
        train_flops=2e8,
        seeds=2,
        corpus=CorpusConfig(data=(raw, clean), valid_share=0.2),
        model=MODEL,
        staging=STAGING,
    )
    rows = choose_tokenizer(options)
    assert [row.bits_per_byte for row in rows] == sorted(row.bits_per_byte for row in rows)
    small, large = sorted(rows, key=lambda row: row.vocab_size)
    # The larger one has shorter texts and dearer tokens; both are trained for what the FLOPs pay, to a batch.
    assert large.bytes_per_token > small.bytes_per_token
    assert large.tokens < small.tokens
    for row in rows:
        assert row.flops <= 2e8 < row.flops * (1 + 512 / row.tokens) * 1.001
    assert rows[0].against_best == 0
    assert rows[1].low_against_best <= rows[1].against_best <= rows[1].high_against_best


def test_what_cannot_be_compared_is_refused(texts, tmp_path):
    raw, clean, valid = texts
    for arms in (("raw=x",), ("raw", "b=c"), ("a=b", "a=c")):
        with pytest.raises(ValueError, match="two names or more"):
            CorporaOptions(arms=arms, valid=(valid,))
    with pytest.raises(ValueError, match="two tokenizers or more"):
        TokenizerOptions(vocab_sizes=(300,))
    options = TokenizerOptions(
        out=tmp_path,
        vocab_sizes=(270, 400),
        train_flops=10,
        corpus=CorpusConfig(data=(raw, clean), valid_share=0.2),
        model=MODEL,
        staging=STAGING,
    )
    with pytest.raises(ValueError, match="less than two batches"):
        choose_tokenizer(options)
