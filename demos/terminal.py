"""`python -m demos.terminal`: watch a model spend experts. Generated text, every token coloured by the number of
experts behind it.

The number is that of the forward pass which predicted the token: the work that went into choosing it, averaged over the
layers whose number varies.
"""

import foundation.starting  # noqa: F401

# isort: split

import dataclasses
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import tyro

from demos.terminal_view import Palette, Summary
from foundation.command import refuse_unwritable, run_command
from foundation.console import escaped
from foundation.files import read_json, write_text
from foundation.numbers import check_numbers
from foundation.serialize import from_dict, load_json
from lm.accounting import kv_bytes
from lm.budget import experts_per_token, set_budget, variable_layers
from lm.config import ModelConfig
from lm.generate import generate
from lm.generation_trace import read_generation, traced_generation
from lm.pretrained import CONFIG_FILE, find_model, load_calibration_tokens, load_pretrained, load_tokenizer
from lm.sampling import SamplingConfig
from routing.policies.top_p import TopP

# Beside a recorded generation: what else the demo showed.
SHOWN = "terminal.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Generate text and show the experts each token used.

    Attributes:
        run: folder of a trained model or of the run that trained it; the newest model under runs/ by default, one
            whose numbers of experts differ by token where there is any.
        prompt: text to continue.
        max_new_tokens: how many at the most.
        budget: mean experts per token in every layer, the number of each token chosen by top-p; as trained by default.
        colours: "auto" colours a terminal unless NO_COLOR is set; without colours the number stands behind each token.
        trace: also record everything in this folder: the text, every token's experts and their weights in every layer
            (`lm.generation_trace`).
        replay: show such a folder again, without a model.
        sampling: temperature, top-p, seed.
    """

    run: Path | None = None
    prompt: str = "def main(argv):\n"
    max_new_tokens: int = 160
    budget: float | None = None
    colours: Literal["auto", "always", "never"] = "auto"
    trace: Path | None = None
    replay: Path | None = None
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = dataclasses.field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_numbers(self, max_new_tokens=1, budget=0)


def main(config: DemoConfig) -> None:
    """Shows a generation, new or recorded.

    Raises:
        ValueError: for a folder that holds no model or no recording, or a budget that the model cannot hold.
    """
    refuse_unwritable("--trace", config.trace, folder=True)
    colours = config.colours == "always" or (
        config.colours == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    recorded = replay(config.replay) if config.replay else record(config)
    head = next(recorded)
    palette = Palette(head["low"], head["high"], colours)
    print(palette.legend())
    print(escaped(head["prompt"]), end="")
    for event in recorded:
        if "text" in event:
            print(palette.paint(event["text"], event["experts"]), end="", flush=True)
        else:
            print(f"\n\n{from_dict(Summary, event['summary'], place=SHOWN)}")


def record(config: DemoConfig) -> Iterator[dict]:
    """Runs the model: first the head (prompt and colour scale), then one event per token, last the summary."""
    folder = find_model(config.run or newest_model(Path("runs")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_pretrained(folder, device)
    tokenizer = load_tokenizer(folder, model)
    calibration_BT = load_calibration_tokens(folder).to(device)
    if config.budget is not None:
        for router in model.routers():
            # A block of a single expert is a dense MLP.
            if router.policy.budget is None and router.n_experts > 1:
                # Twice the mean leaves hard tokens room above it.
                router.set_policy(
                    TopP(
                        target_mean=config.budget,
                        cap=min(router.n_experts, max(TopP.cap, math.ceil(2 * config.budget))),
                    )
                )
        set_budget(model, config.budget, calibration_BT)
    layers = variable_layers(model) or tuple(range(model.config.n_layers))
    usual_N = experts_per_token(model, calibration_BT, layers)
    low, high = (usual_N.quantile(share).item() for share in (0.05, 0.95))
    head = {"prompt": config.prompt, "run": str(folder), "low": low, "high": high}
    yield head

    decoder = tokenizer.stream_decoder()
    prompt = [tokenizer.boundary_id, *tokenizer.encode(config.prompt)]
    steps = []
    with traced_generation(model, config.trace, prompt=prompt) as write:
        for step in generate(
            model, prompt, max_new_tokens=config.max_new_tokens, sampling=config.sampling, stop=tokenizer.boundary_id
        ):
            steps.append(step)
            piece = decoder.push(step.token)
            write(step.token, piece)
            yield {"text": piece, "experts": statistics.fmean(step.experts[layer] for layer in layers)}
    if not steps:
        raise ValueError("the model ended the document at once; try another prompt or seed")
    summary = Summary(
        mean_experts=statistics.fmean(step.experts[layer] for step in steps for layer in layers),
        budget=config.budget,
        # The first step is the prefill of the prompt.
        milliseconds=1000 * statistics.median(step.seconds for step in (steps[1:] or steps)),
        cache_bytes=steps[-1].cache_bytes,
        full_attention_bytes=kv_bytes(
            dataclasses.replace(model.config, layer_plan="F"), max(len(prompt) + config.max_new_tokens - 1, 1)
        ),
    )
    shown = {"head": head, "layers": layers, "summary": dataclasses.asdict(summary)}
    if config.trace is not None:
        write_text(config.trace / SHOWN, json.dumps(shown, indent=1) + "\n")
    yield {"summary": shown["summary"]}


def replay(folder: Path) -> Iterator[dict]:
    """The events of `record`, from what it left in a folder: the numbers of experts are counted again, from the rows on
    record.

    Raises:
        ValueError: when the folder holds no generation that this demo recorded.
    """
    text, experts_NL = read_generation(folder)
    try:
        shown = read_json(folder / SHOWN)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds a generation that this demo did not record: {error}") from error
    yield shown["head"]
    for piece, experts in zip(text.pieces, experts_NL[:, shown["layers"]].mean(axis=1).tolist()):
        yield {"text": piece, "experts": experts}
    yield {"summary": shown["summary"]}


def newest_model(root: Path) -> Path:
    """The most recently finished model below `root`; one whose numbers of experts differ by token where there is
    any."""
    found = sorted(root.glob("**/model/weights.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no trained model under {root}/: run `make ablation` first, or give --run")
    variable = [path for path in found if varies_by_token(path.parent)]
    return (variable or found)[-1].parent


def varies_by_token(folder: Path) -> bool:
    """Whether the model of this folder generates with a number of experts that depends on the token."""
    try:
        config = load_json(ModelConfig, folder / CONFIG_FILE)
    except ValueError:
        # Written by another version: nothing for this demo to prefer, and no reason to fail.
        return False
    policies = [config.block(layer).moe.router.policy for layer in range(config.n_layers)]
    return any(policy.varies_by_token and not policy.needs_whole_batch for policy in policies)


if __name__ == "__main__":
    run_command(
        lambda arguments: tyro.cli(DemoConfig, prog="python -m demos.terminal", description=__doc__, args=arguments),
        main,
    )
