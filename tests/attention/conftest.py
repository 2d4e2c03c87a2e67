"""A residual stack of attention layers: the smallest thing that uses a layer plan as a model does."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from attention import AttentionConfig, HybridCache, LayerPlan, build_attention


class Stack(nn.Module):
    """Args:
    config: of all layers, or one per layer.
    """

    def __init__(
        self,
        pattern: str,
        config: AttentionConfig | Sequence[AttentionConfig],
        *,
        d_model: int = 32,
        n_layers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        n_layers = n_layers or len(pattern)
        self.configs = [config] * n_layers if isinstance(config, AttentionConfig) else list(config)
        self.d_model = d_model
        self.plan = LayerPlan.parse(pattern, n_layers)
        self.layers = nn.ModuleList(
            build_attention(letter, self.configs[index], d_model=d_model, layer_index=index, n_layers=n_layers)
            for index, letter in enumerate(self.plan.letters)
        )
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            layer.init_weights(generator)
            # Norm weights other than 1 and sinks other than 0, so that a test notices when they are left out.
            for parameter in layer.parameters():
                if parameter.dim() == 1:
                    parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x_BTD: Tensor, cache: HybridCache | None = None) -> Tensor:
        start = 0 if cache is None else cache.position
        kv: dict[int, object] = {}
        for index, layer in enumerate(self.layers):
            state = None if cache is None else cache.layers[index]
            y_BTD, kv[index] = layer(x_BTD, start=start, state=state, shared=kv.get(self.plan.source[index]))
            x_BTD = x_BTD + y_BTD
        return x_BTD

    def cache(self, batch_size: int, max_length: int, dtype: torch.dtype = torch.float32) -> HybridCache:
        return HybridCache(self.configs, self.plan, batch_size, max_length, dtype)

    def input(self, batch_size: int, n_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(batch_size, n_tokens, self.d_model, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(scope="session")
def make_stack():
    return Stack


@pytest.fixture(scope="session")
def tiny() -> AttentionConfig:
    """Every option on, all widths different, a window and chunks short enough to be crossed several times."""
    return AttentionConfig(
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        window=5,
        rotary_fraction=0.5,
        output_gate=True,
        sink_logits=True,
        linear_heads=3,
        linear_key_dim=6,
        linear_value_dim=10,
        latent_dim=20,
        latent_shared_dim=12,
        latent_value_dim=14,
        latent_query_dim=18,
        mamba_groups=3,
        short_conv_dim=22,
        chunk_size=4,
    )
