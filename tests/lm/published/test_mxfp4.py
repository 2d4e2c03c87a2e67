"""Experts in MXFP4, as gpt-oss is published: read as transformers reads them, bit by bit, and written as bf16."""

import copy
import dataclasses
import json

import pytest
import safetensors.torch
import torch

from foundation.files import CorruptFileError
from lm.__main__ import main
from lm.pretrained import load_pretrained
from lm.published.checkpoint import Checkpoint
from lm.published.convert import ImportConfig, import_model
from lm.published.families import FAMILIES
from lm.published.mxfp4 import dequantised
from lm.published.parity import TOLERANCE, published_model, relative

pytest.importorskip("transformers", reason="transformers is not installed (the extra `hub`)")
E, D, F = 8, 32, 32


def packed(generator, columns, depth):
    """Random blocks and scales, of every byte and of exponents about 2^-4."""
    blocks = torch.randint(256, (E, columns, depth // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(121, 125, (E, columns, depth // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales


@pytest.fixture
def source(tmp_path):
    """A published folder in bf16 whose experts lie in MXFP4, beside transformers' model of the same numbers in fp32."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    family = FAMILIES["gpt_oss"]
    tiny = dict(family.tiny) | {"intermediate_size": F, "hidden_size": D}
    theirs = published_model(dataclasses.replace(family, tiny=tiny), 0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.bfloat16())
    folder = tmp_path / "published"
    generator = torch.Generator().manual_seed(0)
    copy.deepcopy(theirs).to(torch.bfloat16).save_pretrained(folder)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    for layer in range(theirs.config.num_hidden_layers):
        for part, columns, depth in (("gate_up_proj", 2 * F, D), ("down_proj", D, F)):
            name, (blocks, scales) = f"model.layers.{layer}.mlp.experts.{part}", packed(generator, columns, depth)
            dequantised_EDF = convert_moe_packed_tensors(blocks, scales)
            assert dequantised_EDF.shape == state.pop(name).shape
            state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            with torch.no_grad():
                theirs.get_parameter(name).copy_(dequantised_EDF)
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, theirs


def test_numbers_are_those_of_transformers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(1)
    blocks, _ = packed(generator, 48, 64)
    scales = torch.randint(30, 220, (E, 48, 2), generator=generator, dtype=torch.uint8)
    ours, theirs = dequantised(blocks, scales), convert_moe_packed_tensors(blocks, scales)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))
    with pytest.raises(ValueError, match="scales of 255, which is no number"):
        dequantised(blocks, torch.full_like(scales, 255))
    with pytest.raises(ValueError, match=r"blocks \[8, 48, 2, 16\] and scales \[8, 48, 1\]"):
        dequantised(blocks, scales[..., :1])


def test_a_model_comes_in_computes_and_goes_out_as_bf16(source, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    folder, theirs = source
    main(["import", str(folder), str(tmp_path / "model"), "--dtype", "float32"])
    assert "8 tensors were MXFP4: they are bf16 here, exactly" in capsys.readouterr().out
    tokens_BT = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = load_pretrained(tmp_path / "model")(tokens_BT).logits_BTV
        wanted = theirs(input_ids=tokens_BT, use_cache=False).logits
    assert relative(ours, wanted) < TOLERANCE
    main(["export", str(tmp_path / "model"), str(tmp_path / "back")])
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    back, before = AutoModelForCausalLM.from_pretrained(tmp_path / "back"), theirs.state_dict()
    assert back.dtype == torch.bfloat16
    assert all(torch.equal(tensor.float(), before[name]) for name, tensor in back.state_dict().items())


def test_damaged_and_missing_parts_are_named(source, tmp_path):
    folder, _ = source
    path, name = folder / "model.safetensors", "model.layers.1.mlp.experts.down_proj"
    state = safetensors.torch.load_file(path)
    assert Checkpoint(folder).unpack() == 8
    safetensors.torch.save_file(state | {f"{name}_scales": torch.full_like(state[f"{name}_scales"], 255)}, path)
    with pytest.raises(CorruptFileError, match=rf"{name}: MXFP4 scales of 255"):
        import_model(ImportConfig(source=folder, out=tmp_path / "out"))
    safetensors.torch.save_file({n: tensor for n, tensor in state.items() if n != f"{name}_scales"}, path)
    with pytest.raises(ValueError, match=rf"1 missing \({name} \[8, 32, 32\]\); 1 unexpected \({name}_blocks"):
        import_model(ImportConfig(source=folder, out=tmp_path / "out"))
