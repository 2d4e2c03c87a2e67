"""`python -m lm parity`: tiny random models of every family, built by transformers, imported, and held against theirs.

Nothing is downloaded. Each model goes through its published form on disk: saved by transformers in shards, imported,
loaded here; exported again and loaded by transformers.

Legend: B batch, T tokens, E experts, V vocabulary.
"""

import contextlib
import copy
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from foundation.command import refuse_unwritable
from foundation.serialize import nearest
from foundation.tables import write_rows
from lm.config import ModelConfig
from lm.model import LanguageModel, Output
from lm.pretrained import load_pretrained
from lm.published.checkpoint import Checkpoint
from lm.published.convert import ExportConfig, ImportConfig, export_model, import_model
from lm.published.double import in_fp64
from lm.published.families import FAMILIES
from lm.published.family import Family
from routing.losses import switch_balance_loss

# Sizes that every tiny model has, unless its family says otherwise.
TINY = {
    **{"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"num_experts_per_tok": 2, "max_position_embeddings": 256},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
}
SEQUENCES, TOKENS, PREFILL = 2, 37, 21
BALANCE = 0.1
# Logarithms of a delta rule's first and last head's rate of forgetting.
DECAYS = (-3.0, 0.0)
# What minimax keeps beside its weights, though it follows from a layer's number.
FIXED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
# In units of the largest value compared with. Where layers have a delta rule, rounding grows in both models.
TOLERANCE, DELTA_TOLERANCE = 5e-6, 1e-4
# Gradients are sums over all tokens, and both sides round them: ours may be as far from those of transformers' model in
# fp64 as this (1e-4 with a delta rule), or as many times as far as transformers' own. Mamba-2's dt_bias is a few sums
# of what mostly cancels: transformers' own are off by 3e-6 to 1.6e-5, ours by 4e-6 to 1.4e-5, from one seed to the
# next.
GRADIENT_TOLERANCE, TIMES = 2e-5, 2.0
# In fp64 nothing but formulas can differ: transformers' gradients go through a file in fp32.
EXACT = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityConfig:
    """Holds ours against transformers', family by family.

    Attributes:
        families: which ones; all of them by default.
        csv: file to write the table to.
        seed: of weights and tokens.
    """

    families: tuple[str, ...] = ()
    csv: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.families:
            if name not in FAMILIES:
                raise ValueError(f"--families {name}: no such family; {nearest(name, FAMILIES)}")


@dataclasses.dataclass(frozen=True)
class Parity:
    """One row of the table.

    Attributes:
        family: its model_type.
        check: what was compared.
        largest_error: the largest difference, in units of the largest value compared with: transformers' in fp32, and
            of gradients transformers' in fp64.
        allowed: the largest error that passes.
        transformers: of gradients, transformers' own error against its fp64.
    """

    family: str
    check: str
    largest_error: float
    allowed: float
    transformers: float | None = None


def parity(config: ParityConfig) -> None:
    """See `ParityConfig`.

    Raises:
        ValueError: where an error is larger than what passes; names family and check.
    """
    refuse_unwritable("--csv", config.csv)
    rows = []
    for name in config.families or FAMILIES:
        for row in checks(FAMILIES[name], config.seed):
            beside = "" if row.transformers is None else f"  transformers {row.transformers:.1e}"
            print(f"{row.family:16} {row.check:28} {row.largest_error:9.1e}  allowed {row.allowed:.0e}{beside}")
            rows.append(row)
    if config.csv is not None:
        write_rows(config.csv, Parity, rows)
    if failed := [f"{row.family}, {row.check}" for row in rows if not row.largest_error <= row.allowed]:
        raise ValueError(f"ours and transformers' disagree: {'; '.join(failed)}")


def checks(family: Family, seed: int) -> Iterator[Parity]:
    """Every row of one family."""
    theirs = published_model(family, seed)
    tokens_BT = torch.randint(TINY["vocab_size"], (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        theirs.save_pretrained(at / "published", max_shard_size="40KB")
        import_model(ImportConfig(source=at / "published", out=at / "model"))
        export_model(ExportConfig(run=at / "model", out=at / "back", shard_bytes=50_000))
        ours = load_pretrained(at / "model")
        yield Parity(family.model_type, "weights after export", _changed_weights(theirs, at / "back"), 0.0)
    allowed = DELTA_TOLERANCE if family.delta_rule else TOLERANCE
    for check, compared in (
        ("logits", _logits),
        ("cached decode", _cached_decode),
        ("prefill in two parts", _prefill),
    ):
        yield Parity(family.model_type, check, compared(theirs, ours, tokens_BT), allowed)
    exact_theirs, exact_ours = (copy.deepcopy(model).double() for model in (theirs, ours))
    found = _training(family, theirs, ours, tokens_BT)
    exact = _training(family, exact_theirs, exact_ours, tokens_BT)
    for check, error in (("balance loss", found.balance), ("balance loss in fp64", exact.balance)):
        if error is not None:
            yield Parity(family.model_type, check, error, allowed)
    ours_off, theirs_off, apart = (
        largest_difference(given, wanted)
        for given, wanted in (
            (found.ours, exact.theirs),
            (found.theirs, exact.theirs),
            (exact.ours, exact.theirs),
        )
    )
    enough = max(allowed, GRADIENT_TOLERANCE, TIMES * theirs_off)
    yield Parity(family.model_type, "gradients", ours_off, enough, theirs_off)
    yield Parity(family.model_type, "gradients in fp64", apart, EXACT)


def published_model(family: Family, seed: int) -> Any:
    """transformers' tiny model of a family in evaluation mode, fp32, with random weights, norms and biases included."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # A model without experts has no number of them per token.
    usual = AutoConfig.for_model(family.model_type)
    fields = {**{name: value for name, value in TINY.items() if hasattr(usual, name)}, **family.tiny}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.model_type, **fields)).float()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if name.endswith(FIXED):
                continue
            noise = torch.randn(tensor.shape, generator=draw)
            # Vectors are norms, biases, sinks: what they start from, and something on top. Matrices keep the scale of
            # what they are multiplied with.
            fresh = tensor + 0.1 * noise if tensor.dim() < 2 else noise * tensor.shape[-1] ** -0.5
            # Heads that forget at once give next to nothing, and the norm behind them makes much of rounding: these
            # remember.
            remembering = torch.linspace(*DECAYS, tensor.numel()).view_as(tensor)
            tensor.copy_(remembering if name.endswith("A_log") else fresh)
    return model.eval()


def _changed_weights(theirs: Any, folder: Path) -> float:
    """How many tensors of transformers' model differ in any bit from those of the folder, loaded by transformers."""
    from transformers import AutoModelForCausalLM

    back = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    before = theirs.state_dict()
    assert back.keys() == before.keys()
    return float(sum(not torch.equal(back[name], tensor) for name, tensor in before.items()))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the largest value of theirs."""
    return ((ours.detach() - theirs.detach()).abs().max() / theirs.detach().abs().max()).item()


@torch.no_grad()
def _logits(theirs: Any, ours: LanguageModel, tokens_BT: Tensor) -> float:
    return relative(ours(tokens_BT).logits_BTV, theirs(input_ids=tokens_BT, use_cache=False).logits)


@torch.no_grad()
def _cached_decode(theirs: Any, ours: LanguageModel, tokens_BT: Tensor) -> float:
    """Token by token after a prefill, both from their caches."""
    cache = ours.new_cache(*tokens_BT.shape)
    past = theirs(input_ids=tokens_BT[:, :PREFILL], use_cache=True).past_key_values
    ours(tokens_BT[:, :PREFILL], cache)
    ours_logits, their_logits = [], []
    for at in range(PREFILL, TOKENS):
        token_B1 = tokens_BT[:, at : at + 1]
        ours_logits.append(ours(token_B1, cache).logits_BTV)
        their_logits.append(theirs(input_ids=token_B1, past_key_values=past, use_cache=True).logits)
    return relative(torch.cat(ours_logits, dim=1), torch.cat(their_logits, dim=1))


@torch.no_grad()
def _prefill(theirs: Any, ours: LanguageModel, tokens_BT: Tensor) -> float:
    """Ours in two parts, theirs as a whole."""
    cache = ours.new_cache(*tokens_BT.shape)
    parts = [ours(part_BT, cache).logits_BTV for part_BT in tokens_BT.split([PREFILL, TOKENS - PREFILL], dim=1)]
    return relative(torch.cat(parts, dim=1), theirs(input_ids=tokens_BT, use_cache=False).logits)


class _Training(NamedTuple):
    """Error of the balance loss, None of a family without; gradients by the names of our weights."""

    balance: float | None
    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]


def _training(family: Family, theirs: Any, ours: LanguageModel, tokens_BT: Tensor) -> _Training:
    """Balance loss, and the gradients of cross-entropy and balance loss in every weight; in the models' precision."""
    if theirs.dtype == torch.float64:
        # The grouped products know no fp64; some families have nothing else than what does.
        with contextlib.suppress(ValueError):
            theirs.set_experts_implementation("eager")
    with in_fp64() if theirs.dtype == torch.float64 else contextlib.nullcontext():
        their_output = theirs(input_ids=tokens_BT, use_cache=False, **_router_logits(theirs))
        our_output = ours(tokens_BT)
        their_balance, error = getattr(their_output, "aux_loss", None), None
        losses = [cross_entropy(our_output.logits_BTV, tokens_BT), cross_entropy(their_output.logits, tokens_BT)]
        if isinstance(their_balance, Tensor):
            balance = pooled_balance(our_output)
            error = relative(balance, their_balance)
            losses = [losses[0] + BALANCE * balance, losses[1] + BALANCE * their_balance]
        for loss in losses:
            loss.backward()
    published = published_gradients(family, theirs, ours.config)
    trained = {name: parameter.grad for name, parameter in ours.named_parameters()}
    found = _Training(error, {}, {})
    for stored in family.tensors(ours.config):
        if stored.ours in trained:
            gradient = trained[stored.ours]
            assert gradient is not None, stored.ours
            found.ours[stored.ours] = gradient
            found.theirs[stored.ours] = stored.layout.join([published[name] for name in stored.theirs])
    return found


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest of all tensors', each in units of its largest value."""
    return max(relative(ours[name].double(), wanted.double()) for name, wanted in theirs.items())


def pooled_balance(output: Output) -> Tensor:
    """The balance loss of transformers' models: E sum_e f_e P_e over the tokens of all layers together, where f sums to
    k rather than to 1."""
    routings = [routing for routing in output.routings if routing.probs_TE.shape[1] > 1]
    rows_E = torch.stack([routing.assignments.rows_per_expert_E() for routing in routings]).sum(dim=0)
    probs_TE = torch.cat([routing.probs_TE for routing in routings])
    return rows_E.sum() / len(probs_TE) * switch_balance_loss(rows_E, probs_TE)


def _router_logits(theirs: Any) -> dict[str, bool]:
    return {"output_router_logits": True} if hasattr(theirs, "router_aux_loss_coef") else {}


def cross_entropy(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Of every next token."""
    return functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())


def published_gradients(family: Family, theirs: Any, config: ModelConfig) -> dict[str, Tensor]:
    """transformers' gradients under the names, and in the shapes, of its checkpoints, where experts lie one by one."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        theirs.float().save_pretrained(folder)
        stored = Checkpoint(Path(folder))
        stored.rename(family.other_names(config))
        stored.cut(family.pieces(config))
        return {name: stored.read(name) for name in stored.entries}
