"""YaRN (Peng et al., arXiv 2309.00071): a rotary embedding stretched to texts longer than those it was trained on.

Pairs of channels that turn often within the original length keep their wavelength, since they tell near positions
apart; those that turn seldom are stretched by a factor, since they would reach angles never seen; between the two a
ramp. Queries and keys grow a little, which makes up for attention that spreads over more tokens.

Legend: T tokens, P pairs of rotated channels.
"""

import dataclasses
import math

import torch
from torch import Tensor

from foundation.numbers import check_numbers
from triton_kernels.softmax.rotary import Rotary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """How a rotary embedding is stretched.

    Attributes:
        factor: by which the slowest pairs are stretched.
        original_length: tokens of the texts that the embedding was trained on.
        fast_turns: pairs that turn more often than this within the original length stay as they are.
        slow_turns: pairs that turn less often are stretched by the whole factor.
        magnitude: of turned queries and keys; 0.1 ln(factor) + 1 by default.
        whole_pairs: the ramp begins and ends at a pair, not between two.

    Raises:
        ValueError: for numbers that make no sense, naming the field.
    """

    factor: float
    original_length: int
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    magnitude: float | None = None
    whole_pairs: bool = True

    def __post_init__(self) -> None:
        check_numbers(self, factor=1, original_length=1, fast_turns=0, slow_turns=0, magnitude=0)
        if not 0 < self.slow_turns < self.fast_turns:
            raise ValueError(f"Yarn.slow_turns: {self.slow_turns}; legal: above 0 and below {self.fast_turns}")

    def tables(self, position_T: Tensor, *, rotary_dim: int, base: float) -> Rotary:
        """As `triton_kernels.softmax.rotary.rotary_tables`, stretched; fp64 [T, P]."""
        pair_P = torch.arange(rotary_dim // 2, device=position_T.device, dtype=torch.float64)
        frequency_P = base ** (-2 * pair_P / max(1, rotary_dim))
        low, high = (self._pair_of(turns, rotary_dim, base) for turns in (self.fast_turns, self.slow_turns))
        if self.whole_pairs:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        # As published: a ramp of no length is a step.
        ramp_P = ((pair_P - low) / (high - low if high != low else 1e-3)).clamp(0, 1)
        frequency_P = frequency_P * (1 - ramp_P + ramp_P / self.factor)
        angle_TP = position_T.to(torch.float64)[:, None] * frequency_P
        magnitude = 0.1 * math.log(self.factor) + 1 if self.magnitude is None else self.magnitude
        return angle_TP.cos() * magnitude, angle_TP.sin() * magnitude

    def _pair_of(self, turns: float, rotary_dim: int, base: float) -> float:
        """The pair, with a fraction, that turns so often within the original length."""
        return rotary_dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))
