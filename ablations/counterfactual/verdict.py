"""The numbers in words. Every sentence is chosen by an interval: one that holds zero says that nothing was seen."""

from collections.abc import Sequence

from ablations.counterfactual.measure import EVEN, HINDSIGHT, MEANING, NULLS, ORACLE, OWN, REPLAYED
from ablations.counterfactual.tables import EASY, HARD, POOLED, WHOLE, AllocationRow, DifferenceRow


def verdict_text(rows: Sequence[AllocationRow], differences: Sequence[DifferenceRow], source: str) -> str:
    """What the study found, for each run and for all together.

    Args:
        source: of the text.
    """
    lines = [
        f"Text: {source}. Gains over the even allocation in bits per byte, above 0 is better; shares of the"
        " cross-fitted oracle's gain; brackets are 95 % intervals, over documents, and over seeds too where runs"
        " are pooled.",
        "",
    ]
    for run in dict.fromkeys(row.run for row in rows):
        here = {(row.part, row.allocation): row for row in rows if row.run == run}
        even = here[WHOLE, EVEN]
        lines.append(
            f"{run}: {even.mean_experts:.3f} experts, {even.tokens:,} tokens, {even.bits_per_byte:.4f} bits per byte"
        )
        lines.append(f"  {room_sentence(here[WHOLE, ORACLE], here[WHOLE, HINDSIGHT])}")
        lines += [
            f"  {row.allocation} ({MEANING[row.allocation]}): {numbers(row)}"
            for (part, _), row in here.items()
            if part == WHOLE and row.allocation not in (EVEN, REPLAYED)
        ]
        if (WHOLE, OWN) in here:
            lines.append(f"  {own_sentence(here[WHOLE, OWN], [row for row in differences if row.run == run])}")
            lines.append(f"  own, in parts: {parts_sentence(here, OWN)}")
        lines.append(f"  oracle, in parts: {parts_sentence(here, ORACLE)}")
        lines.append("")
    return "\n".join(lines)


def room_sentence(oracle: AllocationRow, hindsight: AllocationRow) -> str:
    """Whether there was anything to find."""
    known = f"{oracle.gain:+.4f} [{oracle.gain_low:+.4f}, {oracle.gain_high:+.4f}]"
    luck = f"; with each token's luck known it would look like {hindsight.gain:+.4f}"
    if oracle.gain_low > 0:
        return f"There is something to gain: {known} for who knows what can be known from other documents{luck}"
    return (
        f"Nothing to gain was seen: who knows what can be known from other documents gains {known}{luck}. No shares are"
        " given"
    )


def own_sentence(own: AllocationRow, differences: Sequence[DifferenceRow]) -> str:
    """The policy's verdict, against even and against the shuffles of its own numbers."""
    word = "better than" if own.gain_low > 0 else "worse than" if own.gain_high < 0 else "not separable from"
    share = "" if own.share is None else f" and takes {own.share:.2f} [{own.share_low:.2f}, {own.share_high:.2f}] of it"
    against = {row.against: row for row in differences}
    nulls = ", ".join(f"{null} {bounded(against[null])}" for null in NULLS)
    return f"verdict: the policy's choice is {word} an even one{share}; against shuffles of its own numbers: {nulls}"


def bounded(row: DifferenceRow) -> str:
    """A difference, with what its interval says of it."""
    word = "better" if row.high < 0 else "worse" if row.low > 0 else "not separable"
    return f"{word} ({row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}])"


def parts_sentence(here: dict[tuple[str, str], AllocationRow], allocation: str) -> str:
    """Gains of one allocation in halves, domains and layers, with the experts that a part of the text got."""
    said = []
    for (part, name), row in here.items():
        if name != allocation or part == WHOLE:
            continue
        of_text = part.startswith("domain") or part in (EASY, HARD)
        experts = f" at {row.mean_experts:.2f} experts" if of_text else ""
        said.append(f"{part} {row.gain:+.4f} [{row.gain_low:+.4f}, {row.gain_high:+.4f}]{experts}")
    return "; ".join(said)


def numbers(row: AllocationRow) -> str:
    """Gain and share of a row."""
    share = "" if row.share is None else f", share {row.share:+.3f} [{row.share_low:+.3f}, {row.share_high:+.3f}]"
    return f"{row.gain:+.5f} [{row.gain_low:+.5f}, {row.gain_high:+.5f}]{share}"


def headline(rows: Sequence[AllocationRow]) -> str:
    """One sentence for a figure: of the pooled runs, or of the only one."""
    runs = [row.run for row in rows]
    run = POOLED if POOLED in runs else runs[0]
    here = {row.allocation: row for row in rows if row.run == run and row.part == WHOLE}
    own = here.get(OWN, here[ORACLE])
    who = "the policy's own choice" if OWN in here else "the oracle"
    return f"{who}: {own.gain:+.4f} [{own.gain_low:+.4f}, {own.gain_high:+.4f}] bits per byte over an even allocation"
