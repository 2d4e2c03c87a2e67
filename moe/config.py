"""Configuration of one mixture-of-experts layer."""

import dataclasses

from foundation.numbers import check_numbers
from routing.router import RouterConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routed experts, and beside them one shared expert that every token passes.

    Attributes:
        n_experts: number of routed experts.
        d_expert: hidden width of each.
        d_shared: hidden width of the shared expert; 0 for none.
        backend: of the expert computation, see `moe.backends.choose_backend`.
        router: how tokens choose their experts.

    Raises:
        ValueError: for a number or a width that makes no sense.
    """

    n_experts: int = 80
    d_expert: int = 256
    d_shared: int = 0
    backend: str = "auto"
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)

    # Whether the policy fits so many experts is asked where a router is built: sizes and policy are often replaced one
    # after the other.
    def __post_init__(self) -> None:
        check_numbers(self, n_experts=1, d_expert=1, d_shared=0)
