"""`python -m demos`, which is `make demo`: text from the best model under runs/, or from a small one that is trained
for it, on the terminal where there is one, and as a page for the browser.

`python -m demos.terminal`, `demos.browser` and `demos.serve` do each of these alone.
"""

import foundation.starting  # noqa: F401

# isort: split

import dataclasses
import itertools
from pathlib import Path

import tyro

from demos import browser, terminal
from demos.runs import best_model
from foundation.command import run_command
from foundation.numbers import check_numbers
from lm.pretrained import WEIGHTS_FILE
from lm.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Show dynamic experts with whatever is there.

    Attributes:
        runs: folder of all runs; the best finished one is shown. Where there is none, a small model with a dynamic
            number of experts is trained into it, on this machine's Python standard library.
        tokens: of that training.
        out: folder of what is shown: a recording and its page for each time.
        prompt: text to continue.
        max_new_tokens: how many at the most.
        budget: mean experts per token; as trained by default.
        sampling: temperature, top-p, seed.
    """

    runs: Path = Path("runs")
    tokens: int = 300_000
    out: Path = Path("runs/demo")
    prompt: str = "def main(argv):\n"
    max_new_tokens: int = 160
    budget: float | None = None
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = dataclasses.field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_numbers(self, tokens=1, max_new_tokens=1, budget=0)


def main(config: Demo) -> None:
    """Trains where nothing is trained, shows, writes the page and says where it is."""
    if not any(config.runs.glob(f"**/model/{WEIGHTS_FILE}")):
        train(config)
    trace = next(path for n in itertools.count(1) if not (path := config.out / str(n)).exists())
    terminal.main(
        terminal.DemoConfig(
            run=best_model(config.runs),
            prompt=config.prompt,
            max_new_tokens=config.max_new_tokens,
            budget=config.budget,
            trace=trace,
            sampling=config.sampling,
        )
    )
    page = browser.main(browser.BrowserConfig(trace=trace))
    print(f"in a browser: {page.resolve().as_uri()}\nlive in a browser: .venv/bin/python -m demos.serve")


def train(config: Demo) -> None:
    """A trunk and a branch that chooses its experts by top-p, as the comparison trains them."""
    # Seconds to import, and not needed where a model is there.
    from ablations.cli import compare
    from ablations.comparison.options import Options
    from ablations.comparison.registry import find_methods
    from staged_training.staging import StagingConfig

    print(f"no trained model under {config.runs}/: training a small one on {config.tokens:,} tokens", flush=True)
    staging = StagingConfig(tokens=config.tokens)
    compare(find_methods(["top_p"]), Options(seeds=1, out=config.runs, staging=staging))


if __name__ == "__main__":
    run_command(
        lambda arguments: tyro.cli(Demo, prog="python -m demos", description=__doc__, args=arguments),
        main,
        continues=True,
    )
