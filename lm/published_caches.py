"""What published models say of their caches, as data, and what the formulas of `attention.cache` give for them.

Sizes are those of the models' reports and configurations.
"""

import dataclasses

from attention.cache import cache_bytes
from attention.config import AttentionConfig
from attention.plan import LayerPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sized:
    """A model as its cache knows it.

    Attributes:
        plan: letters, repeated to `layers`.
        bits: of every number that is kept, of keys, values and latents.
    """

    plan: str
    layers: int
    attention: AttentionConfig
    bits: int = 16

    def bytes(self, tokens: int) -> float:
        """Of the cache of one sequence."""
        plan = LayerPlan.parse(self.plan, self.layers)
        return sum(cache_bytes([self.attention] * self.layers, plan, tokens)) * self.bits / 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedCache:
    """One published number.

    Attributes:
        name: of the model.
        sized: its cache.
        tokens: at which the number holds.
        reference: what it is compared with; None where the number is one of bytes.
        says: the number, as published.
        source: where.
        note: what is not as the letters say.
    """

    name: str
    sized: Sized
    tokens: int
    reference: Sized | None
    says: str
    source: str
    note: str = ""

    @property
    def plan(self) -> str:
        return self.sized.plan

    def saved(self) -> float:
        """The share of the reference's bytes that is saved."""
        assert self.reference is not None
        return 1 - self.sized.bytes(self.tokens) / self.reference.bytes(self.tokens)

    def computed(self) -> str:
        """The number by the formulas."""
        if self.reference is None:
            return f"{self.sized.bytes(self.tokens) / 2**30:.3f} GiB"
        return f"{100 * self.saved():.4f} %"


YI = AttentionConfig(n_heads=32, n_kv_heads=8, head_dim=128, window=4096)
JAMBA = AttentionConfig(
    n_heads=32, n_kv_heads=8, head_dim=128, linear_heads=128, linear_key_dim=16, linear_value_dim=64
)
DEEPSEEK_V2 = AttentionConfig(n_heads=128, n_kv_heads=128, head_dim=128, latent_dim=512, latent_shared_dim=64)
DEEPSEEK_67B = AttentionConfig(n_heads=64, n_kv_heads=8, head_dim=128)
KIMI = AttentionConfig(
    n_heads=32, n_kv_heads=32, head_dim=128, latent_dim=512, latent_shared_dim=64, rotary_fraction=0.0
)

PUBLISHED = (
    PublishedCache(
        name="Yi-Lightning",
        sized=Sized(plan="SSSFSSSR", layers=48, attention=YI),
        tokens=2**16,
        reference=Sized(plan="F", layers=48, attention=YI),
        says="82.8 % saved at 64K",
        source="arXiv 2412.01253",
        note="depth and heads are not published; the share does not depend on them",
    ),
    PublishedCache(
        name="Jamba",
        sized=Sized(plan="DDDFDDDD", layers=32, attention=JAMBA),
        tokens=2**18,
        reference=None,
        says="4 GB at 256K",
        source="arXiv 2403.19887",
        note="its Mamba layers are Mamba-1, of 16 numbers per channel: D of that size stands in for them",
    ),
    PublishedCache(
        name="DeepSeek-V2",
        sized=Sized(plan="A", layers=60, attention=DEEPSEEK_V2, bits=6),
        tokens=2**17,
        reference=Sized(plan="F", layers=95, attention=DEEPSEEK_67B),
        says="93.3 % saved against DeepSeek 67B",
        source="arXiv 2405.04434",
        note="its latents are deployed in 6 bits, the reference in 16; at 16 bits both, 82.2 % are saved",
    ),
    PublishedCache(
        name="Kimi Linear",
        sized=Sized(plan="KKKA", layers=28, attention=KIMI),
        tokens=2**20,
        reference=Sized(plan="A", layers=28, attention=KIMI),
        says="up to 75 % saved at 1M",
        source="arXiv 2510.26692",
        note="three of four layers keep a state of fixed size",
    ),
)
