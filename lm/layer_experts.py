"""`python -m lm layer-experts RUN OUT --mean 6`: how many experts each layer of a trained model should use
under one total, found by what the loss on held-out text says, and written as a model that does (`LayerTopK`).

LExI (arXiv 2509.02753) asks how far a layer's output moves on random inputs and searches by mutation. Here every layer
is set to every candidate once, the others staying at the mean, and the losses are taken to add up: the best numbers
under the total then follow exactly, by dynamic programming over layers. Half of the documents are searched on, the
other half says what the numbers found are worth beside the same number everywhere.

Legend: L layers that choose, K candidates.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro

from foundation.command import refuse_unwritable
from foundation.numbers import check_numbers
from foundation.tables import write_rows
from lm.config import ModelConfig
from lm.evaluate import Evaluation
from lm.evaluate_text import evaluate_documents, read_texts
from lm.model import LanguageModel
from lm.pretrained import (
    find_model,
    has_calibration_tokens,
    load_calibration_tokens,
    load_pretrained,
    load_tokenizer,
    save_pretrained,
)
from lm.stored_text import stored_texts
from moe.config import MoEConfig
from routing.policies.layer_top_k import LayerTopK
from routing.policies.top_k import TopK


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerExpertsConfig:
    """Finds how many experts each layer should use, and writes the model that does.

    Attributes:
        run: a model folder, or the run that trained it.
        out: the model folder to write; it may not exist yet, or is replaced.
        data: files and folders of text that the model has not seen, of two documents at least; the text stored with the
            model without them.
        text_field: key or column that holds the text.
        mean: experts per token in the mean of the layers, at the most.
        candidates: numbers that a layer may have; those the model has not are left out.
        window: tokens that the model sees at once.
        batch_size: windows at once.
        csv: file for the measured losses.
    """

    run: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    data: tuple[str, ...] = ()
    text_field: str = "text"
    mean: float = 6.0
    candidates: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24)
    window: int = 256
    batch_size: int = 8
    csv: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self, mean=1, candidates=1, window=1, batch_size=1)
        if not self.candidates:
            raise ValueError("LayerExpertsConfig.candidates: none; legal: at least one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerLoss:
    """Bits per byte with one layer at k experts and the others at the mean, and how far that is from all at the
    mean."""

    layer: int
    k: int
    bits_per_byte: float
    more: float


def layer_experts(config: LayerExpertsConfig) -> str:
    """See `LayerExpertsConfig`; returns what was found, for people to read.

    Raises:
        ValueError: for a mean below the smallest candidate, a model without experts to choose, or a single document.
    """
    refuse_unwritable("--csv", config.csv)
    refuse_unwritable("OUT", config.out.parent, folder=True)
    folder = find_model(config.run)
    if config.out.resolve() == folder.resolve():
        raise ValueError(f"OUT: {config.out} is the model that is read; legal: another folder")
    model = load_pretrained(folder)
    tokenizer = load_tokenizer(folder, model)
    texts = read_texts(config.data, config.text_field, tokenizer) if config.data else stored_texts(folder, tokenizer)
    if len(texts) < 2:
        raise ValueError("--data: one document; legal: two at least, one of which says what was found is worth")
    choosing = [layer for layer, router in enumerate(model.routers()) if router.n_experts > 1]
    if not choosing:
        raise ValueError(f"{folder}: no layer chooses experts; legal: a model of several")
    most = min(model.routers()[layer].n_experts for layer in choosing)
    candidates = sorted({k for k in config.candidates if k <= most})
    usual = max(1, min(round(config.mean), most))

    def measure(place: int) -> Evaluation:
        return evaluate_documents(
            model,
            tokenizer.boundary_id,
            texts[place::2],
            window=config.window,
            stride=config.window,
            batch_size=config.batch_size,
        )

    def with_numbers(numbers: Sequence[int], place: int) -> float:
        for layer, k in zip(choosing, numbers):
            model.routers()[layer].set_policy(TopK(k=k))
        return measure(place).bits_per_byte

    even = [usual] * len(choosing)
    rows = layer_losses(lambda numbers: with_numbers(numbers, 0), even, candidates)
    loss_LK = [[row.more for row in rows if row.layer == place] for place in range(len(choosing))]
    total = math.floor(config.mean * len(choosing) + 1e-9)
    numbers = best_numbers(loss_LK, candidates, total)
    rows = [dataclasses.replace(row, layer=choosing[row.layer]) for row in rows]
    if config.csv is not None:
        write_rows(config.csv, LayerLoss, rows)
    before, after = with_numbers(even, 1), with_numbers(numbers, 1)
    by_layer = [0] * model.config.n_layers
    for layer, k in zip(choosing, numbers):
        by_layer[layer] = k
    # Blocks of a single expert choose nothing.
    policy = LayerTopK(layers=tuple(k or 1 for k in by_layer))
    calibration_BT = load_calibration_tokens(folder) if has_calibration_tokens(folder) else None
    save_pretrained(config.out, with_layer_policy(model, policy), calibration_BT, tokenizer)
    return (
        f"{config.out}: {' '.join(map(str, numbers))} experts in layers {' '.join(map(str, choosing))},"
        f" {sum(numbers) / len(numbers):.3f} in the mean\non the other half of {len(texts)} documents"
        f" {after:.4f} bits per byte; {usual} everywhere: {before:.4f}, difference {after - before:+.4f}"
    )


def layer_losses(
    measure: Callable[[Sequence[int]], float], even: Sequence[int], candidates: Sequence[int]
) -> list[LayerLoss]:
    """One layer at a time set to each candidate; `layer` is the place in `even`.

    Args:
        measure: bits per byte with these numbers of experts.
    """
    base, rows = measure(even), []
    for layer, usual in enumerate(even):
        for k in candidates:
            numbers = [*even[:layer], k, *even[layer + 1 :]]
            bits = base if k == usual else measure(numbers)
            print(f"layer {layer}, {k} experts: {bits:.4f} bits per byte, {bits - base:+.4f}", flush=True)
            rows.append(LayerLoss(layer=layer, k=k, bits_per_byte=bits, more=bits - base))
    return rows


def best_numbers(loss_LK: Sequence[Sequence[float]], candidates: Sequence[int], total: int) -> list[int]:
    """The candidate of each layer whose losses add up to the least, with at most `total` experts in all layers; of
    equal losses the fewer experts.

    Raises:
        ValueError: where the smallest candidates exceed the total.
    """
    # By experts used so far: the loss, and the numbers that give it.
    found: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for loss_K in loss_LK:
        further: dict[int, tuple[float, list[int]]] = {}
        for used, (loss, numbers) in found.items():
            for k, more in zip(candidates, loss_K):
                if used + k <= total and loss + more < further.get(used + k, (math.inf,))[0]:
                    further[used + k] = (loss + more, [*numbers, k])
        found = further
    if not found:
        raise ValueError(
            f"mean: {total} experts for {len(loss_LK)} layers; legal: {min(candidates)} each, the smallest candidate"
        )
    return min((loss, used, numbers) for used, (loss, numbers) in found.items())[2]


@torch.no_grad()
def with_layer_policy(model: LanguageModel, policy: LayerTopK) -> LanguageModel:
    """The same weights under the policy in all blocks that choose experts."""

    def changed(moe: MoEConfig) -> MoEConfig:
        router = dataclasses.replace(moe.router, policy=policy)
        return dataclasses.replace(moe, router=router) if moe.n_experts > 1 else moe

    config: ModelConfig = dataclasses.replace(model.config, moe=changed(model.config.moe), blocks=())
    blocks = [model.config.block(layer) for layer in range(model.config.n_layers)]
    made = LanguageModel(config.with_blocks([dataclasses.replace(block, moe=changed(block.moe)) for block in blocks]))
    state = model.state_dict()
    # Null columns of another policy stay where they are not asked for, with its thresholds.
    made.load_state_dict({name: state[name] for name in made.state_dict()})
    return made.eval()
