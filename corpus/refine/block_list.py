"""Layer 2: what comes from a place on a block list. Documents without an address or source pass."""

from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from corpus.refine.layer import Layer
from corpus.refine.page import CHINESE, CODE, ENGLISH, Page

LIST = Path(__file__).with_name("blocked_places.txt")
KINDS = ("host", "part", "soft", "source")
URL_FIELDS, SOURCE_FIELDS = ("url", "uri", "link"), ("source",)


class BlockList(Layer):
    """One entry a line, `kind:value`: `host:` a domain with all below it, `part:` anything that an address contains,
    `soft:` the same, of which two must be there, `source:` the document's source field as a whole. `#` begins a
    comment.

    Raises:
        ValueError: for a line of another form, naming file and line.
    """

    name = "block_list"
    source = "RefinedWeb's strict, hard and soft lists (arXiv 2306.01116, appendix G.1), with entries of our own"
    thresholds: ClassVar = {language: {"soft parts": 2} for language in (ENGLISH, CHINESE, CODE)}

    def __init__(self, path: Path | None = None):
        self._entries = read_list(path or LIST)

    def judge(self, page: Page) -> str | None:
        for field in SOURCE_FIELDS:
            if page.record.get(field) in self._entries["source"]:
                return "source on the block list"
        for field in URL_FIELDS:
            url = page.record.get(field)
            if isinstance(url, str) and (reason := self._judge_address(url.lower())):
                return reason
        return None

    def _judge_address(self, url: str) -> str | None:
        try:
            host = urlsplit(url if "//" in url else f"//{url}").hostname or ""
        except ValueError:
            host = ""
        labels = host.split(".")
        if any(".".join(labels[start:]) in self._entries["host"] for start in range(len(labels))):
            return "host on the block list"
        if any(part in url for part in self._entries["part"]):
            return "address on the block list"
        if sum(part in url for part in self._entries["soft"]) >= self.thresholds[ENGLISH]["soft parts"]:
            return "address with two doubtful parts"
        return None


def read_list(path: Path) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        kind, colon, value = entry.partition(":")
        if not colon or kind not in KINDS or not value.strip():
            raise ValueError(
                f"{path}:{number}: {entry!r} is no entry; legal are {', '.join(f'{k}:...' for k in KINDS)}"
            )
        found[kind].add(value.strip() if kind == "source" else value.strip().lower())
    return {kind: frozenset(values) for kind, values in found.items()}
