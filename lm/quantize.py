"""`python -m lm quantize RUN OUT --bits 8`: a model whose experts are stored, and read, in fewer bits; `moe/packed.py`
says how. Routers, norms, attention, embeddings and the shared expert stay as they are."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from corpus.byte_level_tokenizer import ByteLevelTokenizer
from corpus.tokenizer import Tokenizer
from foundation.command import refuse_unwritable
from lm.config import ModelConfig
from lm.model import LanguageModel
from lm.pretrained import (
    find_model,
    has_calibration_tokens,
    load_calibration_tokens,
    load_pretrained,
    load_tokenizer,
    save_tensors,
)
from lm.published.convert import BESIDE
from moe.config import ExpertFormat
from moe.experts import Experts
from moe.packed import PackedExperts, PackedMatrices, pack

# What a weight of all experts is called, in fp32 and packed.
NAMES = {"w_gate_up_EDF2": "gate_up", "w_down_EFD": "down"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Writes a model folder whose experts' weights are stored in fewer bits. Every command reads it; training and the
    exports do not.

    Attributes:
        run: a model folder, or the run that trained it.
        out: the model folder to write; it may not exist yet, or is replaced.
        bits: of a weight: 8 or 4, 16 for bf16, or 32 for fp32 again, with what was lost.
        group: consecutive inputs of an expert that share a scale, of 2 bytes for each output.
        zero_point: whether they share an offset of 2 more bytes, too; measured to be worth them with 4 bits only, and
            by default there with them alone.
    """

    run: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    bits: Literal[32, 16, 8, 4] = 8
    group: int = 32
    zero_point: bool | None = None

    def __post_init__(self) -> None:
        # Refused before a model is read.
        _ = self.form

    @property
    def form(self) -> ExpertFormat | None:
        if self.bits == 32:
            return None
        return ExpertFormat(bits=self.bits, group=self.group, zero_point=self._with_zero_point)

    @property
    def _with_zero_point(self) -> bool:
        return self.bits == 4 if self.zero_point is None else self.zero_point


@dataclasses.dataclass(frozen=True)
class Packed:
    """A model in another form, as `save_tensors` takes it.

    Attributes:
        error: root mean square of what experts' weights changed by, as a share of their own.
    """

    config: ModelConfig
    state: dict[str, Tensor]
    error: float


@torch.no_grad()
def packed_state(model: LanguageModel, form: ExpertFormat | None) -> Packed:
    """The model's weights with its experts in another form; None: fp32."""
    state = dict(model.state_dict())
    changed = whole = 0.0
    for path, experts in model.named_modules():
        if not isinstance(experts, Experts | PackedExperts) or experts.d_expert == 0:
            continue
        for ours, packed in NAMES.items():
            before = _weight(experts, ours)
            for name in (ours, *(f"{packed}.{part}" for part in ("codes", "scale", "offset"))):
                state.pop(f"{path}.{name}", None)
            if form is None:
                state[f"{path}.{ours}"] = before
                continue
            made = PackedMatrices(form, *before.shape)
            for name, tensor in pack(before, form).items():
                made.register_buffer(name, tensor)
                state[f"{path}.{packed}.{name}"] = tensor
            after = made.unpacked(range(len(before)))
            changed += float((after - before).double().square().sum())
            whole += float(before.double().square().sum())
    return Packed(model.config.with_packed(form), state, math.sqrt(changed / whole) if whole else 0.0)


def _weight(experts: Experts | PackedExperts, name: str) -> Tensor:
    """A weight of all experts of a layer in fp32."""
    if isinstance(experts, PackedExperts):
        matrices = getattr(experts, NAMES[name])
        return matrices.unpacked(range(matrices.shape[0]))
    return getattr(experts, name)


def packed_model(model: LanguageModel, form: ExpertFormat | None) -> LanguageModel:
    """The same model with its experts in another form, in evaluation mode."""
    made = packed_state(model, form)
    packed = LanguageModel(made.config)
    packed.load_state_dict(made.state)
    return packed.to(model.embedding_VD.device).eval()


def quantize(config: QuantizeConfig) -> str:
    """See `QuantizeConfig`; returns what was written, for people to read.

    Raises:
        ValueError: for a folder without a model, or where the model to write lies.
    """
    refuse_unwritable("OUT", config.out.parent, folder=True)
    folder = find_model(config.run)
    if config.out.resolve() == folder.resolve():
        raise ValueError(f"OUT: {config.out} is the model that is read; legal: another folder")
    model = load_pretrained(folder)
    made = packed_state(model, config.form)
    calibration_BT = load_calibration_tokens(folder) if has_calibration_tokens(folder) else None
    names = (ByteLevelTokenizer.file_name, Tokenizer.file_name)
    tokenizer = load_tokenizer(folder, model) if any((folder / name).is_file() for name in names) else None
    published = (path for path in (folder / BESIDE).rglob("*") if path.is_file())
    beside = {str(path.relative_to(folder)): path.read_bytes() for path in published}
    save_tensors(config.out, made.config, made.state, calibration_BT, tokenizer, beside)
    before, after = folder_bytes(folder), folder_bytes(config.out)
    return (
        f"{config.out}: experts in {config.bits} bits{_grouped(config.form)}, {after:,} bytes, {after / before:.3f} of"
        f" {before:,}; weights changed by {made.error:.3%} of their size"
    )


def folder_bytes(folder: Path) -> int:
    """Of all files of a model folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _grouped(form: ExpertFormat | None) -> str:
    if form is None or form.bits == 16:
        return ""
    return f", groups of {form.group}{' with a zero point' if form.zero_point else ''}"
