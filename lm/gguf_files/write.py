"""`python -m lm gguf`: a published model, trained on or not, as a file that llama.cpp runs.

Matrices take the type that is asked for; vectors and routers stay fp32: a router that was rounded sends tokens
elsewhere. A matrix whose rows do not fill the blocks of a quantised type is fp16.

Legend: D model width, E experts, F expert width.
"""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from foundation.command import refuse_unwritable
from foundation.files import fsync_path, naming, require_space
from foundation.serialize import load_json
from lm.accounting import meta_model
from lm.config import ModelConfig
from lm.gguf_files.architecture import Architecture, dense_layers, sparse_moe
from lm.gguf_files.architectures import architecture_of
from lm.gguf_files.vocabulary import add_vocabulary
from lm.pretrained import CONFIG_FILE, WEIGHTS_FILE, check_folder, find_model, refuse_packed
from lm.published.checkpoint import Checkpoint
from lm.published.convert import BESIDE, read_published
from lm.published.family import Family
from routing.policies.top_k import TopK

Type = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
# Numbers of the types that a file can be mostly of.
FILE_TYPES: dict[str, int] = {
    **{"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32},
}
# Routers and gates of shared experts; llama.cpp's convolutions take nothing else, and neither do its biases, which are
# matrices of experts.
FULL_PRECISION = ("ffn_gate_inp", "ssm_conv1d", "shortconv.conv", "ssm_a", "ssm_d", "ssm_norm", ".bias")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFConfig:
    """Writes an imported model as a GGUF file.

    Attributes:
        run: a model folder, or the run that trained it.
        out: the file to write.
        like: the imported model folder that it was trained from, where it holds no `published/` itself.
        type: of the matrices: q8_0 has 8.5 bits for a number, q4_0 4.5.
    """

    run: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    like: Path | None = None
    type: Type = "f16"


def write_gguf(config: GGUFConfig) -> str:
    """See `GGUFConfig`; returns what was written, for people to read.

    Raises:
        ValueError: for a model that was not imported, or that llama.cpp does not know; names what it is.
        ImportError: without the package gguf, saying how to install it.
        foundation.files.DiskFullError: naming the file.
    """
    refuse_unwritable("OUT", config.out)
    folder = find_model(config.run)
    check_folder(folder)
    origin = (find_model(config.like) if config.like else folder) / BESIDE
    if not origin.is_dir():
        raise ValueError(
            f"{origin.parent} was not imported (it has no {BESIDE}/); a model trained from one needs --like"
        )
    family, values, _ = read_published(origin)
    model = load_json(ModelConfig, folder / CONFIG_FILE)
    refuse_packed(folder, model)
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"lm gguf needs the package gguf: pip install 'hybrid-moe-lab[gguf]' ({error})") from error
    architecture = architecture_of(family.model_type, model, str(folder))
    temporary = config.out.with_name(f".{config.out.name}.partial")
    writer = gguf.GGUFWriter(temporary, architecture.name)
    add_sizes(writer, architecture, model, context=values.get("max_position_embeddings"), file_type=config.type)
    vocabulary = add_vocabulary(writer, folder, model.vocab_size, architecture.pre_tokenizer)
    wanted = gguf.GGMLQuantizationType[config.type.upper()]
    planned = list(_planned(gguf, architecture, family, model, wanted))
    size = 0
    for name, shape, kind in planned:
        stored = gguf.quant_shape_to_byte_shape(shape, kind)
        n_bytes = int(torch.Size(stored).numel())
        size += n_bytes
        writer.add_tensor_info(name, list(stored), np.dtype(np.uint8), n_bytes, raw_dtype=kind)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    require_space(config.out.parent, size, f"the file {config.out}")
    try:
        with naming(config.out, "nothing of it is left"):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            kinds = {name: kind for name, _, kind in planned}
            for name, tensor in _tensors(gguf, architecture, family, model, Checkpoint(folder, WEIGHTS_FILE)):
                writer.write_tensor_data(gguf.quants.quantize(tensor.float().contiguous().numpy(), kinds[name]))
            writer.close()
            os.replace(temporary, config.out)
            fsync_path(config.out)
    finally:
        temporary.unlink(missing_ok=True)
    return (
        f"{config.out}: {architecture.name}, {model.n_layers} blocks, {len(planned)} tensors, mostly {config.type},"
        f" {size / 2**20:.1f} MiB, {vocabulary}"
    )


def add_sizes(
    writer: Any, architecture: Architecture, model: ModelConfig, *, context: int | None, file_type: str
) -> None:
    """What a file says of a model beside its tensors and its tokenizer."""
    attention = model.attention
    if attention.yarn is not None and not architecture.yarn:
        raise ValueError("AttentionConfig.yarn: a stretched rotary embedding is not written; legal: None")
    writer.add_file_type(FILE_TYPES[file_type])
    writer.add_quantization_version(2)
    usual = {
        "block_count": architecture.layers(model),
        # What the published model was made for; llama.cpp asks for a number and runs others.
        "context_length": context or 4096,
        "vocab_size": model.vocab_size,
        "embedding_length": model.d_model,
        # Of dense layers, where there are some.
        "feed_forward_length": model.block(0).moe.d_expert,
        **(_expert_sizes(model) if len(dense_layers(model)) < model.n_layers else {}),
        "attention.head_count": attention.n_heads,
        "attention.head_count_kv": attention.n_kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "rope.dimension_count": attention.rotary_dim,
        "rope.freq_base": attention.rope_base,
        "attention.layer_norm_rms_epsilon": model.norm_eps,
    }
    adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in {**usual, **architecture.keys(model)}.items():
        adds.get(type(value), writer.add_array)(f"{architecture.name}.{name}", value)


def _expert_sizes(model: ModelConfig) -> dict[str, int]:
    moe = sparse_moe(model)
    k = moe.router.policy.fixed_experts
    policies = [block.moe.router.policy for block in map(model.block, range(model.n_layers)) if block.moe.n_experts > 1]
    if k is None or type(moe.router.policy) is not TopK or any(policy != moe.router.policy for policy in policies):
        raise ValueError(
            f"{type(moe.router.policy).__name__}: llama.cpp gives every token of every layer as many experts; legal:"
            " TopK with one k"
        )
    return {
        "expert_feed_forward_length": moe.d_expert,
        "expert_count": moe.n_experts,
        "expert_used_count": int(k),
    }


def _planned(
    gguf: Any, architecture: Architecture, family: Family, model: ModelConfig, wanted: Any
) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """Name, shape and type of every tensor, in the order in which `_tensors` gives them."""
    block_size = gguf.GGML_QUANT_SIZES[wanted][0]
    for name, tensor in _tensors(gguf, architecture, family, model, None):
        kind = wanted if tensor.shape[-1] % block_size == 0 else gguf.GGMLQuantizationType.F16
        if tensor.dim() == 1 or any(part in name for part in FULL_PRECISION):
            kind = gguf.GGMLQuantizationType.F32
        yield name, tuple(tensor.shape), kind


def _tensors(
    gguf: Any, architecture: Architecture, family: Family, model: ModelConfig, weights: Checkpoint | None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file with its name there; without weights, on the meta device.

    Raises:
        ValueError: for a published tensor that the architecture has no place for.
    """
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(arch, architecture.layers(model))
    shapes = meta_model(model).state_dict()
    for stored in family.tensors(model):
        whole = shapes[stored.ours] if weights is None else weights.read(stored.ours)
        stacks: dict[str, list[Tensor]] = {}
        for theirs, part in zip(stored.theirs, stored.layout.split(whole)):
            # Experts of one matrix lie in one tensor, in their order.
            expert = EXPERT.fullmatch(theirs)
            stacks.setdefault(f"{expert[1]}.{expert[3]}.weight" if expert else theirs, []).append(part)
        for theirs, parts in stacks.items():
            tensor = torch.stack(parts) if EXPERT.fullmatch(stored.theirs[0]) else parts[0]
            for published, converted in architecture.convert(theirs, tensor, model):
                name = names.get_name(published, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise ValueError(f"llama.cpp's {architecture.name} has no place for {published}")
                yield name, converted
