"""Mamba-2 layers (arXiv 2405.21060) in the layout that published hybrids have in common.

Legend: H heads, G groups, K state width, V head width, X convolution channels, W convolution width.
"""

import math
from collections.abc import Iterator

from attention.config import AttentionConfig
from attention.mamba2 import mamba_widths
from lm.published.fields import Fields
from lm.published.layouts import SAME, Stored, chained, headwise, reshaped

# JSON has no infinity: Python writes one that other readers do not know, transformers 5 an object.
UNLIMITED = (math.inf, {"__float__": "Infinity"})


def read_step_limits(fields: Fields, name: str = "time_step_limit") -> float:
    """The shortest time step; there may be no longest one.

    Raises:
        ValueError: for what is no pair of numbers from 0 on, or a longest step.
    """
    limits = fields.get(name, list, [0.0, math.inf])
    if len(limits) != 2 or not isinstance(limits[0], int | float) or limits[1] not in UNLIMITED:
        raise ValueError(f"{fields.place}: {name} = {limits} is not supported; legal: [shortest step, Infinity]")
    return float(limits[0])


def mamba_tensors(layer: int, attention: AttentionConfig, theirs: str) -> Iterator[Stored]:
    """A Mamba-2 layer, published as gate, x, B, C and time step below each other; ours begins with C, B, x.

    Args:
        theirs: the published module.
    """
    ours = f"blocks.{layer}.attention"
    (H, _, V), (C, B, x), W = attention.linear_shape, mamba_widths(attention), attention.conv_width
    inner = headwise(1, (H * V, x, B, C, H), order=(3, 2, 1, 0, 4))
    channels = headwise(1, (x, B, C), order=(2, 1, 0))
    yield Stored(f"{ours}.to_inner.weight", (f"{theirs}.in_proj.weight",), inner)
    taps = chained(reshaped((-1, W), (-1, 1, W)), channels)
    yield Stored(f"{ours}.conv_XW", (f"{theirs}.conv1d.weight",), taps)
    yield Stored(f"{ours}.conv_bias_X", (f"{theirs}.conv1d.bias",), channels)
    same = {"decay_gate.A_log_H": "A_log", "decay_gate.dt_bias": "dt_bias", "skip_H": "D"}
    same |= {"norm_X": "norm.weight", "to_out.weight": "out_proj.weight"}
    for our_name, their_name in same.items():
        yield Stored(f"{ours}.{our_name}", (f"{theirs}.{their_name}",), SAME)
