"""The configuration of a language model: sizes, layer plan, attention, experts, and what single blocks have of their
own."""

import dataclasses
from collections.abc import Sequence

from attention.config import AttentionConfig
from attention.plan import LayerPlan
from foundation.numbers import check_numbers
from foundation.serialize import nearest
from moe.config import ExpertFormat, MoEConfig

DTYPES = ("float32", "bfloat16")
# Where a block normalises: what goes into attention and experts, what comes out of them, both, or the residual stream
# itself.
NORM_PLACES = ("pre", "post", "sandwich", "stream")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual:
    """What a block multiplies the residual stream, and what it adds to it, by: kept x + added f(x).

    Attributes:
        attention_kept, attention_added: where attention is added.
        experts_kept, experts_added: where experts are added.

    Raises:
        ValueError: for a number that is not above 0.
    """

    attention_kept: float = 1.0
    attention_added: float = 1.0
    experts_kept: float = 1.0
    experts_added: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self)
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"Residual.{field.name}: {getattr(self, field.name)}; legal: above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parametrization:
    """Sizes of the model whose learning rates were tuned, from which a model of other sizes takes what its tensors'
    first weights, rates, decays and epsilons are multiplied by, see `lm.parametrization`.

    Widths that have no base here (heads, shared expert, latent) are taken to grow with d_model.

    Attributes:
        base_d_model: its width.
        base_n_layers: its depth.
        base_d_expert: hidden width of its experts.
        base_k: its experts per token. Their number has no base: at a fixed k nothing depends on it.

    Raises:
        ValueError: for a size below 1.
    """

    base_d_model: int
    base_n_layers: int
    base_d_expert: int
    base_k: float

    def __post_init__(self) -> None:
        check_numbers(self, base_d_model=1, base_n_layers=1, base_d_expert=1, base_k=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One block, resolved.

    Attributes:
        letter: kind of attention, see `attention.kinds`.
        attention: heads, widths, window, rotary embedding.
        moe: experts and router.
        norm: one of `NORM_PLACES`.
        residual: how attention and experts are added.
        shortcut: what the routed experts give is added behind the next block, and the shared expert's at once
            (shortcut-connected experts, arXiv 2404.05019, 2509.01322): the next block need not wait for them.
    """

    letter: str
    attention: AttentionConfig
    moe: MoEConfig
    norm: str = "pre"
    residual: Residual = dataclasses.field(default_factory=Residual)
    shortcut: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOverride:
    """What one block has instead of the model's; None where it has nothing of its own. Fields as in `BlockConfig`."""

    attention: AttentionConfig | None = None
    moe: MoEConfig | None = None
    norm: str | None = None
    residual: Residual | None = None
    shortcut: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder: embedding, `n_layers` blocks of attention and experts, norm, head.

    Attributes:
        vocab_size: number of tokens, the boundary token included.
        d_model: width of the residual stream.
        n_layers: number of blocks; the layer plan is repeated to this depth.
        layer_plan: one letter per layer, see `attention.kinds` or `python -m ablations compare --help`; `SSSF` is three
            sliding-window layers and a full one.
        attention: heads, widths, window, rotary embedding of every block that has none of its own.
        moe: number and width of the experts, router of every block that has none of its own.
        norm: where blocks normalise: "pre" x + f(norm(x)), "post" x + norm(f(x)), "sandwich" x + norm(f(norm(x))),
            "stream" y + f(y) with y = norm(x).
        residual: how blocks add to the residual stream, of every block that has nothing of its own.
        blocks: what single blocks have of their own: nothing, or one entry per block, lowest first.
        norm_eps: added to the mean square in every RMSNorm.
        unit_offset: the weights of the RMSNorms over the residual stream are what their scale has beyond one, see
            `attention.norm`.
        tied_embeddings: the head is the embedding (arXiv 1608.05859): one matrix, stored, trained and counted once.
        embedding_scale: multiplies what the embedding gives to the residual stream (arXiv 2203.03466).
        logit_scale: multiplies the logits.
        document_boundary: token that begins a document, where attention keeps the documents of a row apart: no layer
            sees beyond it, as if each stood alone. None for packed text that is one. Text that is read into a cache is
            one document.
        parametrization: sizes that learning rates were tuned at, by which first weights, what blocks add, and every
            tensor's rate are scaled (CompleteP); None: they are not.
        dtype: of activations and of weights as they enter a product; parameters stay fp32.

    Raises:
        ValueError: for an unknown dtype or place of norms, a size below 1, a wrong number of `blocks`, a plan that
            does not parse, isolated documents under a policy that mixes tokens, or attention that a layer cannot have
            or cannot share with the layer whose keys and values it reads.
            does not parse, attention that a layer cannot have or cannot share with the layer whose keys and values
            it reads, or a parametrization of a model that its rules do not hold for.
    """

    vocab_size: int = 4096
    d_model: int = 128
    n_layers: int = 8
    layer_plan: str = "F"
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    norm: str = "pre"
    residual: Residual = dataclasses.field(default_factory=Residual)
    blocks: tuple[BlockOverride, ...] = ()
    norm_eps: float = 1e-5
    unit_offset: bool = False
    tied_embeddings: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    document_boundary: int | None = None
    parametrization: Parametrization | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"ModelConfig.dtype: {self.dtype!r} is not supported; {nearest(self.dtype, DTYPES)}")
        check_numbers(self, vocab_size=1, d_model=1, n_layers=1, norm_eps=0)
        for name in ("embedding_scale", "logit_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"ModelConfig.{name}: {getattr(self, name)}; legal: above 0")
        if len(self.blocks) not in (0, self.n_layers):
            raise ValueError(f"ModelConfig.blocks: {len(self.blocks)} for {self.n_layers} blocks; legal: one each")
        norms = {"ModelConfig.norm": self.norm}
        norms |= {f"ModelConfig.blocks[{i}].norm": block.norm for i, block in enumerate(self.blocks) if block.norm}
        for place, norm in norms.items():
            if norm not in NORM_PLACES:
                raise ValueError(f"{place}: {norm!r} is not supported; {nearest(norm, NORM_PLACES)}")
        self.plan.check(self.attentions)
        self._check_shortcuts()
        self._check_isolation()
        if self.parametrization is not None:
            self._check_parametrization()

    def _check_parametrization(self) -> None:
        """The rules are derived for pre-norm blocks, a head of its own, and routing weights that sum to one."""
        place = "ModelConfig.parametrization"
        if self.tied_embeddings:
            raise ValueError(f"{place}: a tied head has the embedding's rate and its own at once; legal: untied")
        for layer in range(self.n_layers):
            block = self.block(layer)
            if block.norm != "pre":
                raise ValueError(f"{place}: norm {block.norm!r} in block {layer}; legal: pre")
            if not block.moe.router.renormalise:
                raise ValueError(
                    f"{place}: routing weights of block {layer} that sum to no fixed number; legal:"
                    " RouterConfig.renormalise True"
                )

    def _check_shortcuts(self) -> None:
        for layer, own in enumerate(self.blocks):
            if own.shortcut and (layer + 1 == self.n_layers or (own.norm or self.norm) != "pre"):
                raise ValueError(
                    f"ModelConfig.blocks[{layer}].shortcut: True in block {layer} of {self.n_layers} with norm"
                    f" {own.norm or self.norm!r}; legal: a block below another one, with norm 'pre'"
                )

    @property
    def plan(self) -> LayerPlan:
        return LayerPlan.parse(self.layer_plan, self.n_layers)

    def _check_isolation(self) -> None:
        if self.document_boundary is None:
            return
        if not 0 <= self.document_boundary < self.vocab_size:
            raise ValueError(
                f"ModelConfig.document_boundary: {self.document_boundary}; legal: a token below {self.vocab_size}"
            )
        for layer in range(self.n_layers):
            policy = self.block(layer).moe.router.policy
            if policy.needs_whole_batch:
                raise ValueError(
                    f"isolated documents: {type(policy).__name__} in block {layer} chooses a token's experts by the"
                    " other tokens of its batch; legal: a policy that does not, or documents that are not isolated"
                )

    @property
    def attentions(self) -> tuple[AttentionConfig, ...]:
        """The attention of every block, lowest first."""
        own = self.blocks or (BlockOverride(),) * self.n_layers
        return tuple(block.attention or self.attention for block in own)

    def block(self, layer: int) -> BlockConfig:
        """What block `layer` is made of, from 0 at the embedding."""
        own = self.blocks[layer] if self.blocks else BlockOverride()
        return BlockConfig(
            letter=self.plan.letters[layer],
            attention=own.attention or self.attention,
            moe=own.moe or self.moe,
            norm=own.norm or self.norm,
            residual=own.residual or self.residual,
            shortcut=bool(own.shortcut),
        )

    @property
    def packed(self) -> ExpertFormat | None:
        """The form in which experts are stored; None where they are fp32."""
        return next((moe.packed for moe in (self.block(i).moe for i in range(self.n_layers)) if moe.packed), None)

    def with_packed(self, form: ExpertFormat | None) -> "ModelConfig":
        """The model with the experts of all blocks stored in this form; None: in fp32."""

        def packed(moe: MoEConfig) -> MoEConfig:
            return dataclasses.replace(moe, packed=form, backend=moe.backend if form is None else "auto")

        blocks = tuple(
            block if block.moe is None else dataclasses.replace(block, moe=packed(block.moe)) for block in self.blocks
        )
        return dataclasses.replace(self, moe=packed(self.moe), blocks=blocks)

    def with_blocks(self, blocks: Sequence[BlockConfig]) -> "ModelConfig":
        """The model with these blocks, one per layer. What equals the model's own is not repeated in `blocks`, so equal
        models have equal configurations."""
        assert len(blocks) == self.n_layers
        overrides = tuple(
            BlockOverride(
                attention=None if block.attention == self.attention else block.attention,
                moe=None if block.moe == self.moe else block.moe,
                norm=None if block.norm == self.norm else block.norm,
                residual=None if block.residual == self.residual else block.residual,
                shortcut=block.shortcut or None,
            )
            for block in blocks
        )
        return dataclasses.replace(
            self,
            layer_plan="".join(block.letter for block in blocks),
            blocks=() if all(override == BlockOverride() for override in overrides) else overrides,
        )
