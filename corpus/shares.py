"""The share of every domain in the tokens of a training: as it is asked for, and what epoch caps leave of that.

Asked for by `natural` (as many tokens as the domain has), `uniform`, `temperature=T` (in proportion to n^(1/T) for a
domain of n tokens, arXiv 1901.07291), by numbers, `prose=.5,code=.5`, or by a file of them: .toml with a line
`prose = 0.5` a domain, or .csv with the columns domain and share. Numbers are proportions; a domain that is not named
gets none.
"""

import csv
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path

from foundation.serialize import nearest

NATURAL, UNIFORM, TEMPERATURE = "natural", "uniform", "temperature"
LEGAL = (
    f"{NATURAL}, {UNIFORM}, {TEMPERATURE}=2, domain=share,domain=share or a file of them, .toml, or .csv with the"
    " columns domain and share"
)


def read_shares(text: str, tokens: Mapping[str, int]) -> dict[str, float]:
    """The share of each domain, in the order of their names; they sum to one.

    Args:
        text: as above.
        tokens: of each domain that there is.

    Raises:
        ValueError: naming what is no domain, no number, negative or named twice.
    """
    name, _, value = text.partition("=")
    if text == NATURAL:
        found = {domain: float(count) for domain, count in tokens.items()}
    elif text == UNIFORM:
        found = dict.fromkeys(tokens, 1.0)
    elif name == TEMPERATURE and TEMPERATURE not in tokens and "," not in value:
        temperature = _number(text, TEMPERATURE, value)
        if temperature <= 0:
            raise ValueError(f"mixture {text}: legal: a temperature above 0")
        found = {domain: count ** (1 / temperature) for domain, count in tokens.items()}
    elif text.endswith((".toml", ".csv")):
        found = _of_file(Path(text))
    else:
        pairs = [part.partition("=") for part in text.split(",")]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError(f"mixture {text!r}: legal: {LEGAL}")
        found = _distinct(text, [(domain.strip(), share) for domain, _, share in pairs])
    for domain, share in found.items():
        if domain not in tokens:
            raise ValueError(f"mixture {text}: no domain {domain!r} in the training text; {nearest(domain, tokens)}")
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"mixture {text}: {domain} is {share}; legal: a finite number from 0 on")
    total = math.fsum(found.values())
    if total <= 0:
        raise ValueError(f"mixture {text}: every share is 0; legal: at least one above it")
    return {domain: found.get(domain, 0.0) / total for domain in sorted(tokens)}


def _of_file(path: Path) -> dict[str, float]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".toml":
                return _distinct(str(path), list(tomllib.loads(file.read()).items()))
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"mixture {path}: cannot be read ({error})") from error
    if not lines or not {"domain", "share"} <= lines[0].keys():
        raise ValueError(f"mixture {path}: legal: a header with the columns domain and share, and a line per domain")
    return _distinct(str(path), [(line["domain"], line["share"]) for line in lines])


def _distinct(text: str, pairs: list[tuple[str, object]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for domain, share in pairs:
        if domain in found:
            raise ValueError(f"mixture {text}: {domain} more than once")
        found[domain] = _number(text, domain, share)
    return found


def _number(text: str, domain: str, value: object) -> float:
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise ValueError(f"mixture {text}: {domain} is {value!r}; legal: a number") from None


def capped(shares: Mapping[str, float], tokens: Mapping[str, int], *, length: int, cap: float) -> dict[str, float]:
    """Shares of a training of `length` tokens that reads no domain more than `cap` times. What a domain cannot fill
    goes to the others, in proportion to their shares (as UniMax does with equal ones, arXiv 2304.09151).

    Raises:
        ValueError: where all domains with a share together are too little text.
    """
    most = {domain: cap * count / length for domain, count in tokens.items()}
    asked = [domain for domain, share in shares.items() if share > 0]
    if math.fsum(most[domain] for domain in asked) < 1:
        passes = length / sum(tokens[domain] for domain in asked)
        raise ValueError(
            f"epoch_cap: {cap:g}, but {length:,} tokens are {passes:.2f} passes over all domains of the mixture"
            f" together; legal: at least {math.ceil(passes * 100) / 100:g}, or fewer tokens"
        )
    full: set[str] = set()
    while True:
        left = 1 - math.fsum(most[domain] for domain in full)
        free = math.fsum(shares[domain] for domain in asked if domain not in full)
        found = {
            domain: most[domain] if domain in full else shares[domain] / free * left if shares[domain] else 0.0
            for domain in shares
        }
        over = {domain for domain in asked if domain not in full and found[domain] > most[domain]}
        if not over:
            return found
        full |= over
        if len(full) == len(asked):
            # All are full to within rounding.
            return {
                domain: most[domain] / math.fsum(map(most.__getitem__, asked)) * (domain in full) for domain in shares
            }
