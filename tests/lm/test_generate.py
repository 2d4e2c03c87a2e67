"""Generation: greedy equals argmax of the full forward, seeds repeat, bad prompts are refused, the cache's bytes are
those of the accounting."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from attention.config import AttentionConfig
from corpus.tokenizer import Tokenizer
from foundation.files import CorruptFileError, DiskFullError
from lm.__main__ import main
from lm.accounting import kv_bytes
from lm.cache_rounding import cache_rounding
from lm.config import ModelConfig
from lm.generate import generate, generate_batch
from lm.model import LanguageModel
from lm.pretrained import find_model, load_calibration_tokens, load_pretrained, save_pretrained
from lm.sampling import SamplingConfig, StopStrings, sample
from moe.config import MoEConfig
from routing.policies.top_p import TopP
from routing.router import RouterConfig

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


@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(temperature=0),
        SamplingConfig(temperature=1.5, seed=4),
        SamplingConfig(temperature=2.0, top_k=9, min_p=0.01, repetition_penalty=1.3),
    ],
)
def test_texts_side_by_side_are_what_they_are_alone(model, sampling, texts):
    """Prompts of different lengths, texts of different lengths: some end at a token while others go on."""
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]][:texts]
    alone = [
        [
            step.token
            for step in generate(
                model,
                prompt,
                max_new_tokens=12,
                sampling=dataclasses.replace(sampling, seed=sampling.seed + place),
                stop=7,
            )
        ]
        for place, prompt in enumerate(prompts)
    ]
    together = [[] for _ in prompts]
    for step in generate_batch(model, prompts, max_new_tokens=12, sampling=sampling, stop=7):
        together[step.text].append(step.token)
        assert len(step.experts) == 4
        assert step.cache_bytes > 0
    assert together == alone


def test_a_text_ends_where_it_is_told_to_and_the_others_go_on(model):
    free = [[], [], []]
    prompts = [[3, 1], [4], [1, 5, 9]]
    greedy = SamplingConfig(temperature=0)
    for step in generate_batch(model, prompts, max_new_tokens=9, sampling=greedy):
        free[step.text].append(step.token)
    counts, places = [4, 1, 7], []
    seen = [[], [], []]
    for step in generate_batch(
        model, prompts, max_new_tokens=9, sampling=greedy, ends=lambda text, token: len(seen[text]) == counts[text]
    ):
        seen[step.text].append(step.token)
        places.append(step.text)
    assert seen == [tokens[:count] for tokens, count in zip(free, counts)]
    assert places == [0, 1, 2, 0, 2, 0, 2, 0, 2, 2, 2, 2]


@pytest.mark.parametrize("plan", ["SLGF", "FRSr", "M"])
def test_a_cache_in_eight_bits_generates_nearly_the_same(plan):
    model = LanguageModel(dataclasses.replace(CONFIG, layer_plan=plan)).init_weights(0)
    torch.nn.init.normal_(model.head_VD, std=0.5, generator=torch.Generator().manual_seed(1))
    prompts, greedy = [[3, 1, 4, 1, 5], [9], [2, 6, 5]], SamplingConfig(temperature=0)
    texts, sizes = {}, {}
    for eight_bits in (None, "int8", "fp8"):
        steps = list(generate_batch(model, prompts, max_new_tokens=4, sampling=greedy, eight_bits=eight_bits))
        texts[eight_bits] = [(step.text, step.token) for step in steps]
        sizes[eight_bits] = steps[-1].cache_bytes
        assert all(math.isfinite(step.nats) for step in steps)
    assert sizes["int8"] == sizes["fp8"] < sizes[None]
    for name, divergence, same in (("int8", 1e-2, 0.9), ("fp8", 0.1, 0.75)):
        assert sum(a == b for a, b in zip(texts[None], texts[name])) >= 9
        tokens_BT = torch.randint(50, (4, 80), generator=torch.Generator().manual_seed(0))
        found = cache_rounding(model, tokens_BT, name)
        assert found.tokens == 4 * 79
        assert 0 < found.divergence < divergence
        assert abs(found.bits_more) < 0.02
        assert found.same > same


def test_experts_side_by_side_are_those_of_the_text(model):
    """The count of experts may differ from token to token; it is the text's own."""
    dynamic = LanguageModel(
        dataclasses.replace(
            CONFIG, moe=dataclasses.replace(CONFIG.moe, router=RouterConfig(policy=TopP(target_mean=4, cap=8)))
        )
    )
    dynamic.init_weights(0)
    torch.nn.init.normal_(dynamic.head_VD, std=0.5, generator=torch.Generator().manual_seed(1))
    prompts, greedy = [[3, 1, 4, 1, 5], [9], [2, 6, 5]], SamplingConfig(temperature=0)
    alone = [
        [step.experts for step in generate(dynamic, prompt, max_new_tokens=6, sampling=greedy)] for prompt in prompts
    ]
    together = [[], [], []]
    for step in generate_batch(dynamic, prompts, max_new_tokens=6, sampling=greedy):
        together[step.text].append(step.experts)
    assert together == alone
    assert len({count for text in alone for experts in text for count in experts}) > 1


LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=20)


@given(LOGITS, st.integers(1, 25), st.floats(0, 1), st.integers(0, 99))
def test_top_k_and_min_p_keep_the_likely_ones(logits, top_k, min_p, seed):
    logits_V = torch.tensor(logits)
    config = SamplingConfig(temperature=1.0, top_k=top_k, top_p=1.0, min_p=min_p)
    token = sample(logits_V, config, torch.Generator().manual_seed(seed))
    probabilities_V = torch.softmax(logits_V, dim=-1)
    assert (probabilities_V > probabilities_V[token]).sum() < top_k
    assert probabilities_V[token] >= min_p * probabilities_V.max() - 1e-6


@given(LOGITS, st.integers(0, 99))
def test_options_that_are_off_change_no_draw(logits, seed):
    logits_V = torch.tensor(logits)
    plain = sample(logits_V, SamplingConfig(seed=seed), torch.Generator().manual_seed(seed))
    config = SamplingConfig(seed=seed, top_k=len(logits), min_p=0.0, repetition_penalty=1.0)
    assert sample(logits_V, config, torch.Generator().manual_seed(seed), seen=[0]) == plain


def test_the_repetition_penalty_makes_what_was_seen_less_likely_whatever_its_sign():
    config = SamplingConfig(temperature=0, repetition_penalty=2.0)
    generator = torch.Generator()
    assert sample(torch.tensor([3.0, 2.0, -5.0]), config, generator, seen=[0, 0]) == 1
    assert sample(torch.tensor([3.0, 1.0, -5.0]), config, generator, seen=[0, 0]) == 0, "applied once"
    assert sample(torch.tensor([-1.0, -1.5, -5.0]), config, generator, seen=[0]) == 1
    logits_V = torch.tensor([3.0, 2.0, 1.0])
    sample(logits_V, config, generator, seen=[0])
    assert logits_V.tolist() == [3.0, 2.0, 1.0], "the caller's logits are left alone"


@given(
    st.text(alphabet="ab\n", max_size=30),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=8),
)
def test_a_text_is_cut_before_the_first_stop_string_however_it_comes(text, strings, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stops, shown = StopStrings(strings), ""
    ended = min((place for string in strings if (place := text.find(string)) >= 0), default=None)
    for begin, end in itertools.pairwise(edges):
        shown += stops.push(text[begin:end])
        assert text.startswith(shown)
        assert not any(string in shown for string in strings)
    shown += stops.flush()
    # Of two that overlap, the one that is complete first ends the text.
    first = min((text.find(s) + len(s), text.find(s)) for s in strings if s in text)[0] if ended is not None else None
    assert stops.stopped == (ended is not None)
    assert shown == text if ended is None else ended <= len(shown) <= first


def test_the_command_continues_prompts_side_by_side(tmp_path, capsys):
    texts = [f"line {n}: the quick brown fox\n" * 5 for n in range(20)]
    tokenizer = Tokenizer.train(texts, 300)
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    model = LanguageModel(config).init_weights(0)
    torch.nn.init.normal_(model.head_VD, std=0.5, generator=torch.Generator().manual_seed(1))
    save_pretrained(tmp_path / "model", model, tokenizer=tokenizer)

    def said(*words):
        main(["generate", "--run", str(tmp_path), "--max-new-tokens", "9", *words])
        return capsys.readouterr().out

    alone = [
        said("--prompt", prompt, "--seed", str(n)) for n, prompt in enumerate(("the quick", "line 3: the brown fox"))
    ]
    together = said("--prompt", "the quick", "line 3: the brown fox")
    assert together == f"[0] {alone[0]}[1] {alone[1]}"
    (whole,) = {said("--prompt", "the quick") for _ in range(2)}
    stop = whole[15:18]
    assert said("--prompt", "the quick", "--stop", stop).rstrip("\n") == whole[: whole.index(stop, 9)].rstrip("\n")
    for words, message in (
        (("--prompt", "a", "b", "--trace", str(tmp_path / "trace")), "trace: a trace is of one text"),
        (("--stop", ""), "stop: an empty string"),
        (("--prompt",), "prompt: none given"),
    ):
        with pytest.raises(SystemExit):
            said(*words)
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1}, "temperature: -1"),
        ({"temperature": 1e-40}, "temperature: 1e-40, must be 0, for the most likely token, or at least 0.001"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"top_p": 0}, "top_p: 0"),
        ({"top_p": math.nan}, "top_p: nan"),
        ({"top_k": -1}, "top_k: -1"),
        ({"min_p": 1.5}, "min_p: 1.5"),
        ({"min_p": math.nan}, "min_p: nan"),
        ({"repetition_penalty": 0}, "repetition_penalty: 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty: inf"),
    ],
)
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
