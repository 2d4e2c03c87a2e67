"""Configuration of one mixture-of-experts layer."""

import dataclasses

from foundation.numbers import check_numbers
from routing.router import RouterConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClampedSwiGLU:
    """g sigmoid(slope g) (u + 1) with g at most `limit` and u within it, either way (gpt-oss, arXiv 2508.10925).

    Raises:
        ValueError: for a slope or a limit that is not above 0.
    """

    slope: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("slope", "limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"ClampedSwiGLU.{name}: {getattr(self, name)}; legal: above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertFormat:
    """How experts' weights are stored where they are not fp32, see `moe.packed`.

    Attributes:
        bits: of a weight: 16 (bf16), 8 or 4.
        group: consecutive inputs that share a scale; not read with 16 bits.
        zero_point: whether they share an offset, too.

    Raises:
        ValueError: for other bits, or a group that is no multiple of 8.
    """

    bits: int = 8
    group: int = 32
    zero_point: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (16, 8, 4):
            raise ValueError(f"ExpertFormat.bits: {self.bits}; legal: 16, 8, 4")
        if self.group < 8 or self.group % 8:
            raise ValueError(f"ExpertFormat.group: {self.group}; legal: a multiple of 8")

    def n_bytes(self, n_in: int, n_out: int) -> int:
        """Of a weight [n_in, n_out], with its scales and offsets of 2 bytes."""
        codes = -(-n_in * self.bits // 8) * n_out
        shared = 0 if self.bits == 16 else 2 if self.zero_point else 1
        return codes + 2 * shared * -(-n_in // self.group) * n_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routed experts, and beside them one shared expert that every token passes.

    Attributes:
        n_experts: number of routed experts.
        d_expert: hidden width of each; 0 of a single one for none: a block that is attention alone.
        d_shared: hidden width of the shared expert; 0 for none.
        d_latent: width of a latent that routed experts read and write, x W_in before them and y W_out behind their sum
            (Nemotron 3, arXiv 2512.20848); 0 for none.
        shared_gate: every token multiplies the shared expert's output by sigmoid(x w) (arXiv 2407.10671).
        expert_bias: routed experts add a bias to both their projections.
        clamped: the activation of routed experts, in place of SiLU(g) u.
        gated: experts are SwiGLU networks; without gates they are relu(x W_up)^2 W_down, the shared one too (arXiv
            2109.08668).
        backend: of the expert computation, see `moe.backends.choose_backend`.
        packed: the form in which routed experts' weights are stored, for evaluation and generation; None: fp32.
        router: how tokens choose their experts.

    Raises:
        ValueError: for a number or a width that makes no sense.
    """

    n_experts: int = 80
    d_expert: int = 256
    d_shared: int = 0
    d_latent: int = 0
    shared_gate: bool = False
    expert_bias: bool = False
    clamped: ClampedSwiGLU | None = None
    gated: bool = True
    backend: str = "auto"
    packed: ExpertFormat | None = None
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)

    # Whether the policy fits so many experts is asked where a router is built: sizes and policy are often replaced one
    # after the other.
    def __post_init__(self) -> None:
        check_numbers(self, n_experts=1, d_expert=0, d_shared=0, d_latent=0)
        if self.d_expert == 0 and (self.n_experts > 1 or self.d_shared):
            raise ValueError(
                f"MoEConfig.d_expert: 0 of {self.n_experts} experts and a shared one of width {self.d_shared}; legal: 1"
                " or more, or no experts at all (n_experts 1, d_shared 0)"
            )
        if self.shared_gate and not self.d_shared:
            raise ValueError("MoEConfig.shared_gate: True without a shared expert; legal: False, or d_shared above 0")
        if self.clamped is not None and not self.gated:
            raise ValueError("MoEConfig.gated: False with clamped, which is of gated experts; legal: True")
        if self.packed is not None and self.backend != "auto":
            raise ValueError(f"MoEConfig.backend: {self.backend!r} with packed experts; legal: auto")
        if self.has_options and self.backend not in ("auto", "reference"):
            raise ValueError(
                f"MoEConfig.backend: {self.backend!r} knows neither expert_bias, clamped, gated=False nor"
                " d_expert=0; legal with them: auto, reference"
            )

    @property
    def has_options(self) -> bool:
        """Whether these experts are computed by `moe.plain_experts`."""
        return self.expert_bias or self.clamped is not None or not self.gated or self.d_expert == 0
