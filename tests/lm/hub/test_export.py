"""A model of our own, exported: the code that travels with it computes what ours does, from a cache, in padded batches
and in a process that cannot see this project."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from attention.config import AttentionConfig
from corpus.tokenizer import Tokenizer
from lm.config import BlockOverride, ModelConfig, Parametrization, Residual
from lm.generate import generate_batch
from lm.model import LanguageModel
from lm.pretrained import save_pretrained
from lm.published.convert import ExportConfig, export_model
from lm.sampling import SamplingConfig
from moe.config import ClampedSwiGLU, MoEConfig
from routing.policies.expert_choice import ExpertChoice
from routing.policies.null_experts import NullExperts
from routing.policies.random_k import RandomK
from routing.policies.skipping import Skipping
from routing.policies.threshold import ScoreThreshold
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.policies.zero_computation import ZeroComputationExperts
from routing.router import RouterConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `hub`)")

VOCAB = 300
TEXT = "".join(f"Line {i} of a small text with {i * i % 31} numbers in it.\n" for i in range(80))
ATTENTION = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, window=5, chunk_size=16)
# What every letter can be told beside its sizes.
OPTIONS = AttentionConfig(
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    window=5,
    rotary_fraction=0.5,
    qk_norm_whole=True,
    unit_offset=True,
    qkv_bias=True,
    out_bias=True,
    output_gate=True,
    sink_logits=True,
    linear_heads=4,
    linear_key_heads=2,
    linear_value_dim=12,
    mamba_groups=2,
    short_conv_dim=24,
    conv_width=3,
    chunk_size=16,
)


def moe(policy=None, **options):
    router = RouterConfig(policy=policy or TopK(k=2))
    return MoEConfig(**{"n_experts": 6, "d_expert": 8, "router": router, **options})


def exported(config, folder, *, tokenizer=None, seed=0):
    """A model with weights everywhere, and the folder it was exported to."""
    model = LanguageModel(config).init_weights(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # Fresh heads, biases, sinks and gates are zero: what is zero would hide where it goes.
            if not tensor.any():
                tensor.normal_(std=0.5, generator=generator)
            elif name.endswith("norm.weight"):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
        for router in model.routers():
            router.selection_bias_E.normal_(std=0.05, generator=generator)
    save_pretrained(folder / "model", model, tokenizer=tokenizer)
    export_model(ExportConfig(run=folder / "model", out=folder / "exported", shard_bytes=40_000))
    return model, folder / "exported"


def theirs(folder):
    """The exported model in this process, by the files that travel with it."""
    from lm.hub.configuration_hybrid_moe import HybridMoEConfig
    from lm.hub.modeling_hybrid_moe import HybridMoEForCausalLM

    config = HybridMoEConfig.from_pretrained(folder)
    return HybridMoEForCausalLM.from_pretrained(folder, config=config).eval()


def tokens(batch, length, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


# As deep as the models below, which are twice as deep as their base.
DEEPER = Parametrization(base_d_model=32, base_n_layers=1, base_d_expert=8, base_k=2)
CASES = {
    "tied": ModelConfig(layer_plan="FC", attention=ATTENTION, moe=moe(), tied_embeddings=True),
    "softmax": ModelConfig(layer_plan="FSRr", attention=ATTENTION, moe=moe()),
    "linear": ModelConfig(layer_plan="LGKDCS", attention=ATTENTION, moe=moe()),
    "options": ModelConfig(
        layer_plan="SGDCF",
        attention=OPTIONS,
        norm="sandwich",
        unit_offset=True,
        moe=moe(d_shared=8, shared_gate=True, expert_bias=True, clamped=ClampedSwiGLU()),
    ),
    "blocks": ModelConfig(
        n_layers=2,
        layer_plan="FF",
        attention=ATTENTION,
        moe=moe(),
        blocks=(
            BlockOverride(norm="post", moe=MoEConfig(n_experts=1, d_expert=12, router=RouterConfig(policy=TopK(k=1)))),
            BlockOverride(attention=dataclasses.replace(ATTENTION, n_kv_heads=4, rope_base=500.0)),
        ),
    ),
    "mixed": ModelConfig(layer_plan="MGA", attention=dataclasses.replace(ATTENTION, mixed_window=7), moe=moe()),
    "mixed_options": ModelConfig(
        layer_plan="MA",
        attention=dataclasses.replace(
            ATTENTION,
            **{"rotary_fraction": 0.5, "output_gate": True, "sink_logits": True, "latent_query_dim": 12},
            **{"latent_shared_dim": 4, "latent_value_dim": 6, "latent_dim": 20},
        ),
        moe=moe(),
    ),
    "null": ModelConfig(layer_plan="F", attention=ATTENTION, moe=moe(NullExperts(n_null=4, k=5, target_mean=2.0))),
    "null_options": ModelConfig(
        n_layers=2,
        layer_plan="FF",
        attention=ATTENTION,
        moe=moe(),
        blocks=(
            BlockOverride(moe=moe(NullExperts(n_null=3, k=5, target_mean=3.0, start=0.1))),
            BlockOverride(moe=moe(NullExperts(n_null=6, k=4, target_mean=2.0, apart=True, null_weighs=False))),
        ),
    ),
    "top_p": ModelConfig(layer_plan="F", attention=ATTENTION, moe=moe(TopP(p=0.4, target_mean=None, cap=5))),
    "random_k": ModelConfig(layer_plan="F", attention=ATTENTION, moe=moe(RandomK(k_min=1, k_max=4, k_eval=3))),
    "threshold": ModelConfig(layer_plan="F", attention=ATTENTION, moe=moe(ScoreThreshold(target_mean=2, cap=5))),
    "skipping": ModelConfig(layer_plan="F", attention=ATTENTION, moe=moe(Skipping(k=4, ratio=0.8))),
    "sigmoid": ModelConfig(
        layer_plan="F",
        attention=ATTENTION,
        moe=moe(
            router=RouterConfig(policy=TopK(k=3), score="sigmoid", bias=True, renormalise=False, scaling=2.5),
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_whole_cached_and_padded(case, tmp_path):
    config = CASES[case]
    config = dataclasses.replace(
        config, vocab_size=VOCAB, d_model=32, n_layers=len(config.blocks) or len(config.layer_plan)
    )
    model, folder = exported(config, tmp_path)
    other = theirs(folder)
    tokens_BT = tokens(2, 23)
    wanted_BTV = model(tokens_BT).logits_BTV
    allowed = 1e-4 * wanted_BTV.abs().max().item()

    def close(found_BTV, wanted_BTV):
        assert (found_BTV - wanted_BTV).abs().max().item() < allowed

    whole = other(input_ids=tokens_BT)
    close(whole.logits, wanted_BTV)
    # In pieces of odd sizes and token by token, under both names that the cache has.
    for name in ("past_key_values", "cache"):
        cache, found = None, []
        for first, last in ((0, 9), (9, 16), *((t, t + 1) for t in range(16, 23))):
            given = {} if cache is None else {name: cache}
            output = other(input_ids=tokens_BT[:, first:last], use_cache=True, **given)
            cache = output[1]
            found.append(output.logits)
        close(torch.cat(found, dim=1), wanted_BTV)
    # A shorter text beside a longer one, padded on its left.
    padded_BT = tokens_BT.clone()
    padded_BT[1] = torch.cat([torch.zeros(6, dtype=torch.int64), tokens_BT[1, :17]])
    mask_BT = torch.ones_like(padded_BT)
    mask_BT[1, :6] = 0
    output = other(input_ids=padded_BT[:, :20], attention_mask=mask_BT[:, :20], use_cache=True)
    close(output.logits[1, 6:], wanted_BTV[1, :14])
    close(output.logits[0], wanted_BTV[0, :20])
    for t in range(20, 23):
        output = other(input_ids=padded_BT[:, t : t + 1], attention_mask=mask_BT[:, : t + 1], cache=output[1])
        close(output.logits[1, 0], wanted_BTV[1, t - 6])


def test_the_loss_is_that_of_the_next_tokens_and_reaches_every_weight(tmp_path):
    config = dataclasses.replace(CASES["linear"], vocab_size=VOCAB, d_model=32, n_layers=6)
    model, folder = exported(config, tmp_path)
    other = theirs(folder).train()
    tokens_BT = tokens(2, 12)
    loss = other(input_ids=tokens_BT, labels=tokens_BT).loss
    assert loss.item() == pytest.approx(model(tokens_BT[:, :-1], targets_BT=tokens_BT[:, 1:]).loss.item(), rel=1e-5)
    loss.backward()
    assert not [name for name, parameter in other.named_parameters() if parameter.grad is None]


def test_what_a_call_does_not_know_is_refused(tmp_path):
    config = dataclasses.replace(CASES["softmax"], vocab_size=VOCAB, d_model=32, n_layers=4)
    other = theirs(exported(config, tmp_path)[1])
    with pytest.raises(TypeError, match="past"):
        other(input_ids=tokens(1, 4), past=None)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 3\); legal: \(1, 4\)"):
        other(input_ids=tokens(1, 4), attention_mask=torch.ones(1, 3))
    first = other(input_ids=tokens(1, 4), use_cache=True)[1]
    second = other(input_ids=tokens(1, 4), use_cache=True)[1]
    with pytest.raises(ValueError, match="two names of one thing"):
        other(input_ids=tokens(1, 1), past_key_values=first, cache=second)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer_plan": "LG"}, "layer plan LG"),
        ({"moe": moe(ExpertChoice(k=2.0))}, "policy ExpertChoice"),
        ({"moe": moe(ZeroComputationExperts(n_null=2, k=3, target_mean=2.0))}, "policy ZeroComputationExperts"),
        ({"moe": moe(TopK(k=2, n_groups=3, top_groups=1))}, "policy TopK with groups"),
        ({"embedding_scale": 2.0}, r"ModelConfig.embedding_scale: 2.0; legal: 1.0"),
        ({"logit_scale": 0.5}, r"ModelConfig.logit_scale: 0.5; legal: 1.0"),
        ({"document_boundary": 1}, r"ModelConfig.document_boundary: 1; legal: None"),
        ({"residual": Residual(experts_added=0.5)}, r"block 0 cannot be exported: BlockConfig.residual: Residual"),
        ({"parametrization": DEEPER}, r"BlockConfig.residual: Residual\(attention_kept=1.0, attention_added=0.5"),
        ({"norm": "stream"}, r"BlockConfig.norm: 'stream'; legal: 'pre', 'post', 'sandwich'"),
        ({"attention": dataclasses.replace(ATTENTION, softmax_scale=0.3)}, r"softmax_scale: 0.3; legal: None"),
        (
            {"layer_plan": "GF", "attention": dataclasses.replace(ATTENTION, negative_eigenvalues=True)},
            r"AttentionConfig.negative_eigenvalues: True; legal: False",
        ),
        (
            {"layer_plan": "DF", "attention": dataclasses.replace(ATTENTION, mamba_step_floor=0.1)},
            r"AttentionConfig.mamba_step_floor: 0.1; legal: 0.0",
        ),
        ({"moe": moe(gated=False)}, r"MoEConfig.gated: False; legal: True"),
        ({"moe": moe(d_latent=6)}, r"MoEConfig.d_latent: 6; legal: 0"),
        ({"moe": moe(TopK(k=1), n_experts=1, d_expert=0)}, r"MoEConfig.d_expert: 0; legal: at least 1"),
        (
            {"moe": moe(router=RouterConfig(policy=TopK(k=2), renormalise_eps=0.1))},
            r"RouterConfig.renormalise_eps: 0.1; legal: 0.0",
        ),
    ],
)
def test_what_the_exported_code_does_not_know_is_refused_by_name(change, said, tmp_path):
    config = ModelConfig(
        **{"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "attention": ATTENTION, "moe": moe(), **change}
    )
    with pytest.raises(ValueError, match=said):
        exported(config, tmp_path)
    assert not (tmp_path / "exported").exists()


# What a process does that has the exported folder and nothing of ours.
ALONE = """
import json, sys
import torch, transformers
folder, prompts, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
assert importlib_find("lm") is None, "this process sees the project"
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
longest = max(map(len, prompts))
ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
alone = [
    model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=new, min_new_tokens=new, do_sample=False)[0, -new:]
    for prompt in prompts
]
beams = model.generate(input_ids=ids[:1], max_new_tokens=4, num_beams=2, do_sample=False)
print(json.dumps({
    "version": transformers.__version__,
    "batch": out[:, -new:].tolist(),
    "alone": [tokens.tolist() for tokens in alone],
    "beams": list(beams.shape),
}))
""".replace("importlib_find", "__import__('importlib.util').util.find_spec")


def run_alone(folder, prompts, new, at, before=""):
    """What `ALONE` prints, run in an empty folder behind some other lines."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        **{"HF_HOME": str(at / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    }
    (at / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", before + ALONE, str(folder), json.dumps(prompts), str(new)],
        capture_output=True,
        text=True,
        cwd=at / "empty",
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture
def generated(tmp_path):
    """An exported model with a tokenizer, prompts, and what ours goes on with."""
    tokenizer = Tokenizer.train([TEXT], VOCAB)
    config = ModelConfig(
        vocab_size=VOCAB,
        d_model=32,
        n_layers=6,
        layer_plan="SGLFKR",
        attention=ATTENTION,
        moe=moe(TopP(p=0.5, target_mean=None, cap=4)),
    )
    model, folder = exported(config, tmp_path, tokenizer=tokenizer)
    prompts = [tokenizer.encode(text) for text in ("Line 7 of a small", "a", "numbers in it.\nLine")]
    new = 12
    found = [[], [], []]
    for step in generate_batch(model, prompts, max_new_tokens=new, sampling=SamplingConfig(temperature=0)):
        found[step.text].append(step.token)
    return folder, prompts, found, new


def test_generate_in_a_process_that_cannot_see_this_project(generated, tmp_path):
    folder, prompts, wanted, new = generated
    found, said = run_alone(folder, prompts, new, tmp_path)
    assert found["version"] == transformers.__version__
    assert found["batch"] == found["alone"] == wanted
    assert "newly initialized" not in said
    assert "not used" not in said


@pytest.mark.long
def test_generate_on_the_other_version_of_transformers(generated, tmp_path):
    """5.24 calls the cache by another name than 5.23, in forwards and in generate."""
    folder, prompts, wanted, new = generated
    version = "5.24.0" if transformers.__version__ != "5.24.0" else "5.23.0"
    packages = tmp_path / "packages"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, f"transformers=={version}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        pytest.skip(f"transformers {version} cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    # The rest of the environment is shared: the other version comes first.
    ahead = f"import sys; sys.path.insert(0, {str(packages)!r})\n"
    found, _ = run_alone(folder, prompts, new, tmp_path, before=ahead)
    assert found["version"] == version
    assert found["batch"] == found["alone"] == wanted


def test_the_exported_files_import_torch_and_transformers_only(generated):
    for path in generated[0].glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert {line.split()[1].split(".")[0] for line in lines} <= {"torch", "transformers", "typing", ""}, path
