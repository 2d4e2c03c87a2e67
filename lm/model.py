"""The language model: a pre-norm decoder whose blocks mix attention of any kind with a mixture of experts.

Legend: B batch, T tokens, D model width, V vocabulary.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.cache import HybridCache
from attention.isolation import Documents, find_documents
from attention.kinds import KINDS
from attention.norm import describe_norm
from foundation.exact_buffers import ExactBuffers
from lm.block import Block, stream_norm
from lm.config import ModelConfig
from lm.decode_step import DecodeStep, step_of, takes_one_call
from lm.parametrization import scale_initial
from moe.backends import Choice
from routing.policy import PolicyConfig
from routing.router import Router, Routing
from triton_kernels.native.decode_step import NativeBlock, NativeModel, NotInOneCall, Watch
from triton_kernels.native.kept_weights import keeps_weights
from triton_kernels.native.library import products_here, rounds_products, takes_many_rows, torch_by_one_thread
from triton_kernels.native.loss import head_losses
from triton_kernels.native.projection import project

IGNORED_TARGET = -100
# Adding many small updates to a bf16 residual stream loses them: measured, 0.15 nats at 100k tokens (notes/LOG.md).
RESIDUAL_DTYPE = "float32"


@dataclasses.dataclass(frozen=True)
class Output:
    """Logits, or the mean loss in their place, and, per block that ran, how its tokens were routed: `routings`, made
    when they are asked for.

    Attributes:
        logits_BTV: [B, 0, V] of a call with targets.
        loss: mean of `token_losses`, fp32 scalar, of a call with targets; otherwise 0.
        losses_BT: `token_losses` without gradient, of a call with targets.
    """

    logits_BTV: Tensor
    routings_of: Callable[[], tuple[Routing, ...]]
    loss: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))
    losses_BT: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, 0))

    @cached_property
    def routings(self) -> tuple[Routing, ...]:
        return self.routings_of()

    @property
    def routing_loss(self) -> Tensor:
        """Sum of all blocks' auxiliary losses, already weighted by their coefficients; fp32 scalar."""
        total = self.logits_BTV.new_zeros((), dtype=torch.float32)
        for routing in self.routings:
            for loss in routing.losses.values():
                total = total + loss
        return total


class LanguageModel(ExactBuffers):
    """Embedding, blocks, norm, head. Parameters and the residual stream are fp32; `config.dtype` is what products
    compute in.

    The blocks can be cut at a boundary: `prefix` runs the embedding and the blocks below, `run` the rest, and
    `run(prefix(tokens, b), b)` equals the whole. Staged training stores what crosses the boundary.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding_VD = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.n_layers))
        self.norm = stream_norm(config)
        self.head_VD = None if config.tied_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.d_model))

    @property
    def head(self) -> Tensor:
        """The head's matrix [V, D]: one of its own, or the embedding."""
        return self.embedding_VD if self.head_VD is None else self.head_VD

    def init_weights(self, seed: int, layers: Iterable[int] | None = None) -> "LanguageModel":
        """Fresh weights from `seed`, each block from a generator of its own: block i's weights do not depend on the
        other blocks.

        Args:
            layers: re-initialise only these blocks (embedding, norm and head keep their weights); all and everything by
                default.
        """
        layers = None if layers is None else tuple(layers)
        for index in range(self.config.n_layers) if layers is None else layers:
            cast(Block, self.blocks[index]).init_weights(_generator(seed, index))
        if layers is None:
            self.norm.reset()
            # A tied one gives logits of variance one.
            std = self.config.d_model**-0.5 if self.head_VD is None else 1.0
            nn.init.normal_(self.embedding_VD, std=std, generator=_generator(seed, self.config.n_layers))
            if self.head_VD is not None:
                # A zero head starts from the uniform distribution over tokens: no time is lost unlearning confident
                # noise.
                nn.init.zeros_(self.head_VD)
        if self.config.parametrization is not None:
            scale_initial(self, layers)
        return self

    def forward(
        self,
        tokens_BT: Tensor,
        cache: HybridCache | None = None,
        *,
        last_only: bool = False,
        targets_BT: Tensor | None = None,
    ) -> Output:
        """Logits of the next token at every position, or at the last one only, or their loss.

        Args:
            tokens_BT: int64 token ids. With a cache they follow the `cache.length` tokens it has seen.
            cache: updated in place.
            last_only: logits_BTV for the last position alone, [B, 1, V]: all that a prompt is read for, and the logits
                of a long one take more memory than its model. Behind its attention the last block computes no other
                position either, and its routing is of that one, unless its router goes by all of them or is heard.
            targets_BT: the mean loss is asked for, and no logits: where the machine can, they never exist as a whole.

        Raises:
            ValueError: for tokens that are not [B, T], or a token id outside the vocabulary, on the CPU; a GPU stops
                by an assertion of its own.
        """
        if cache is not None and not self.training and takes_one_call(tokens_BT, self.embedding_VD, last_only):
            step = step_of(cache, lambda: self._described(cache, len(tokens_BT)))
            if step is not None and step.ready(tokens_BT):
                return Output(*step.run(tokens_BT, cache))
        x_BTD = self._embed(tokens_BT)
        documents = self._documents(tokens_BT) if cache is None else None
        return self._from_block(x_BTD, 0, cache, last_only, targets_BT, documents)

    def _documents(self, tokens_BT: Tensor) -> Documents | None:
        """What attention keeps apart, where it does."""
        boundary = self.config.document_boundary
        return None if boundary is None else find_documents(tokens_BT, boundary)

    def _described(self, cache: HybridCache, batch_size: int) -> DecodeStep:
        """This model and a cache for a decode step that is one call of C.

        Raises:
            NotInOneCall: for what the call does not know.
        """
        if type(self) is not LanguageModel or len(cache.layers) != len(self.blocks):
            raise NotInOneCall(f"a {type(self).__name__} with a cache of {len(cache.layers)} layers")
        V, D, eps = self.config.vocab_size, self.config.d_model, self.config.norm_eps
        if self.config.embedding_scale != 1.0 or self.config.logit_scale != 1.0:
            raise NotInOneCall("scaled embeddings or logits")
        n_bytes = sum(parameter.nbytes for parameter in self.parameters())
        watch = Watch(batch_size, D, keeps=keeps_weights(self._dtype, n_bytes))
        watch.module(self)
        watch.module(self.blocks)
        watch.same(self, "config")
        blocks = []
        for block, state in zip(self.blocks, cache.layers):
            if type(block) is not Block:
                raise NotInOneCall(f"a block that is a {type(block).__name__}")
            blocks.append(NativeBlock())
            block.describe(blocks[-1], watch, state, eps)
        for block in blocks[:-1]:
            block.alone = False
        native = NativeModel(vocabulary=V, width=D, batch=batch_size, eps=eps)
        native.embedding = watch.parameter(self, "embedding_VD", V, D)
        native.head = watch.weight(self, "embedding_VD" if self.head_VD is None else "head_VD", V, D, transposed=True)
        native.norm = describe_norm(self.norm, watch, width=D, eps=eps)
        return DecodeStep(native, blocks, watch, self.routers(), cache, self._dtype)

    def prefix(self, tokens_BT: Tensor, boundary: int) -> Tensor:
        """The residual stream x_BTD that enters block `boundary`, fp32."""
        documents = self._documents(tokens_BT)
        x_BTD, _, _ = self._run_blocks(self._embed(tokens_BT), 0, boundary, None, documents)
        return x_BTD

    def run(self, inputs: Tensor, boundary: int, targets_BT: Tensor | None = None) -> Output:
        """What trains above a boundary: blocks [boundary, n_layers), norm and head; with boundary 0 the whole model.

        Args:
            inputs: tokens_BT where `boundary` is 0, else the x_BTD that `prefix` returned.
            targets_BT: see `forward`.

        Raises:
            ValueError: for a boundary above 0 in a model that keeps documents apart.
        """
        # Through __call__ for the whole model: that is where FSDP gathers the root's weights.
        if boundary == 0:
            return self(inputs, targets_BT=targets_BT)
        return self.above(inputs, boundary, targets_BT)

    def above(self, x_BTD: Tensor, boundary: int, targets_BT: Tensor | None = None) -> Output:
        """`run` for a boundary above 0."""
        if self.config.document_boundary is not None:
            raise ValueError(
                f"isolated documents: what enters block {boundary} does not say where documents begin; legal: nothing"
                " frozen below what trains"
            )
        return self._from_block(x_BTD, boundary, None, targets_BT=targets_BT)

    def frozen_names(self, boundary: int) -> frozenset[str]:
        """Parameters and buffers below a boundary: the embedding and blocks [0, boundary); none where it is 0. A tied
        head is frozen with the embedding."""
        if boundary == 0:
            return frozenset()
        return frozenset({"embedding_VD"}) | self.names_in(self.blocks[:boundary])

    def names_in(self, modules: Iterable[nn.Module]) -> frozenset[str]:
        """Names, as `state_dict` has them, of all parameters and buffers that these parts of the model hold."""
        paths = {module: path for path, module in self.named_modules()}
        return frozenset(f"{paths[module]}.{name}" for module in modules for name in module.state_dict())

    def begin_step(self, step: int, seed: int) -> None:
        """Tells every router the training step and seed that its random draws depend on."""
        for router in self.routers():
            router.begin_step(step, seed)

    def after_step(self, boundary: int = 0) -> None:
        """Moves selection biases and budget controllers of the blocks that train, after the optimizer's step."""
        for router in self.routers(boundary):
            router.after_step()

    def set_policy(self, policy: PolicyConfig, boundary: int = 0) -> None:
        """Runs the same weights under another routing policy in blocks [boundary, n_layers), but for blocks of a single
        expert, a dense MLP, which choose nothing.

        Raises:
            ValueError: for a policy that these layers could not have been built with, see `Router.set_policy`; no
                layer has it then.
        """
        # Blocks may differ, and one that refuses must not leave the ones below it changed.
        routers = [router for router in self.routers(boundary) if router.n_experts > 1]
        for router in routers:
            router.module_of(policy)
        for router in routers:
            router.set_policy(policy)

    def routers(self, boundary: int = 0) -> list[Router]:
        """The routers of blocks [boundary, n_layers), lowest first."""
        return [cast(Block, block).moe.router for block in self.blocks[boundary:]]

    def expert_backend(self, n_tokens: int = 0) -> Choice:
        """What computes the experts on this model's device, and why; of so many tokens, where their number is known to
        the policy, what is measured to be the fastest."""
        moe = cast(Block, self.blocks[-1]).moe
        x = torch.empty(0, dtype=self._dtype, device=self.embedding_VD.device)
        return moe.experts.choice(x, round(n_tokens * (moe.router.policy.asked_experts or 0)))

    def mostly_in_c(self) -> bool:
        """Whether all that is large in training or reading this model is computed in C: attention, experts, norms,
        loss."""
        attention = all(KINDS[letter].in_c for letter in self.config.plan.letters)
        return attention and self._dtype in products_here() and takes_many_rows(self.head, dtypes=products_here())

    def its_threads(self) -> contextlib.AbstractContextManager[None]:
        """Around training and evaluation: see `torch_by_one_thread`, where the model is mostly in C."""
        return torch_by_one_thread() if self.mostly_in_c() else contextlib.nullcontext()

    def new_cache(self, batch_size: int, max_length: int, *, eight_bits: str | None = None) -> HybridCache:
        """An empty cache for `max_length` tokens of each of `batch_size` sequences, on the model's device; keys and
        values as int8 or fp8 on request."""
        attentions, plan, device = self.config.attentions, self.config.plan, self.embedding_VD.device
        return HybridCache(attentions, plan, batch_size, max_length, self._dtype, device, eight_bits=eight_bits)

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.config.dtype)

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        if tokens_BT.dim() != 2:
            raise ValueError(f"tokens: shape {tuple(tokens_BT.shape)}, must be [batch, tokens]")
        try:
            x_BTD = functional.embedding(tokens_BT, self.embedding_VD)
        except IndexError:
            raise ValueError(_outside("tokens", tokens_BT, self.config.vocab_size)) from None
        scale = self.config.embedding_scale
        return x_BTD if scale == 1.0 else x_BTD * scale

    def _from_block(
        self,
        x_BTD: Tensor,
        boundary: int,
        cache: HybridCache | None,
        last_only: bool = False,
        targets_BT: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Output:
        x_BTD, _, routings = self._run_blocks(x_BTD, boundary, self.config.n_layers, cache, documents, last_only)
        x_BTD = self.norm(x_BTD[:, -1:] if last_only else x_BTD)
        if self.config.logit_scale != 1.0:
            x_BTD = x_BTD * self.config.logit_scale
        x_BTD = x_BTD.to(self._dtype)
        if targets_BT is None:
            return Output(project(x_BTD, self.head), lambda: routings)
        no_logits_BTV = x_BTD.new_empty(len(x_BTD), 0, self.config.vocab_size)
        return Output(no_logits_BTV, lambda: routings, *mean_and_token_losses(x_BTD, self.head, targets_BT))

    def _run_blocks(
        self,
        x_BTD: Tensor,
        first: int,
        last: int,
        cache: HybridCache | None,
        documents: Documents | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, dict[int, object], tuple[Routing, ...]]:
        source = self.config.plan.source
        start = cache.position if cache is not None else 0
        kv: dict[int, object] = {}
        routings, later_BTD = [], None
        for index in range(first, last):
            state = cache.layers[index] if cache is not None else None
            # An R layer reads the K/V of the layer that owns them; every other layer is its own source and reads
            # nothing.
            sums_BX = None if cache is None else cache.sums.get(index)
            x_BTD, kv[index], routing, later_BTD = self.blocks[index](
                x_BTD,
                start=start,
                state=state,
                shared=kv.get(source[index]),
                documents=documents,
                sums_BX=sums_BX,
                later_BTD=later_BTD,
                last_only=last_only and index == last - 1,
            )
            if cache is not None and routing.sums_BX is not None:
                cache.sums[index] = routing.sums_BX
            routings.append(routing)
        if later_BTD is not None:
            raise ValueError(
                f"block {last - 1} adds what its experts give behind block {last}; legal: nothing cut between them"
            )
        return x_BTD, kv, tuple(routings)


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of every token in nats, fp32 [B, T]; 0 where the target is `IGNORED_TARGET`.

    Raises:
        ValueError: for another target outside the vocabulary, on the CPU; a GPU stops by an assertion of its own.
    """
    try:
        losses = functional.cross_entropy(
            logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED_TARGET, reduction="none"
        )
    except IndexError:
        raise ValueError(_outside("targets", targets_BT, logits_BTV.shape[-1])) from None
    return losses.view_as(targets_BT)


def mean_and_token_losses(x_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """`Output.loss` and `Output.losses_BT` of the logits x W^T.

    Raises:
        ValueError: for targets of another shape, or see `token_losses`.
    """
    if targets_BT.shape != x_BTD.shape[:2]:
        raise ValueError(f"targets: shape {tuple(targets_BT.shape)}, must be {tuple(x_BTD.shape[:2])}")
    if not takes_many_rows(x_BTD, head_VD, dtypes=products_here()) or targets_BT.dtype != torch.int64:
        losses_BT = token_losses(project(x_BTD, head_VD), targets_BT)
        return losses_BT.mean(), losses_BT.detach()
    try:
        loss, loss_T = head_losses(
            x_BTD.flatten(0, 1).float(),
            head_VD.float(),
            targets_BT.flatten(),
            ignored=IGNORED_TARGET,
            bf16=rounds_products(x_BTD.dtype),
        )
    except ValueError:
        raise ValueError(_outside("targets", targets_BT, len(head_VD))) from None
    return loss, loss_T.view_as(targets_BT)


def _outside(name: str, ids_BT: Tensor, vocab_size: int) -> str:
    return f"{name}: ids from {int(ids_BT.min())} to {int(ids_BT.max())}, must lie in the vocabulary [0, {vocab_size})"


def _generator(seed: int, index: int) -> torch.Generator:
    (state,) = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
