"""Every family against transformers: logits, caches, gradients, balance losses, weights after export."""

import csv
import dataclasses
import itertools

import pytest
import torch

from lm.__main__ import main
from lm.accounting import kv_bytes
from lm.pretrained import load_pretrained
from lm.published.families import FAMILIES
from lm.published.parity import TOLERANCE, checks
from triton_kernels.native import library

pytest.importorskip("transformers", reason="transformers is not installed (the extra `hub`)")


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_equals_transformers(family):
    rows = {row.check: row for row in checks(FAMILIES[family], seed=0)}
    assert {"weights after export", "logits", "cached decode", "prefill in two parts", "gradients"} <= rows.keys()
    wrong = [row for row in rows.values() if not row.largest_error <= row.allowed]
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_in_c_equals_decoding_in_torch(family, published, monkeypatch):
    model = load_pretrained(published(family).folder)
    tokens_BT = torch.randint(model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(3))

    def decoded():
        cache = model.new_cache(2, 12)
        with torch.no_grad():
            parts = [
                model(piece_BT, cache).logits_BTV for piece_BT in (tokens_BT[:, :5], *tokens_BT[:, 5:].split(1, 1))
            ]
        return torch.cat(parts, dim=1)

    # Rounding grows where layers have a delta rule.
    atol = 1e-3 if FAMILIES[family].delta_rule else 2e-5
    fast = decoded()
    monkeypatch.setattr(library, "native", lambda: library.Compiled(None, "switched off"))
    torch.testing.assert_close(fast, decoded(), atol=atol, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(fast, model(tokens_BT).logits_BTV, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_has_the_bytes_that_its_formula_says(family, published):
    model = load_pretrained(published(family).folder)
    cache = model.new_cache(1, 40)
    assert sum(state.nbytes() for state in cache.layers) == kv_bytes(model.config, 40)


def test_whole_pairs_of_a_stretched_embedding():
    """As gpt-oss does not have them: a ramp from pair to pair, and a magnitude of its own."""
    rope = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 8.0, "original_max_position_embeddings": 64}
    family = FAMILIES["olmoe"]
    for more in ({}, {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}):
        tiny = {**family.tiny, "rope_parameters": rope | more}
        rows = {row.check: row for row in checks(dataclasses.replace(family, tiny=tiny), seed=0)}
        assert rows["logits"].largest_error <= TOLERANCE


VARIANTS = {
    "every layer of deepseek_v3 with experts": ("deepseek_v3", {"first_k_dense_replace": 0, "rope_parameters": None}),
    "a query latent in kimi_linear": ("kimi_linear", {"q_lora_rank": 10, "mlp_layer_types": ["sparse"] * 4}),
    "a pattern of nemotron_h": ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "M-*E*M-"}),
    "no experts in nemotron_h": ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "M-M*-"}),
    "no experts in granitemoehybrid": ("granitemoehybrid", {"num_local_experts": 0, "mamba_n_groups": 1}),
    "no positions in granitemoehybrid": ("granitemoehybrid", {"position_embedding_type": None}),
    "an untied head in lfm2_moe": ("lfm2_moe", {"tie_word_embeddings": False, "norm_topk_prob": False}),
    "positions in olmo_hybrid": ("olmo_hybrid", {"rope_parameters": None, "linear_allow_neg_eigval": False}),
    "a tied head in olmoe": ("olmoe", {"tie_word_embeddings": True}),
    "more slots than experts that compute nothing in longcat_flash": (
        "longcat_flash",
        {"zero_expert_num": 2, "moe_topk": 5, "num_layers": 1, "tie_word_embeddings": True},
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_what_else_a_family_may_have(name):
    family, changes = VARIANTS[name]
    family = dataclasses.replace(FAMILIES[family], tiny={**FAMILIES[family].tiny, **changes})
    rows = list(itertools.islice(checks(family, seed=0), 3))
    assert [row.check for row in rows] == ["weights after export", "logits", "cached decode"]
    assert not [row for row in rows if not row.largest_error <= row.allowed]


def test_a_shortest_time_step_as_transformers_has_it(tmp_path):
    """Its forward pass, that is: its step for a single token has none."""
    family = FAMILIES["nemotron_h"]
    family = dataclasses.replace(family, tiny={**family.tiny, "time_step_min": 0.2})
    rows = {row.check: row for row in itertools.islice(checks(family, seed=0), 4)}
    assert rows["logits"].largest_error <= TOLERANCE
    # Ours has it everywhere.
    assert rows["prefill in two parts"].largest_error <= TOLERANCE
    assert rows["cached decode"].largest_error > 100 * TOLERANCE


def test_the_command_writes_its_table(tmp_path, capsys):
    main(["parity", "--families", "olmoe", "--csv", str(tmp_path / "parity.csv")])
    with (tmp_path / "parity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["family"] for row in rows} == {"olmoe"}
    assert all(float(row["largest_error"]) <= float(row["allowed"]) for row in rows)
    assert "olmoe" in capsys.readouterr().out


def test_an_unknown_family_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        main(["parity", "--families", "olmo"])
    assert "olmoe" in capsys.readouterr().err
