"""One tiny published model of each family, built by transformers and imported once for all tests."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lm.published.convert import ImportConfig, import_model
from lm.published.families import FAMILIES
from lm.published.parity import published_model


class Published(NamedTuple):
    """A published model in memory and on disk, and the model folder made of it. Tests change copies only."""

    theirs: Any
    source: Path
    folder: Path


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The model of a family, by its model_type."""

    @functools.cache
    def make(model_type: str) -> Published:
        at = tmp_path_factory.mktemp(model_type)
        theirs = published_model(FAMILIES[model_type], seed=1)
        theirs.save_pretrained(at / "published", max_shard_size="100KB")
        import_model(ImportConfig(source=at / "published", out=at / "model"))
        return Published(theirs, at / "published", at / "model")

    return make
