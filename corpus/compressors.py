"""What a general-purpose compressor makes of a text: the yardstick beside a model's bits per byte."""

import lzma


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
