"""An exported hybrid-attention mixture-of-experts model, in torch and transformers alone: these files travel with the
weights, and `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` runs them.

The cache is transformers' own. Its argument is called `past_key_values` up to transformers 5.23 and `cache` from 5.24
on; both names are taken, and no argument that is not known is swallowed: a model that ignored its cache would decode
every token without its past.

Legend: B batch, T tokens, D model width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .attention_hybrid_moe import ATTENTION, Norm, Past, Projection
from .configuration_hybrid_moe import HybridMoEConfig
from .experts_hybrid_moe import MoE


class Block(nn.Module):
    """Attention and experts, each around the residual stream, which is fp32."""

    def __init__(self, config: HybridMoEConfig, index: int) -> None:
        super().__init__()
        block = config.blocks[index]
        before, behind = block["norm"] != "post", block["norm"] != "pre"
        self.dtype = getattr(torch, config.compute_dtype)

        def norm(present: bool) -> nn.Module:
            return Norm(config.hidden_size, config.norm_eps, config.unit_offset) if present else nn.Identity()

        self.attention_norm, self.attention_out_norm = norm(before), norm(behind)
        self.attention = ATTENTION[block["letter"]](block, config.hidden_size, index)
        self.moe_norm, self.moe_out_norm = norm(before), norm(behind)
        self.moe = MoE(block, config.hidden_size)

    def forward(self, x_BTD: Tensor, past: Past) -> Tensor:
        attended_BTD = self.attention(self.attention_norm(x_BTD).to(self.dtype), past)
        x_BTD = x_BTD + self.attention_out_norm(attended_BTD)
        mixed_TD = self.moe(self.moe_norm(x_BTD).to(self.dtype).flatten(0, 1))
        return x_BTD + self.moe_out_norm(mixed_TD).view_as(x_BTD)


class HybridMoEPreTrainedModel(PreTrainedModel):
    """Loading and saving."""

    config_class = HybridMoEConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    # A linear state cannot forget its last tokens, as assisted generation would ask it to.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Of weights that a checkpoint does not hold.
        if isinstance(module, Norm):
            init.constant_(module.weight, 0.0 if module.unit_offset else 1.0)
            return
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                generator = torch.Generator(parameter.device).manual_seed(parameter.numel())
                init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
            else:
                init.constant_(parameter, 1.0 if name in ("skip_H", "norm_X") else 0.0)
        for buffer in module.buffers(recurse=False):
            init.constant_(buffer, 0.0)


class HybridMoEModel(HybridMoEPreTrainedModel):
    """Embedding, blocks and last norm."""

    def __init__(self, config: HybridMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(len(config.blocks)))
        self.norm = Norm(config.hidden_size, config.norm_eps, config.unit_offset)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        cache=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> MoeModelOutputWithPast:
        """Hidden states behind the last norm.

        Args:
            input_ids: int64 [B, T], those behind what the cache has seen; or `inputs_embeds` [B, T, D] in their place.
            attention_mask: [B, past + T], 0 for padding; None without any.
            position_ids: [B, T]; counted over what is no padding by default.
            past_key_values, cache: transformers' cache, under its name up to 5.23 or from 5.24 on; updated in place.
        """
        if past_key_values is not None and cache is not None and past_key_values is not cache:
            raise ValueError("past_key_values and cache are two names of one thing; give one of them")
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is None and (_by_default(self) if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        B, T, _ = x_BTD.shape
        start = 0 if cache is None else cache.get_seq_length()
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] != start + T:
                shape = tuple(attention_mask.shape)
                raise ValueError(f"attention_mask of shape {shape}; legal: ({B}, {start + T}), past and present tokens")
            if position_ids is None:
                position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp_min(0)[:, -T:]
            attention_mask = None if bool(attention_mask.all()) else attention_mask
        if position_ids is None:
            position_ids = torch.arange(start, start + T, device=x_BTD.device)[None].expand(B, -1)
        past = Past(cache, position_ids, attention_mask)
        x_BTD = x_BTD.float()
        for block in self.blocks:
            x_BTD = block(x_BTD, past)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(x_BTD), past_key_values=cache)


def _by_default(model: HybridMoEModel) -> bool:
    """Whether a call that says nothing of it makes a cache."""
    return getattr(model.config, "use_cache", True) and not model.training


class HybridMoEForCausalLM(HybridMoEPreTrainedModel, GenerationMixin):
    """The model with its head."""

    def __init__(self, config: HybridMoEConfig) -> None:
        super().__init__(config)
        self.model = HybridMoEModel(config)
        self.lm_head = Projection(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        cache=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> MoeCausalLMOutputWithPast:
        """Logits of the next token; arguments as of `HybridMoEModel`.

        Args:
            labels: [B, T], shifted here, -100 for tokens that do not count: their mean loss is returned. Losses of
                routers are not part of it.
            logits_to_keep: of the last so many positions alone; all by default.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        x_BTD = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(x_BTD[:, kept].to(getattr(torch, self.config.compute_dtype)))
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            # What the outputs call it is transformers' affair.
            past_key_values=outputs[1] if len(outputs) > 1 else None,
        )
