"""Scaling laws as data: a constant and terms that are products of powers, `L = E + sum_j C_j prod_v x_v ^ -e_jv`.

With the exponents fixed such a law is linear in E and the C_j, which is what variable projection lives on. Terms may
share an exponent by its name, as in Krajewski's law.

Legend: P points, T terms with the constant first, X exponents.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from foundation.serialize import nearest

TOTAL, ACTIVE, TOKENS = "total_params", "active_params", "tokens"
EXPERTS, GRANULARITY, DENSITY = "experts", "granularity", "density"
# Of other columns: training FLOPs / tokens; and active_params^-(log experts / 10), by which the exponents of two other
# powers may depend on each other.
FLOPS_PER_TOKEN, INTERACTION = "flops_per_token", "interaction"
FLOPS = "flops"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """One product of powers.

    Attributes:
        coefficient: name of its factor.
        powers: (variable, name of the exponent) of each power; the term falls as the variable grows.
    """

    coefficient: str
    powers: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
    """A form of the loss.

    Attributes:
        name: what the command line calls it.
        source: where it was published.
        terms: beside the constant E.
    """

    name: str
    source: str
    terms: tuple[Term, ...]

    @property
    def variables(self) -> tuple[str, ...]:
        """Columns that it needs, each once."""
        return tuple(dict.fromkeys(variable for term in self.terms for variable, _ in term.powers))

    @property
    def exponents(self) -> tuple[str, ...]:
        """Names of the exponents, each once."""
        return tuple(dict.fromkeys(exponent for term in self.terms for _, exponent in term.powers))

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Names of the linear parameters, the constant first."""
        return ("E", *(term.coefficient for term in self.terms))

    @property
    def parameters(self) -> tuple[str, ...]:
        """All names, the linear ones first."""
        return (*self.coefficients, *self.exponents)

    @property
    def text(self) -> str:
        """The formula in one line."""
        terms = (
            f"{term.coefficient} / ({' '.join(f'{variable}^{exponent}' for variable, exponent in term.powers)})"
            for term in self.terms
        )
        return f"L = {' + '.join(('E', *terms))}"

    def powers_TPX(self, logs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The logarithm of a column is linear in the exponents; these are its coefficients.

        Args:
            logs: natural logarithm of each variable, [P].

        Returns:
            [T, P, X], zero for the constant.
        """
        n = len(next(iter(logs.values())))
        powers_TPX = np.zeros((len(self.terms) + 1, n, len(self.exponents)))
        for row, term in enumerate(self.terms, start=1):
            for variable, exponent in term.powers:
                powers_TPX[row, :, self.exponents.index(exponent)] -= logs[variable]
        return powers_TPX


def _law(name: str, source: str, **terms: str) -> Law:
    """Terms as `A="total_params^a tokens^b"`."""
    parsed = []
    for coefficient, text in terms.items():
        pairs = [power.split("^") for power in text.split()]
        parsed.append(Term(coefficient=coefficient, powers=tuple((variable, exponent) for variable, exponent in pairs)))
    return Law(name=name, source=source, terms=tuple(parsed))


LAWS = {
    law.name: law
    for law in (
        _law("total", "Hoffmann 2022 (arXiv 2203.15556)", A=f"{TOTAL}^a", B=f"{TOKENS}^b"),
        _law("active", "the same of active parameters", A=f"{ACTIVE}^a", B=f"{TOKENS}^b"),
        _law("both", "a term for each", A=f"{ACTIVE}^a", T=f"{TOTAL}^t", B=f"{TOKENS}^b"),
        _law(
            "granularity",
            "Krajewski 2024 (arXiv 2402.07871)",
            A=f"{ACTIVE}^a",
            G=f"{ACTIVE}^a {GRANULARITY}^g",
            B=f"{TOKENS}^b",
        ),
        _law(
            "sparsity",
            "Abnar 2025 (arXiv 2501.12370), density = 1 - sparsity",
            A=f"{TOTAL}^a",
            B=f"{TOKENS}^b",
            C=f"{DENSITY}^c",
            D=f"{DENSITY}^d {TOTAL}^f",
        ),
        _law(
            "routed",
            "Clark 2022 (arXiv 2202.01169), its bilinear law of sizes beside tokens, as Yun 2024 (arXiv 2404.02852)"
            " adds them; E experts as they are, without saturation",
            A=f"{ACTIVE}^a {EXPERTS}^x {INTERACTION}^c",
            B=f"{TOKENS}^b",
        ),
        _law(
            "triad",
            "the three sizes of Wan 2026 (arXiv 2603.21862), in one product of our own",
            A=f"{FLOPS_PER_TOKEN}^m {ACTIVE}^a {TOTAL}^t",
            B=f"{TOKENS}^b",
        ),
        _law("experts", "a term of our own for the number of experts", A=f"{ACTIVE}^a {EXPERTS}^x", B=f"{TOKENS}^b"),
    )
}


def derived(name: str, column: Callable[[str], np.ndarray]) -> np.ndarray:
    """A variable of a law: a column, or what is made of several.

    Args:
        column: a column by its name, positive numbers.
    """
    if name == FLOPS_PER_TOKEN:
        return column(FLOPS) / column(TOKENS)
    if name == INTERACTION:
        return np.exp(-np.log(column(ACTIVE)) * np.log(column(EXPERTS)) / 10)
    return column(name)


def find_law(name: str) -> Law:
    """A law by its name.

    Raises:
        ValueError: for an unknown one, with the nearest legal name.
    """
    if name not in LAWS:
        raise ValueError(f"--law {name}: no such law; {nearest(name, LAWS)}")
    return LAWS[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """A law with its numbers.

    Attributes:
        law: the form.
        values: by name of the parameter, see `Law.parameters`.
        objective: sum of weighted Huber losses of the residuals in log loss, see `huber.py`.
    """

    law: Law
    values: dict[str, float]
    objective: float

    def predict(self, variables: Mapping[str, np.ndarray]) -> np.ndarray:
        """The loss, in the unit of the points, at every point of `variables` (arrays of one length)."""
        return predict(self.law, [self.values[name] for name in self.law.parameters], variables)


def predict(law: Law, values: Sequence[float], variables: Mapping[str, np.ndarray]) -> np.ndarray:
    """The loss of a law.

    Args:
        values: in the order of `Law.parameters`.
        variables: arrays of one length, by the names that the law uses.
    """
    n_linear = len(law.coefficients)
    logs = {name: np.log(np.asarray(variables[name], dtype=float)) for name in law.variables}
    columns_TP = np.exp(law.powers_TPX(logs) @ np.asarray(values[n_linear:], dtype=float))
    return np.asarray(values[:n_linear], dtype=float) @ columns_TP
