"""A recorded generation as the page wants it: plain data for JSON.

Arrays are base64 of little-endian numbers, token by token: a live page is sent the same, one token at a time.

Legend: N generated tokens, L layers, K slots per token, E experts, M budgets.
"""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from demos.runs import ShownRun
from lm.accounting import kv_bytes
from lm.config import ModelConfig
from lm.generation_trace import TracedScores, TracedText

# Beyond this many tokens the sizes of the cache are those of the last one.
MOST_SIZES = 4096


def page_data(
    text: TracedText, scores: TracedScores, run: ShownRun, config: ModelConfig, *, live: bool = False
) -> dict[str, Any]:
    """All that the page's script reads.

    Args:
        text: of a trace, or of a generation that has not begun.
        scores: likewise.
        run: what the model is.
        config: the model's.
        live: the page will be sent its tokens by a server.
    """
    parts = [
        {
            name: getattr(scores, name)[n]
            for name in ("expert_NLK", "level_NLK", "weight_NLK", "threshold_NL", "logit_NLE")
        }
        for n in range(len(text.tokens))
    ]
    length = min(len(text.prompt) + max(len(text.tokens), 1), MOST_SIZES)
    experts = [config.block(layer).moe.n_experts for layer in range(config.n_layers)]
    counted = text.counted_layers or tuple(range(config.n_layers))
    return {
        "live": live,
        "prompt": "" if live else text.prompt_text,
        "prompt_tokens": len(text.prompt),
        "end": None if live else text.end,
        "budget": text.budget,
        "cap": text.cap or max(scores.level_NLK.shape[-1], 1),
        "layers": [
            {"index": layer, "letter": letter, "experts": experts[layer], "counted": layer in counted}
            for layer, letter in enumerate(config.plan.letters)
        ],
        "means": scores.mean_M.tolist(),
        "table": packed(scores.threshold_ML, np.float32),
        "cache": cache_sizes(config, MOST_SIZES if live else length),
        "tokens": [
            token_data(part, text=piece, seconds=seconds, nats=nats)
            for part, piece, seconds, nats in zip(parts, text.pieces, text.seconds, text.nats)
        ],
        "run": run.name,
    }


def token_data(part: Mapping[str, np.ndarray], *, text: str, seconds: float, nats: float) -> dict[str, Any]:
    """One token, recorded or just drawn.

    Args:
        part: its part of `TracedScores`, by name, see `lm.generation_trace.token_scores`.
        text: that it added.
        seconds: of the forward pass behind it.
        nats: minus the log of its probability.
    """
    return {
        "text": text,
        "seconds": seconds,
        "nats": nats,
        "expert": packed(part["expert_NLK"], np.int16),
        "level": packed(part["level_NLK"], np.float32),
        "weight": packed(part["weight_NLK"], np.float32),
        "threshold": packed(part["threshold_NL"], np.float32),
        "probability": packed(np.round(65535 * np.sqrt(probability_LE(part["logit_NLE"]))), np.uint16),
    }


def probability_LE(logit_LE: np.ndarray) -> np.ndarray:
    """The router's probabilities; 0 behind a layer's last expert."""
    shifted_LE = np.exp(logit_LE.astype(np.float64) - logit_LE.max(axis=-1, keepdims=True))
    return shifted_LE / shifted_LE.sum(axis=-1, keepdims=True)


def cache_sizes(config: ModelConfig, length: int) -> dict[str, list[int]]:
    """Bytes after 1, 2, ... tokens, of the model's cache and of one with full attention in every layer."""
    full = dataclasses.replace(config, layer_plan="F")
    # What a kind keeps per token is constant but for a window that fills: a line between few lengths would do, but a
    # formula is exact.
    return {
        name: [kv_bytes(shown, tokens) for tokens in range(1, length + 1)]
        for name, shown in (("model", config), ("full", full))
    }


def packed(values: np.ndarray | Sequence[float], dtype: type) -> str:
    """Base64 of the numbers, little-endian."""
    return base64.b64encode(np.ascontiguousarray(values, np.dtype(dtype).newbyteorder("<")).tobytes()).decode()
