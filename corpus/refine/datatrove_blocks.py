"""The layers of rules as datatrove filters, for its readers, writers and executors on a cluster (local, Slurm, Ray):

    LocalPipelineExecutor([JsonlReader(...), *blocks(config), JsonlWriter(...)], tasks=100).run()

`python -m corpus refine` does not run on datatrove itself: its contracts are that every layer sees every document, that
a text is judged until nothing changes, and that a shard is wholly there or not; datatrove's filters hand on what they
keep and nothing else, and each stage of an executor starts processes that import it for a second.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from corpus.refine.cascade import rule_layers
from corpus.refine.config import RefineConfig
from corpus.refine.layer import Layer
from corpus.refine.page import CHINESE, CODE, ENGLISH, Page

try:
    from datatrove.pipeline.filters.base_filter import BaseFilter
except ImportError as error:
    raise ImportError('layers as datatrove filters need datatrove: pip install -e ".[corpus]"') from error

if TYPE_CHECKING:
    from datatrove.data import Document
    from datatrove.pipeline.writers.disk_base import DiskWriter

# datatrove's codes: its "zh" has no segmenter behind it, "cmn" has.
CODES = {ENGLISH: "eng", CHINESE: "cmn", CODE: "code"}
LANGUAGES = {code: language for language, code in CODES.items()}


class LayerFilter(BaseFilter):
    """One layer. Changes `document.text` as the layer does, and sets `metadata["language"]`.

    Args:
        layer: what judges.
        exclusion_writer: where dropped documents go, with their reason.
    """

    type = "🔻 - FILTER"

    def __init__(self, layer: Layer, exclusion_writer: "DiskWriter | None" = None):
        super().__init__(exclusion_writer)  # pyright: ignore[reportArgumentType]
        self.layer = layer
        self.name = layer.name

    def filter(self, doc: "Document") -> bool | tuple[bool, str]:
        language = LANGUAGES.get(str(doc.metadata.get("language")))
        page = Page(doc.text, language=language, record=doc.metadata)
        reason = self.layer.judge(page)
        doc.text = page.text
        if page.language is not None:
            doc.metadata["language"] = CODES[page.language]
        return True if reason is None else (False, reason)


def blocks(config: RefineConfig, exclusions: Path | None = None) -> list[LayerFilter]:
    """Layers 1 to 8 as filters, in their order.

    Args:
        exclusions: folder for what each of them drops, a folder a layer.
    """
    if exclusions is None:
        return [LayerFilter(layer) for layer in rule_layers(config)]
    from datatrove.pipeline.writers.jsonl import JsonlWriter

    return [LayerFilter(layer, JsonlWriter(str(exclusions / layer.name))) for layer in rule_layers(config)]
