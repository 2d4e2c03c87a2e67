"""The page of a generation as one HTML file that asks for nothing: style, script, figures and data lie in it."""

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablations.report.report import CSS_FILE, theme
from demos.figures import cache_figure, frontier_figure, size_text
from demos.recording import page_data
from demos.runs import ShownRun
from lm.accounting import kv_bytes
from lm.config import ModelConfig
from lm.generation_trace import TracedScores, TracedText

HERE = Path(__file__).parent
Frontier = Mapping[str, Sequence[tuple[float, float]]]


def page(
    text: TracedText,
    scores: TracedScores,
    run: ShownRun,
    config: ModelConfig,
    frontier: Frontier | None = None,
    *,
    live: str | None = None,
) -> str:
    """HTML of a recorded generation, or of one that a server will send.

    Args:
        text, scores: of a trace (`lm.generation_trace`).
        run: what the model is.
        config: the model's.
        frontier: (mean experts, bits per byte) of each method; what the run itself has measured by default.
        live: the form of a live page (`demos.serve`); None for a recorded one.
    """
    data = page_data(text, scores, run, config, live=live is not None)
    own: Frontier = {"this run": run.frontier} if run.frontier else {}
    frontier = own if frontier is None else frontier
    title = "How many experts each token took"
    tokens = len(text.prompt) + len(text.tokens)
    scripts = ["page.js"] + ([] if live is None else ["live.js"])
    connect = "'none'" if live is None else "'self'"
    body = [
        '<p class="kicker">Dynamic experts, token by token</p>',
        f"<h1>{title}</h1>",
        f'<p class="source">{html.escape(str(run))}</p>',
        FACTS.format(when="median" if live else "as recorded"),
        live or "",
        budget_bar(data),
        legend(data["cap"]),
        TEXT_AND_DETAILS,
        "<h2>Layer by layer</h2>",
        BY_LAYER,
        f'<h2>{"Memory" if not frontier else "Memory and the price of a budget"}</h2><div class="figures">',
        figure("What the cache costs over the length", cache_figure(config, tokens), cache_caption(config, tokens)),
        figure("Bits per byte against experts", frontier_figure(frontier), FRONTIER_CAPTION) if frontier else "",
        "</div>",
    ]
    style = theme() + CSS_FILE.read_text(encoding="utf-8") + (HERE / "page.css").read_text(encoding="utf-8")
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in scripts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
        ' content="width=device-width, initial-scale=1">'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline';"
        f" script-src 'unsafe-inline'; img-src data:; connect-src {connect}; form-action 'none'; base-uri 'none'\">"
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style></head>\n<body><main>\n'
        + "\n".join(part for part in body if part)
        + f'\n</main><script type="application/json" id="recording">{embedded(data)}</script>'
        + f"<script>\n{script}</script></body></html>\n"
    )


def embedded(data: dict[str, Any]) -> str:
    """JSON that may stand inside a script element: nothing in it ends one."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def budget_bar(data: dict[str, Any]) -> str:
    """The slider over the budgets that every layer can hold; a sentence where there is none."""
    means, live = data["means"], data["live"]
    if not means:
        return (
            '<div class="bar"><p>No slider: the trace was made without text to calibrate budgets on, or some layer\'s'
            " policy has no budget.</p></div>"
        )
    wanted = data["budget"] or 12
    start = min(range(len(means)), key=lambda place: abs(means[place] - wanted))
    name = "Budget of the tokens to come" if live else "Budget, decided again from the stored scores"
    reset = "As trained" if live else "Reset"
    explained = "" if live else '<p id="change" role="status"></p>'
    return (
        f'<div class="bar"><label for="budget">{name}</label><output id="budget-now" for="budget"></output>'
        f'<input type="range" id="budget" min="0" max="{len(means) - 1}" step="1" value="{start}">'
        f'<button type="button" class="plain" id="as-recorded">{reset}</button>{explained}</div>'
    )


def legend(cap: int) -> str:
    """The fixed scale, in words too."""
    return (
        f'<div class="legend"><span>0</span><span class="ramp"></span><span>{cap} experts, the cap</span>'
        '<span class="words">The digits under a token are its number of experts, a mean over layers where it varies.'
        " \u25e6 stands for bytes that make no whole character.</span></div>"
    )


def figure(title: str, drawing: str, caption: str) -> str:
    return f"<figure><h3>{html.escape(title)}</h3>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>"


def cache_caption(config: ModelConfig, tokens: int) -> str:
    """What the cache takes at the length shown and at 64k tokens."""
    full = full_attention(config)
    parts = []
    for length in (*([tokens] if tokens else []), 1 << 16):
        own, whole = kv_bytes(config, length), kv_bytes(full, length)
        parts.append(f"{size_text(own)} of {size_text(whole)} at {length:,} tokens ({1 - own / whole:.1%} saved)")
    return f"Layers {''.join(config.plan.letters)}, {config.dtype}: {'; '.join(parts)}."


def full_attention(config: ModelConfig) -> ModelConfig:
    """The same model with full attention in every layer."""
    return dataclasses.replace(config, layer_plan="F")


FRONTIER_CAPTION = (
    "Measured on validation text, the same weights under other budgets; a dynamic number pays off only where its line"
    " lies below those of a fixed one."
)
FACTS = """<dl class="facts">
<div><dt>experts per token</dt><dd id="mean"></dd></div>
<div><dt>bits per byte of this text</dt><dd id="bits"></dd></div>
<div><dt>ms per token, {when}</dt><dd id="ms"></dd></div>
<div><dt>bytes of cache, of full attention</dt><dd id="cache"></dd></div>
</dl>"""
TEXT_AND_DETAILS = """<div class="columns">
<div class="text" id="text" role="group" aria-label="the text, token by token; arrow keys move"></div>
<section class="details" aria-label="the token looked at"><h2 id="token-name">No token yet</h2>
<p id="token-facts">Point at a token, or move with the arrow keys.</p><div id="layers"></div>
<ul class="keys"><li style="--swatch:var(--series-0)">used</li><li style="--swatch:var(--grid)">not used</li>
<li style="--swatch:var(--series-1)">would be added</li><li style="--swatch:var(--paper)">would be dropped</li>
<li style="--swatch:transparent">height: root of the router's probability</li></ul></section>
</div>"""
BY_LAYER = """<div class="scroll"><table class="by-layer"><thead><tr><th>layer</th><th>experts</th>
<th>decided again</th><th>tokens changed</th><th><span aria-hidden="true">of the cap</span></th></tr></thead>
<tbody id="by-layer"></tbody></table></div>"""
