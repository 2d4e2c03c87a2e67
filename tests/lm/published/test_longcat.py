"""LongCat-Flash: what its blocks are here beside what other families have."""

import dataclasses
import shutil

import pytest
import safetensors.torch
import torch

from lm.budget import set_budget
from lm.config import BlockOverride, ModelConfig
from lm.model import LanguageModel
from lm.pretrained import load_pretrained, save_pretrained
from lm.published.checkpoint import SINGLE, Checkpoint
from lm.published.convert import ExportConfig, ImportConfig, export_model, import_model
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig
from staged_training.boundary import choose_cut

pytest.importorskip("transformers", reason="transformers is not installed (the extra `hub`)")
TOKENS_BT = torch.randint(96, (2, 30), generator=torch.Generator().manual_seed(0))


def bits(folder):
    """Every tensor of a checkpoint."""
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def test_matrices_that_nothing_reads_go_through_and_need_not_be_there(published, tmp_path):
    source = published("longcat_flash").source
    said = import_model(ImportConfig(source=source, out=tmp_path / "with"))
    # Of two layers, four zero experts each: transformers has a gate and an up of every one.
    assert "kept for export: 16 tensors of zero experts" in said
    export_model(ExportConfig(run=tmp_path / "with", out=tmp_path / "back"))
    before, after = bits(source), bits(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # As Meituan publishes it, without.
    shutil.copytree(source, tmp_path / "meituan")
    for shard in tmp_path.glob("meituan/*.safetensors*"):
        shard.unlink()
    own = {name: tensor for name, tensor in before.items() if not any(f"experts.{e}." in name for e in range(8, 12))}
    safetensors.torch.save_file(own, tmp_path / "meituan" / SINGLE, metadata={"format": "pt"})
    assert "kept" not in import_model(ImportConfig(source=tmp_path / "meituan", out=tmp_path / "without"))
    export_model(ExportConfig(run=tmp_path / "without", out=tmp_path / "again"))
    assert bits(tmp_path / "again").keys() == own.keys()
    with torch.no_grad():
        logits = [load_pretrained(tmp_path / name)(TOKENS_BT).logits_BTV for name in ("with", "without")]
    assert torch.equal(*logits)


def test_fewer_experts_are_more_that_compute_nothing(published, tmp_path):
    model = load_pretrained(published("longcat_flash").folder)
    as_published = [routing.statistics.mean_experts for routing in model(TOKENS_BT).routings]
    set_budget(model, 1.0, TOKENS_BT)
    cheaper = [routing.statistics.mean_experts for routing in model(TOKENS_BT).routings]
    # Blocks with the dense MLP alone have their one.
    assert [float(mean) for mean in cheaper] == pytest.approx([1.0] * 4, abs=0.02)
    assert as_published[0] > 1.2
    save_pretrained(tmp_path / "cheaper", model)
    with pytest.raises(ValueError, match=r"blocks\.0\.moe\.router\.policy\.budget\.threshold is not zero"):
        export_model(
            ExportConfig(run=tmp_path / "cheaper", out=tmp_path / "back", like=published("longcat_flash").folder)
        )


def shortcut(layer, n_layers=3, norm="pre"):
    moe = MoEConfig(n_experts=4, d_expert=8, d_shared=8, router=RouterConfig(policy=TopK(k=2)))
    blocks = tuple(BlockOverride(shortcut=place == layer or None) for place in range(n_layers))
    return ModelConfig(vocab_size=50, d_model=32, n_layers=n_layers, norm=norm, moe=moe, blocks=blocks)


def test_a_shortcut_is_added_behind_the_next_block():
    config = shortcut(0)
    model = LanguageModel(config).init_weights(0)
    tokens_BT = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    (first, second, _), x_BTD = model.blocks, torch.nn.functional.embedding(tokens_BT, model.embedding_VD)
    h_BTD = x_BTD + first.attention(first.attention_norm(x_BTD))[0]
    inner_BTD = first.moe_norm(h_BTD)
    routed_TD, shared_TD, _ = first.moe.parts(inner_BTD.flatten(0, 1))
    h_BTD = h_BTD + shared_TD.view_as(h_BTD)
    h_BTD = h_BTD + second.attention(second.attention_norm(h_BTD))[0]
    h_BTD = h_BTD + second.moe(second.moe_norm(h_BTD).flatten(0, 1))[0].view_as(h_BTD) + routed_TD.view_as(h_BTD)
    torch.testing.assert_close(model.prefix(tokens_BT, 2), h_BTD)


def test_nothing_is_cut_between_a_shortcut_and_the_next_block():
    config = shortcut(1)
    model = LanguageModel(config).init_weights(0)
    tokens_BT = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="block 1 adds what its experts give behind block 2; legal: nothing cut"):
        model.prefix(tokens_BT, 2)
    cut = choose_cut(config, {"same": config}, freeze=0.7)
    assert cut.boundary == 1
    assert "lowered to 1: block 1 adds what its experts give behind block 2" in cut.reasons
    for layer, norm in ((2, "pre"), (0, "post")):
        with pytest.raises(ValueError, match=rf"blocks\[{layer}\]\.shortcut: True .* legal: a block below another"):
            shortcut(layer, norm=norm)


def test_our_own_layout_refuses_it_by_name(tmp_path):
    save_pretrained(tmp_path / "model", LanguageModel(shortcut(0)).init_weights(0))
    with pytest.raises(ValueError, match=r"block 0 cannot be exported: BlockConfig\.shortcut: True; legal: False"):
        export_model(ExportConfig(run=tmp_path / "model", out=tmp_path / "out"))
    attention = dataclasses.replace(ModelConfig().attention, latent_gain=2.0)
    config = ModelConfig(vocab_size=50, d_model=32, n_layers=1, layer_plan="A", attention=attention)
    save_pretrained(tmp_path / "gain", LanguageModel(config).init_weights(0))
    with pytest.raises(ValueError, match=r"AttentionConfig\.latent_gain: 2\.0; legal: 1"):
        export_model(ExportConfig(run=tmp_path / "gain", out=tmp_path / "out"))
