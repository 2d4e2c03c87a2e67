"""`python -m lm eval`: a model on tasks of lm-evaluation-harness, its own or those of a folder of YAML files."""

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from foundation.command import refuse_unwritable
from foundation.numbers import check_numbers
from foundation.serialize import nearest
from foundation.tables import write_rows
from lm.budget import set_budget
from lm.pretrained import find_model, load_calibration_tokens, load_pretrained, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Runs tasks of lm-evaluation-harness.

    Attributes:
        run: folder of a trained model, or of the run that trained it.
        tasks: names of tasks or groups.
        task_folder: folder of YAML files that define tasks; with it the harness's own tasks are not known.
        limit: documents of each task, the first so many; all by default.
        fewshot: examples ahead of each question; as the task says by default.
        batch_size: answers side by side.
        experts: real experts per token, in the mean, in every layer; as the model has them by default.
        online: let data sets be fetched; without it only what lies on this machine is read.
        csv: file for the table.
        seed: of the examples that are drawn.
    """

    run: Path
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    limit: int | None = None
    fewshot: int | None = None
    batch_size: int = 8
    experts: float | None = None
    online: bool = False
    csv: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, limit=1, fewshot=0, batch_size=1, experts=0, seed=0)
        if not self.tasks:
            raise ValueError("EvalConfig.tasks: none given; legal: at least one name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One metric of one task.

    Attributes:
        filter: what the harness did to answers before it counted them.
        standard_error: of the mean over documents; None where the metric has none.
    """

    task: str
    documents: int
    fewshot: int
    metric: str
    filter: str
    value: float
    standard_error: float | None


def run_tasks(config: EvalConfig) -> list[EvalRow]:
    """Runs the tasks, prints the table, and returns its rows.

    Raises:
        ValueError: for a task that is not known, a folder without tasks, or data that cannot be read here.
        ImportError: without lm-evaluation-harness, saying how to install it.
    """
    refuse_unwritable("--csv", config.csv)
    if config.task_folder is not None and not config.task_folder.is_dir():
        raise ValueError(f"--task-folder {config.task_folder}: no such folder")
    folder = find_model(config.run)
    if not config.online:
        # Read where these packages are imported.
        os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"})
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"lm eval needs lm-evaluation-harness: pip install 'hybrid-moe-lab[eval]' ({error})"
        ) from error
    from lm.eval_model import HarnessModel

    model = load_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(folder, model)
    if config.experts is not None:
        set_budget(model, config.experts, load_calibration_tokens(folder).to(model.embedding_VD.device))
    manager = TaskManager(
        include_path=None if config.task_folder is None else str(config.task_folder),
        include_defaults=config.task_folder is None,
    )
    for task in config.tasks:
        if task not in manager.all_tasks:
            place = "the harness" if config.task_folder is None else config.task_folder
            raise ValueError(f"--tasks {task}: not a task of {place}; {nearest(task, manager.all_tasks)}")
    # The harness tells a story at this level.
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    results = simple_evaluate(
        model=HarnessModel(model, tokenizer, batch_size=config.batch_size),
        tasks=list(config.tasks),
        task_manager=manager,
        limit=config.limit,
        num_fewshot=config.fewshot,
        log_samples=False,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
    )
    rows = list(rows_of(cast(dict[str, Any], results or {})))
    print(table(rows))
    if config.csv is not None:
        write_rows(config.csv, EvalRow, rows)
    return rows


def rows_of(results: dict[str, Any]) -> Iterator[EvalRow]:
    """Every metric of what the harness returns."""
    for task, metrics in results.get("results", {}).items():
        for name, value in metrics.items():
            metric, _, used = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{used}")
            yield EvalRow(
                task=task,
                documents=results.get("n-samples", {}).get(task, {}).get("effective", 0),
                fewshot=results.get("n-shot", {}).get(task, 0),
                metric=metric,
                filter=used,
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
            )


def table(rows: list[EvalRow]) -> str:
    lines = [f"{'task':<28} {'documents':>9} {'shots':>5} {'metric':<18} {'value':>20}"]
    for row in rows:
        error = "" if row.standard_error is None else f" ± {row.standard_error:.4f}"
        name = row.metric if row.filter == "none" else f"{row.metric} ({row.filter})"
        lines.append(f"{row.task:<28} {row.documents:>9,} {row.fewshot:>5} {name:<18} {row.value:>10.4f}{error}")
    return "\n".join(lines)
