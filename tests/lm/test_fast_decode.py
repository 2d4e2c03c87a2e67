"""The forms for few tokens on a CPU decode what the torch forms decode: every letter, every policy, one sequence and
eight, both dtypes."""

import pytest
import torch

from attention.config import AttentionConfig
from attention.kinds import KINDS
from foundation.serialize import kinds
from lm.config import ModelConfig
from lm.model import LanguageModel
from moe.config import MoEConfig
from routing.policy import PolicyConfig
from routing.router import RouterConfig
from triton_kernels.native import library

pytestmark = pytest.mark.skipif(library.native().library is None, reason=library.native().reason)

PLANS = [(kind.reads or "") + letter for letter, kind in KINDS.items()]
POLICIES = [policy for policy in kinds(PolicyConfig).values() if not policy.needs_whole_batch]


def decoded(model, batch_size, n_tokens=6):
    """Logits and experts per token of a prompt of three tokens and of each that follows."""
    tokens_BT = torch.randint(50, (batch_size, 3 + n_tokens), generator=torch.Generator().manual_seed(0))
    cache, logits, experts = model.new_cache(batch_size, 3 + n_tokens), [], []
    with torch.no_grad():
        for piece_BT in (tokens_BT[:, :3], *tokens_BT[:, 3:].split(1, dim=1)):
            output = model(piece_BT, cache)
            logits.append(output.logits_BTV)
            experts.append(torch.stack([routing.assignments.experts_per_token_T() for routing in output.routings]))
    return torch.cat(logits, dim=1), torch.cat(experts, dim=1)


def build(plan, dtype, router=RouterConfig(), **attention):  # noqa: B008
    options = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "window": 4, **attention}
    config = ModelConfig(
        vocab_size=50,
        d_model=32,
        n_layers=2 * len(plan),
        layer_plan=plan,
        dtype=dtype,
        attention=AttentionConfig(**options),
        moe=MoEConfig(n_experts=40, d_expert=16, d_shared=8, router=router),
    )
    model = LanguageModel(config).init_weights(0).eval()
    with torch.no_grad():
        model.head_VD.normal_(generator=torch.Generator().manual_seed(1))
    return model


def compare(model, batch_size, monkeypatch):
    fast, experts = decoded(model, batch_size)
    monkeypatch.setattr(library, "native", lambda: library.Native(None, "switched off"))
    plain, expected_experts = decoded(model, batch_size)
    same = (experts == expected_experts).all(dim=0)
    # In bf16 a token may meet another expert where two scores are equal but for rounding: most must agree.
    bf16 = model.config.dtype == "bfloat16"
    assert same.float().mean() >= (0.8 if bf16 else 1.0)
    difference = (fast.float() - plain.float()).abs()
    assert difference.max() <= (3.0 if bf16 else 2e-4)
    assert difference.median() <= (0.05 if bf16 else 1e-5) * plain.float().abs().mean()


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_letter(plan, dtype, batch_size, monkeypatch):
    compare(build(plan, dtype), batch_size, monkeypatch)


@pytest.mark.parametrize("plan", ["F", "S", "FR", "M"])
def test_options_of_softmax_layers(plan, monkeypatch):
    model = build(plan, "float32", qk_norm=False, output_gate=True, sink_logits=True, rotary_fraction=0.5)
    compare(model, 2, monkeypatch)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_every_policy(policy, score, batch_size, monkeypatch):
    model = build("F", "float32", RouterConfig(policy=policy(), score=score))
    compare(model, batch_size, monkeypatch)


def test_the_fast_path_is_the_one_taken(monkeypatch):
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
