"""Whole numbers of launches. Nothing here imports Triton."""


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least one that is not smaller than n."""
    return 1 << max(0, n - 1).bit_length()


def padded(width: int) -> int:
    """Columns of a tile that holds `width` channels: a power of two, and at least the 16 that tensor cores take."""
    return max(16, power_of_two(width))
