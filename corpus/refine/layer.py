"""What a layer of the cascade is: a name, where its rules come from, its thresholds by language, and a verdict."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from corpus.refine.page import Page


class Layer(ABC):
    """Judges pages one by one, and may change them.

    Attributes:
        name: as reports and `--without` call it; the name of the layer's file.
        source: paper or code that the rules and thresholds come from.
        thresholds: by language, what the verdict compares with; a report prints them.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    thresholds: ClassVar[Mapping[str, Mapping[str, Any]]]

    @abstractmethod
    def judge(self, page: Page) -> str | None:
        """None where the page stays, otherwise the reason why it goes.

        A layer may change `page.text`. It must settle: judging what it left changes nothing any more and, if it stayed,
        lets it stay.
        """
