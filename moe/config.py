"""Configuration of one mixture-of-experts layer."""

import dataclasses

from routing.router import RouterConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """n_experts routed experts of hidden width d_expert, beside one shared expert of width d_shared that every token
    passes (0: none). backend: of the expert computation, see `moe.backends.choose_backend`."""

    n_experts: int = 80
    d_expert: int = 256
    d_shared: int = 0
    backend: str = "auto"
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
