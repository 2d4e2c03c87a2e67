"""`python -m lm generate | evaluate | bench | bench-peers | long-context`: text from a trained model, how well it
compresses text, how fast a model is on this machine, alone and beside transformers, and what a long text costs it."""

import foundation.starting  # noqa: F401

# isort: split

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from foundation.command import refuse_unwritable, run_command
from foundation.console import escaped
from foundation.numbers import check_numbers
from lm.bench import BenchConfig, bench
from lm.bench_peers import PeersConfig, bench_peers
from lm.evaluate_text import EvaluateConfig, evaluate_text
from lm.generate import SamplingConfig, generate
from lm.generation_trace import traced_generation
from lm.long_context import LongContextConfig, long_context
from lm.pretrained import find_model, load_pretrained, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Streams text that continues a prompt.

    Attributes:
        run: folder of a trained model, or of the run that trained it.
        prompt: text to continue; empty begins a new document.
        max_new_tokens: how many at the most; a document may end earlier.
        trace: folder to record every token's experts and their weights in, layer by layer, and the text; see
            `lm.generation_trace`.
        sampling: temperature, top-p, seed.
    """

    run: Path
    prompt: str = ""
    max_new_tokens: int = 200
    trace: Path | None = None
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = dataclasses.field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_numbers(self, max_new_tokens=0)


def run_generate(config: GenerateConfig) -> None:
    refuse_unwritable("--trace", config.trace, folder=True)
    folder = find_model(config.run)
    model = load_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(folder, model)
    decoder = tokenizer.stream_decoder()
    # Into a file or a pipe goes the text itself.
    shown = escaped if sys.stdout.isatty() else str
    print(shown(config.prompt), end="", flush=True)
    prompt = [tokenizer.boundary_id, *tokenizer.encode(config.prompt)]
    started, count, cache_bytes = time.perf_counter(), 0, 0
    with traced_generation(model, config.trace, prompt=prompt) as record:
        for step in generate(
            model, prompt, max_new_tokens=config.max_new_tokens, sampling=config.sampling, stop=tokenizer.boundary_id
        ):
            piece = decoder.push(step.token)
            record(step.token, piece)
            print(shown(piece), end="", flush=True)
            count, cache_bytes = count + 1, step.cache_bytes
    print(shown(decoder.flush()))
    print(
        f"[{count} tokens, {count / (time.perf_counter() - started):.0f} tokens/s, cache {cache_bytes:,} bytes]",
        file=sys.stderr,
    )


COMMANDS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "generate": (GenerateConfig, run_generate),
    "evaluate": (EvaluateConfig, evaluate_text),
    "bench": (BenchConfig, bench),
    "bench-peers": (PeersConfig, bench_peers),
    "long-context": (LongContextConfig, long_context),
}


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(
        lambda given: tyro.extras.subcommand_cli_from_dict(
            {name: config for name, (config, _) in COMMANDS.items()},
            prog="python -m lm",
            description=__doc__,
            args=given,
        ),
        lambda config: next(run for kind, run in COMMANDS.values() if isinstance(config, kind))(config),
        arguments,
    )


if __name__ == "__main__":
    main()
