"""A long text through a small hybrid: the table's bytes are the cache's, and the text may be the user's."""

import csv

import pytest

from lm.__main__ import main

OPTIONS = {
    "--dtype": "float32",
    "--n-layers": 4,
    "--layer-plan": "KSLF",
    "--d-model": 32,
    "--vocab-size": 256,
    "--n-experts": 16,
    "--d-expert": 16,
    "--window": 8,
    "--threads": 1,
    "--tokens": 17000,
    "--decode-tokens": 3,
}
SMALL = [str(word) for option in OPTIONS.items() for word in option]


def test_the_table_and_the_end(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("A short text. " * 200)
    (tmp_path / "b.txt").write_text("Another one, ü. " * 100)
    table = tmp_path / "long.csv"
    main(
        [
            "long-context",
            *SMALL,
            "--data",
            str(tmp_path),
            "--tokens",
            "17000",
            "--decode-tokens",
            "3",
            "--csv",
            str(table),
        ]
    )
    rows = list(csv.DictReader(table.open()))
    assert [row["tokens"] for row in rows] == ["16384", "17000"]
    # Keys and values of 17,000 tokens in one layer of four, fp32, two heads of 32; a window and two states beside them.
    one_layer = 2 * 2 * 32 * 4 * 17000
    assert int(rows[-1]["full_attention_bytes"]) == 4 * one_layer
    assert one_layer < int(rows[-1]["cache_bytes"]) < 1.05 * one_layer
    assert float(rows[-1]["saved"]) == pytest.approx(0.75, abs=0.02)
    for row in rows:
        assert 0 < float(row["linear_seconds"]) + float(row["softmax_seconds"]) < float(row["seconds"])
    assert float(rows[-1]["decode_seconds"]) > 0
    assert "decoding behind 17,000 tokens" in capsys.readouterr().out


def test_a_recorded_table_is_drawn_again(tmp_path, capsys):
    recorded = "notes/results/cpu_speed/long_context.csv"
    drawn = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in drawn:
        main(["long-context", "--drawn-from", recorded, "--figure", str(path)])
    assert drawn[0].read_text() == drawn[1].read_text()
    assert "<svg" in drawn[0].read_text()
    for wrong, message in (
        (["--drawn-from", recorded], "without a figure"),
        (["--drawn-from", "no.csv", "--figure", str(drawn[0])], "no.csv is no file"),
    ):
        with pytest.raises(SystemExit):
            main(["long-context", *wrong])
        assert message in capsys.readouterr().err


def test_bytes_need_a_vocabulary():
    with pytest.raises(SystemExit, match=r"--vocab-size 100: must be at least 256"):
        main(["long-context", "--vocab-size", "100", "--tokens", "10"])
