"""Published models in and out: what comes back is what went in, and what cannot be read is refused by name."""

import dataclasses
import json
import shutil

import pytest
import safetensors.torch
import torch

from lm.budget import set_budget
from lm.config import ModelConfig
from lm.evaluate import evaluate
from lm.generate import SamplingConfig, generate
from lm.model import LanguageModel
from lm.pretrained import load_pretrained, save_pretrained
from lm.published.checkpoint import Checkpoint
from lm.published.convert import ExportConfig, ImportConfig, export_model, import_model
from lm.published.families import FAMILIES
from lm.published.parity import TINY

pytest.importorskip("transformers", reason="transformers is not installed (the extra `hub`)")

# How Qwen3.5 shares rotated channels among the axes of a picture.
RELEASED_ROPE = {"mrope_interleaved": True, "mrope_section": [1, 1, 0]}


@pytest.fixture
def copied(published, tmp_path):
    """A copy of the published olmoe that a test may damage."""
    shutil.copytree(published("olmoe").source, tmp_path / "published")
    return tmp_path / "published"


def refusal(folder, tmp_path, error=ValueError):
    """What the import of a folder says; nothing may be left of it."""
    with pytest.raises(error) as refused:
        import_model(ImportConfig(source=folder, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    return str(refused.value)


def edit(path, **changes):
    """Writes fields into a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def bits(folder):
    """Every tensor of a checkpoint as bytes."""
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name).contiguous().view(torch.uint8).numpy().tobytes() for name in checkpoint.entries}


def names(path):
    """Of the tensors in a file."""
    return safetensors.torch.load_file(path).keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_goes_through_bit_by_bit(published, tmp_path, dtype):
    theirs = published("qwen3_moe").theirs.to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "published", max_shard_size="30KB")
    theirs.float()
    # A tensor of another precision than the rest keeps it.
    shard = sorted(tmp_path.glob("published/*.safetensors"))[0]
    tensors = safetensors.torch.load_file(shard)
    odd = next(iter(tensors))
    safetensors.torch.save_file({**tensors, odd: tensors[odd].float() + 1e-6}, shard, metadata={"format": "pt"})
    import_model(ImportConfig(source=tmp_path / "published", out=tmp_path / "model"))
    export_model(ExportConfig(run=tmp_path / "model", out=tmp_path / "back", shard_bytes=20_000))
    before, after = bits(tmp_path / "published"), bits(tmp_path / "back")
    assert len(list(tmp_path.glob("back/*.safetensors"))) > 1
    assert before == after
    assert load_pretrained(tmp_path / "model").config.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")


def test_import_fewer_experts_export(published, tmp_path):
    """The round trip of a published model that is to run with fewer experts per token."""
    from transformers import AutoModelForCausalLM

    _, source, folder = published("qwen3_moe")
    model = load_pretrained(folder)
    tokens_BT = torch.randint(96, (2, 30), generator=torch.Generator().manual_seed(0))
    batches = [(tokens_BT[:, :-1], tokens_BT[:, 1:])]
    as_published = evaluate(model, batches, n_bytes=58)
    set_budget(model, 1, tokens_BT)
    cheaper = evaluate(model, batches, n_bytes=58)
    assert as_published.mean_experts == (2.0, 1.0, 2.0, 2.0)
    assert cheaper.mean_experts == (1.0,) * 4
    assert cheaper.nats != as_published.nats
    export_model(ExportConfig(run=folder, out=tmp_path / "back", experts=1))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert theirs.config.num_experts_per_tok == 1
    with torch.no_grad():
        logits_BTV = theirs(input_ids=tokens_BT).logits
        torch.testing.assert_close(model(tokens_BT).logits_BTV, logits_BTV, atol=1e-5, rtol=1e-5)
    assert bits(source) == bits(tmp_path / "back")


def test_a_trained_model_goes_back(published, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = published("olmoe").folder
    model = load_pretrained(folder)
    tokens_BT = torch.randint(96, (2, 30), generator=torch.Generator().manual_seed(0))
    model.train()
    model.begin_step(0, 0)
    output = model(tokens_BT[:, :-1], targets_BT=tokens_BT[:, 1:])
    (output.loss + output.routing_loss).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    model.after_step()
    save_pretrained(tmp_path / "trained", model.eval())
    # Without the model that it comes from it is one of ours, and says so.
    assert "load it with trust_remote_code" in export_model(
        ExportConfig(run=tmp_path / "trained", out=tmp_path / "ours")
    )
    export_model(ExportConfig(run=tmp_path / "trained", out=tmp_path / "back", like=folder))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        ours_BTV, theirs_BTV = model(tokens_BT).logits_BTV, theirs(input_ids=tokens_BT).logits
    torch.testing.assert_close(ours_BTV, theirs_BTV, atol=1e-5, rtol=1e-5)


def test_what_a_family_cannot_say_is_refused_by_name(published, tmp_path):
    folder = published("olmoe").folder
    model = load_pretrained(folder)
    attention = dataclasses.replace(model.config.attention, rope_base=500.0)
    save_pretrained(tmp_path / "other", LanguageModel(dataclasses.replace(model.config, attention=attention)))
    with pytest.raises(ValueError, match=r"blocks\[0\]\.attention\.rope_base is 500.0, its config\.json says 10000"):
        export_model(ExportConfig(run=tmp_path / "other", out=tmp_path / "back", like=folder))
    biased = load_pretrained(folder)
    biased.routers()[1].selection_bias_E[0] = 1.0
    save_pretrained(tmp_path / "biased", biased)
    with pytest.raises(ValueError, match=r"blocks\.1\.moe.router\.selection_bias_E is not zero"):
        export_model(ExportConfig(run=tmp_path / "biased", out=tmp_path / "back", like=folder))
    save_pretrained(tmp_path / "ours", LanguageModel(ModelConfig(n_layers=1, d_model=8, vocab_size=8)))
    with pytest.raises(ValueError, match="olmoe, "):
        export_model(ExportConfig(run=tmp_path / "ours", out=tmp_path / "back", experts=1))
    with pytest.raises(ValueError, match=r"TopK\.k = 9"):
        export_model(ExportConfig(run=folder, out=tmp_path / "back", experts=9))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_generates(published, family):
    model = load_pretrained(published(family).folder)
    sampling = SamplingConfig(temperature=0.0)
    steps = list(generate(model, [1, 5, 7], max_new_tokens=6, sampling=sampling))
    theirs = published(family).theirs
    want = theirs.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert [step.token for step in steps] == want[0, 3:].tolist()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A tiny Qwen3.5 as it is released, in bf16: its decoder inside of a model that also sees, experts in one tensor.
    With the folder that it is saved in."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    rope = {**RELEASED_ROPE, "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    text = {**TINY, **FAMILIES["qwen3_5_moe_text"].tiny, "rope_parameters": rope, "bos_token_id": None}
    config = Qwen3_5MoeConfig(
        text_config=text, vision_config={**vision, "num_position_embeddings": 16}, dtype="bfloat16"
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = Qwen3_5MoeForConditionalGeneration(config).bfloat16().eval()
        for parameter in theirs.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("seeing") / "published"
    # What transformers writes has experts one by one; it reads either.
    theirs.save_pretrained(folder, max_shard_size="60KB")
    stack_experts(folder)
    # Fields that the released file has, and transformers does not write.
    values = json.loads((folder / "config.json").read_text())
    said = {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1}
    edit(folder / "config.json", text_config={**values["text_config"], **said, "mtp_use_dedicated_embeddings": False})
    return theirs, folder


def stack_experts(folder):
    """Puts every layer's experts into two tensors, in one file."""
    checkpoint = Checkpoint(folder)
    tensors = {name: checkpoint.read(name) for name in checkpoint.entries}
    for path in folder.glob("model*"):
        path.unlink()
    for name in [name for name in tensors if name.endswith("experts.0.down_proj.weight")]:
        layer = name.removesuffix("0.down_proj.weight")
        matrices = {part: [] for part in ("gate", "up", "down")}
        while f"{layer}{len(matrices['up'])}.up_proj.weight" in tensors:
            e = len(matrices["up"])
            for part, found in matrices.items():
                found.append(tensors.pop(f"{layer}{e}.{part}_proj.weight"))
        tensors[f"{layer}gate_up_proj"] = torch.stack(
            [torch.cat(both) for both in zip(matrices["gate"], matrices["up"])]
        )
        tensors[f"{layer}down_proj"] = torch.stack(matrices["down"])
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_decoder_is_read_out_of_a_model_that_sees(seeing, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs, folder = seeing
    assert Checkpoint(folder).entries["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (8, 48, 32)
    # The files as transformers itself reads them.
    again = type(theirs).from_pretrained(folder).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.state_dict().items())
    said = import_model(ImportConfig(source=folder, out=tmp_path / "model", dtype="float32"))
    assert "tensors of a vision tower" in said
    tokens_BT = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))
    before = {name: tensor for name, tensor in theirs.state_dict().items() if "visual" not in name}
    theirs.float()
    with torch.no_grad():
        expected_BTV = theirs(input_ids=tokens_BT).logits
        given_BTV = load_pretrained(tmp_path / "model")(tokens_BT).logits_BTV
    theirs.bfloat16()
    torch.testing.assert_close(given_BTV, expected_BTV, rtol=0, atol=1e-4 * expected_BTV.abs().max().item())
    export_model(ExportConfig(run=tmp_path / "model", out=tmp_path / "back", experts=1))
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (values["model_type"], values["num_experts_per_tok"]) == ("qwen3_5_moe_text", 1)
    assert values["mtp_num_hidden_layers"] == 0
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    after = {name.replace("model.", "model.language_model.", 1): each for name, each in back.state_dict().items()}
    assert after.keys() == before.keys()
    assert back.dtype == torch.bfloat16
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_config": None}, "text_config is missing; legal: the fields of a qwen3_5_moe_text"),
        (
            {"text_config": {"model_type": "qwen3_5_text"}},
            "model_type = 'qwen3_5_text' is not supported; legal: 'qwen3_5",
        ),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = False is not supported; legal: True"),
        ({"audio_config": {}}, "audio_config = {}: nothing here knows what that means"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method = 'fp8' is not supported"),
    ],
)
def test_what_surrounds_a_decoder_is_refused_by_name(seeing, tmp_path, change, said):
    shutil.copytree(seeing[1], tmp_path / "published")
    edit(tmp_path / "published" / "config.json", **change)
    assert said in refusal(tmp_path / "published", tmp_path)


def test_unknown_and_unsupported_fields_are_refused_by_name(copied, tmp_path):
    edit(copied / "config.json", mystery_scale=2.0)
    assert "mystery_scale = 2.0" in refusal(copied, tmp_path)
    edit(copied / "config.json", mystery_scale=2.0, clip_qkv=8.0)
    assert "clip_qkv = 8.0 is not supported; legal: None" in refusal(copied, tmp_path)
    edit(copied / "config.json", clip_qkv=None, rope_parameters={"rope_type": "llama3", "factor": 8})
    assert "rope_type = 'llama3' is not supported; legal: 'default'" in refusal(copied, tmp_path)
    edit(copied / "config.json", rope_parameters=None, hidden_size="wide")
    assert "hidden_size = 'wide'; legal: a value of type int" in refusal(copied, tmp_path)
    edit(copied / "config.json", hidden_size=32, num_experts_per_tok=9)
    assert "config.json: TopK.k = 9" in refusal(copied, tmp_path)


def test_tied_embeddings_have_no_head_of_their_own(copied, tmp_path):
    edit(copied / "config.json", tie_word_embeddings=True)
    assert "1 unexpected (lm_head.weight [96, 32])" in refusal(copied, tmp_path)
    name = next(path for path in sorted(copied.glob("*.safetensors")) if "lm_head.weight" in names(path))
    tensors = safetensors.torch.load_file(name)
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, name, metadata={"format": "pt"})
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    import_model(ImportConfig(source=copied, out=tmp_path / "model"))
    export_model(ExportConfig(run=tmp_path / "model", out=tmp_path / "back"))
    assert bits(tmp_path / "back") == bits(copied)
    model = load_pretrained(tmp_path / "model")
    assert model.head is model.embedding_VD


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_before_transformers_5_says_the_same(published, family):
    path = published(family).source / "config.json"
    values = json.loads(path.read_text())
    expected = FAMILIES[family].configuration(values, str(path))
    values["torch_dtype"] = values.pop("dtype")
    if (rope := values.pop("rope_parameters", None)) is None:
        # Without positions.
        assert FAMILIES[family].configuration(values, str(path)) == expected
        return
    values["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        values["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    values["rope_scaling"] = None if rope["rope_type"] == "default" else {"type": rope.pop("rope_type"), **rope}
    assert FAMILIES[family].configuration(values, str(path)) == expected


@pytest.mark.parametrize("family", ["kimi_linear", "olmo_hybrid"])
def test_names_and_heights_that_transformers_writes_otherwise_are_the_same_model(published, tmp_path, family):
    """What is exported is called as it was released, and imports as the same weights."""
    _, source, folder = published(family)
    export_model(ExportConfig(run=folder, out=tmp_path / "back"))
    assert Checkpoint(tmp_path / "back").entries.keys() != Checkpoint(source).entries.keys()
    import_model(ImportConfig(source=tmp_path / "back", out=tmp_path / "again"))
    for name in ("weights.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_rows_split_otherwise_have_to_be_as_many_and_as_wide(published, tmp_path):
    shutil.copytree(published("olmo_hybrid").source, tmp_path / "published")
    name = "model.layers.0.linear_attn.q_conv1d.weight"
    index = json.loads((tmp_path / "published" / "model.safetensors.index.json").read_text())
    shard = tmp_path / "published" / index["weight_map"][name]
    tensors = safetensors.torch.load_file(shard)
    safetensors.torch.save_file({**tensors, name: tensors[name][:, :, :3].contiguous()}, shard)
    assert f"{name} [32, 1, 3] instead of [24, 1, 4]" in refusal(tmp_path / "published", tmp_path)
    safetensors.torch.save_file({**tensors, name: tensors[name][1:].contiguous()}, shard)
    assert f"{name} [31, 1, 4] instead of [24, 1, 4]" in refusal(tmp_path / "published", tmp_path)


def test_both_names_of_the_number_of_experts_are_written(published, tmp_path):
    shutil.copytree(published("gpt_oss").source, tmp_path / "published")
    edit(tmp_path / "published" / "config.json", experts_per_token=2)
    import_model(ImportConfig(source=tmp_path / "published", out=tmp_path / "model"))
    export_model(ExportConfig(run=tmp_path / "model", out=tmp_path / "back", experts=1))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["experts_per_token"] == written["num_experts_per_tok"] == 1


def test_an_unsupported_family_is_answered_with_the_supported_ones(copied, tmp_path):
    edit(copied / "config.json", model_type="llama")
    said = refusal(copied, tmp_path)
    assert "'llama' is not supported" in said
    assert all(family in said for family in (*FAMILIES, "qwen3_5_moe,"))
    assert "config.json is missing" in refusal(tmp_path, tmp_path)


@pytest.mark.parametrize(("family", "name"), [("qwen3_next", "mtp.fc.weight"), ("glm4_moe", "model.layers.4.a.weight")])
def test_what_lies_beside_the_decoder_is_left_out_and_said(published, tmp_path, family, name):
    shutil.copytree(published(family).source, tmp_path / "published")
    index = json.loads((tmp_path / "published" / "model.safetensors.index.json").read_text())
    safetensors.torch.save_file({name: torch.ones(3)}, tmp_path / "published" / "beside.safetensors")
    index["weight_map"][name] = "beside.safetensors"
    (tmp_path / "published" / "model.safetensors.index.json").write_text(json.dumps(index))
    said = import_model(ImportConfig(source=tmp_path / "published", out=tmp_path / "model"))
    assert "left out: 1 tensors of multi-token prediction" in said
    export_model(ExportConfig(run=tmp_path / "model", out=tmp_path / "back"))
    assert bits(tmp_path / "back") == bits(published(family).source)
    # What was left out is not claimed to be there.
    assert json.loads((tmp_path / "back" / "config.json").read_text()).get("num_nextn_predict_layers", 0) == 0


def test_fewer_experts_of_groups_come_from_the_same_groups(published):
    model = load_pretrained(published("glm4_moe").folder)
    set_budget(model, 1, torch.zeros(1, 4, dtype=torch.int64))
    policies = [router.policy.config for router in model.routers()]
    assert [(policy.k, policy.n_groups, policy.top_groups) for policy in policies] == [(1, 1, 1)] + [(1, 4, 2)] * 3


def test_missing_unexpected_and_misshapen_tensors_are_listed_with_their_shapes(copied, tmp_path):
    def change(name, tensor):
        index = json.loads((copied / "model.safetensors.index.json").read_text())
        shard = index["weight_map"].get(name, "model-00001-of-00004.safetensors")
        tensors = safetensors.torch.load_file(copied / shard)
        tensors.pop(name, None)
        index["weight_map"].pop(name, None)
        if tensor is not None:
            tensors[name] = index["weight_map"][name] = tensor
            index["weight_map"][name] = shard
        safetensors.torch.save_file(tensors, copied / shard)
        (copied / "model.safetensors.index.json").write_text(json.dumps(index))

    change("model.layers.2.self_attn.o_proj.weight", None)
    change("model.layers.0.extra.weight", torch.zeros(3, 5))
    change("model.norm.weight", torch.zeros(7))
    said = refusal(copied, tmp_path)
    assert "1 missing (model.layers.2.self_attn.o_proj.weight [32, 32])" in said
    assert "1 unexpected (model.layers.0.extra.weight [3, 5])" in said
    assert "1 of another shape (model.norm.weight [7] instead of [32])" in said


def test_damaged_shards_are_named(copied, tmp_path):
    shards = sorted(copied.glob("*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[: len(content) // 2])
    assert f"{shards[1]} cannot be read" in refusal(copied, tmp_path)
    shards[1].unlink()
    assert f"{shards[1].name} missing, of {len(shards)} files" in refusal(copied, tmp_path)
    # A shard that is sound but another one.
    shutil.copy(shards[0], shards[1])
    said = refusal(copied, tmp_path)
    assert "promises" in said
    assert shards[1].name in said
    for shard in shards:
        shard.unlink()
    (copied / "model.safetensors.index.json").unlink()
    (copied / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is pickled, which is never read here" in refusal(copied, tmp_path)


def test_weights_of_few_bits_are_refused(copied, tmp_path):
    shard = sorted(copied.glob("*.safetensors"))[0]
    tensors = safetensors.torch.load_file(shard)
    name = next(iter(tensors))
    safetensors.torch.save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, shard)
    assert f"{name} is F8_E4M3; legal: F32, BF16, F16" in refusal(copied, tmp_path)
