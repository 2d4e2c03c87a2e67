"""A model's tokenizer as a GGUF file has it: pieces, their scores or merges, and what kind each of them is."""

import json
from pathlib import Path
from typing import Any

from corpus.byte_level_tokenizer import ByteLevelTokenizer
from corpus.tokenizer import Tokenizer

# Kinds of tokens, by their numbers in the file.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def add_vocabulary(writer: Any, folder: Path, vocab_size: int, pre_tokenizer: str) -> str:
    """Writes the tokenizer of a model folder, or that there is none; returns what it was.

    Args:
        writer: a gguf.GGUFWriter.
        vocab_size: rows of the embedding; tokens that the tokenizer does not have are there, and unused.
        pre_tokenizer: see `Architecture`.
    """
    if (folder / ByteLevelTokenizer.file_name).is_file():
        _add_byte_level(writer, folder, vocab_size, pre_tokenizer)
        return ByteLevelTokenizer.file_name
    if (folder / Tokenizer.file_name).is_file():
        _add_sentencepiece(writer, folder / Tokenizer.file_name)
        return Tokenizer.file_name
    writer.add_tokenizer_model("no_vocab")
    return "no tokenizer"


def _add_byte_level(writer: Any, folder: Path, vocab_size: int, pre_tokenizer: str) -> None:
    path = folder / ByteLevelTokenizer.file_name
    boundary = ByteLevelTokenizer.load(path, vocab_size).boundary_id
    content = json.loads(path.read_text(encoding="utf-8"))
    pieces = [f"[unused {id}]" for id in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for piece, id in content["model"]["vocab"].items():
        pieces[id], kinds[id] = piece, NORMAL
    for token in content.get("added_tokens", []):
        pieces[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    _add_boundary(writer, boundary)


def _add_sentencepiece(writer: Any, path: Path) -> None:
    import sentencepiece

    tokenizer = Tokenizer.load(path)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(path.read_bytes())
    kinds = []
    for id in range(tokenizer.vocab_size):
        if processor.is_unknown(id):
            kinds.append(UNKNOWN)
        elif processor.is_control(id):
            kinds.append(CONTROL)
        elif processor.is_byte(id):
            kinds.append(BYTE)
        else:
            kinds.append(UNUSED if processor.is_unused(id) else NORMAL)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([processor.id_to_piece(id) for id in range(tokenizer.vocab_size)])
    writer.add_token_scores([processor.get_score(id) for id in range(tokenizer.vocab_size)])
    writer.add_token_types(kinds)
    # As ours encode: no space is put ahead of a text.
    writer.add_add_space_prefix(False)
    _add_boundary(writer, tokenizer.boundary_id)


def _add_boundary(writer: Any, boundary: int) -> None:
    """The token that begins and ends a document; nothing adds it by itself, as nothing does here."""
    writer.add_bos_token_id(boundary)
    writer.add_eos_token_id(boundary)
    writer.add_add_bos_token(False)
