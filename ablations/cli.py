"""The commands: `python -m ablations list | compare | pairs | gate | report | budgets | calibrate |
difficulty | counterfactual | frontier | agreement | problems | recall | mixture | corpora | tokenizers | scaling |
runs | prune`, and `python -m ablations.<method>`."""

import foundation.starting  # noqa: F401

# isort: split

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ablations.agreement.options import AgreementOptions
from ablations.comparison.budgets import BUDGETS_FILE, budget_rows, budget_text, write_budgets
from ablations.comparison.calibration import CALIBRATION_FILE, CalibrationRow, calibration_rows, calibration_text
from ablations.comparison.options import Options
from ablations.comparison.pairs import PairsConfig, pairs
from ablations.comparison.records import read_records
from ablations.comparison.registry import all_methods, find_methods
from ablations.comparison.shares import run_side_by_side
from ablations.counterfactual.options import CounterfactualOptions, FrontierOptions
from ablations.difficulty.options import AnalysisOptions
from ablations.difficulty.tasks import generate, write_problems
from ablations.difficulty.training import TrainingOptions, train
from ablations.gate.decision import GateConfig
from ablations.gate.exits import Verdict, errors_apart, progress_on_stderr
from ablations.gate.gate import gate, verdict_text
from ablations.method import Method
from ablations.mixture.options import MixtureSearchOptions
from ablations.recall.options import RecallOptions
from ablations.report.index import runs_command
from ablations.report.run_folders import prune_command
from ablations.scaling.command import ScalingCommand, run_scaling
from ablations.text.options import CorporaOptions, TokenizerOptions
from foundation.command import deferred, refuse_unwritable, run_command
from foundation.environment import under_torchrun
from foundation.numbers import objection
from foundation.serialize import to_dict
from foundation.tables import write_rows

Names = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="METHOD ...")]
# As many pairs as tell 5 % of false verdicts from 20 %.
CALIBRATION = Options(seeds=40)
# Three looks.
GATE = Options(seeds=8)
QUESTION = GateConfig()
FlatOptions = Annotated[Options, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="comparison")]


def main() -> None:
    """`python -m ablations`."""
    commands = {
        "list": list_command,
        "compare": compare_command,
        "pairs": pairs_command,
        "gate": gate_command,
        "report": report_command,
        "budgets": budgets_command,
        "calibrate": calibrate_command,
        "difficulty": difficulty_command,
        "counterfactual": counterfactual_command,
        "frontier": frontier_command,
        "agreement": agreement_command,
        "problems": problems_command,
        "recall": recall_command,
        "mixture": mixture_command,
        "corpora": corpora_command,
        "tokenizers": tokenizers_command,
        "scaling": scaling_command,
        "runs": runs_command,
        "prune": prune_command,
    }
    with errors_apart() if sys.argv[1:2] == ["gate"] else contextlib.nullcontext():
        run_command(
            lambda arguments: tyro.extras.subcommand_cli_from_dict(
                {name: deferred(command) for name, command in commands.items()},
                prog="python -m ablations",
                description=__doc__,
                args=arguments,
            ),
            lambda command: command(),
            continues=True,
            nested=("scaling",),
        )


def list_command() -> None:
    """List the methods and the question each answers."""
    for name, method in all_methods().items():
        print(f"{name:<24} {method.question}")


def compare_command(methods: Names, options: FlatOptions) -> None:
    """Compare methods with the baseline on shared trunks; print the table and write the report. What is finished is not
    run again.

    Args:
        methods: names as `list` shows them; the baseline is always one of them.
    """
    if not methods:
        raise ValueError(f"name the methods to compare; known: {', '.join(all_methods())}")
    compare(find_methods(list(methods)), options)


def compare(methods: list[Method], options: Options) -> Path | None:
    """Runs what of a comparison is not finished and shows it.

    Returns:
        The path of the report; None after a dry run.

    Raises:
        ValueError, foundation.stopping.Interrupted: see `run_side_by_side`.
    """
    folder = run_side_by_side(methods, options)
    return None if folder is None else _show(folder)


def pairs_command(config: Annotated[PairsConfig, tyro.conf.OmitArgPrefixes]) -> None:
    """How much better are some finished runs than others, seed by seed? Trains nothing."""
    pairs(config)


def gate_command(
    method: tyro.conf.Positional[str],
    config: Annotated[GateConfig, tyro.conf.OmitArgPrefixes] = QUESTION,
    options: FlatOptions = GATE,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Is a method better than the baseline? Looks at few seeds, then at more, until the answer is clear or `--seeds`
    are spent. Exits with 0 for keep, 1 for discard, 2 for unresolved; with 64 for a command line that is none, 65 for
    data or options that cannot be used, 70 for a failure of the program, 128 + n for a stop signal.

    Args:
        method: name as `list` shows it.
        as_json: print the verdict as JSON, alone on standard output; progress goes to standard error.
    """
    if under_torchrun():
        raise ValueError("torchrun: a gate starts processes of its own for each of its looks; legal: --processes N")
    with progress_on_stderr() if as_json else contextlib.nullcontext():
        verdict, path = gate(method, options, config)
    print(json.dumps(to_dict(verdict), indent=2) if as_json else verdict_text(verdict, path), flush=True)
    raise Verdict(verdict.verdict)


def report_command(folder: tyro.conf.Positional[Path]) -> None:
    """Print the table and write the report of a comparison again, from its run folders.

    Args:
        folder: of the comparison, `runs/comparisons/<hash>`.
    """
    _show(folder)


def _show(folder: Path) -> Path:
    # Figures take half a second to import, and studies more: only what shows them waits for that.
    from ablations.report.report import show

    return show(folder)


def budgets_command(methods: Names, options: FlatOptions, last_steps: int = 50) -> None:
    """How exactly methods hold the mean number of experts: asked, in training, at inference, at other budgets of the
    same weights.

    Args:
        methods: names as `list` shows them; by default all whose number of experts depends on the token.
        last_steps: of training, whose mean is reported.
    """
    if problem := objection(last_steps, 1):
        raise ValueError(f"--last-steps {last_steps}: {problem}")
    # Which policy a method has does not depend on the vocabulary.
    baseline = options.model.config(vocab_size=1)
    names = methods or tuple(name for name, method in all_methods().items() if method.has_budget(baseline))
    folder = run_side_by_side(find_methods(list(names)), options)
    if folder is None:
        return
    rows = budget_rows(read_records(folder), last_steps=last_steps)
    write_budgets(rows, folder / BUDGETS_FILE)
    print(f"\n{budget_text(rows, last_steps=last_steps)}\n\nbudgets: {folder / BUDGETS_FILE}")


def calibrate_command(options: FlatOptions = CALIBRATION) -> None:
    """How often verdicts come up where there is nothing to find: twins and other orders of the baseline, judged as
    methods are. Every seed is a pair of each."""
    folder = run_side_by_side(find_methods(["twin", "other_order"]), options)
    if folder is None:
        return
    rows = calibration_rows(read_records(folder))
    write_rows(folder / CALIBRATION_FILE, CalibrationRow, rows)
    print(f"\n{calibration_text(rows)}\n\ncalibration: {folder / CALIBRATION_FILE}")


def difficulty_command(
    training: Annotated[TrainingOptions, tyro.conf.OmitArgPrefixes],
    analysis: Annotated[AnalysisOptions, tyro.conf.OmitArgPrefixes],
    phase: Literal["all", "train", "analyse"] = "all",
) -> None:
    """Do harder tokens get more experts, and does it pay? Train the models of the study, then measure. What is finished
    is not trained again.

    Args:
        phase: "train" or "analyse" alone; the analysis needs `--out` only, and also works on what is trained so far.
    """
    if phase != "analyse":
        train(training)
    if phase != "train":
        from ablations.difficulty.analysis import analyse

        analyse(training.out, analysis)


def counterfactual_command(
    options: Annotated[CounterfactualOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="study")],
) -> None:
    """Is a policy's choice of experts worth anything? The loss of trained models under it and under other allocations
    of the same total: even, shuffled, by frequency, greedy, and an oracle's that knows no token's luck."""
    from ablations.counterfactual.study import counterfactual

    counterfactual(options)


def frontier_command(
    options: Annotated[FrontierOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="study")],
) -> None:
    """Bits per byte against mean experts and against measured seconds per token: trained models by their own policies
    and with the same number for every token."""
    from ablations.counterfactual.frontier import frontier

    frontier(options)


def agreement_command(
    options: Annotated[AgreementOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="study")],
) -> None:
    """Do cheap comparisons order arms as full runs do? Train every arm whole and in every cheap setting, then compare.
    Prints its cost first; what is finished is not trained again."""
    from ablations.agreement.report import agreement_study

    agreement_study(options)


def problems_command(out: Path, count: int = 24_000, seed: int = 0) -> None:
    """Write generated problems of known difficulty (addition, recall, word problems), one JSON object per line, for
    `--data`.

    Args:
        out: the .jsonl file to write.
        count: problems, all different.
        seed: equal seed, equal problems.
    """
    if problem := objection(count, 1):
        raise ValueError(f"--count {count}: {problem}")
    refuse_unwritable("--out", out)
    problems = generate(count, seed)
    write_problems(problems, out)
    print(f"{count:,} problems, {sum(len(each.text) for each in problems):,} bytes: {out}")


def recall_command(options: Annotated[RecallOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="study")]) -> None:
    """What does a layer plan remember? Train small models to recall associations, over a grid of learning rates, and
    show their accuracy against the size of their state. What is finished is not trained again."""
    from ablations.recall.report import recall_study

    recall_study(options)


def mixture_command(
    options: Annotated[MixtureSearchOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="search")],
) -> None:
    """Which mixture of a corpus's domains trains the best model? Small runs on many mixtures, a regression from mixture
    to losses, its optimum under epoch caps, and runs of the model on it, the natural and the uniform mixture."""
    from ablations.mixture.search import search

    search(options)


def corpora_command(
    options: Annotated[CorporaOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="study")],
) -> None:
    """What is a corpus worth? One model, trained for as many tokens on each, evaluated on the same text."""
    from ablations.text.corpora import compare_corpora

    compare_corpora(options)


def tokenizers_command(
    options: Annotated[TokenizerOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="study")],
) -> None:
    """Which tokenizer gives a small model the fewest bits per byte at equal compute?"""
    from ablations.text.tokenizers import choose_tokenizer

    choose_tokenizer(options)


def scaling_command(command: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[ScalingCommand]]) -> None:
    """Scaling laws: fit them to points, predict the loss at every step, plan, compare methods at scale."""
    run_scaling(command)


def run_alone(method: Method) -> None:
    """`python -m ablations.<method>`: this method against the baseline."""
    prog = f"python -m ablations.{method.name}"
    run_command(
        lambda arguments: tyro.cli(Options, prog=prog, description=method.question, args=arguments),
        lambda options: compare(find_methods([method.name]), options),
        continues=True,
    )
