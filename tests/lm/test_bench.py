"""`python -m lm bench`: its table, and what fewer experts save."""

import pytest

from lm.__main__ import main
from lm.bench import BenchConfig, fewer_experts_text
from lm.options import ModelOptions


def config(**changes):
    return BenchConfig(model=ModelOptions(n_experts=9, d_expert=8, k=8), **changes)


def test_decoding_is_timed_with_fewer_experts_too(tmp_path, capsys):
    words = "--n-layers 2 --d-model 16 --vocab-size 50 --head-dim 8 --batch-size 2"
    csv = tmp_path / "bench.csv"
    more = f"--seq-len 9 --decode-tokens 4 --repeats 1 --experts 5 2 80 --threads 1 --csv {csv}"
    main(["bench", *f"{words} {more}".split()])
    printed = capsys.readouterr().out
    parts = [line.split(",")[0] for line in csv.read_text().replace('"', "").splitlines()[1:]]
    assert parts[:3] == ["training", "prefill", "decode"]
    for k in (5, 2, 80):
        assert f"decode, {k} experts" in printed
    assert "time per decoded token: 5 experts 1, 2 experts " in printed


def test_the_models_own_number_comes_first():
    assert config().numbers_of_experts == (8, 4, 2)
    assert config(experts=(3, 9, 3)).numbers_of_experts == (3, 9)
    with pytest.raises(ValueError, match="experts: 10, must be at most the model's 9"):
        config(experts=(10,))


def test_ratios_are_of_time():
    rows = [{"part": f"decode, {k} experts", "tokens_per_second": speed} for k, speed in ((12, "100"), (3, "250"))]
    assert fewer_experts_text(rows) == "time per decoded token: 12 experts 1, 3 experts 0.40"
