"""A trained model as a folder: `config.json`, `weights.safetensors`, `tokenizer.model` (or, of a published model,
`tokenizer.json`), `calibration.safetensors`, and `seal.json` with a checksum of each. Nothing is ever unpickled.

The calibration file holds a few thousand tokens of training text, so that a budget can be set exactly wherever the
model goes. Legend: B batch, T tokens.
"""

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from corpus.byte_level_tokenizer import ByteLevelTokenizer
from corpus.tokenizer import Tokenizer
from foundation.files import CorruptFileError, DiskFullError, atomic_folder, check_seal, require_space, seal
from foundation.serialize import load_json, save_json
from lm.config import ModelConfig
from lm.model import LanguageModel

CONFIG_FILE, WEIGHTS_FILE, CALIBRATION_FILE = "config.json", "weights.safetensors", "calibration.safetensors"


def save_pretrained(
    folder: Path, model: LanguageModel, calibration_BT: Tensor | None = None, tokenizer: Tokenizer | None = None
) -> None:
    """Writes config, weights, calibration tokens (int64 [B, T]) and tokenizer into `folder`, which appears, or takes
    an older one's place, whole or not at all.

    Raises:
        DiskFullError: naming the folder; nothing half-written is left.
    """
    save_tensors(folder, model.config, model.state_dict(), calibration_BT, tokenizer)


def save_tensors(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    calibration_BT: Tensor | None = None,
    tokenizer: Tokenizer | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """`save_pretrained` without a model.

    Args:
        state: its `state_dict`, in any floating dtypes.
        beside: further files, by their path inside the folder.

    Raises:
        DiskFullError: as there.
    """
    tensors = {WEIGHTS_FILE: {name: tensor.contiguous() for name, tensor in state.items()}}
    if calibration_BT is not None:
        tensors[CALIBRATION_FILE] = {"tokens_BT": calibration_BT.contiguous()}
    n_bytes = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    require_space(folder.parent, n_bytes, f"the model {folder}")
    with atomic_folder(folder, replace=True) as temporary:
        save_json(temporary / CONFIG_FILE, config)
        if tokenizer is not None:
            tokenizer.save(temporary / tokenizer.file_name)
        for name, group in tensors.items():
            try:
                safetensors.torch.save_file(group, temporary / name)
            except safetensors.SafetensorError as error:
                raise DiskFullError(f"{folder} could not be written: {error}; nothing of it is left") from error
        for name, content in (beside or {}).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(content)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        seal(temporary, [str(path.relative_to(temporary)) for path in files])


def load_pretrained(folder: Path, device: str | torch.device = "cpu") -> LanguageModel:
    """The model stored in `folder`, in evaluation mode.

    Raises:
        ValueError: when a file is missing or unreadable, or weights and config disagree; names the tensors.
        CorruptFileError: when a file is not as it was written; names it.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no trained model: {name} is missing")
    check_folder(folder)
    model = LanguageModel(load_json(ModelConfig, folder / CONFIG_FILE))
    try:
        stored = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} cannot be read ({error}): the file is damaged, export the run again"
        ) from error
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if shapes != expected:
        wrong = [name for name in sorted(expected | shapes) if expected.get(name) != shapes.get(name)]
        raise ValueError(
            f"{folder}: weights and config disagree on {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}"
        )
    model.load_state_dict(stored)
    return model.to(device).eval()


def has_calibration_tokens(folder: Path) -> bool:
    """Whether the model was saved with text to calibrate budgets on; an imported one has none."""
    return (folder / CALIBRATION_FILE).is_file()


def load_calibration_tokens(folder: Path) -> Tensor:
    """The calibration tokens stored with a model, int64 [B, T].

    Raises:
        ValueError: when the model was saved without them.
        CorruptFileError: when a file is not as it was written; names it.
    """
    if not has_calibration_tokens(folder):
        raise ValueError(f"{folder} has no {CALIBRATION_FILE}: it was saved without calibration tokens")
    check_folder(folder)
    return safetensors.torch.load_file(folder / CALIBRATION_FILE)["tokens_BT"]


def check_folder(folder: Path) -> None:
    """Compares a model folder with its seal.

    Raises:
        CorruptFileError: when a file is not as it was written; names it.
    """
    try:
        check_seal(folder)
    except CorruptFileError as error:
        raise CorruptFileError(
            f"{error}. The model cannot be trusted: put the file back, or remove the run's folder and train it again"
        ) from None


def refuse_packed(folder: Path, config: ModelConfig) -> None:
    """Refuses a model whose experts are stored in fewer bits by a ValueError that says what is legal."""
    packed = config.packed
    if packed is not None:
        raise ValueError(
            f"{folder}: its experts are stored in {packed.bits} bits; legal: the model that they were packed from, or"
            f" what `python -m lm quantize {folder} OUT --bits 32` makes of this one"
        )


def load_tokenizer(folder: Path, model: LanguageModel) -> Tokenizer:
    """The tokenizer stored with a model.

    Raises:
        ValueError: when it is missing, unreadable or another one: its ids would mean something else, or nothing.
    """
    if (folder / ByteLevelTokenizer.file_name).is_file():
        return ByteLevelTokenizer.load(folder / ByteLevelTokenizer.file_name, model.config.vocab_size)
    tokenizer = Tokenizer.load(folder / Tokenizer.file_name)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{folder / Tokenizer.file_name}: {tokenizer.vocab_size} tokens, the model's vocabulary has"
            f" {model.config.vocab_size}: it belongs to another model"
        )
    return tokenizer


def find_model(run: Path) -> Path:
    """The model folder meant by `run`: itself, its `model/`, or an error that lists the models below it."""
    for folder in (run, run / "model"):
        if (folder / WEIGHTS_FILE).is_file() and (folder / CONFIG_FILE).is_file():
            return folder
    below = sorted(path.parent for path in run.glob(f"**/model/{WEIGHTS_FILE}")) if run.is_dir() else []
    hint = "; models below it: " + ", ".join(str(path) for path in below[:20]) if below else ""
    raise ValueError(f"{run} holds no trained model{hint}")
