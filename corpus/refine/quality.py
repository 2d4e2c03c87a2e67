"""Layer 10: what a classifier finds unlike trusted text goes.

Logistic regression on the mean of hashed terms and pairs of terms, as fastText classifies; trained on trusted documents
against documents of the corpus itself, and calibrated on held-out documents of both. The threshold is the probability
that all but a fiftieth of the held-out trusted documents reach, and at most `SURE`: where the corpus is as good as the
trusted set, nothing can be told apart and nothing goes.

Legend: D documents, F features.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import scipy.optimize
import scipy.sparse
from scipy.special import expit

from corpus.refine.layer import Layer
from corpus.refine.page import CHINESE, CODE, ENGLISH, Page

FEATURES = 1 << 18
# Of a longer text its beginning says enough.
TERMS = 2000
DECAY = 1e-6
LOST_TRUSTED = 0.02
# At even odds, below which four in five documents are of the corpus and not of the trusted set.
SURE = 0.2


class Quality(Layer):
    """Args:
    classifiers: by language.
    """

    name = "quality"
    source = (
        "DCLM (arXiv 2406.11794) and Yi (arXiv 2403.04652): a linear classifier of trusted against raw text; they keep"
        " the best tenth, here the threshold follows from the trusted set"
    )
    thresholds: ClassVar = {
        language: {"held-out trusted documents below the threshold": LOST_TRUSTED, "highest threshold": SURE}
        for language in (ENGLISH, CHINESE, CODE)
    }

    def __init__(self, classifiers: dict[str, "Classifier"]):
        self.classifiers = classifiers

    def judge(self, page: Page) -> str | None:
        classifier = self.classifiers.get(page.language or "")
        if classifier is None:
            return None
        probability = classifier.probability(page)
        page.scores["quality"] = round(probability, 4)
        return "unlike trusted text" if probability < classifier.lowest else None


class Classifier:
    """Attributes:
    weights_F: float32.
    slope, offset: of the calibration: probability = sigmoid(slope x score + offset).
    lowest: probability that a document must reach.
    """

    def __init__(self, weights_F: np.ndarray, slope: float, offset: float, lowest: float):
        self.weights_F = weights_F
        self.slope = slope
        self.offset = offset
        self.lowest = lowest

    def probability(self, page: Page) -> float:
        """That the document is one of the trusted, at even odds before it was read."""
        found = features(page)
        score = float(self.weights_F[found].mean()) if len(found) else 0.0
        return float(expit(self.slope * score + self.offset))

    @classmethod
    def train(
        cls, trusted: Sequence[Page], raw: Sequence[Page], held_out: tuple[Sequence[Page], Sequence[Page]]
    ) -> "Classifier":
        """Args:
        held_out: further trusted and raw documents, for the calibration and the threshold.
        """
        x_DF, y_D = _matrix([*trusted, *raw]), np.repeat([1.0, 0.0], [len(trusted), len(raw)])
        # Each side weighs the same, whatever it has.
        weight_D = np.where(y_D == 1, 0.5 / len(trusted), 0.5 / len(raw))

        def loss(w_F: np.ndarray) -> tuple[float, np.ndarray]:
            margin_D = x_DF @ w_F
            value = weight_D @ (np.logaddexp(0, margin_D) - y_D * margin_D) + DECAY / 2 * (w_F @ w_F)
            return float(value), x_DF.T @ (weight_D * (expit(margin_D) - y_D)) + DECAY * w_F

        best = scipy.optimize.minimize(loss, np.zeros(FEATURES), jac=True, method="L-BFGS-B", options={"maxiter": 60})
        weights_F = best.x.astype(np.float32)
        scores = [_matrix(pages) @ weights_F for pages in held_out]
        slope, offset = _platt(*scores)
        lowest = float(np.quantile(expit(slope * scores[0] + offset), LOST_TRUSTED))
        return cls(weights_F, slope, offset, min(lowest, SURE))

    def arrays(self) -> dict[str, np.ndarray]:
        return {"weights": self.weights_F, "calibration": np.array([self.slope, self.offset, self.lowest])}

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> "Classifier":
        return cls(arrays["weights"], *arrays["calibration"].tolist())


def features(page: Page) -> np.ndarray:
    """Hashed terms and pairs of neighbouring terms of the text's beginning, with repetition."""
    hashes_T = page.terms.hashes[:TERMS]
    pairs = page.term_hashes.ngrams(2)[: max(len(hashes_T) - 1, 0)]
    return (np.concatenate((hashes_T, pairs)) & np.uint64(FEATURES - 1)).astype(np.int64)


def _matrix(pages: Sequence[Page]) -> scipy.sparse.csr_array:
    """[D, F], rows that sum to one."""
    rows = []
    for page in pages:
        rows.append(features(page))
        page.forget()
    lengths = np.array([len(row) for row in rows])
    values = np.repeat(1 / np.maximum(lengths, 1), lengths)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    columns = np.concatenate(rows) if rows else np.empty(0, np.int64)
    return scipy.sparse.csr_array((values, columns, ends), shape=(len(rows), FEATURES))


def _platt(trusted_D: np.ndarray, raw_D: np.ndarray) -> tuple[float, float]:
    """Slope and offset of Platt's calibration (1999), with his targets; the slope is never negative: where held-out
    documents cannot be told apart, all get the same probability."""
    score_D = np.concatenate((trusted_D, raw_D))
    scale = float(np.abs(score_D).max()) or 1.0
    high, low = (len(trusted_D) + 1) / (len(trusted_D) + 2), 1 / (len(raw_D) + 2)
    target_D = np.repeat([high, low], [len(trusted_D), len(raw_D)])
    weight_D = np.repeat([0.5 / len(trusted_D), 0.5 / len(raw_D)], [len(trusted_D), len(raw_D)])

    def loss(parameters: np.ndarray) -> float:
        margin_D = parameters[0] * score_D / scale + parameters[1]
        return float(weight_D @ (np.logaddexp(0, margin_D) - target_D * margin_D))

    best = scipy.optimize.minimize(loss, np.array([1.0, 0.0]), method="L-BFGS-B", bounds=[(0, 1e3), (-1e3, 1e3)])
    return float(best.x[0] / scale), float(best.x[1])
