"""Layer 9: what a model of trusted text finds very unlikely goes.

One n-gram model per language, trained on the trusted set; its held-out part says what is usual. The thirds of the
held-out perplexities name the buckets head, middle and tail, which are recorded with every document.
"""

from typing import ClassVar

import numpy as np

from corpus.refine.layer import Layer
from corpus.refine.ngram_model import ORDERS, NgramModel
from corpus.refine.page import CHINESE, CODE, ENGLISH, Page

DEVIATIONS = 3.0
BUCKETS = ("head", "middle", "tail")


class Perplexity(Layer):
    """Args:
    models: by language.
    """

    name = "perplexity"
    source = (
        "CCNet (arXiv 1911.00359): a model per language and terciles; Yi (arXiv 2403.04652, section 2.1): what is"
        " largely above average goes"
    )
    thresholds: ClassVar = {
        language: {"standard deviations above the mean of held-out trusted text": DEVIATIONS}
        for language in (ENGLISH, CHINESE, CODE)
    }

    def __init__(self, models: dict[str, "Calibrated"]):
        self.models = models

    def judge(self, page: Page) -> str | None:
        found = self.models.get(page.language or "")
        if found is None:
            return None
        bits = found.model.bits_per_character(page.text)
        page.scores["bits_per_character"] = round(bits, 3)
        page.scores["bucket"] = BUCKETS[int(np.searchsorted(found.terciles, bits))]
        return "unlikely text" if bits > found.highest else None


class Calibrated:
    """A model and what is usual of it.

    Attributes:
        highest: bits per character above which a text goes.
        terciles: bits per character between the buckets.
    """

    def __init__(self, model: NgramModel, highest: float, terciles: np.ndarray):
        self.model = model
        self.highest = highest
        self.terciles = terciles

    @classmethod
    def train(cls, texts: list[str], held_out: list[str], language: str) -> "Calibrated":
        model = NgramModel.train(texts, ORDERS[language])
        bits = np.array([model.bits_per_character(text) for text in held_out])
        return cls(model, float(bits.mean() + DEVIATIONS * bits.std()), np.quantile(bits, (1 / 3, 2 / 3)))

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "counts": self.model.counts_S,
            "shape": np.array([self.model.order, self.model.total]),
            "limits": np.array([self.highest, *self.terciles]),
        }

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> "Calibrated":
        order, total = arrays["shape"].tolist()
        highest, *terciles = arrays["limits"].tolist()
        return cls(NgramModel(arrays["counts"], order, total), highest, np.array(terciles))
