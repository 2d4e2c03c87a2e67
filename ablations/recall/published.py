"""Published points to stand beside our own, as data: accuracy of MQAR at the size of a model's state, in elements.

Measured by others on models of two layers, at their own lengths, vocabularies and budgets (the Zoology study and its
follow-ups, arXiv 2312.04927, 2402.18668): they show how accuracy grows with the state, and are no reproduction target.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedPoint:
    """One point.

    Attributes:
        name: of the layer.
        letter: what we call it; empty where we have no such layer.
        state_elements: numbers that the model keeps of a text.
        accuracy: share of right answers.
    """

    name: str
    letter: str
    state_elements: float
    accuracy: float


def _points(name: str, letter: str, *points: tuple[float, float]) -> list[PublishedPoint]:
    return [
        PublishedPoint(name=name, letter=letter, state_elements=elements, accuracy=accuracy)
        for elements, accuracy in points
    ]


PUBLISHED = [
    *_points("DeltaNet", "", (8.9e3, 0.792), (34e3, 0.962), (133e3, 0.994)),
    *_points("Gated DeltaNet", "G", (17e3, 0.889), (67e3, 0.987)),
    *_points("GLA", "", (4.9e3, 0.531), (18e3, 0.770), (68e3, 0.949)),
    *_points("sliding window", "S", (9.7e3, 0.082), (67e3, 0.514), (522e3, 0.935)),
]
