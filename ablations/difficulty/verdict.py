"""The numbers in words. Every sentence is chosen by an interval: one that holds zero says that nothing was seen."""

from ablations.difficulty.frontier import OWN, RANDOM, TRAINED, UNIFORM
from ablations.difficulty.results import ResultRow, Results

DIFFICULTIES = {
    "reference_loss": "loss of the reference model",
    "learnability": "learnability (its early loss minus its late loss)",
}
AGAINST = {
    UNIFORM: "the same number for every token, same weights",
    RANDOM: "the same numbers dealt out at random",
    TRAINED: "static weights trained at it",
}
# A budget is held if the mean lies this near its target, in percent.
BUDGET_PERCENT = 1.0


def verdict_text(results: Results) -> str:
    """What the study found, method by method."""
    lines = [
        (
            f"Held-out real text: {results.n_tokens:,} tokens of {results.n_documents} documents; brackets are 95 %"
            " intervals, documents resampled."
        ),
        (
            "Partial: token frequency (seen and predicted), position and domain held fixed, by splines and columns per"
            " domain. Shuffled: 95 % of shuffles among tokens of like frequency."
        ),
        "",
    ]
    for method in dict.fromkeys(row["method"] for row in results.correlations):
        lines += [f"{method}, mean of {results.k} experts"]
        lines += [
            f"  {correlation_sentence(row)}"
            for row in results.correlations
            if row["method"] == method and row["layer"] == "sum"
        ]
        lines += [f"  {structure_sentence(row)}" for row in results.structure if row["method"] == method]
        lines += [
            f"  {difference_sentence(row)}"
            for row in results.differences
            if row["weights"] == method and row["asked"] == results.k
        ]
        lines += [""]
    lines += budget_sentences(results.frontier)
    return "\n".join(lines) + "\n"


def correlation_sentence(row: ResultRow) -> str:
    low, high = row["partial_low"], row["partial_high"]
    word = (
        "more experts"
        if low > 0
        else "fewer experts"
        if high < 0
        else "neither more nor fewer experts that could be seen"
    )
    beyond = "" if row["shuffled_low"] <= row["spearman"] <= row["shuffled_high"] else ", outside the shuffled"
    return (
        f"{DIFFICULTIES[row['difficulty']]}: harder tokens get {word}: partial {interval(row, 'partial', '+.3f')}; "
        f"plain {interval(row, 'spearman', '+.3f')}{beyond} [{row['shuffled_low']:+.3f}, {row['shuffled_high']:+.3f}]"
    )


def structure_sentence(row: ResultRow) -> str:
    low, high = row["spearman_low"], row["spearman_high"]
    word = "more" if low > 0 else "fewer" if high < 0 else "no other number of"
    controlled, loss = interval(row, "given_position", "+.2f"), interval(row, "level_vs_reference_loss", "+.2f")
    return (
        f"{row['task']} ({row['problems']} problems): answers to harder problems get {word} experts:"
        f" {interval(row, 'spearman', '+.2f')}; given position {controlled}; the label against the reference's loss"
        f" {loss}"
    )


def difference_sentence(row: ResultRow) -> str:
    low, high = row["difference_low"], row["difference_high"]
    word = "better than" if high < 0 else "worse than" if low > 0 else "not separable from"
    return f"bits per byte: {word} {AGAINST[row['against_allocation']]}: {interval(row, 'difference', '+.4f')}"


def budget_sentences(frontier: list[ResultRow]) -> list[str]:
    """How well calibration on other documents held the budgets of the methods' own allocations."""
    own = [row for row in frontier if row["allocation"] == OWN]
    if not own:
        return []
    worst = max(own, key=lambda row: abs(row["error_percent"]))
    n_held = sum(abs(row["error_percent"]) <= BUDGET_PERCENT for row in own)
    return [
        f"Budgets calibrated on other documents: {n_held} of {len(own)} within {BUDGET_PERCENT:g} %; the worst is"
        f" {worst['weights']}, asked {worst['asked']}, used {worst['mean_experts']:.3f}"
        f" ({worst['error_percent']:+.2f} %)."
    ]


def interval(row: ResultRow, name: str, spec: str) -> str:
    return f"{row[name]:{spec}} [{row[f'{name}_low']:{spec}}, {row[f'{name}_high']:{spec}}]"
