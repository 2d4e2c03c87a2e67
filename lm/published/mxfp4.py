"""MXFP4, in which gpt-oss is published (OCP Microscaling Formats 1.0): numbers of 4 bits, every 32 of them with one
exponent.

A matrix W_DF of a product x W is stored as `NAME_blocks`, bytes [F, D / 32, 16], each with two numbers of 4 bits, the
lower half first, and `NAME_scales`, bytes [F, D / 32]: exponents of two, plus 127. All of them are bf16 numbers.

Legend: E experts, D width of what is multiplied, F columns, G = D / 32 groups.
"""

import torch
from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"
# Numbers in a group, and bytes that they take.
GROUP, GROUP_BYTES = 32, 16
NOT_A_NUMBER, BIAS = 255, 127
# A sign, two bits of exponent, one of fraction.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMBERS = (*MAGNITUDES, *(-number for number in MAGNITUDES))


def dequantised(blocks: Tensor, scales: Tensor) -> Tensor:
    """The matrices [E, D, F] in bf16, exactly.

    Args:
        blocks: uint8 [E, F, G, 16].
        scales: uint8 [E, F, G].

    Raises:
        ValueError: for a scale that is no number, or shapes that do not fit together.
    """
    if blocks.dim() != 4 or blocks.shape[-1] != GROUP_BYTES or blocks.shape[:-1] != scales.shape:
        raise ValueError(
            f"MXFP4 blocks {list(blocks.shape)} and scales {list(scales.shape)}; legal: [E, F, G, {GROUP_BYTES}] and"
            " [E, F, G]"
        )
    if bool((scales == NOT_A_NUMBER).any()):
        raise ValueError(f"MXFP4 scales of {NOT_A_NUMBER}, which is no number")
    pairs = torch.tensor([[NUMBERS[byte & 15], NUMBERS[byte >> 4]] for byte in range(256)])
    whole = torch.empty(blocks.shape[0], blocks.shape[2] * GROUP, blocks.shape[1], dtype=torch.bfloat16)
    # Expert by expert: indices take eight times the memory of what they look up.
    for matrix_DF, block_FGB, scale_FG in zip(whole, blocks, scales):
        numbers_FGX = pairs[block_FGB.long()].flatten(-2)
        scaled_FGX = torch.ldexp(numbers_FGX, (scale_FG.int() - BIAS)[..., None])
        matrix_DF.copy_(scaled_FGX.flatten(1).T)
    return whole
