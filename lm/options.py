"""The options of a command line that size a model, and their defaults: the one place where both are.

Every command that builds a model takes these, so that a model of `staged_training run` or `lm bench` is the one that
`ablations compare` compares. What has no option here is changed in a method's file, or from Python by `ModelConfig`.
"""

import dataclasses
from typing import Annotated, Literal

import tyro

from attention.config import AttentionConfig
from attention.kinds import describe_letters
from lm.config import ModelConfig, Parametrization
from lm.precision import fast_dtype
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig

LAYER_PLAN_HELP = f"one letter per layer, repeated to the depth: {describe_letters()}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model that a command line sizes; in a comparison the baseline's, which is also the trunk's.

    Attributes:
        n_layers: blocks.
        d_model: width of the residual stream.
        layer_plan: kinds of attention, see `attention.kinds`.
        n_heads: query heads of a softmax layer.
        n_kv_heads: its key/value heads, a divisor of the query heads.
        head_dim: width of a head.
        window: tokens that a sliding-window layer sees.
        latent_dim: width of what a latent-attention layer (A) caches per token; 4 head_dim by default.
        n_experts: experts per layer.
        d_expert: hidden width of an expert.
        d_shared: hidden width of the expert that every token passes; 0 for none.
        k: experts per token; in a comparison those of the baseline, and of every routing method in the mean.
        rope_base: base of the rotary embedding's wavelengths.
        isolate_documents: keep the documents of a row of packed text apart in attention, as if each stood alone.
        balance_coefficient: of the routers' load balancing loss.
        z_coefficient: of the routers' z-loss.
        dtype: of products; "auto" is bf16 where this machine is fast at it.
        parametrization: "complete_p" scales first weights, what blocks add, and every tensor's learning rate, decay and
            epsilon by the sizes' ratios to those below, so that one learning rate fits all sizes (see
            lm/parametrization.py); at those sizes themselves it changes nothing.
        base_d_model: width at which the learning rate was tuned; read with complete_p, as the three that follow.
        base_n_layers: depth there.
        base_d_expert: hidden width of an expert there.
        base_k: experts per token there; how many experts there are makes no difference.
    """

    n_layers: int = 4
    d_model: int = 128
    layer_plan: Annotated[str, tyro.conf.arg(help=LAYER_PLAN_HELP)] = "SSSF"
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    window: int = 64
    latent_dim: int | None = None
    n_experts: int = 80
    d_expert: int = 16
    d_shared: int = 0
    k: int = 12
    rope_base: float = AttentionConfig.rope_base
    isolate_documents: bool = False
    balance_coefficient: float = RouterConfig.balance_coefficient
    z_coefficient: float = RouterConfig.z_coefficient
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    parametrization: Literal["standard", "complete_p"] = "standard"
    base_d_model: int = 128
    base_n_layers: int = 4
    base_d_expert: int = 16
    base_k: int = 12

    def config(self, vocab_size: int, boundary_id: int | None = None) -> ModelConfig:
        """The model's configuration.

        Args:
            vocab_size: of the tokenizer that the text was prepared with, which is not known before.
            boundary_id: its token that begins a document; None where the text is not of documents.

        Raises:
            ValueError: for sizes that do not fit together, naming the field.
        """
        if self.isolate_documents and boundary_id is None:
            raise ValueError("ModelOptions.isolate_documents: this command packs no documents; legal: without it")
        return ModelConfig(
            vocab_size=vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            layer_plan=self.layer_plan,
            attention=AttentionConfig(
                n_heads=self.n_heads,
                n_kv_heads=self.n_kv_heads,
                head_dim=self.head_dim,
                window=self.window,
                latent_dim=self.latent_dim,
                rope_base=self.rope_base,
            ),
            moe=MoEConfig(
                n_experts=self.n_experts,
                d_expert=self.d_expert,
                d_shared=self.d_shared,
                router=RouterConfig(
                    policy=TopK(k=self.k),
                    balance_coefficient=self.balance_coefficient,
                    z_coefficient=self.z_coefficient,
                ),
            ),
            document_boundary=boundary_id if self.isolate_documents else None,
            parametrization=self._base() if self.parametrization == "complete_p" else None,
            dtype=fast_dtype() if self.dtype == "auto" else self.dtype,
        )

    def _base(self) -> Parametrization:
        return Parametrization(
            base_d_model=self.base_d_model,
            base_n_layers=self.base_n_layers,
            base_d_expert=self.base_d_expert,
            base_k=self.base_k,
        )
