"""`python -m demos.terminal`: watch a model spend experts. Generated text, every token coloured by the number of
experts behind it, and below it a line per layer, bits per byte, time and memory.

The number is that of the forward pass which predicted the token: the work that went into choosing it, averaged over the
layers whose number varies. On a terminal keys change the budget while the text grows; into a pipe or a file goes the
text, its numbers in brackets.
"""

import foundation.starting  # noqa: F401

# isort: split

import contextlib
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from demos.browser import config_of
from demos.live import LiveModel
from demos.runs import model_of, shown_run
from demos.screen import Screen, is_screen, opened_screen
from demos.side import Side, recorded_pane, timing_line
from demos.terminal_view import Palette, Pane, frame, spark_lines, wrapped
from foundation.command import refuse_unwritable, run_command
from foundation.console import escaped
from foundation.numbers import check_numbers
from lm.generation_trace import read_generation, traced_generation
from lm.sampling import SamplingConfig

KEYS = "+ - budget   t as trained   space pause   q leave"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Generate text and show the experts each token used.

    Attributes:
        run: folder of a trained model or of the run that trained it; by default the best finished one under runs/, one
            whose numbers of experts differ by token where there is any.
        prompt: text to continue.
        max_new_tokens: how many at the most.
        budget: mean experts per token in every layer, the number of each token chosen by its policy, or by top-p; as
            trained by default.
        side_by_side: two texts from one seed, a token of each in turn: "static" shows the same number for every token
            beside as many in the mean, "budgets" two budgets and what each token takes on the clock.
        budgets: of "budgets".
        colours: "auto" colours a terminal unless NO_COLOR is set; without colours the number stands behind each token.
        pace: tokens per second on a terminal, so that one can follow; times shown are those of the forward passes.
        trace: also record everything in this folder: the text, every token's experts and their weights in every layer,
            and the scores behind them (`lm.generation_trace`).
        replay: show such a folder again, without a model.
        sampling: temperature, top-p, seed.
    """

    run: Path | None = None
    prompt: str = "def main(argv):\n"
    max_new_tokens: int = 160
    budget: float | None = None
    side_by_side: Literal["off", "static", "budgets"] = "off"
    budgets: tuple[float, float] = (2, 20)
    colours: Literal["auto", "always", "never"] = "auto"
    pace: float = 20.0
    trace: Path | None = None
    replay: Path | None = None
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = dataclasses.field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_numbers(self, max_new_tokens=1, budget=0, budgets=0, pace=0.1)
        if self.trace is not None and self.side_by_side != "off":
            raise ValueError("DemoConfig.trace: a trace is of one text, not of two; legal: --side-by-side off")


def main(config: DemoConfig) -> None:
    """Shows a generation, new or recorded.

    Raises:
        ValueError: for a folder that holds no model or no recording, or a budget that the model cannot hold.
    """
    refuse_unwritable("--trace", config.trace, folder=True)
    colours = config.colours == "always" or (
        config.colours == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    if config.replay is not None:
        text, experts_NL = read_generation(config.replay)
        pane = recorded_pane(text, experts_NL, config_of(text, config.replay))
        palette = Palette(text.cap, colours)
        print(f"{escaped(str(shown_run(Path(text.source))))}\n{palette.legend()}")
        print_text(pane, palette)
        print_figures(pane, palette)
        return
    lives = models(config)
    with contextlib.ExitStack() as recording:
        recorder = recording.enter_context(
            traced_generation(
                lives[0].model,
                config.trace,
                prompt=lives[0].prompt(config.prompt),
                calibration_BT=lives[0].calibration_BT() if config.trace else None,
                prompt_text=config.prompt,
                source=str(lives[0].folder),
                budget=config.budget,
                sampling=config.sampling,
            )
        )
        sides = [
            Side(
                live,
                config.prompt,
                title=title_of(live) if len(lives) > 1 else "",
                max_new_tokens=config.max_new_tokens,
                sampling=config.sampling,
                recorder=recorder,
            )
            for live in lives
        ]
        palette = Palette(max(live.cap for live in lives), colours)
        head = [escaped(str(lives[0].run)), palette.legend()]
        # A screen without colours could show no number beside its token.
        if is_screen() and colours:
            with opened_screen() as screen:
                on_screen(sides, screen, palette, head, config.pace)
            print("\n".join(head))
            for side in sides:
                print_text(side.pane, palette)
                print_figures(side.pane, palette)
        else:
            print("\n".join(head))
            in_lines(sides, palette)
    if len(sides) > 1 and (line := timing_line(sides)):
        print(line)
    if not any(side.measured.means for side in sides):
        raise ValueError("the model ended the document at once; try another prompt or seed")


def models(config: DemoConfig) -> list[LiveModel]:
    """One, or two that share their weights."""
    live = LiveModel(model_of(config.run))
    if config.side_by_side == "off":
        live.set_budget(config.budget)
        return [live]
    if config.side_by_side == "budgets":
        lives, budgets = [live, live.twin()], config.budgets
    else:
        budget = config.budget or round(live.mean_asked())
        lives, budgets = [live.twin(static=True), live], (budget, budget)
    for one, budget in zip(lives, budgets):
        one.set_budget(budget)
    return lives


def title_of(live: LiveModel) -> str:
    if live.budget is None:
        return "as trained"
    return f"{live.budget:g} experts for every token" if live.static else f"{live.budget:g} experts in the mean"


def turn(sides: Sequence[Side], number: int) -> list[tuple[str, float] | None]:
    """A token of each; who begins alternates, so that none profits from what the other left warm."""
    order = sides if number % 2 == 0 else sides[::-1]
    return [side.advance() for side in order][:: 1 if number % 2 == 0 else -1]


def in_lines(sides: Sequence[Side], palette: Palette) -> None:
    """The text as it grows; two texts, which grow together, one behind the other at the end."""
    stream = len(sides) == 1 and not sys.stdout.isatty()
    if stream:
        print(escaped(sides[0].pane.runs[0][0]), end="")
    number = 0
    while any(tokens := turn(sides, number)):
        number += 1
        if stream and tokens[0] is not None:
            print(palette.paint(*tokens[0]), end="", flush=True)
    if stream:
        print()
    for side in sides:
        if not stream:
            print_text(side.pane, palette)
        print_figures(side.pane, palette)


def on_screen(sides: Sequence[Side], screen: Screen, palette: Palette, head: Sequence[str], pace: float) -> None:
    """The text as it grows, until somebody leaves."""
    number, paused = 0, False
    while True:
        due = time.monotonic() + 1 / pace
        if not paused and any(turn(sides, number)):
            number += 1
        timing = timing_line(sides) if len(sides) > 1 else ""
        ended = all(side.ended for side in sides)
        foot = f"{KEYS}{'   (paused)' if paused else ''}"
        screen.draw(
            frame([side.pane for side in sides], palette, [*head, *([timing] if timing else [])], foot, screen.size)
        )
        for key in screen.keys(3600.0 if paused or ended else max(due - time.monotonic(), 0.0)):
            if key in ("q", "\x1b", "\x03", "\x04"):
                for side in sides:
                    if not side.ended:
                        side.end("stop")
                return
            if key == " ":
                paused = not paused
            elif key in "+=-_t":
                move_budget(sides, key)


def move_budget(sides: Sequence[Side], key: str) -> None:
    """One expert more or fewer, or as trained: of one text; of both where they compare policies; of the second where
    they compare budgets."""
    both = any(side.live.static for side in sides)
    for side in sides if both else sides[-1:]:
        now = side.live.budget or round(side.live.mean_asked())
        wanted = None if key == "t" else now + (1 if key in "+=" else -1)
        try:
            side.live.set_budget(wanted)
            side.pane.note = f"from here on: {title_of(side.live)}" if not side.ended else side.pane.note
        except ValueError as error:
            side.pane.note = str(error)
        if side.pane.title:
            side.pane.title = title_of(side.live)


def print_text(pane: Pane, palette: Palette) -> None:
    """A whole text: on a terminal its words stay whole."""
    if pane.title:
        print(f"\n{pane.title}")
    if not sys.stdout.isatty():
        print("".join(palette.paint(*run) for run in pane.runs))
        return
    for line in wrapped(pane.runs, max(shutil.get_terminal_size().columns, 20)):
        print("".join(palette.paint(*run) for run in line))


def print_figures(pane: Pane, palette: Palette) -> None:
    """What stands below a text: layers, figures, how it ended."""
    width = max(shutil.get_terminal_size().columns, 40)
    print()
    for line in spark_lines(pane, palette, width, len(pane.layers)):
        print(line)
    if pane.summary is not None:
        print(pane.summary)
    print(pane.note)


if __name__ == "__main__":
    run_command(
        lambda arguments: tyro.cli(DemoConfig, prog="python -m demos.terminal", description=__doc__, args=arguments),
        main,
    )
