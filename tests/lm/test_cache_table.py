"""`python -m lm cache`: its numbers are the real objects' and the published ones."""

import csv
import re
from xml.etree import ElementTree

import pytest
import torch

from attention import AttentionConfig, HybridCache
from attention.kinds import KINDS
from lm.__main__ import main
from lm.accounting import kv_bytes
from lm.cache_table import PlanCost, cheaper_from, pattern_of, tokens_of
from lm.config import ModelConfig
from lm.model import LanguageModel
from lm.pretrained import save_pretrained
from lm.published_caches import PUBLISHED
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig

SMALL = ("--n-heads", "4", "--n-kv-heads", "2", "--head-dim", "8")
BY_NAME = {model.name: model for model in PUBLISHED}


def test_published_numbers_come_out_of_the_formulas():
    assert 100 * BY_NAME["Yi-Lightning"].saved() == 82.8125
    jamba = BY_NAME["Jamba"].sized
    assert jamba.bytes(2**18) / 2**30 == pytest.approx(4.0, abs=0.02)
    # The four attention layers alone: what the report counts.
    assert jamba.bytes(2**18) - jamba.bytes(0) == 4 * 2**30
    deepseek = BY_NAME["DeepSeek-V2"]
    assert 100 * deepseek.saved() == pytest.approx(93.3, abs=0.05)
    # Table 9 of the report: 34.6 K numbers per token, where multi-head attention has 860.2 K in a model of its size.
    assert deepseek.sized.bytes(1) * 8 / 6 == 34_560
    assert 74.8 < 100 * BY_NAME["Kimi Linear"].saved() < 75
    growing = [BY_NAME["Kimi Linear"].sized.bytes(n) for n in (2**20, 2**20 + 1)]
    reference = BY_NAME["Kimi Linear"].reference.bytes(1)
    assert growing[1] - growing[0] == reference / 4


def test_the_published_table_is_printed(capsys):
    main(["cache", "--published"])
    said = capsys.readouterr().out
    for text in ("82.8125 %", "4.015 GiB", "93.3388 %", "74.8652 %", *(model.source for model in PUBLISHED)):
        assert text in said


def test_yi_lightnings_plan(capsys):
    main(["cache", "--layer-plan", "SSSFSSSR", "--length", "64k"])
    said = capsys.readouterr().out
    assert "saved 82.8125 %" in said
    assert re.search(r"^S +6 +0 .* 4,097 tokens$", said, re.MULTILINE)
    assert re.search(r"^F +1 +4,096 +268,435,456 +72.7% +268,435,456$", said, re.MULTILINE)
    assert re.search(r"^R +1 +0 +0 +0.0% +268,435,456  the first token$", said, re.MULTILINE)
    assert "a HybridCache of this size holds 369,098,752 bytes" in said


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("pattern", [*((kind.reads or "") + letter for letter, kind in KINDS.items()), "SrGLKFRADCM"])
def test_rows_are_the_bytes_of_real_caches(tmp_path, pattern, dtype, capsys):
    path = tmp_path / "cache.csv"
    main(
        [
            "cache",
            "--layer-plan",
            pattern,
            "--length",
            "700",
            "--dtype",
            dtype,
            "--batch-size",
            "2",
            "--csv",
            str(path),
            *SMALL,
        ]
    )
    rows = list(csv.DictReader(path.open()))
    assert [int(row["tokens"]) for row in rows] == [256, 512, 700]
    config = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, window=4096)
    model = ModelConfig(n_layers=len(pattern), layer_plan=pattern, attention=config, dtype=dtype)
    for row in rows:
        assert (row["plan"], row["layers"]) == (pattern, str(len(pattern)))
        length = int(row["tokens"])
        cache = HybridCache(model.attentions, model.plan, 2, length, getattr(torch, dtype))
        assert int(row["cache_bytes"]) == cache.nbytes() == 2 * kv_bytes(model, length)
        longer = HybridCache(model.attentions, model.plan, 2, length + 1, getattr(torch, dtype))
        assert int(row["bytes_per_token"]) == longer.nbytes() - cache.nbytes()
        full = 2 * 2 * 2 * 8 * length * getattr(torch, dtype).itemsize * len(pattern)
        assert int(row["full_attention_bytes"]) == full
        assert float(row["saved"]) == pytest.approx(1 - cache.nbytes() / full)
    assert f"holds {cache.nbytes():,} bytes" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_eight_bits_and_what_they_change(tmp_path, capsys, name):
    main(["cache", "--layer-plan", "SSSFSSSR", "--length", "64k", "--eight-bits", name])
    said = capsys.readouterr().out
    # 128 numbers and a scale in fp32 where bf16 takes 256 bytes.
    assert re.search(r"^F +1 +2,112 +138,412,032 ", said, re.MULTILINE)
    assert f"holds {369_098_752 * 132 // 256:,} bytes" in said
    attention = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, window=16)
    moe = MoEConfig(n_experts=4, d_expert=8, router=RouterConfig(policy=TopK(k=2)))
    config = ModelConfig(vocab_size=60, d_model=32, n_layers=2, layer_plan="SF", attention=attention, moe=moe)
    tokens_BT = torch.randint(60, (16, 33), generator=torch.Generator().manual_seed(0))
    save_pretrained(tmp_path / "model", LanguageModel(config).init_weights(0), tokens_BT)
    main(["cache", "--run", str(tmp_path), "--length", "1k", "--eight-bits", name])
    assert re.search(
        rf"in {name}, on 256 tokens of .* bits per token beside \d\.\d+, divergence", capsys.readouterr().out
    )


@pytest.mark.parametrize("letter", [letter for letter, kind in KINDS.items() if kind.reads is None and letter != "F"])
def test_a_kind_is_cheaper_from_there_on_and_not_before(letter):
    config = AttentionConfig(n_heads=8, n_kv_heads=4, head_dim=16, window=100, mixed_window=30)
    model = ModelConfig(n_layers=1, layer_plan=letter, attention=config)
    cost = PlanCost(model.plan, model.attentions, 1, torch.bfloat16)

    def full(length):
        return sum(cost.full_by_layer(length))

    length = cheaper_from(cost.total, full)
    assert length is not None
    assert cost.total(length) < full(length)
    assert length == 1 or cost.total(length - 1) >= full(length - 1)
    assert all(cost.total(length + more) < full(length + more) for more in (1, 50, 10_000))


def test_a_kind_that_is_never_cheaper():
    config = AttentionConfig(n_heads=8, n_kv_heads=1, head_dim=16)
    cost = PlanCost(ModelConfig(n_layers=1, layer_plan="A").plan, [config], 1, torch.bfloat16)
    assert cheaper_from(cost.total, lambda length: sum(cost.full_by_layer(length))) is None


def test_by_hand_where_a_linear_layer_begins_to_save():
    """4 H K V bytes of state against 2 G K 2 per token."""
    config = AttentionConfig(n_heads=32, n_kv_heads=8, head_dim=128)
    cost = PlanCost(ModelConfig(n_layers=1, layer_plan="L").plan, [config], 1, torch.bfloat16)
    break_even = 4 * 32 * 128 * 128 // (2 * 8 * 128 * 2)
    assert cheaper_from(cost.total, lambda length: sum(cost.full_by_layer(length))) == break_even + 1 == 513


def test_figures_are_drawn_the_same_each_time(tmp_path):
    paths = [tmp_path / name for name in ("one.svg", "two.svg", "three.png")]
    for path in paths:
        main(["cache", "--layer-plan", "SSSF", "KKKA", "F", "--length", "2k", "--plot", str(path), *SMALL])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    text = " ".join(ElementTree.parse(paths[0]).getroot().itertext())
    assert "KKKA" in text
    assert "full attention everywhere" in text
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_a_trained_models_own_cache(tmp_path, capsys):
    config = ModelConfig(
        vocab_size=30,
        d_model=16,
        n_layers=3,
        layer_plan="GSF",
        attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=8, window=20),
        moe=MoEConfig(n_experts=16, d_expert=8),
    )
    save_pretrained(tmp_path / "model", LanguageModel(config).init_weights(0))
    main(["cache", "--run", str(tmp_path), "--length", "100", "--dtype", "float32"])
    said = capsys.readouterr().out
    assert "plan GSF, 3 layers" in said
    assert f"holds {LanguageModel(config).new_cache(1, 100).nbytes():,} bytes" in said


@pytest.mark.parametrize(("letters", "pattern"), [("F", "F"), ("FFFF", "F"), ("SSFSSFS", "SSF"), ("SFR", "SFR")])
def test_a_plan_is_named_by_what_repeats(letters, pattern):
    assert pattern_of(letters) == pattern


@pytest.mark.parametrize(("text", "tokens"), [("1", 1), ("64k", 65_536), ("1M", 2**20), ("700", 700)])
def test_lengths(text, tokens):
    assert tokens_of(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "0k", "-1", "64K", "1.5k", "k", "1e3", "9999999999999", "999999999999M"])
def test_lengths_that_are_none(text):
    with pytest.raises(ValueError, match=rf"length: '{text}'; legal: a number of tokens"):
        tokens_of(text)
