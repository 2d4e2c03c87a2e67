"""`python -m lm generate | evaluate | few-shot | eval | cache | bench | bench-peers | bench-bits | long-context |
recall | quantize | layer-experts | import | export | gguf | parity`: text from a trained model, its bits per byte, its
answers to questions from files and to tasks of lm-evaluation-harness, what a layer plan remembers, in bytes, how fast a
model is on this machine, alone, beside transformers and with experts in fewer bits, what a long text costs it and what
it remembers of one, the same model with experts in fewer bits or fewer of them in some layers, and published models in
and out."""

import foundation.starting  # noqa: F401

# isort: split

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import tyro

from foundation.command import refuse_unwritable, run_command
from foundation.console import escaped
from foundation.numbers import check_numbers
from lm.bench import BenchConfig, bench
from lm.bench_bits import BenchBitsConfig, bench_bits
from lm.bench_peers import PeersConfig, bench_peers
from lm.budget import counted_layers
from lm.cache_table import CacheConfig, show_caches
from lm.eval_harness import EvalConfig, run_tasks
from lm.evaluate_text import EvaluateConfig, evaluate_text
from lm.few_shot import FewShotConfig, few_shot
from lm.generate import generate_batch
from lm.generation_trace import traced_generation
from lm.gguf_files.write import GGUFConfig, write_gguf
from lm.layer_experts import LayerExpertsConfig, layer_experts
from lm.long_context import LongContextConfig, long_context
from lm.pretrained import find_model, has_calibration_tokens, load_calibration_tokens, load_pretrained, load_tokenizer
from lm.published.convert import ExportConfig, ImportConfig, export_model, import_model
from lm.published.parity import ParityConfig, parity
from lm.quantize import QuantizeConfig, quantize
from lm.recall import RecallConfig, recall
from lm.sampling import SamplingConfig, StopStrings
from lm.text_budgets import TextBudgets, parse_changes


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Streams text that continues a prompt, or continues several side by side.

    Attributes:
        run: folder of a trained model, or of the run that trained it.
        prompt: text to continue; empty begins a new document. Several, of any lengths, share every forward pass, and
            each becomes what it would alone under its own seed.
        max_new_tokens: how many at the most; a document may end earlier.
        stop: strings before any of which a text ends.
        experts: mean experts per token and layer, of all texts or one number for each; as trained by default. Layers
            that give every token the same number need a whole one.
        experts_at: changes of that number on the way, of all texts: 40:2 has the 40th token that is generated, counted
            from 0, and all later ones use 2 in the mean, 80:trained as many as trained again.
        eight_bits: the cache stores keys and values in 8 bits, as int8 or fp8 (e4m3), with a scale for each token and
            head.
        trace: folder to record every token's experts and their weights in, layer by layer, and the text; see
            `lm.generation_trace`.
        sampling: temperature, top-k, top-p, min-p, repetition penalty, seed.
    """

    run: Path
    prompt: tuple[str, ...] = ("",)
    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()
    experts: tuple[float, ...] = ()
    experts_at: tuple[str, ...] = ()
    eight_bits: Literal["int8", "fp8"] | None = None
    trace: Path | None = None
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = dataclasses.field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_numbers(self, max_new_tokens=0, experts=0)
        parse_changes(self.experts_at)
        StopStrings(self.stop)
        if not self.prompt:
            raise ValueError('prompt: none given; legal: at least one, "" for a new document')
        if len(self.experts) not in (0, 1, len(self.prompt)):
            raise ValueError(
                f"experts: {len(self.experts)} numbers for {len(self.prompt)} prompts; legal: one, or as many"
            )
        if self.trace is not None and len(self.prompt) > 1:
            raise ValueError(f"trace: a trace is of one text; legal: one prompt, not {len(self.prompt)}")


def run_generate(config: GenerateConfig) -> None:
    refuse_unwritable("--trace", config.trace, folder=True)
    folder = find_model(config.run)
    model = load_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(folder, model)
    # Into a file or a pipe goes the text itself.
    shown = escaped if sys.stdout.isatty() else str
    prompts = [[tokenizer.boundary_id, *tokenizer.encode(prompt)] for prompt in config.prompt]
    decoders = [tokenizer.stream_decoder() for _ in prompts]
    stops = [StopStrings(config.stop) for _ in prompts]
    alone = len(prompts) == 1
    texts = list(config.prompt)
    print(shown(config.prompt[0]) if alone else "", end="", flush=True)
    calibration_BT = None
    changes = parse_changes(config.experts_at)
    if (config.trace is not None or config.experts or changes) and has_calibration_tokens(folder):
        calibration_BT = load_calibration_tokens(folder).to(model.embedding_VD.device)
    budgets = TextBudgets(model, calibration_BT) if config.experts or changes else None
    if budgets is not None:
        # What cannot be held is refused before anything is generated.
        for change in changes:
            budgets.set(0, change.mean)
        for place in range(len(prompts)):
            budgets.set(place, config.experts[place % len(config.experts)] if config.experts else None)
            budgets.change(place, changes, 0)
    counted, used = counted_layers(model), [list[float]() for _ in prompts]
    count = cache_bytes = 0
    with traced_generation(
        model,
        config.trace,
        prompt=prompts[0],
        calibration_BT=calibration_BT,
        prompt_text=config.prompt[0],
        source=str(folder),
        budget=config.experts[0] if config.experts else None,
        budget_changes=changes,
        sampling=config.sampling,
    ) as record:
        started = time.perf_counter()
        for step in generate_batch(
            model,
            prompts,
            max_new_tokens=config.max_new_tokens,
            sampling=config.sampling,
            stop=tokenizer.boundary_id,
            ends=lambda text, token: stops[text].stopped,
            budgets=budgets,
            eight_bits=config.eight_bits,
        ):
            used[step.text].append(fmean(step.experts[layer] for layer in counted))
            piece = decoders[step.text].push(step.token)
            if record is not None:
                # Its scores are decided on again, as they were.
                with nullcontext() if budgets is None else budgets.using([step.text]):
                    record.add(step, piece)
            if budgets is not None:
                budgets.change(step.text, changes, len(used[step.text]))
            certain = stops[step.text].push(piece)
            texts[step.text] += certain
            print(shown(certain) if alone else "", end="", flush=True)
            count, cache_bytes = count + 1, max(cache_bytes, step.cache_bytes)
        if record is not None and count < config.max_new_tokens:
            record.end = "stop" if stops[0].stopped else "document"
    for place, (decoder, stop) in enumerate(zip(decoders, stops)):
        # What was held back for a character or a stop string that did not come.
        rest = stop.push(decoder.flush()) + stop.flush()
        print(shown(rest) if alone else f"[{place}] {shown(texts[place] + rest)}")
    means = ", ".join(f"{fmean(own):.2f}" if own else "-" for own in used)
    speed = count / (time.perf_counter() - started)
    print(f"[{count} tokens, {speed:.0f} tokens/s, cache {cache_bytes:,} bytes, mean experts {means}]", file=sys.stderr)


COMMANDS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "generate": (GenerateConfig, run_generate),
    "evaluate": (EvaluateConfig, evaluate_text),
    "few-shot": (FewShotConfig, few_shot),
    "eval": (EvalConfig, run_tasks),
    "bench": (BenchConfig, bench),
    "bench-peers": (PeersConfig, bench_peers),
    "bench-bits": (BenchBitsConfig, bench_bits),
    "long-context": (LongContextConfig, long_context),
    "recall": (RecallConfig, recall),
    "cache": (CacheConfig, show_caches),
    "quantize": (QuantizeConfig, lambda config: print(quantize(config))),
    "layer-experts": (LayerExpertsConfig, lambda config: print(layer_experts(config))),
    "import": (ImportConfig, lambda config: print(import_model(config))),
    "export": (ExportConfig, lambda config: print(export_model(config))),
    "gguf": (GGUFConfig, lambda config: print(write_gguf(config))),
    "parity": (ParityConfig, parity),
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
