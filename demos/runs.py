"""Which trained model a demo shows, and what it can say of it: the run, its text and its bits per byte."""

import dataclasses
from pathlib import Path
from typing import Any

from corpus.prepare import MANIFEST
from foundation.files import read_json
from foundation.serialize import load_json
from lm.config import ModelConfig
from lm.pretrained import CONFIG_FILE, WEIGHTS_FILE, find_model
from staged_training.record import CONFIG, ENVIRONMENT, RESULT


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownRun:
    """Attributes:
    model: folder of the model.
    name: the run, for a reader.
    data: what it was trained on; empty where nothing tells.
    bits_per_byte: on its validation text; None where nothing tells.
    frontier: (mean experts, bits per byte) of the same weights under other budgets, as measured behind the training.
    """

    model: Path
    name: str
    data: str = ""
    bits_per_byte: float | None = None
    frontier: tuple[tuple[float, float], ...] = ()

    def __str__(self) -> str:
        score = "" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f} bits per byte"
        return " · ".join(part for part in (self.name, self.data, score) if part)


def shown_run(folder: Path) -> ShownRun:
    """What is known of a model's folder: much where the run that trained it lies around it."""
    run = folder.parent if folder.name == "model" else folder
    result, asked = (_read(run / name) for name in (RESULT, CONFIG))
    if "bits_per_byte" not in result:
        return ShownRun(model=folder, name=str(folder))
    seeds = [f"trunk seed {result.get('trunk_seed')}"]
    if result.get("branch_seed") is not None:
        seeds.append(f"seed {result['branch_seed']}")
    corpus = asked.get("trunk", asked).get("corpus", {})
    budgets = [(float(row["mean_experts"]), float(row["bits_per_byte"])) for row in result.get("budgets", ())]
    return ShownRun(
        model=folder,
        name=f"{result.get('method', run.name)}, {', '.join(seeds)} ({run})",
        data=_text_of(run, corpus),
        bits_per_byte=result["bits_per_byte"],
        frontier=tuple(sorted(budgets)),
    )


def best_model(root: Path) -> Path:
    """The finished model below `root` with the fewest bits per byte: of those whose numbers of experts differ by token,
    where there are any, and that were evaluated on the text of the newest of them, since bits per byte of different
    texts do not compare. Where no run is finished, the newest model.

    Raises:
        ValueError: where there is no model.
    """
    found = sorted(root.glob(f"**/model/{WEIGHTS_FILE}"), key=lambda path: path.stat().st_mtime)
    models = [path.parent for path in found]
    if not models:
        raise ValueError(f"no trained model under {root}/: run `make demo` or `make ablation` first, or give --run")
    models = [model for model in models if varies_by_token(model)] or models
    scored = [model for model in models if isinstance(_read(model.parent / RESULT).get("bits_per_byte"), float)]
    if not scored:
        return models[-1]
    text = _text_hash(scored[-1])
    same = [model for model in scored if _text_hash(model) == text]
    return min(same, key=lambda model: _read(model.parent / RESULT)["bits_per_byte"])


def model_of(run: Path | None) -> Path:
    """The model that `run` means, or the best under runs/."""
    return best_model(Path("runs")) if run is None else find_model(run)


def varies_by_token(folder: Path) -> bool:
    """Whether the model of this folder generates with a number of experts that depends on the token."""
    try:
        config = load_json(ModelConfig, folder / CONFIG_FILE)
    except (OSError, ValueError):
        # Written by another version: nothing for a demo to prefer, and no reason to fail.
        return False
    policies = [config.block(layer).moe.router.policy for layer in range(config.n_layers)]
    return any(policy.varies_by_token and not policy.needs_whole_batch for policy in policies)


def _text_hash(model: Path) -> object:
    return _read(model.parent / ENVIRONMENT).get("data_hash")


def _text_of(run: Path, corpus: dict[str, Any]) -> str:
    """The text that a run's configuration counts, by name where its prepared corpus lies near."""
    sizes = [corpus.get(f"{split}_tokens") for split in ("train", "valid")]
    if None in sizes:
        return ""
    name = ""
    for path in [path for parent in run.parents[:3] for path in parent.glob(f"corpus/*/{MANIFEST}")]:
        manifest = _read(path)
        if [manifest.get(split, {}).get("tokens") for split in ("train", "valid")] == sizes:
            name = ", ".join(manifest["config"]["data"]) or "the Python standard library"
            break
    return f"{name or 'text'} ({corpus['train_bytes'] / 1e6:.1f} MB)"


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none that can be read: a demo shows what there is."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
