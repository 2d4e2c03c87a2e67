"""The forms for few tokens on a CPU, and the one call for a whole step, decode what the torch forms decode: every
letter, every policy, one sequence and eight, both dtypes."""

import copy
import gc

import pytest
import torch
from torch import nn

import lm.decode_step
import lm.model
from attention.cache import HybridCache
from attention.config import AttentionConfig
from attention.kinds import KINDS
from foundation.serialize import kinds
from lm.config import ModelConfig
from lm.model import LanguageModel
from moe.config import MoEConfig
from routing.policies.null_experts import NullExperts
from routing.policies.threshold import ScoreThreshold
from routing.policies.top_p import TopP
from routing.policy import PolicyConfig
from routing.router import NonFiniteScoresError, RouterConfig
from triton_kernels.native import library

pytestmark = pytest.mark.skipif(library.native().library is None, reason=library.native().reason)

ONE_CALL = ("F", "S", "FR", "Sr", "L", "G", "K")
PLANS = [(kind.reads or "") + letter for letter, kind in KINDS.items()]
POLICIES = [policy for policy in kinds(PolicyConfig).values() if not policy.needs_whole_batch]


def decoded(model, batch_size, n_tokens=6, seed=0):
    """Logits and experts per token of a prompt of three tokens and of each that follows."""
    tokens_BT = torch.randint(50, (batch_size, 3 + n_tokens), generator=torch.Generator().manual_seed(seed))
    cache, logits, experts = model.new_cache(batch_size, 3 + n_tokens), [], []
    with torch.no_grad():
        for piece_BT in (tokens_BT[:, :3], *tokens_BT[:, 3:].split(1, dim=1)):
            output = model(piece_BT, cache)
            logits.append(output.logits_BTV)
            experts.append(torch.stack([routing.assignments.experts_per_token_T() for routing in output.routings]))
    return torch.cat(logits, dim=1), torch.cat(experts, dim=1)


def layer_by_layer(monkeypatch):
    monkeypatch.setattr(lm.model, "takes_one_call", lambda *_: False)


def build(plan, dtype, router=RouterConfig(), norm="pre", **attention):  # noqa: B008
    options = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "window": 4, **attention}
    config = ModelConfig(
        vocab_size=50,
        d_model=32,
        n_layers=2 * len(plan),
        layer_plan=plan,
        dtype=dtype,
        norm=norm,
        attention=AttentionConfig(**options),
        moe=MoEConfig(n_experts=40, d_expert=16, d_shared=8, router=router),
    )
    model = LanguageModel(config).init_weights(0).eval()
    with torch.no_grad():
        model.head_VD.normal_(generator=torch.Generator().manual_seed(1))
    return model


def compare(model, batch_size, monkeypatch, steps, *, one_call=True, seed=0):
    n_tokens = 4
    fast, experts = decoded(model, batch_size, n_tokens, seed)
    assert len(steps) == (n_tokens if one_call else 0)
    layer_by_layer(monkeypatch)
    by_layer, _ = decoded(model, batch_size, n_tokens, seed)
    monkeypatch.setattr(library, "native", lambda: library.Compiled(None, "switched off"))
    plain, expected_experts = decoded(model, batch_size, n_tokens, seed)
    assert len(steps) == (n_tokens if one_call else 0)
    same = (experts == expected_experts).all(dim=0)
    # In bf16 a token may meet another expert where two scores are equal but for rounding: most must agree.
    bf16 = model.config.dtype == "bfloat16"
    assert same.float().mean() >= (0.8 if bf16 else 1.0)
    assert fast.dtype == plain.dtype
    for expected in (plain, by_layer):
        difference = (fast.float() - expected.float()).abs()
        assert difference.max() <= (3.0 if bf16 else 5e-5 * plain.abs().max())
        assert difference.median() <= (0.05 if bf16 else 1e-5) * plain.float().abs().mean()


# What is one call in all four ways, what goes layer by layer in two in which either occurs.
@pytest.mark.parametrize(
    ("plan", "dtype", "batch_size"),
    [
        (plan, dtype, batch_size)
        for plan in PLANS
        for dtype, batch_size in (("float32", 1), ("bfloat16", 8), ("float32", 8), ("bfloat16", 1))
        if plan in ONE_CALL or (dtype == "float32") == (batch_size == 1)
    ],
)
def test_every_letter(plan, dtype, batch_size, monkeypatch, steps):
    compare(build(plan, dtype), batch_size, monkeypatch, steps, one_call=plan in ONE_CALL)


@pytest.mark.parametrize("norm", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("plan", ["F", "S", "FR", "SrGKL", "M"])
def test_options(plan, norm, monkeypatch, steps):
    model = build(plan, "float32", norm=norm, qk_norm=False, output_gate=True, sink_logits=True, rotary_fraction=0.5)
    # With seed 0 two experts of a token are equally good but for rounding.
    compare(model, 2, monkeypatch, steps, one_call=plan != "M", seed=1)


# Every policy with either score and either number of sequences, from one to the next in turn.
@pytest.mark.parametrize(
    ("policy", "score", "batch_size"),
    [
        pytest.param(policy, score, batch_size, id=f"{score}-{policy.__name__}-{batch_size}")
        for index, policy in enumerate(POLICIES)
        for score in ("softmax", "sigmoid")
        for batch_size in (1, 8)
        if (index + (score == "softmax") + (batch_size == 1)) % 2 == 0
    ],
)
def test_every_policy(policy, score, batch_size, monkeypatch, steps):
    model = build("F", "float32", RouterConfig(policy=policy(), score=score))
    compare(model, batch_size, monkeypatch, steps)


def test_layer_by_layer_takes_the_forms_for_few_tokens(monkeypatch):
    layer_by_layer(monkeypatch)
    calls = []
    call = library.call
    for module in ("triton_kernels.experts.native", "triton_kernels.softmax.native", "triton_kernels.native.library"):
        monkeypatch.setattr(f"{module}.call", lambda name, *args: calls.append(name) or call(name, *args))
    model, n_tokens = build("F", "float32"), 3
    decoded(model, 1, n_tokens)
    layers = model.config.n_layers
    assert calls.count("softmax_decode") == n_tokens * layers
    # A prompt of three tokens is few as well.
    assert calls.count("experts") == calls.count("route") == calls.count("sort_slots") == (n_tokens + 1) * layers
    assert calls.count("linear") > n_tokens * layers


def next_logits(change, monkeypatch, steps, plan="FS", policy=TopP()):  # noqa: B008
    """Logits [6, V] of two sequences: of a step, then after `change`, two more; by one call and by layers; and how many
    of the last two were one call. `change` gives the model and the cache to go on with."""
    logits, taken = [], None
    for one_call in (True, False):
        if not one_call:
            layer_by_layer(monkeypatch)
        model, own = build(plan, "float32", RouterConfig(policy=policy)), []
        cache = model.new_cache(2, 12)
        with torch.no_grad():
            model(torch.arange(6).view(2, 3), cache)
            own.append(model(torch.tensor([[7], [8]]), cache).logits_BTV)
            before = len(steps)
            changed = change(model, cache)
            model, cache = changed if type(changed) is tuple else (model, cache)
            own += [model(torch.tensor([[9 + i], [20 + i]]), cache).logits_BTV for i in range(2)]
        taken = len(steps) - before if taken is None else taken
        logits.append(torch.cat(own).view(-1, 50))
    return *logits, taken


def router(model):
    return model.blocks[-1].moe.router


def experts(model):
    return model.blocks[-1].moe.experts


def attention(model):
    return model.blocks[0].attention


def other_projection(model, cache):
    attention(model).to_out = nn.Linear(64, 32, bias=False)
    attention(model).to_out.weight.fill_(0.01)
    model.eval()


# What is done between two steps, and how many of the two after it are one call.
CHANGES = {
    "a weight": (2, lambda model, cache: attention(model).to_inner.weight.mul_(2)),
    "all weights": (2, lambda model, cache: model.load_state_dict({k: -x for k, x in model.state_dict().items()})),
    "a storage": (2, lambda model, cache: setattr(experts(model).w_down_EFD, "data", -experts(model).w_down_EFD)),
    "a parameter": (2, lambda model, cache: setattr(model, "head_VD", nn.Parameter(2 * model.head_VD))),
    "a buffer": (2, lambda model, cache: setattr(router(model), "selection_bias_E", torch.arange(40.0))),
    "a selection bias": (2, lambda model, cache: router(model).selection_bias_E[3].fill_(0.5)),
    "a threshold": (2, lambda model, cache: router(model).policy.budget.threshold.fill_(0.1)),
    "a policy": (2, lambda model, cache: model.set_policy(ScoreThreshold(target_mean=3.0, cap=5))),
    "a policy with null columns": (2, lambda model, cache: model.set_policy(NullExperts())),
    "a calibration": (2, lambda model, cache: router(model).calibrate(3.0)),
    "a backend": (0, lambda model, cache: setattr(experts(model), "backend", "reference")),
    "a hook": (0, lambda model, cache: router(model).register_forward_hook(lambda *_: None)),
    "a module": (0, other_projection),
    "bf16 weights": (0, lambda model, cache: attention(model).bfloat16()),
    "strides": (0, lambda model, cache: setattr(model.embedding_VD, "data", model.embedding_VD.t().contiguous().t())),
    "training": (0, lambda model, cache: model.train()),
    "one layer in training": (0, lambda model, cache: attention(model).train()),
    "sequences": (2, lambda model, cache: cache.reorder(torch.tensor([1, 0]))),
    "the length": (2, lambda model, cache: cache.crop(2)),
    "a copied cache": (2, lambda model, cache: (model, copy.deepcopy(cache))),
    "a copied model": (2, lambda model, cache: (copy.deepcopy(model), cache)),
    "a longer piece": (2, lambda model, cache: model(torch.ones(2, 2, dtype=torch.int64), cache)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name, monkeypatch, steps):
    n_calls, change = CHANGES[name]
    one_call, by_layer, taken = next_logits(change, monkeypatch, steps)
    torch.testing.assert_close(one_call, by_layer, rtol=1e-4, atol=1e-4)
    assert taken == n_calls


def test_what_is_refused_is_refused_alike(monkeypatch, steps):
    nan = torch.tensor(torch.nan)
    cases = {
        "vocabulary": lambda model, cache: [[50], [0]],
        "do not fit": lambda model, cache: model(torch.ones(2, 8, dtype=torch.int64), cache) and None,
        "batch size 1": lambda model, cache: [[1]],
        "layer 1: scores": lambda model, cache: router(model).weight_ED[0, 0].copy_(nan) and None,
        "layer 3: scores": lambda model, cache: router(model).policy.budget.threshold.copy_(nan) and None,
        "layer 3: scores are": lambda model, cache: router(model).policy.budget.aim.copy_(nan) and None,
        "layer 3: scores are not": lambda model, cache: router(model).selection_bias_E[1].copy_(nan) and None,
    }
    said = []
    for one_call in (True, False):
        if not one_call:
            layer_by_layer(monkeypatch)
        for text, change in cases.items():
            model = build("FS", "float32", RouterConfig(policy=TopP()))
            cache = model.new_cache(2, 12)
            with torch.no_grad():
                for _ in range(4):
                    model(torch.ones(2, 1, dtype=torch.int64), cache)
                tokens = change(model, cache)
                with pytest.raises(ValueError) as error:
                    model(torch.tensor([[1], [2]] if tokens is None else tokens), cache)
            said.append((str(error.value), type(error.value), [state.length for state in cache.layers]))
            assert text.split(":")[-1].strip() in str(error.value)
            assert ("scores" in text) == isinstance(error.value, NonFiniteScoresError)
    assert said[: len(cases)] == said[len(cases) :]
    assert len(steps) == 4 * len(cases) + 4


@pytest.mark.parametrize("plan", ["FRSr", "GKL"])
def test_the_number_of_threads_changes_no_bit(plan, steps):
    model, before, results = build(plan, "float32", head_dim=64), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            cache = model.new_cache(8, 3)
            with torch.no_grad():
                results.append([model(torch.arange(8)[:, None] + i, cache).logits_BTV for i in range(3)])
    finally:
        torch.set_num_threads(before)
    assert len(steps) == 6
    assert torch.equal(torch.stack(results[0]), torch.stack(results[1]))


def compare_routings(model, monkeypatch, steps):
    """Asked for when later steps have run."""
    both = []
    for one_call in (True, False):
        if not one_call:
            layer_by_layer(monkeypatch)
        cache = model.new_cache(3, 5)
        with torch.no_grad():
            outputs = [model(torch.tensor([[i], [2 * i], [3]]), cache) for i in range(5)]
            both.append([routing for output in outputs for routing in output.routings])
    assert len(steps) == 5
    assert_same_routings(*both, rtol=1e-4, atol=1e-5)


def assert_same_routings(ours, theirs, **tolerance):
    """Rows, probabilities, losses, and what is added beside rows."""
    for our, their in zip(ours, theirs, strict=True):
        for name, rows in vars(their.assignments).items():
            torch.testing.assert_close(getattr(our.assignments, name), rows, **tolerance)
        for name in ("probs_TE", "losses", "identity_T", "constant_TD"):
            assert (getattr(our, name) is None) == (getattr(their, name) is None), name
            if getattr(their, name) is not None:
                torch.testing.assert_close(getattr(our, name), getattr(their, name), **tolerance)


def test_routings_are_those_of_the_layers(monkeypatch, steps):
    router = RouterConfig(policy=TopP(entropy_coefficient=0.1))
    compare_routings(build("FG", "float32", router), monkeypatch, steps)


def test_a_step_lives_as_long_as_its_cache(steps):
    model = build("F", "float32")
    gc.collect()
    before = len(lm.decode_step.STEPS)
    cache = model.new_cache(1, 2)
    with torch.no_grad():
        model(torch.tensor([[1]]), cache)
    assert len(steps) == 1
    assert len(lm.decode_step.STEPS) == before + 1
    del cache
    gc.collect()
    assert len(lm.decode_step.STEPS) == before


@pytest.mark.parametrize(("batch_size", "setting"), [(9, None), (1, torch.enable_grad()), (1, torch.autocast("cpu"))])
def test_other_moments_go_layer_by_layer(batch_size, setting, steps):
    model = build("F", "float32")
    cache = model.new_cache(batch_size, 2)
    with torch.no_grad(), setting or torch.no_grad():
        logits = model(torch.ones(batch_size, 1, dtype=torch.int64), cache).logits_BTV
    assert bool(logits.isfinite().all())
    assert not steps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plan", ["FSRr", "GKL", "MADC"])
def test_sequences_of_different_lengths_have_the_logits_that_they_have_alone(plan, dtype, steps):
    """In one call, each from a place of its own: rings go round at different steps, and rows are moved on the way."""
    model = build(plan, dtype, output_gate=True, sink_logits=True)
    texts = [
        torch.randint(50, (1, length + 3), generator=torch.Generator().manual_seed(length)) for length in (7, 2, 7)
    ]
    caches = [model.new_cache(1, 12) for _ in texts]
    with torch.no_grad():
        for cache, text in zip(caches, texts):
            model(text[:, :-3], cache)
        cache = HybridCache.stack(caches)
        decoded = [model(torch.cat([text[:, t : t + 1] for text in texts]), cache).logits_BTV for t in (-3, -2)]
        kept = [0, 1]
        cache.reorder(torch.tensor(kept))
        last = model(torch.cat([texts[n][:, -1:] for n in kept]), cache).logits_BTV
        for n, text in enumerate(texts):
            expected = model(text).logits_BTV[0]
            # In bf16 a token may meet another expert where two scores are equal but for rounding.
            tolerance = 1e-4 if dtype == "float32" else 0.05 * float(expected.abs().max())
            got = torch.cat(
                [*(step[n] for step in decoded), last[kept.index(n)]] if n in kept else [step[n] for step in decoded]
            )
            difference = (got.float() - expected[-3:][: len(got)].float()).abs()
            assert (difference.max() if dtype == "float32" else difference.median()) <= tolerance
    assert len(steps) == (0 if plan == "MADC" else 3)
