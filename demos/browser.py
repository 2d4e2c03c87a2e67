"""`python -m demos.browser TRACE`: a recorded generation as one HTML file that works offline, its tokens coloured by
the experts behind them, with a slider that decides the budget again from the stored scores.

A trace is what `python -m lm generate --trace` or `python -m demos.terminal --trace` leaves.
"""

import foundation.starting  # noqa: F401

# isort: split

import dataclasses
from pathlib import Path

import tyro

from foundation.command import refuse_unwritable, run_command
from foundation.files import write_text
from lm.config import ModelConfig
from lm.generation_trace import TracedText, read_generation, read_scores
from lm.pretrained import CONFIG_FILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class BrowserConfig:
    """Write a recorded generation as one HTML file.

    Attributes:
        trace: folder of the trace.
        out: file to write; page.html in the trace's folder by default.
        frontier: csv with columns method, mean_experts, bits_per_byte, drawn beside; by default what the run measured
            behind its training.
    """

    trace: tyro.conf.Positional[Path]
    out: Path | None = None
    frontier: Path | None = None


def main(config: BrowserConfig) -> Path:
    """Writes the page and says where.

    Raises:
        ValueError: for a folder that holds no such trace, or a frontier that cannot be read.
    """
    # Half a second to import, for the figures.
    from demos.figures import read_frontier
    from demos.page import page
    from demos.runs import shown_run

    text, _ = read_generation(config.trace)
    scores = read_scores(config.trace)
    path = config.out or config.trace / "page.html"
    refuse_unwritable("--out", path)
    frontier = None if config.frontier is None else read_frontier(config.frontier)
    write_text(path, page(text, scores, shown_run(Path(text.source)), config_of(text, config.trace), frontier))
    print(f"{len(text.tokens)} tokens in {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


def config_of(text: TracedText, folder: Path) -> ModelConfig:
    """The configuration of the traced model.

    Raises:
        ValueError: for a trace without one.
    """
    if text.config is None:
        raise ValueError(
            f"{folder} was recorded by an older version, without the model's {CONFIG_FILE}: record it again"
        )
    return text.config


if __name__ == "__main__":
    run_command(
        lambda arguments: tyro.cli(BrowserConfig, prog="python -m demos.browser", description=__doc__, args=arguments),
        main,
    )
