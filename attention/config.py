"""The configuration of an attention layer: one for a whole model, or one of its own for some layers.

Every kind reads the fields that it needs and leaves the others alone, so one configuration serves a mixed plan.
"""

import dataclasses

from attention.yarn import Yarn
from foundation.numbers import check_numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Heads, widths and options of softmax layers, linear layers and mixed layers.

    Attributes:
        n_heads: query heads of a softmax layer.
        n_kv_heads: key/value heads of a softmax layer; each serves n_heads / n_kv_heads query heads.
        head_dim: width of a softmax layer's head.
        window: how many tokens a sliding-window layer sees, the current one included.
        rope_base: base of the rotary embedding's wavelengths.
        yarn: how the rotary embedding is stretched to longer texts, or None.
        rotary_fraction: share of head_dim that is rotated, from the front; 0 leaves positions out (NoPE).
        qk_norm: RMSNorm of every query and key head before the rotary embedding.
        qk_norm_whole: the RMSNorm is of all query heads together, and of all key heads together (OLMo, arXiv
            2501.00656), instead of each head alone.
        unit_offset: the weights of these RMSNorms are what their scale has beyond one, see `attention.norm`.
        qkv_bias: softmax layers add a bias to their queries, keys, values and output gates.
        out_bias: softmax layers add a bias to their output projection.
        softmax_scale: of a softmax layer's logits; head_dim^-0.5 by default.
        output_gate: softmax layers multiply their output by sigmoid(x W_g) before the output projection.
        head_gate: they multiply every head's output by one number, sigmoid(x w_h), instead (arXiv 2505.06708).
        sink_logits: one learnt logit per query head in the softmax's denominator, so that a head may attend to nothing.
        linear_heads: heads of a linear layer; n_heads by default.
        linear_key_heads: heads of a gated DeltaNet layer's queries and keys, each of them serving linear_heads /
            linear_key_heads heads of values; linear_heads by default.
        linear_key_dim: key width of a linear layer's head; head_dim by default.
        linear_value_dim: value width of a linear layer's head; head_dim by default.
        mixed_linear_heads: how many of a mixed layer's n_heads are linear; half of them by default. Its softmax heads
            keep their share of n_kv_heads.
        mixed_window: how many tokens a mixed layer's softmax heads see, the current one included; None for all.
        latent_dim: width of the latent that a latent-attention layer caches; 4 head_dim by default. Its heads are those
            of a softmax layer, and rotary_fraction is the share of latent_shared_dim that is turned.
        latent_shared_dim: key channels that all heads of a latent-attention layer share, beside their own head_dim;
            half of head_dim by default.
        latent_value_dim: value width of a latent-attention head; head_dim by default.
        latent_query_dim: width of a latent that its queries are made from; None makes them from the input.
        latent_gain: multiplies the normalised latent that keys and values are made from, and that is cached
            (LongCat-Flash, arXiv 2509.01322).
        latent_scale: multiplies a latent-attention layer's logits: DeepSeek's YaRN makes all channels grow, (0.1 m
            ln(factor) + 1)^2 with its mscale_all_dim m, and not only those that are turned.
        negative_eigenvalues: beta of a delta rule lies in (0, 2) instead of (0, 1), so that a state may be turned
            around as well as forgotten (arXiv 2411.12537).
        decay_bound: log-decays of a delta rule stay above minus this, see `attention.decay_gate`; None for no bound.
        mamba_step_floor: the shortest time step of a Mamba-2 layer.
        mamba_groups: groups of a Mamba-2 layer's linear heads that share what is written and read by (its B and C).
        short_conv_dim: channels of a gated short convolution; n_heads * head_dim by default.
        conv_width: taps of a short convolution (before a delta rule or a Mamba-2 scan, or a layer of its own), 2 to 8.
        chunk_size: tokens per chunk of the linear layers' chunked form, a power of two; changes speed, not results.
        norm_eps: added to the mean square in every RMSNorm.

    Raises:
        ValueError: for values that do not fit together, naming the field, its value and what is legal.
    """

    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    window: int = 128
    rope_base: float = 10_000.0
    yarn: Yarn | None = None
    rotary_fraction: float = 1.0
    qk_norm: bool = True
    qk_norm_whole: bool = False
    unit_offset: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    softmax_scale: float | None = None
    output_gate: bool = False
    head_gate: bool = False
    sink_logits: bool = False
    linear_heads: int | None = None
    linear_key_heads: int | None = None
    linear_key_dim: int | None = None
    linear_value_dim: int | None = None
    mixed_linear_heads: int | None = None
    mixed_window: int | None = None
    latent_dim: int | None = None
    latent_shared_dim: int | None = None
    latent_value_dim: int | None = None
    latent_query_dim: int | None = None
    latent_gain: float = 1.0
    latent_scale: float = 1.0
    negative_eigenvalues: bool = False
    decay_bound: float | None = None
    mamba_step_floor: float = 0.0
    mamba_groups: int = 1
    short_conv_dim: int | None = None
    conv_width: int = 4
    chunk_size: int = 64
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_numbers(self, n_heads=1, n_kv_heads=1, head_dim=1, window=1, chunk_size=1)
        check_numbers(self, latent_dim=1, latent_shared_dim=0, latent_value_dim=1, latent_query_dim=1)
        check_numbers(self, mamba_groups=1, mamba_step_floor=0, short_conv_dim=1)
        check_numbers(self, linear_heads=1, linear_key_dim=1, linear_value_dim=1, mixed_linear_heads=1, mixed_window=1)
        check_numbers(self, linear_key_heads=1)
        if self.linear_shape[0] % self.key_heads != 0:
            raise ValueError(
                f"AttentionConfig.linear_key_heads: {self.linear_key_heads}; legal: a divisor of the"
                f" {self.linear_shape[0]} linear heads"
            )
        if not 2 <= self.conv_width <= 8:
            raise ValueError(f"AttentionConfig.conv_width: {self.conv_width}; legal: 2 to 8")
        if self.chunk_size & (self.chunk_size - 1) != 0:
            raise ValueError(f"AttentionConfig.chunk_size: {self.chunk_size}; legal: a power of two")
        if self.n_heads % self.n_kv_heads != 0:
            raise ValueError(
                f"AttentionConfig.n_kv_heads: {self.n_kv_heads}; legal: a divisor of n_heads={self.n_heads}"
            )
        if not 0 <= self.rotary_fraction <= 1:
            raise ValueError(
                f"AttentionConfig.rotary_fraction: {self.rotary_fraction}; legal: from 0 (no positions) to 1 (the whole"
                " head)"
            )
        if self.head_dim % 2 != 0:
            raise ValueError(
                f"AttentionConfig.head_dim: {self.head_dim}; legal: even, because the rotary embedding turns pairs"
            )
        rotated = self.rotary_fraction * self.head_dim
        if abs(rotated - self.rotary_dim) > 1e-6 or self.rotary_dim % 2 != 0:
            raise ValueError(
                f"AttentionConfig.rotary_fraction: {self.rotary_fraction} turns {rotated:g} channels per head; legal:"
                " an even number"
            )
        for name in ("qk_norm_whole", "unit_offset"):
            if getattr(self, name) and not self.qk_norm:
                raise ValueError(f"AttentionConfig.{name}: True without qk_norm, whose option it is; legal: False")
        if self.head_gate and self.output_gate:
            raise ValueError("AttentionConfig.head_gate: True beside output_gate; legal: one of them")
        for name in ("rope_base", "norm_eps", "latent_scale", "latent_gain", "softmax_scale", "decay_bound"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"AttentionConfig.{name}: {value}; legal: above 0")

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that the rotary embedding turns."""
        return round(self.rotary_fraction * self.head_dim)

    @property
    def linear_shape(self) -> tuple[int, int, int]:
        """Heads, key width and value width of a linear layer."""
        return (
            self.linear_heads or self.n_heads,
            self.linear_key_dim or self.head_dim,
            self.linear_value_dim or self.head_dim,
        )

    @property
    def mixed_heads(self) -> tuple[int, int, int]:
        """Softmax heads, key/value heads and linear heads of a mixed layer.

        Raises:
            ValueError: where that leaves a kind without a head, or softmax heads that its key/value heads do not
                divide.
        """
        linear = self.n_heads // 2 if self.mixed_linear_heads is None else self.mixed_linear_heads
        softmax = self.n_heads - linear
        if not 1 <= linear < self.n_heads:
            raise ValueError(
                f"AttentionConfig.mixed_linear_heads: {linear} of n_heads={self.n_heads}; legal: at least one head of"
                " either kind"
            )
        kv = max(1, softmax * self.n_kv_heads // self.n_heads)
        if softmax % kv != 0:
            raise ValueError(
                f"AttentionConfig.mixed_linear_heads: {linear} leaves {softmax} softmax heads for {kv} of"
                f" n_kv_heads={self.n_kv_heads}; legal: softmax heads that they divide"
            )
        return softmax, kv, linear

    @property
    def key_heads(self) -> int:
        """Heads of a delta rule's queries and keys."""
        return self.linear_key_heads or self.linear_shape[0]

    @property
    def conv_widths(self) -> tuple[int, int, int]:
        """Channels of the short convolution before a delta rule: queries, keys and values of all heads side by side."""
        H, K, V = self.linear_shape
        return self.key_heads * K, self.key_heads * K, H * V

    @property
    def conv_channels(self) -> int:
        """All of them."""
        return sum(self.conv_widths)

    @property
    def short_conv_channels(self) -> int:
        """Channels of a gated short convolution."""
        return self.short_conv_dim or self.n_heads * self.head_dim
