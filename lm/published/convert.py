"""`python -m lm import` and `python -m lm export`: a published model as a model folder of ours, and back.

A model folder made by import keeps what it was made from in `published/`: config.json and the small files beside the
weights, unchanged, and the dtypes of tensors that differ from config.json's. Weights are stored in the dtypes that they
were published in, so that both ways are exact.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
import tyro
from torch import Tensor

from corpus.byte_level_tokenizer import ByteLevelTokenizer
from corpus.readers import Document
from corpus.sources import read_paths
from corpus.tokenizer import Tokenizer
from foundation.command import refuse_unwritable
from foundation.files import atomic_folder, json_text, read_json, require_space, write_json
from foundation.numbers import check_numbers
from foundation.serialize import load_json, to_dict
from lm.accounting import meta_model
from lm.budget import CALIBRATION_TOKENS
from lm.config import ModelConfig
from lm.hub.export import export_own
from lm.pretrained import CONFIG_FILE, WEIGHTS_FILE, check_folder, find_model, refuse_packed, save_tensors
from lm.published.checkpoint import DTYPES, SHARD_BYTES, Checkpoint, Entry, write_checkpoint
from lm.published.families import FAMILIES, family_of
from lm.published.family import Family
from lm.published.layouts import Stored
from lm.published.wrapper import decoder_of

# Where a model folder keeps what it was imported from.
BESIDE = "published"
DTYPES_FILE = "dtypes.json"
KEPT_FILE = "kept.safetensors"
# Small files that belong to a published model and go through unchanged.
COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "tokenizer.model", "LICENSE"),
)
# What every family calls its k.
EXPERTS_PER_TOKEN = "num_experts_per_tok"
MOST_LISTED = 10
# Tokens of a row of text that is kept with a model.
CALIBRATION_LENGTH = 256
# Fields of `ModelConfig` that a block may have of its own.
BLOCK_FIELDS = ("attention", "moe", "norm", "residual", "shortcut")
# Fields that say how a model is trained or computed here, of which a published config.json knows nothing.
OF_OURS = ("dtype", "backend", "chunk_size", "balance_coefficient", "z_coefficient", "selection_bias_step")
OF_OURS += ("three_level_balance",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Makes a model folder of a published model (config.json and safetensors).

    Attributes:
        source: folder of the published model.
        out: the model folder to write; it may not exist yet, or is replaced.
        dtype: what products compute in; that of the published weights by default.
        text: files or folders of text, some tokens of which are kept with the model: whoever sets a budget of experts
            sets it on them.
    """

    source: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    dtype: Literal["float32", "bfloat16"] | None = None
    text: tuple[Path, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writes a model folder as transformers reads it: in the layout of the family that it was imported from, or, a
    model of our own, with the code that runs it (`trust_remote_code=True`).

    Attributes:
        run: a model folder, or the run that trained it.
        out: folder to write; it may not exist yet, or is replaced.
        like: the imported model folder that it was trained from, where it holds no `published/` itself and is to be
            written in that family's layout.
        experts: experts per token that the written config.json names; those of the model by default.
        shard_bytes: of one file of weights, at the most.
    """

    run: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    like: Path | None = None
    experts: int | None = None
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        check_numbers(self, experts=1, shard_bytes=1)


def read_published(folder: Path) -> tuple[Family, dict[str, Any], ModelConfig]:
    """The family of a published model, its config.json, or that of the decoder inside, and what that is here.

    Raises:
        ValueError: for a folder without config.json, another family, or a field that is not supported.
        CorruptFileError: where it is no JSON.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no published model: {CONFIG_FILE} is missing")
    values = decoder_of(read_json(path), str(path))
    family = family_of(values, str(path))
    return family, values, family.configuration(values, str(path))


def import_model(config: ImportConfig) -> str:
    """See `ImportConfig`; returns what was imported, for people to read.

    Raises:
        ValueError: for what is not supported, and for tensors that are missing, unexpected or of another shape; lists
            them with their shapes.
        CorruptFileError: for damaged files; names them.
    """
    refuse_unwritable("OUT", config.out.parent, folder=True)
    family, values, model = read_published(config.source)
    if config.dtype is not None:
        model = dataclasses.replace(model, dtype=config.dtype)
    checkpoint = Checkpoint(config.source)
    unpacked = checkpoint.unpack()
    checkpoint.rename(family.other_names(model))
    checkpoint.unstack(family.stacked(model))
    checkpoint.cut(family.pieces(model))
    left_out, kept = _check_tensors(family, model, checkpoint)
    stored = {one.ours: one for one in family.tensors(model)}
    usual = values.get("dtype") or values.get("torch_dtype") or "float32"
    dtypes = {
        name: entry.dtype
        for name, entry in checkpoint.entries.items()
        if name not in left_out and entry.dtype in DTYPES and str(DTYPES[entry.dtype]) != f"torch.{usual}"
    }
    state: dict[str, Tensor] = {}
    for name, like in meta_model(model).state_dict().items():
        state[name] = torch.zeros(like.shape)
        if name in stored:
            state[name] = stored[name].layout.join([checkpoint.read(part) for part in stored[name].theirs])
    beside = {name: (config.source / name).read_bytes() for name in COMPANIONS if (config.source / name).is_file()}
    beside = {f"{BESIDE}/{name}": content for name, content in beside.items()}
    beside[f"{BESIDE}/{CONFIG_FILE}"] = (config.source / CONFIG_FILE).read_bytes()
    beside[f"{BESIDE}/{DTYPES_FILE}"] = json_text(dtypes).encode()
    if kept:
        stored_as = {name: checkpoint.read(name).contiguous() for name in kept}
        beside[f"{BESIDE}/{KEPT_FILE}"] = safetensors.torch.save(stored_as)
    tokenizer, without = _tokenizer(config.source, model)
    calibration_BT = None
    if config.text:
        if tokenizer is None:
            raise ValueError(f"--text needs a tokenizer: {without}")
        tokens = read_tokens(tokenizer, config.text, CALIBRATION_TOKENS)
        # Rows of one length, as many as there are.
        length = min(CALIBRATION_LENGTH, len(tokens))
        calibration_BT = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    save_tensors(config.out, model, state, calibration_BT, tokenizer, beside)
    count = sum(tensor.numel() for name, tensor in state.items() if name in stored)
    lines = [f"{config.out}: {family.model_type}, {count:,} parameters, {model.n_layers} blocks {model.layer_plan}"]
    if unpacked:
        lines.append(
            f"{unpacked} tensors were MXFP4: they are bf16 here, exactly, and will be bf16 where they are exported"
        )
    for what, reasons in (("left out", left_out), ("kept for export", kept)):
        for reason, tensors in sorted(Counter(reasons.values()).items()):
            lines.append(f"{what}: {tensors} tensors of {reason}")
    if without is not None:
        lines.append(f"without a tokenizer: {without}")
    return "\n".join(lines)


def _tokenizer(folder: Path, model: ModelConfig) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer of a published model, or why there is none."""
    try:
        if (folder / ByteLevelTokenizer.file_name).is_file():
            return ByteLevelTokenizer.load(folder / ByteLevelTokenizer.file_name, model.vocab_size), None
        tokenizer = Tokenizer.load(folder / Tokenizer.file_name)
        if tokenizer.vocab_size != model.vocab_size:
            return None, f"{tokenizer.vocab_size} tokens, the model's vocabulary has {model.vocab_size}"
        return tokenizer, None
    except (ValueError, ImportError) as error:
        return None, str(error)


def read_tokens(tokenizer: Tokenizer, data: Sequence[Path], most: int) -> list[int]:
    """The first tokens of a text, `most` of them or all, with a boundary before each document.

    Raises:
        ValueError: where there is no document.
    """
    tokens: list[int] = []
    for item in read_paths([str(path) for path in data], text_field="text"):
        if isinstance(item, Document):
            tokens += [tokenizer.boundary_id, *tokenizer.encode(item.text)]
        if len(tokens) >= most:
            break
    if len(tokens) < 2:
        raise ValueError(f"--text: no usable document in {', '.join(map(str, data))}")
    return tokens[:most]


def export_model(config: ExportConfig) -> str:
    """See `ExportConfig`; returns what was exported, for people to read.

    Raises:
        ValueError: for a model that its family's config.json cannot describe any more, or one of ours that the
            exported code does not know; names what it is.
        CorruptFileError: for damaged files; names them.
    """
    refuse_unwritable("OUT", config.out.parent, folder=True)
    folder = find_model(config.run)
    check_folder(folder)
    model = load_json(ModelConfig, folder / CONFIG_FILE)
    refuse_packed(folder, model)
    origin = (find_model(config.like) if config.like else folder) / BESIDE
    if not origin.is_dir():
        if config.like is not None or config.experts is not None:
            raise ValueError(
                f"{origin.parent} was not imported (it has no {BESIDE}/); --like and --experts are for models of the"
                f" families {', '.join(sorted(FAMILIES))}"
            )
        return export_own(folder, config.out, config.shard_bytes)
    family, values, _ = read_published(origin)
    experts = config.experts or _experts_per_token(model)
    if experts is not None:
        named = [name for name in family.aliases.get(EXPERTS_PER_TOKEN, ()) if name in values]
        values |= dict.fromkeys((EXPERTS_PER_TOKEN, *named), experts)
    values |= {name: value for name, value in family.after_export.items() if name in values}
    values = {name: value for name, value in values.items() if name not in family.after_export or value is not None}
    described = family.configuration(values, f"{config.out}/{CONFIG_FILE}")
    if config.experts is not None:
        model = _with_policies(model, described)
    if wrong := list(differences(resolved(described), resolved(model))):
        raise ValueError(f"{folder} is no {family.model_type} model any more: {'; '.join(wrong[:MOST_LISTED])}")
    weights = Checkpoint(folder, WEIGHTS_FILE)
    stored = list(family.tensors(model))
    _check_unstored(folder, weights, stored)
    usual = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    dtypes = {name: DTYPES[dtype] for name, dtype in read_json(origin / DTYPES_FILE).items()}
    where = {name: one for one in stored for name in one.theirs}
    shapes = _published_shapes(model, stored)
    dtype_of = {name: dtypes.get(name, getattr(torch, usual)) for name in where}
    pieces = {name: list(heights) for name, heights in family.pieces(model).items()}
    inside = {piece for names in pieces.values() for piece in names}
    written = {name: [name] for name in where if name not in inside} | pieces
    sizes = {
        name: sum(shapes[part].numel() * dtype_of[part].itemsize for part in parts) for name, parts in written.items()
    }
    kept = Checkpoint(origin, KEPT_FILE) if (origin / KEPT_FILE).is_file() else None
    unread = {} if kept is None else kept.entries
    sizes |= {name: torch.Size(one.shape).numel() * DTYPES[one.dtype].itemsize for name, one in unread.items()}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    require_space(config.out.parent, sum(sizes.values()), f"the model {config.out}")
    with atomic_folder(config.out, replace=True) as temporary:
        for path in origin.iterdir():
            if path.name in COMPANIONS:
                (temporary / path.name).write_bytes(path.read_bytes())
        write_json(temporary / CONFIG_FILE, values)
        parts = _Parts(weights)

        def tensor(name: str) -> Tensor:
            if kept is not None and name in unread:
                return kept.read(name)
            found = [parts.of(where[part], part).to(dtype_of[part]) for part in written[name]]
            return torch.cat(found) if name in pieces else found[0]

        write_checkpoint(temporary, sizes, tensor, config.shard_bytes)
    return f"{config.out}: {family.model_type}, {sum(shape.numel() for shape in shapes.values()):,} parameters"


def _experts_per_token(model: ModelConfig) -> int | None:
    """The k that all layers with experts have, where they have one."""
    found = {
        block.moe.router.policy.fixed_experts
        for block in map(model.block, range(model.n_layers))
        if block.moe.n_experts > 1
    }
    return found.pop() if len(found) == 1 else None


def _with_policies(model: ModelConfig, described: ModelConfig) -> ModelConfig:
    """The model under the routing policies of another one."""
    blocks = []
    for layer in range(model.n_layers):
        block, policy = model.block(layer), described.block(layer).moe.router.policy
        router = dataclasses.replace(block.moe.router, policy=policy)
        blocks.append(dataclasses.replace(block, moe=dataclasses.replace(block.moe, router=router)))
    return model.with_blocks(blocks)


class _Parts:
    """The published tensors of one of ours, split when the first of them is asked for and kept until another one's
    turn."""

    def __init__(self, weights: Checkpoint) -> None:
        self.weights = weights
        self.ours, self.parts = "", {}

    def of(self, stored: Stored, name: str) -> Tensor:
        if stored.ours != self.ours:
            whole = self.weights.read(stored.ours)
            self.ours, self.parts = stored.ours, dict(zip(stored.theirs, stored.layout.split(whole)))
        return self.parts[name]


def resolved(model: ModelConfig) -> dict[str, Any]:
    """A configuration in its JSON form, every block with all that it is made of."""
    own = {name: value for name, value in to_dict(model).items() if name not in ("layer_plan", *BLOCK_FIELDS)}
    return own | {"blocks": [to_dict(model.block(layer)) for layer in range(model.n_layers)]}


def differences(theirs: Any, ours: Any, place: str = "") -> Iterator[str]:
    """Where two resolved configurations differ in what a published one can say."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in [*theirs, *(name for name in ours if name not in theirs)]:
            if name not in OF_OURS:
                yield from differences(theirs.get(name), ours.get(name), f"{place}.{name}" if place else name)
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for index, pair in enumerate(zip(theirs, ours)):
            yield from differences(*pair, f"{place}[{index}]")
    elif theirs != ours:
        yield f"{place} is {ours!r}, its config.json says {theirs!r}"


def _published_shapes(model: ModelConfig, stored: list[Stored]) -> dict[str, torch.Size]:
    """The shape of every published tensor, from the shapes of ours."""
    ours = meta_model(model).state_dict()
    return {name: part.shape for one in stored for name, part in zip(one.theirs, one.layout.split(ours[one.ours]))}


def _other_heights(expected: Mapping[str, torch.Size], entries: Mapping[str, Entry]) -> dict[str, torch.Size]:
    """The shapes in the files of tensors that hold the same rows, split otherwise; none where they hold others."""
    found = {name: torch.Size(entries[name].shape) for name in expected if name in entries}
    whole = [
        (sum(shape[0] for shape in shapes.values()), {s[1:] for s in shapes.values()}) for shapes in (expected, found)
    ]
    return found if whole[0] == whole[1] else {}


def _check_tensors(family: Family, model: ModelConfig, checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """Refuses a checkpoint that is not what its config.json says; returns what it has beside the decoder, and what is
    kept unread, each with what that is."""
    stored = list(family.tensors(model))
    expected = _published_shapes(model, stored)
    entries, left_out, kept = checkpoint.entries, {}, {}
    for one in stored:
        if one.any_heights:
            expected |= _other_heights({name: expected[name] for name in one.theirs}, entries)
    for name in entries.keys() - expected.keys():
        for found, patterns in ((left_out, family.beside(model)), (kept, family.kept(model))):
            for pattern, reason in patterns.items():
                if re.fullmatch(pattern, name):
                    found[name] = reason
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in entries]
    unexpected = [
        f"{name} {list(entry.shape)}"
        for name, entry in entries.items()
        if name not in expected and name not in left_out and name not in kept
    ]
    other = [
        f"{name} {list(entries[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in entries and entries[name].shape != tuple(shape)
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:MOST_LISTED])}{', ...' if len(found) > MOST_LISTED else ''})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
        if found
    ]
    if problems:
        raise ValueError(f"{checkpoint.folder}: tensors and config.json disagree: {'; '.join(problems)}")
    return left_out, kept


def _check_unstored(folder: Path, weights: Checkpoint, stored: list[Stored]) -> None:
    """Refuses weights of ours that the family has no place for, unless they are zero or what training counts."""
    unstored = weights.entries.keys() - {one.ours for one in stored}
    for name in sorted(unstored):
        if not name.endswith(".router.load_E") and weights.read(name).any():
            raise ValueError(f"{folder}: {name} is not zero, and the family has no place for it")
