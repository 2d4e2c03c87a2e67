"""The configuration of a language model: sizes, layer plan, attention, experts."""

import dataclasses

from attention.config import AttentionConfig
from attention.plan import LayerPlan
from foundation.serialize import nearest
from moe.config import MoEConfig

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pre-norm decoder: embedding, `n_layers` blocks of attention and experts, norm, head.

    Attributes:
        vocab_size: number of tokens, the boundary token included.
        d_model: width of the residual stream.
        n_layers: number of blocks; the layer plan is repeated to this depth.
        layer_plan: one letter per layer, see `attention.plan`; `SSSF` is three sliding-window layers and a full one.
        attention: heads, widths, window, rotary embedding; shared by all layers.
        moe: number and width of the experts, router; of every block not named by the next two.
        lower_moe, n_lower: the first `n_lower` blocks have `lower_moe` instead: what a branch with another routing
            method kept from its trunk.
        norm_eps: added to the mean square in every RMSNorm.
        dtype: of activations and of weights as they enter a product; parameters stay fp32.

    Raises:
        ValueError: for an unknown dtype, a size below 1, or a plan that does not parse.
    """

    vocab_size: int = 4096
    d_model: int = 128
    n_layers: int = 8
    layer_plan: str = "F"
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    lower_moe: MoEConfig | None = None
    n_lower: int = 0
    norm_eps: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"ModelConfig.dtype: {self.dtype!r} is not supported; {nearest(self.dtype, DTYPES)}")
        for name in ("vocab_size", "d_model", "n_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name}: {getattr(self, name)}, must be at least 1")
        if not 0 <= self.n_lower <= self.n_layers or (self.lower_moe is None) != (self.n_lower == 0):
            has = "no lower_moe" if self.lower_moe is None else "a lower_moe"
            raise ValueError(
                f"ModelConfig.n_lower: {self.n_lower} with {has}; give both or neither, at most"
                f" n_layers={self.n_layers}"
            )
        LayerPlan.parse(self.layer_plan, self.n_layers)

    @property
    def plan(self) -> LayerPlan:
        return LayerPlan.parse(self.layer_plan, self.n_layers)

    def moe_of(self, layer: int) -> MoEConfig:
        """The experts of one block."""
        return self.lower_moe if self.lower_moe is not None and layer < self.n_lower else self.moe
