"""The held-out text in pieces small enough to be counted as draws: what the noise of a validation text is measured on.

Documents are held out whole, and of very different lengths: of the 48 that a twelfth of the standard library holds out,
one is a fifth of the text. So a document is cut into sections of at most `LONGEST` tokens, as equal as they can be;
each knows its document, because sections of one document may be alike. A section is where its tokens are predicted:
evaluation runs in windows that start anywhere, so what a model sees ahead of a section may be of the document before.

Legend: N predicted tokens, S sections, D documents.
"""

from dataclasses import dataclass

import numpy as np

from corpus.packing import PackedTokens
from corpus.tokenizer import Tokenizer

LONGEST = 256


@dataclass(frozen=True, kw_only=True)
class Sections:
    """Of one packed stream.

    Attributes:
        document_S: number of the document that each lies in, ascending from 0.
        n_bytes_S: UTF-8 bytes of their text, int64; they add up to that of the stream.
        section_N: section of every predicted token, which are all of the stream but the first.
    """

    document_S: np.ndarray
    n_bytes_S: np.ndarray
    section_N: np.ndarray


def sections(packed: PackedTokens, tokenizer: Tokenizer, longest: int = LONGEST) -> Sections:
    """Cuts the documents of a stream.

    Args:
        longest: tokens of a section, its document's boundary token included.
    """
    lengths_D = np.diff(packed.document_offsets)
    pieces_D = -(-lengths_D // longest)
    document_S = np.repeat(np.arange(len(lengths_D)), pieces_D)
    # Of each section its number within the document; equal shares of the document begin at whole tokens.
    piece_S = np.arange(len(document_S)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
    starts_S = packed.document_offsets[document_S] + piece_S * lengths_D[document_S] // pieces_D[document_S]
    n_bytes_N = tokenizer.n_bytes_V[packed.window(0, len(packed))]
    section_N = np.repeat(np.arange(len(starts_S)), np.diff(starts_S, append=len(packed)))
    return Sections(document_S=document_S, n_bytes_S=np.add.reduceat(n_bytes_N, starts_S), section_N=section_N[1:])
