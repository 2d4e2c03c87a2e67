"""`python -m lm generate | bench`: text from a trained model, and how fast the model is on this machine."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import tyro

from corpus.tokenizer import Tokenizer
from lm.bench import BenchConfig, bench
from lm.generate import SamplingConfig, generate
from lm.generation_trace import traced_generation
from lm.pretrained import find_model, load_pretrained


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


def run_generate(config: GenerateConfig) -> None:
    folder = find_model(config.run)
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    model = load_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu")
    decoder = tokenizer.stream_decoder()
    print(config.prompt, end="", flush=True)
    prompt = [tokenizer.boundary_id, *tokenizer.encode(config.prompt)]
    started, count, cache_bytes = time.perf_counter(), 0, 0
    with traced_generation(model, config.trace, prompt=prompt) as record:
        for step in generate(
            model, prompt, max_new_tokens=config.max_new_tokens, sampling=config.sampling, stop=tokenizer.boundary_id
        ):
            piece = decoder.push(step.token)
            print(piece, end="", flush=True)
            record(step.token, piece)
            count, cache_bytes = count + 1, step.cache_bytes
    print(decoder.flush())
    print(
        f"[{count} tokens, {count / (time.perf_counter() - started):.0f} tokens/s, cache {cache_bytes:,} bytes]",
        file=sys.stderr,
    )


def main() -> None:
    config = tyro.cli(
        Annotated[GenerateConfig, tyro.conf.subcommand("generate")]
        | Annotated[BenchConfig, tyro.conf.subcommand("bench")],  # pyright: ignore
        prog="python -m lm",
        description=__doc__,
    )
    try:
        run_generate(config) if isinstance(config, GenerateConfig) else bench(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
