"""The text that is stored with a model, as documents to measure it on: of a run, tokens that it has not learnt from."""

from pathlib import Path

from corpus.tokenizer import Tokenizer
from lm.evaluate_text import Text
from lm.pretrained import load_calibration_tokens


def stored_texts(folder: Path, tokenizer: Tokenizer) -> list[Text]:
    """Every row of the text as a document.

    Raises:
        ValueError: for a model that was saved without text.
    """
    return [
        Text("stored", text, ids, len(text.encode()), f"row {place}")
        for place, ids in enumerate(load_calibration_tokens(folder).tolist())
        for text in [tokenizer.decode(ids)]
    ]
