"""A prompt through hybrids of linear layers: in one piece or several, all logits or the last, in C or in torch.

Legend: B batch, T tokens, V vocabulary.
"""

import pytest
import torch

from attention.config import AttentionConfig
from lm.config import ModelConfig
from lm.model import LanguageModel
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig
from triton_kernels.linear import causal_conv1d, decayed_linear_attention, delta_rule, gated_rms_norm
from triton_kernels.linear import native as linear_native

VOCABULARY, LENGTH, PIECES = 50, 70, (33, 1, 36)


def model_of(plan):
    config = ModelConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        n_layers=4,
        layer_plan=plan,
        dtype="float32",
        attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16),
        moe=MoEConfig(n_experts=4, d_expert=16, router=RouterConfig(policy=TopK(k=2))),
    )
    return LanguageModel(config).init_weights(0).eval()


@torch.no_grad()
@pytest.mark.parametrize("plan", ["GGGF", "KKLF", "DDDF"])
def test_in_pieces_as_in_one_and_as_without_a_cache(plan):
    model = model_of(plan)
    tokens_BT = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    whole_BTV = model(tokens_BT).logits_BTV
    cache = model.new_cache(2, LENGTH)
    last_B1V = model(tokens_BT, cache, last_only=True).logits_BTV
    assert last_B1V.shape == (2, 1, VOCABULARY)
    torch.testing.assert_close(last_B1V, whole_BTV[:, -1:], rtol=1e-4, atol=1e-5)
    pieces = model.new_cache(2, LENGTH)
    for piece_BT in tokens_BT.split(PIECES, dim=1):
        last_B1V = model(piece_BT, pieces, last_only=True).logits_BTV
    torch.testing.assert_close(last_B1V, whole_BTV[:, -1:], rtol=1e-4, atol=1e-5)
    for one, other in zip(cache.layers, pieces.layers, strict=True):
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(other.tensors[name], tensor, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("plan", ["GGGF", "KKLF"])
def test_in_c_as_in_torch_and_nothing_is_kept_for_gradients(plan, monkeypatch):
    model, calls = model_of(plan), []
    tokens_BT = torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    call = linear_native.call
    monkeypatch.setattr(linear_native, "call", lambda *given: calls.append(given) or call(*given))
    in_c_BTV = model(tokens_BT).logits_BTV
    for module in (delta_rule, decayed_linear_attention):
        monkeypatch.setattr(module, "takes_rule", lambda *_: False)
    for module in (causal_conv1d, gated_rms_norm):
        monkeypatch.setattr(module, "takes_many_rows", lambda *_, **__: False)
    n_calls = len(calls)
    torch.testing.assert_close(model(tokens_BT).logits_BTV, in_c_BTV, rtol=1e-4, atol=1e-5)
    assert len(calls) == n_calls
    if linear_native.takes_rule(in_c_BTV):
        assert [given[0] for given in calls] == ["rule_forward"] * 3
        assert all(given[10] is None and given[11] is None for given in calls)
