"""`lm quantize`: a folder that every command reads, in one call of C as layer by layer; smaller, near the original, and
no start for training or export."""

import dataclasses

import pytest
import torch

import lm.decode_step
import lm.model
from attention.config import AttentionConfig
from corpus.tokenizer import Tokenizer
from lm.__main__ import main
from lm.accounting import decode_bytes, model_cost
from lm.bench_bits import form_of
from lm.config import BlockOverride, ModelConfig
from lm.model import LanguageModel
from lm.pretrained import load_pretrained, save_pretrained
from lm.quantize import folder_bytes, packed_model
from moe.config import ExpertFormat, MoEConfig
from routing.policies.top_p import TopP
from routing.router import RouterConfig
from triton_kernels.native.library import native

TEXT = "def main(argv):\n    return argv[0] + 'of the text'\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of a dynamic number of experts, its first block a dense one."""
    folder = tmp_path_factory.mktemp("quantize") / "model"
    tokenizer = Tokenizer.train([TEXT * 30], 280)
    moe = MoEConfig(n_experts=12, d_expert=32, router=RouterConfig(policy=TopP(target_mean=4.0, cap=8)))
    dense = dataclasses.replace(moe, n_experts=1, router=RouterConfig())
    dense = dataclasses.replace(
        dense, router=dataclasses.replace(dense.router, policy=dataclasses.replace(dense.router.policy, k=1))
    )
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=64,
        n_layers=3,
        layer_plan="FSG",
        attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16, window=8),
        moe=moe,
        blocks=(BlockOverride(moe=dense), BlockOverride(), BlockOverride()),
    )
    model = LanguageModel(config).init_weights(0)
    torch.nn.init.normal_(model.head_VD, std=0.3, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor(tokenizer.encode(TEXT * 40))
    save_pretrained(folder, model, ids[: len(ids) // 32 * 32].view(-1, 32), tokenizer)
    (folder.parent / "text.txt").write_text(TEXT * 4)
    return folder


def decoded(model, batch_size=2):
    tokens_BT = torch.randint(280, (batch_size, 8), generator=torch.Generator().manual_seed(0))
    cache, logits = model.new_cache(batch_size, 8), []
    with torch.no_grad():
        for piece_BT in (tokens_BT[:, :3], *tokens_BT[:, 3:].split(1, dim=1)):
            logits.append(model(piece_BT, cache).logits_BTV)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(("bits", "smaller", "near"), [("16", 0.75, 0.02), ("8", 0.6, 0.02), ("4", 0.5, 0.25)])
def test_every_command_reads_it(folder, tmp_path, capsys, bits, smaller, near):
    out, text = tmp_path / "packed", str(folder.parent / "text.txt")
    main(["quantize", str(folder), str(out), "--bits", bits])
    said = capsys.readouterr().out
    assert f"experts in {bits} bits" in said
    assert f"{folder_bytes(out):,} bytes" in said
    assert folder_bytes(out) < smaller * folder_bytes(folder)
    original, packed = load_pretrained(folder), load_pretrained(out)
    expected, got = decoded(original), decoded(packed)
    assert (got - expected).norm() < near * expected.norm()
    # With a dynamic budget and rounded keys and values at once.
    main(["generate", "--run", str(out), "--max-new-tokens", "4", "--experts", "2", "--eight-bits", "int8"])
    assert "mean experts" in capsys.readouterr().err
    main(["evaluate", "--run", str(out), "--data", text, "--experts", "2", "--resamples", "2"])
    assert "bits per byte" in capsys.readouterr().out


@pytest.mark.skipif(native().library is None, reason=native().reason)
@pytest.mark.parametrize("form", ["bf16", "int8", "int4-16", "int4-symmetric"])
def test_a_step_in_one_call_is_that_of_the_layers(folder, monkeypatch, form, steps):
    model = packed_model(load_pretrained(folder), form_of(form))
    fast = decoded(model)
    assert len(steps) == 5
    monkeypatch.setattr(lm.model, "takes_one_call", lambda *_: False)
    torch.testing.assert_close(fast, decoded(model), rtol=1e-4, atol=1e-4)
    assert len(steps) == 5


def test_fp32_again_is_what_the_packed_one_computes(folder, tmp_path, capsys):
    packed, back, again = (tmp_path / name for name in ("packed", "back", "again"))
    main(["quantize", str(folder), str(packed), "--bits", "4", "--group", "16"])
    main(["quantize", str(packed), str(back), "--bits", "32"])
    assert load_pretrained(back).config == load_pretrained(folder).config
    torch.testing.assert_close(decoded(load_pretrained(back)), decoded(load_pretrained(packed)), rtol=1e-4, atol=1e-4)
    # From one form to another.
    main(["quantize", str(packed), str(again), "--bits", "8"])
    expected = decoded(load_pretrained(packed))
    assert (decoded(load_pretrained(again)) - expected).norm() < 0.03 * expected.norm()
    capsys.readouterr()
    for command in (["export", str(packed), str(tmp_path / "out")], ["gguf", str(packed), str(tmp_path / "out")]):
        with pytest.raises(SystemExit) as refused:
            main([*command, *(["--like", str(folder)] if command[0] == "gguf" else [])])
        # What gguf asks first is where the model comes from.
        assert "experts are stored in 4 bits" in str(refused.value.code) or command[0] == "gguf"
    with pytest.raises(SystemExit) as refused:
        main(["quantize", str(folder), str(folder)])
    assert "is the model that is read" in str(refused.value.code)


def test_a_packed_model_is_not_trained(folder):
    model = packed_model(load_pretrained(folder), ExpertFormat(bits=8)).train()
    with pytest.raises(ValueError, match="experts of 8 bits cannot be trained"):
        model(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="no fresh weights"):
        model.init_weights(0)


def test_costs_are_counted_as_stored(folder):
    config = load_pretrained(folder).config
    packed = config.with_packed(ExpertFormat(bits=8, group=32))
    assert model_cost(packed, length=8, mean_experts=4) == model_cost(config, length=8, mean_experts=4)
    # A dense block, and four experts in each of two.
    weights = 3 * 64 * 32 * (1 + 4 + 4)
    saved = decode_bytes(config, 8, 4) - decode_bytes(packed, 8, 4)
    assert saved == pytest.approx(weights * (4 - 1 - 2 / 32))


def test_bench_bits_fills_its_table(folder, tmp_path, capsys):
    table, text = tmp_path / "bits.csv", str(folder.parent / "text.txt")
    shape = ["--experts", "4", "2", "--context", "4", "--steps", "2", "--prefill", "8", "--repeats", "1"]
    main(["bench-bits", "--run", str(folder), "--data", text, *shape, "--forms", "fp32", "int4", "--csv", str(table)])
    header, *lines = table.read_text().splitlines()
    assert header.endswith("decode_1,decode_8")
    assert [line.split(",")[0] for line in lines] == ["fp32", "fp32", "int4", "int4"]
    assert all(all(line.split(",")) for line in lines)
    assert "int4" in capsys.readouterr().out
    # Half of the text stored with the model, where no other is given; nothing timed.
    main(
        ["bench-bits", "--run", str(folder), "--experts", "2", "--repeats", "0", "--forms", "int8", "--csv", str(table)]
    )
    assert float(table.read_text().splitlines()[1].split(",")[3]) > 1
    with pytest.raises(SystemExit):
        main(["bench-bits", "--forms", "int5"])
    assert "BenchBitsConfig.forms: 'int5'; legal: fp32" in capsys.readouterr().err
