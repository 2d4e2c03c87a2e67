"""Our model and transformers' of the same sizes, behind one face: what `python -m lm bench --peers` times in turn.

transformers runs as its users run it: SDPA attention, its grouped_mm experts, its dynamic cache, logits of the last
position in a prefill. Both sides have fresh weights and see the same tokens.

Legend: B batch, T tokens, D width.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from attention.config import AttentionConfig
from attention.layer_states import Alias
from lm.config import ModelConfig
from lm.model import LanguageModel
from moe.config import MoEConfig
from moe.freed_memory import keep_freed_memory
from routing.policies.top_k import TopK
from routing.router import RouterConfig
from triton_kernels.native.library import native, rounds_products

VOCABULARY = 8192
LONGEST = 2**17


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One pair of models of the same sizes: 80 experts a layer, 12 of them per token.

    Attributes:
        name: what the table says.
        family: of transformers' model, a key of `FAMILIES`.
        layer_plan: of ours.
        d_model: width; heads are 64 wide, half as many for keys and values.
        d_expert: hidden width of an expert.
        d_shared: of the shared expert; 0 for none.
    """

    name: str
    family: str
    layer_plan: str
    d_model: int = 256
    d_expert: int = 64
    d_shared: int = 0
    n_layers: int = 8
    n_experts: int = 80
    k: int = 12

    @property
    def heads(self) -> int:
        return self.d_model // 64

    def model_config(self, dtype: str) -> ModelConfig:
        """Of our side."""
        return ModelConfig(
            vocab_size=VOCABULARY,
            d_model=self.d_model,
            n_layers=self.n_layers,
            layer_plan=self.layer_plan,
            dtype=dtype,
            attention=AttentionConfig(n_heads=self.heads, n_kv_heads=self.heads // 2, head_dim=64),
            moe=MoEConfig(
                n_experts=self.n_experts,
                d_expert=self.d_expert,
                d_shared=self.d_shared,
                router=RouterConfig(policy=TopK(k=self.k)),
            ),
        )


CASES = {
    case.name: case
    for case in (
        Case(name="F", family="olmoe", layer_plan="F"),
        # Qwen3-Next's blocks cannot be without a shared expert.
        Case(name="GGGF", family="qwen3_next", layer_plan="GGGF", d_shared=64),
        Case(name="F, shared expert", family="qwen2_moe", layer_plan="F", d_shared=128),
        Case(name="F, width 512", family="olmoe", layer_plan="F", d_model=512, d_expert=128),
    )
}


class Side(Protocol):
    """One of the two models."""

    def kernels(self) -> str:
        """What computes it, in words."""
        ...

    def training(self, tokens_BT: Tensor, targets_BT: Tensor) -> None:
        """Forward and backward."""
        ...

    def prefill(self, tokens_BT: Tensor) -> None:
        """Fills a fresh cache and gives the logits of the last position."""
        ...

    def decoder(self, batch_size: int, length: int, steps: int) -> Callable[[], Any]:
        """One more token of each sequence after `length`, at every call; enough memory for `steps` of them. The cache's
        keys and values are random numbers: what they are changes no time."""
        ...


class Ours:
    def __init__(self, case: Case, dtype: str) -> None:
        # As training and generation do.
        keep_freed_memory()
        self.model = LanguageModel(case.model_config(dtype)).init_weights(0)

    def kernels(self) -> str:
        products = "of bf16" if rounds_products(self.model._dtype) else "of fp32"
        return f"C ({native().reason}), products {products}" if native().library else "torch's operators"

    def training(self, tokens_BT: Tensor, targets_BT: Tensor) -> None:
        self.model.train()
        self.model.begin_step(0, 0)
        # As a training step does.
        output = self.model.run(tokens_BT, 0, targets_BT)
        (output.loss + output.routing_loss).backward()
        self.model.zero_grad()
        self.model.after_step()

    @torch.no_grad()
    def prefill(self, tokens_BT: Tensor) -> None:
        self.model.eval()
        self.model(tokens_BT, self.model.new_cache(*tokens_BT.shape), last_only=True)

    @torch.no_grad()
    def decoder(self, batch_size: int, length: int, steps: int) -> Callable[[], Any]:
        self.model.eval()
        cache = self.model.new_cache(batch_size, length + steps)
        for state in cache.layers:
            for tensor in state.tensors.values():
                tensor.normal_(generator=_fresh())
            if not isinstance(state, Alias):
                state.length = length  # pyright: ignore[reportAttributeAccessIssue]
        token_B1 = torch.zeros(batch_size, 1, dtype=torch.int64)
        return torch.no_grad()(lambda: self.model(token_B1, cache).logits_BTV)


class Transformers:
    def __init__(self, case: Case, dtype: str) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        self.model = FAMILIES[case.family](case).to(getattr(torch, dtype))

    def kernels(self) -> str:
        config, torchs = self.model.config, torch.backends.cpu.get_cpu_capability()
        return f"attention {config._attn_implementation}, experts {config._experts_implementation}, torch's {torchs}"

    def training(self, tokens_BT: Tensor, targets_BT: Tensor) -> None:
        self.model.train()
        # The labels are shifted inside: ours train on as many targets but one.
        self.model(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
        self.model.zero_grad()

    @torch.inference_mode()
    def prefill(self, tokens_BT: Tensor) -> None:
        self.model.eval()
        self.model(input_ids=tokens_BT, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def decoder(self, batch_size: int, length: int, steps: int) -> Callable[[], Any]:
        self.model.eval()
        cache = self.model(input_ids=torch.zeros(batch_size, 16, dtype=torch.int64), use_cache=True).past_key_values
        for layer in cache.layers:
            if getattr(layer, "keys", None) is not None:
                shape = (batch_size, layer.keys.shape[1], length, layer.keys.shape[3])
                layer.keys, layer.values = (
                    torch.randn(shape, generator=_fresh(), dtype=layer.keys.dtype) for _ in range(2)
                )
        token_B1 = torch.zeros(batch_size, 1, dtype=torch.int64)
        return torch.inference_mode()(
            lambda: self.model(input_ids=token_B1, past_key_values=cache, use_cache=True).logits
        )


def _fresh() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _olmoe(case: Case) -> Any:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    return OlmoeForCausalLM(
        OlmoeConfig(
            **_common(case),
            intermediate_size=case.d_expert,
            num_experts=case.n_experts,
            num_experts_per_tok=case.k,
            norm_topk_prob=True,
            output_router_logits=True,
        )
    )


def _qwen2_moe(case: Case) -> Any:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **_common(case),
            moe_intermediate_size=case.d_expert,
            shared_expert_intermediate_size=case.d_shared,
            num_experts=case.n_experts,
            num_experts_per_tok=case.k,
            norm_topk_prob=True,
            output_router_logits=True,
        )
    )


def _qwen3_next(case: Case) -> Any:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **_common(case),
            head_dim=64,
            moe_intermediate_size=case.d_expert,
            shared_expert_intermediate_size=case.d_shared,
            num_experts=case.n_experts,
            num_experts_per_tok=case.k,
            linear_num_key_heads=case.heads,
            linear_num_value_heads=case.heads,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            layer_types=[
                "full_attention" if case.layer_plan[layer % len(case.layer_plan)] == "F" else "linear_attention"
                for layer in range(case.n_layers)
            ],
            output_router_logits=True,
        )
    )


def _common(case: Case) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": case.d_model,
        "num_hidden_layers": case.n_layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.heads // 2,
        "max_position_embeddings": LONGEST,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


FAMILIES: dict[str, Callable[[Case], Any]] = {"olmoe": _olmoe, "qwen2_moe": _qwen2_moe, "qwen3_next": _qwen3_next}
SIDES: dict[str, Callable[[Case, str], Side]] = {"ours": Ours, "transformers": Transformers}
