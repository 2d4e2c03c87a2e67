"""Generation: greedy equals argmax of the full forward, seeds repeat, bad prompts are refused, the cache's bytes are
those of the accounting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from attention.config import AttentionConfig
from foundation.files import CorruptFileError, DiskFullError
from lm.accounting import kv_bytes
from lm.config import ModelConfig
from lm.generate import SamplingConfig, generate, sample
from lm.model import LanguageModel
from lm.pretrained import find_model, load_calibration_tokens, load_pretrained, save_pretrained
from moe.config import MoEConfig

CONFIG = ModelConfig(
    vocab_size=50,
    d_model=32,
    n_layers=4,
    layer_plan="SLGF",
    attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16, window=4, chunk_size=4),
    moe=MoEConfig(n_experts=16, d_expert=16),
)


@pytest.fixture(scope="module")
def model():
    model = LanguageModel(CONFIG).init_weights(0)
    torch.nn.init.normal_(model.head_VD, std=0.5, generator=torch.Generator().manual_seed(1))
    return model


def test_greedy_decoding_follows_the_full_forward(model):
    prompt = [3, 1, 4, 1, 5]
    steps = list(generate(model, prompt, max_new_tokens=12, sampling=SamplingConfig(temperature=0)))
    sequence = prompt + [step.token for step in steps]
    with torch.no_grad():
        predicted = model.eval()(torch.tensor([sequence[:-1]])).logits_BTV[0].argmax(-1).tolist()
    assert predicted[len(prompt) - 1 :] == [step.token for step in steps]
    assert all(len(step.experts) == 4 for step in steps)
    assert steps[-1].cache_bytes == kv_bytes(CONFIG, len(sequence) - 1)


def test_the_seed_decides(model):
    def run(seed):
        return [
            step.token
            for step in generate(
                model, [7], max_new_tokens=20, sampling=SamplingConfig(seed=seed, temperature=1.5, top_p=1.0)
            )
        ]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_generation_ends_before_the_stop_token(model):
    free = [step.token for step in generate(model, [7], max_new_tokens=20, sampling=SamplingConfig(temperature=0))]
    stopped = [
        step.token
        for step in generate(model, [7], max_new_tokens=20, sampling=SamplingConfig(temperature=0), stop=free[6])
    ]
    assert stopped == free[: free.index(free[6])]


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=20), st.floats(0.01, 1), st.integers(0, 99))
def test_nucleus_sampling_stays_inside_the_nucleus(logits, top_p, seed):
    logits_V = torch.tensor(logits)
    token = sample(
        logits_V, SamplingConfig(temperature=1.0, top_p=top_p, seed=seed), torch.Generator().manual_seed(seed)
    )
    probabilities_V = torch.softmax(logits_V, dim=-1)
    heavier = probabilities_V[probabilities_V > probabilities_V[token]].sum()
    assert heavier < top_p + 1e-5


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "prompt is empty"), ([1, 50], r"token 50 lies outside the vocabulary \[0, 50\)")]
)
def test_bad_prompts(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        next(generate(model, prompt, max_new_tokens=1, sampling=SamplingConfig()))


@pytest.mark.parametrize(("change", "message"), [({"temperature": -1}, "temperature: -1"), ({"top_p": 0}, "top_p: 0")])
def test_bad_sampling(change, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**change)


def test_a_saved_model_comes_back(model, tmp_path):
    save_pretrained(tmp_path / "model", model)
    loaded = load_pretrained(find_model(tmp_path))
    assert loaded.config == CONFIG
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_damaged_or_absent_models_are_named(model, tmp_path):
    with pytest.raises(ValueError, match="holds no trained model"):
        find_model(tmp_path)
    save_pretrained(tmp_path / "deep" / "model", model)
    with pytest.raises(ValueError, match=r"models below it: .*deep"):
        find_model(tmp_path)
    weights = tmp_path / "deep" / "model" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"weights\.safetensors has 1000 bytes instead of"):
        load_pretrained(tmp_path / "deep" / "model")
    (tmp_path / "deep" / "model" / "seal.json").unlink()
    with pytest.raises(ValueError, match=r"weights\.safetensors cannot be read"):
        load_pretrained(tmp_path / "deep" / "model")


@pytest.mark.parametrize("name", ["weights.safetensors", "calibration.safetensors", "config.json"])
def test_a_flipped_byte_of_a_saved_model_is_named(model, tmp_path, name):
    save_pretrained(tmp_path / "model", model, torch.arange(8).view(2, 4))
    # Twice: what is written anew takes the old one's place whole.
    save_pretrained(tmp_path / "model", model, torch.arange(8).view(2, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    data = bytearray((tmp_path / "model" / name).read_bytes())
    data[-3] ^= 1
    (tmp_path / "model" / name).write_bytes(data)
    for load in (load_pretrained, load_calibration_tokens):
        with pytest.raises(CorruptFileError, match=f"{name} does not match its checksum. The model cannot be trusted"):
            load(tmp_path / "model")


def test_a_disk_that_runs_full_during_the_export_is_said_and_leaves_nothing(model, tmp_path, monkeypatch):
    save_pretrained(tmp_path / "model", model)
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lm.pretrained.safetensors.torch.save_file", full)
    with pytest.raises(DiskFullError, match=r"model could not be written: .*No space left"):
        save_pretrained(tmp_path / "model", model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
