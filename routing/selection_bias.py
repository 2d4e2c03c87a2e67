"""Balancing without a loss: a bias per expert that selects and never weighs (Wang et al., arXiv 2408.15664).

After each step b_e += step * sign(mean load - load_e): an overloaded expert is chosen a little less often from then on,
and no gradient of the language model's loss is disturbed.

Legend: E experts.
"""

import torch
from torch import Tensor


def updated_selection_bias(bias_E: Tensor, rows_E: Tensor, *, step: float) -> Tensor:
    """The bias after a step in which expert e computed rows_E[e] rows; unchanged if there were none."""
    rows_E = rows_E.to(bias_E.dtype)
    return bias_E + step * torch.sign(rows_E.mean() - rows_E)
