"""What compressors that have learnt nothing make of a text: the yardsticks beside a model's bits per byte."""

import lzma

import numpy as np

from corpus.ngram_code import code_lengths

# Bytes of the n-gram model's longest context, and that it is given at once: some 50 bytes of memory each.
ORDER, BLOCK = 5, 1 << 23


def xz_bits_per_byte(data: bytes) -> float:
    """Size of `data` under LZMA2 at preset 9 in the .xz container (as `xz -9` writes it), in bits per byte of input.

    At some 2 MB a second, so it says that it begins.

    Raises:
        ValueError: for no bytes.
    """
    if not data:
        raise ValueError("no bytes to compress")
    print(f"corpus: compressing {len(data):,} bytes of validation text by xz -9", flush=True)
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


def ngram_bits_per_byte(data: bytes, *, block: int = BLOCK) -> float:
    """Size of `data` under a byte model of order 5 that learns as it goes (`corpus.ngram_code`), in bits per byte: what
    an arithmetic coder needs. Every `block` bytes it begins anew, which bounds its memory.

    Raises:
        ValueError: for no bytes.
    """
    if not data:
        raise ValueError("no bytes to compress")
    blocks = (data[start : start + block] for start in range(0, len(data), block))
    bits = (code_lengths(np.frombuffer(part, np.uint8), alphabet=256, order=ORDER).sum() for part in blocks)
    return float(sum(bits)) / len(data)
