"""A kind of attention that only this file knows: declared and registered here, it is planned, cached, counted, trained
and decoded like the others.

Legend: B batch, T tokens, D model width, X width of what is averaged.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from attention import AttentionConfig, HybridCache, LayerPlan, cache_bytes
from attention.kind import AttentionKind, AttentionLayer
from attention.kinds import KINDS
from attention.layer_states import KV, LayerState, TensorState
from attention.positions import Start
from attention.projection import Projection
from lm.accounting import decode_bytes, kv_bytes, mixing_flops, model_cost
from lm.config import BlockOverride, ModelConfig
from lm.generate import generate
from lm.model import LanguageModel, token_losses
from lm.sampling import SamplingConfig
from moe.config import MoEConfig


class RunningSum(TensorState):
    def __init__(self, batch_size: int, max_length: int, width: int, device: torch.device) -> None:
        super().__init__(max_length, sum=torch.zeros(batch_size, width, device=device))

    def refusal_to_crop(self, length: int) -> str | None:
        return None if length in (0, self.length) else "a sum cannot forget"


class RunningMean(AttentionLayer):
    """The mean of a projection over all tokens so far."""

    def __init__(self, kind, config, *, d_model, layer_index, n_layers) -> None:
        super().__init__(kind, config, d_model=d_model, layer_index=layer_index, n_layers=n_layers)
        width = config.n_heads * config.head_dim
        self.to_inner = Projection(d_model, width)
        self.to_out = Projection(width, d_model, gain=self.output_gain)

    def forward(
        self, x_BTD: Tensor, *, start: Start = 0, state: LayerState | None = None, shared: KV | None = None
    ) -> tuple[Tensor, KV | None]:
        self.check_call(x_BTD, start, state)
        T, start_B1 = x_BTD.shape[1], torch.as_tensor(start).view(-1, 1)
        sum_BTX = self.to_inner(x_BTD).float().cumsum(1)
        if state is not None:
            assert isinstance(state, RunningSum)
            sum_BTX = sum_BTX + state.tensors["sum"][:, None]
            state.tensors["sum"].copy_(sum_BTX[:, -1].detach())
            state.length += T
        count_BT = start_B1 + torch.arange(1, T + 1)
        return self.to_out((sum_BTX / count_BT[..., None]).to(x_BTD.dtype)), None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningMeanKind(AttentionKind):
    def new_state(self, config, *, batch_size, max_length, dtype, device):
        return RunningSum(batch_size, max_length, config.n_heads * config.head_dim, device)

    def state_bytes(self, config, length, element_size):
        return 4 * config.n_heads * config.head_dim

    def mixing_flops(self, config, length):
        return 2.0 * config.n_heads * config.head_dim


TOY = RunningMeanKind(letter="t", sentence="the mean of the past", layer=RunningMean, state_type=RunningSum)
WIDE = AttentionConfig(n_heads=3, n_kv_heads=1, head_dim=16)
ATTENTION = AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16, window=5)


@pytest.fixture
def config(monkeypatch) -> ModelConfig:
    monkeypatch.setitem(KINDS, "t", TOY)
    return ModelConfig(
        vocab_size=61,
        d_model=32,
        n_layers=4,
        layer_plan="tSFt",
        attention=ATTENTION,
        blocks=(BlockOverride(attention=WIDE), BlockOverride(), BlockOverride(), BlockOverride()),
        moe=MoEConfig(n_experts=16, d_expert=16),
    )


def test_the_letter_is_unknown_outside():
    with pytest.raises(ValueError, match="unknown letter 't' at place 0"):
        LayerPlan.parse("tF", 2)


def test_it_is_planned_and_named_in_errors(config):
    assert config.plan.kinds[0] is TOY
    with pytest.raises(ValueError, match=r"unknown letter 'Q'.*t \(the mean of the past\)"):
        LayerPlan.parse("Q", 1)
    with pytest.raises(ValueError, match=r"attention layer 0 \(t, the mean of the past\): start=-1"):
        LanguageModel(config).blocks[0].attention(torch.zeros(1, 2, 32), start=-1)


def test_its_cache_has_the_bytes_that_it_declares(config):
    cache = HybridCache(config.attentions, config.plan, batch_size=3, max_length=11)
    expected = cache_bytes(config.attentions, config.plan, 11, batch_size=3, element_size=4)
    assert [state.nbytes() for state in cache.layers] == expected
    assert expected[0] == 3 * 4 * 48, "its own configuration"
    assert expected[3] == 3 * 4 * 32, "the model's"


def test_it_is_counted(config):
    assert [mixing_flops(config, layer, 100) for layer in (0, 3)] == [96, 64]
    cost = model_cost(config, length=100, mean_experts=3)
    assert cost.layers[0].letter == "t"
    assert cost.total_parameters == sum(parameter.numel() for parameter in LanguageModel(config).parameters())
    # The window is full at 10 tokens and the running sums never grow: only the full layer does.
    grown = kv_bytes(config, 110) - kv_bytes(config, 10)
    assert grown == decode_bytes(config, 110, 3) - decode_bytes(config, 10, 3) == 100 * 2 * 16 * 4


def test_it_decodes_as_it_runs_and_generates(config):
    model = LanguageModel(config).init_weights(0).eval()
    torch.nn.init.normal_(model.head_VD, std=0.3, generator=torch.Generator().manual_seed(1))
    tokens_BT = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full_BTV = model(tokens_BT).logits_BTV
        cache = model.new_cache(2, 19)
        parts = [model(tokens_BT[:, :7], cache).logits_BTV]
        parts += [model(tokens_BT[:, t : t + 1], cache).logits_BTV for t in range(7, 19)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full_BTV, atol=2e-4, rtol=2e-4)
    with pytest.raises(ValueError, match="crop to 2 of 19 tokens seen: layer 0 cannot: a sum"):
        cache.crop(2)
    assert len(list(generate(model, [3], max_new_tokens=4, sampling=SamplingConfig()))) == 4


def test_it_learns(config):
    model = LanguageModel(config).init_weights(0)
    torch.nn.init.normal_(model.head_VD, std=0.3, generator=torch.Generator().manual_seed(1))
    tokens_BT = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(0))
    token_losses(model(tokens_BT[:, :-1]).logits_BTV, tokens_BT[:, 1:]).mean().backward()
    gradients = [model.blocks[0].attention.to_inner.weight.grad, model.blocks[0].attention.to_out.weight.grad]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
