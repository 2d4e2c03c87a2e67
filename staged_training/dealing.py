"""How runs are dealt out to processes that train side by side."""

from collections.abc import Sequence


def dealt(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Runs dealt out so that shares end at about the same time, by the same rule in every process.

    Args:
        lengths: of the runs, in any unit.

    Returns:
        The numbers of the runs in each share, ascending.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    taken = [0] * count
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        least = taken.index(min(taken))
        shares[least].append(number)
        taken[least] += lengths[number]
    return [sorted(share) for share in shares]
