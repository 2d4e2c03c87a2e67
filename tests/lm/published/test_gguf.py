"""`python -m lm gguf`: what a file holds, and, where llama.cpp can be imported, what it computes from it."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from corpus.tokenizer import Tokenizer
from lm.__main__ import main
from lm.gguf_files.architectures import ARCHITECTURES
from lm.gguf_files.write import FULL_PRECISION
from lm.pretrained import load_pretrained, load_tokenizer
from lm.published.convert import ImportConfig, import_model
from lm.published.families import FAMILIES
from lm.published.parity import published_model

pytest.importorskip("transformers", reason="transformers is not installed (the extra `hub`)")
gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (the extra `gguf`)")

VOCAB = 320
TEXT = "".join(f"def line_{i}(x):\n    return x + {i}  # überall, {i * i}\n" for i in range(60))
# What makes a tiny model one that llama.cpp's architecture can compute, with rows that fill the blocks of q8_0.
FITTING = {
    "olmoe": {"num_key_value_heads": 4, "intermediate_size": 32},
    "qwen3_moe": {"mlp_only_layers": [], "moe_intermediate_size": 32},
    "glm4_moe": {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "intermediate_size": 64},
    "qwen3_next": {
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "qwen3_5_moe_text": {
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    # Whose ramp begins and ends at a pair, as llama.cpp's does.
    "gpt_oss": {
        "intermediate_size": 32,
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 150_000.0, "factor": 4.0, "truncate": True},
            **{"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 64},
        },
    },
    "lfm2_moe": {"intermediate_size": 64, "moe_intermediate_size": 32, "routed_scaling_factor": 1.0},
    "deepseek_v3": {
        **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 32, "q_lora_rank": 32},
        **{"moe_intermediate_size": 32, "intermediate_size": 64, "rms_norm_eps": 1e-6},
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
            **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    },
    "glm4_moe_lite": {
        **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 32, "q_lora_rank": 32},
        **{"moe_intermediate_size": 32, "intermediate_size": 64, "rms_norm_eps": 1e-6},
    },
    "kimi_linear": {
        **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 32},
        **{"moe_intermediate_size": 32, "intermediate_size": 64, "linear_head_dim": 32, "rms_norm_eps": 1e-6},
    },
    "granitemoehybrid": {
        **{"intermediate_size": 32, "shared_intermediate_size": 32, "mamba_n_groups": 1},
        "position_embedding_type": "nope",
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention", "moe"],
        **{"moe_intermediate_size": 32, "moe_latent_size": 32, "moe_shared_expert_intermediate_size": 64},
        **{"mamba_head_dim": 8, "ssm_state_size": 16, "n_group": 1, "topk_group": 1},
    },
}
FAMILY_NAMES = list(FITTING)
# The divergence of llama.cpp's next tokens from ours, in nats. Its cache and products round to fp16; among weights of 8
# bits a token of so small a model may go to another expert.
DIVERGENCE = {"f32": 1e-5, "q8_0": 0.2}


def imported(model_type, at, **changes):
    """A tiny model of a family with a byte-level tokenizer, as a model folder."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (the extra `hub`)")
    family = FAMILIES[model_type]
    fields = {**family.tiny, "vocab_size": VOCAB, **FITTING[model_type], **changes}
    theirs = published_model(dataclasses.replace(family, tiny=fields), 3)
    theirs.save_pretrained(at / "published")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True)])
    (at / "published" / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (at / "published" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    import_model(ImportConfig(source=at / "published", out=at / "model"))
    return theirs, at / "model"


# Those whose types and rounding are looked at whenever the tests run; the others' by `make gate`.
LOOKED_AT = ("qwen3_moe", "qwen3_5_moe_text")
ALL = [pytest.param(name, marks=[] if name in LOOKED_AT else pytest.mark.long) for name in FAMILY_NAMES]
by_two = pytest.mark.parametrize("made", ALL, indirect=True)
by_all = pytest.mark.parametrize("made", FAMILY_NAMES, indirect=True)


@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
    """A family, transformers' model of it, and its model folder."""
    at = tmp_path_factory.mktemp(request.param)
    return request.param, *imported(request.param, at)


def read(path):
    """Keys and tensors of a file, dequantised."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: (tensor.tensor_type.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    return keys, tensors


@by_all
def test_keys_tensors_and_vocabulary(made, tmp_path):
    _, theirs, folder = made
    main(["gguf", str(folder), str(tmp_path / "f32.gguf"), "--type", "f32"])
    keys, tensors = read(tmp_path / "f32.gguf")
    arch = keys["general.architecture"]
    model = load_pretrained(folder)
    config, last = model.config, model.config.n_layers - 1
    moe = config.block(last).moe
    n_layers = keys[f"{arch}.block_count"]
    assert n_layers == (6 if arch == "nemotron_h_moe" else 4)
    assert keys[f"{arch}.expert_count"] == moe.n_experts
    assert keys[f"{arch}.expert_used_count"] == moe.router.policy.k
    heads, letters = keys[f"{arch}.attention.head_count_kv"], config.plan.letters
    if isinstance(heads, list):
        by_letter = {"F": config.attention.n_kv_heads, "A": 1}
        # Nemotron's experts are layers of their own.
        every = "".join(f"{letter} " if n_layers > len(letters) else letter for letter in letters)
        assert heads == [by_letter.get(letter, 0) for letter in every]
    else:
        assert heads == (1 if "A" in letters else config.attention.n_kv_heads)
    turned = config.attention.latent_shared_dim if "A" in letters else config.attention.rotary_dim
    assert keys[f"{arch}.rope.dimension_count"] == turned
    # Every weight is there once: as many numbers as the published model has.
    theirs_once = {id(p): p.numel() for p in theirs.parameters()}
    buffers = sum(b.numel() for name, b in theirs.named_buffers() if name in theirs.state_dict())
    assert sum(values.size for _, values in tensors.values()) == sum(theirs_once.values()) + buffers
    assert all(kind == "F32" for kind, _ in tensors.values())
    experts = model.blocks[last].moe.experts
    gate_up = experts.w_gate_up_EDF2.detach().chunk(2 if moe.gated else 1, dim=-1)
    parts = [*zip(("gate", "up")[-len(gate_up) :], gate_up), ("down", experts.w_down_EFD.detach())]
    for part, wanted in parts:
        name = f"blk.{n_layers - 1}.ffn_{part}_exps.weight"
        np.testing.assert_array_equal(tensors[name][1], wanted.transpose(1, 2).numpy())
    np.testing.assert_array_equal(tensors["token_embd.weight"][1], model.embedding_VD.detach().numpy())
    pieces = keys["tokenizer.ggml.tokens"]
    assert len(pieces) == VOCAB
    assert pieces[keys["tokenizer.ggml.bos_token_id"]] == "<|end|>"
    assert keys["tokenizer.ggml.token_type"][VOCAB - 1] == gguf.TokenType.UNUSED


@by_two
@pytest.mark.parametrize(("kind", "allowed"), [("f16", 1e-3), ("q8_0", 1 / 127), ("q4_0", 1 / 7)])
def test_types(made, kind, allowed, tmp_path):
    _, _, folder = made
    main(["gguf", str(folder), str(tmp_path / "f32.gguf"), "--type", "f32"])
    main(["gguf", str(folder), str(tmp_path / "out.gguf"), "--type", kind])
    exact, rounded = read(tmp_path / "f32.gguf")[1], read(tmp_path / "out.gguf")[1]
    assert exact.keys() == rounded.keys()
    for name, (stored, values) in rounded.items():
        wanted = exact[name][1]
        if values.ndim == 1 or any(part in name for part in FULL_PRECISION):
            assert stored == "F32"
            np.testing.assert_array_equal(values, wanted)
        else:
            assert stored == (kind.upper() if wanted.shape[-1] % 32 == 0 else "F16")
            blocks = wanted.reshape(-1, 32 if wanted.shape[-1] % 32 == 0 else wanted.shape[-1])
            largest = np.abs(blocks).max(axis=1, keepdims=True)
            assert (np.abs(values.reshape(blocks.shape) - blocks) <= allowed * largest + 1e-7).all(), name
    assert not list(tmp_path.glob(".*"))


def test_a_sentencepiece_vocabulary(tmp_path):
    family = FAMILIES["olmoe"]
    fields = {**family.tiny, "vocab_size": VOCAB, **FITTING["olmoe"]}
    published_model(dataclasses.replace(family, tiny=fields), 0).save_pretrained(tmp_path / "published")
    tokenizer = Tokenizer.train([TEXT], VOCAB)
    tokenizer.save(tmp_path / "published" / "tokenizer.model")
    import_model(ImportConfig(source=tmp_path / "published", out=tmp_path / "model"))
    main(["gguf", str(tmp_path / "model"), str(tmp_path / "out.gguf")])
    keys, _ = read(tmp_path / "out.gguf")
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.bos_token_id"] == tokenizer.boundary_id
    assert keys["tokenizer.ggml.token_type"].count(gguf.TokenType.BYTE) == 256
    pieces, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    ids = tokenizer.encode("def line_3(x)")
    assert b"".join(pieces[id].replace("\u2581", " ").encode() for id in ids) == b"def line_3(x)"
    assert len(scores) == VOCAB


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("olmoe", {"num_key_value_heads": 2}, "llama.cpp's olmoe has no 2 key heads of 4"),
        ("olmoe", {"norm_topk_prob": True}, "renormalised weights"),
        ("qwen3_moe", {"norm_topk_prob": False}, "weights of experts as they are"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"dense layers \(1\)"),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer plan FSFS"),
        ("lfm2_moe", {"routed_scaling_factor": 2.0}, "weights of experts times 2.0"),
        ("deepseek_v3", {"q_lora_rank": None}, "queries without a latent"),
        ("granitemoehybrid", {"position_embedding_type": "rope"}, "has no positions"),
        ("granitemoehybrid", {"mamba_n_groups": 2}, "2 groups of Mamba-2"),
        ("granitemoehybrid", {"num_local_experts": 0}, "granitehybrid has no model without experts"),
        ("nemotron_h", {"n_group": 4, "topk_group": 2}, "groups of experts"),
        ("nemotron_h", {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]}, "MLPs beside"),
        ("nemotron_h", {"time_step_min": 0.01}, "shortest time step of 0.01"),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused_by_name(model_type, changes, said, tmp_path):
    family = FAMILIES[model_type]
    fields = {**family.tiny, **FITTING[model_type], **changes}
    published_model(dataclasses.replace(family, tiny=fields), 0).save_pretrained(tmp_path / "published")
    import_model(ImportConfig(source=tmp_path / "published", out=tmp_path / "model"))
    with pytest.raises(SystemExit, match=said):
        main(["gguf", str(tmp_path / "model"), str(tmp_path / "out.gguf")])
    assert not list(tmp_path.glob("*.gguf"))


def test_every_architecture_is_looked_at():
    assert set(FITTING) == set(ARCHITECTURES) < set(FAMILIES)


def test_a_family_without_an_architecture_is_refused_with_the_others(published, tmp_path):
    with pytest.raises(SystemExit, match=r"no GGUF file of flex_olmo .*olmoe"):
        main(["gguf", str(published("flex_olmo").folder), str(tmp_path / "out.gguf")])


@by_all
def test_llama_cpp_computes_what_ours_does(made, tmp_path):
    computed_alike(made, "f32", tmp_path)


def test_llama_cpp_computes_a_nemotron_without_experts(tmp_path):
    changes = {"layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"]}
    computed_alike((None, *imported("nemotron_h", tmp_path, **changes, intermediate_size=64)), "f32", tmp_path)


@by_two
def test_llama_cpp_computes_nearly_the_same_in_eight_bits(made, tmp_path):
    computed_alike(made, "q8_0", tmp_path)


def computed_alike(made, kind, tmp_path):
    """Log-probabilities of every next token, by an implementation that shares no code with ours or transformers'."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed (the extra `gguf`)")
    _, _, folder = made
    main(["gguf", str(folder), str(tmp_path / "out.gguf"), "--type", kind])
    model = load_pretrained(folder)
    tokenizer = load_tokenizer(folder, model)
    options = xllamacpp.CommonParams()
    options.model.path = str(tmp_path / "out.gguf")
    options.n_ctx, options.warmup = 128, False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(options)
    for text in ("d", "def line_7(x):", "return x + 12  # über" * 3):
        ids = [tokenizer.boundary_id, *tokenizer.encode(text)]
        with torch.no_grad():
            ours_V = model(torch.tensor([ids])).logits_BTV[0, -1].log_softmax(dim=-1)
        # What is drawn says nothing, but must be a character of its own to be answered: the bias is for it, and
        # logprobs are without.
        request = {"prompt": ids, "max_tokens": 1, "logprobs": VOCAB, "logit_bias": [[tokenizer.encode("a")[0], 100.0]]}
        answer = server.handle_completions(request)
        (step,) = answer["choices"][0]["logprobs"]["content"]
        theirs = {one["id"]: one["logprob"] for one in step["top_logprobs"]}
        assert len(theirs) == VOCAB
        theirs_V = torch.tensor([theirs[id] for id in range(VOCAB)])
        assert (ours_V.exp() * (ours_V - theirs_V)).sum().item() < DIVERGENCE[kind]
        if kind == "f32":
            assert (ours_V - theirs_V).abs().max().item() < 0.02
