"""The held-out text of a study: windows of documents, with the domain of each and the frequency of every token.

Legend: W windows, T tokens, N counted tokens, D documents, V vocabulary.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ablations.counterfactual.options import TextOptions
from ablations.difficulty.domains import texts_by_domain, validation_domains
from ablations.difficulty.windows import Windows, cut_windows, windows_of
from corpus.prepare import MANIFEST, PreparedCorpus, open_prepared
from corpus.tokenizer import Tokenizer
from foundation.files import read_json
from lm.model import LanguageModel
from lm.pretrained import CALIBRATION_FILE, find_model, load_calibration_tokens, load_pretrained, load_tokenizer
from staged_training.record import ENVIRONMENT
from staged_training.staging import corpus_facts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """What is measured on.

    Attributes:
        domain_D: name of each document's domain.
        frequency_N: logarithm of one plus how often the counted token that goes in occurs in training text.
        source: where the text and the frequencies come from, for people.
    """

    windows: Windows
    domain_D: np.ndarray
    frequency_N: np.ndarray
    source: str

    @property
    def n_bytes_D(self) -> np.ndarray:
        """UTF-8 bytes of the predicted tokens of each document."""
        return np.bincount(self.windows.document_N, weights=self.windows.n_bytes_N, minlength=len(self.domain_D))


def held_out_text(runs: Sequence[Path], options: TextOptions) -> Text:
    """Text that none of the runs has learnt from: `--data` as it is given, or the validation documents of the corpus
    that the runs were trained on, which they must have in common.

    Raises:
        ValueError: where there is neither, or the runs read text differently.
    """
    model_folders = [find_model(run) for run in runs]
    first = load_pretrained(model_folders[0])
    tokenizer = load_tokenizer(model_folders[0], first)
    refuse_other_tokenizers(model_folders, tokenizer)
    if options.data:
        documents = [
            (domain, np.array([tokenizer.boundary_id, *tokenizer.encode(text)], dtype=np.int64))
            for domain, text in _spread(list(texts_by_domain(options.data, options.text_field)), options.documents)
        ]
        counts_V, origin = _counts(model_folders[0], first, documents)
        source = f"{', '.join(options.data)}; token frequencies of {origin}"
    else:
        corpus = corpus_of(runs)
        domains = validation_domains(corpus)
        stretches = list(zip(domains.tolist(), itertools.pairwise(corpus.valid.document_offsets.tolist())))
        documents = [
            (domain, np.asarray(corpus.valid.tokens[start:stop], dtype=np.int64))
            for domain, (start, stop) in _spread(stretches, options.documents)
        ]
        counts_V = np.bincount(np.asarray(corpus.train.tokens[:]), minlength=tokenizer.vocab_size)
        source = "validation documents of the runs' corpus; token frequencies of its training text"
    documents = [(domain, ids) for domain, ids in documents if len(ids) > 1]
    if len(documents) < 2:
        raise ValueError(f"{len(documents)} held-out documents: intervals resample documents, give at least two")
    windows = windows_of(
        [cut_windows(ids, options.window, options.windows_per_document) for _, ids in documents],
        tokenizer.n_bytes_V,
        options.window,
    )
    return Text(
        windows=windows,
        domain_D=np.array([domain for domain, _ in documents]),
        frequency_N=np.log(counts_V + 1)[windows.inputs_N],
        source=source,
    )


def run_names(runs: Sequence[Path]) -> list[str]:
    """What tables call some runs: their folders' names, or, where these are not all different, their paths."""
    folders = [run.parent if run.name == "model" else run for run in runs]
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def refuse_other_tokenizers(model_folders: Sequence[Path], tokenizer: Tokenizer) -> None:
    """Raises ValueError where a model's tokenizer file is not that of the first."""
    first = (model_folders[0] / tokenizer.file_name).read_bytes()
    for folder in model_folders[1:]:
        if not (folder / tokenizer.file_name).is_file() or (folder / tokenizer.file_name).read_bytes() != first:
            raise ValueError(f"{folder}: another tokenizer than {model_folders[0]}; legal: models of one tokenizer")


def corpus_of(runs: Sequence[Path]) -> PreparedCorpus:
    """The prepared corpus that all of the runs were trained on, from the folder of runs that they lie in.

    Raises:
        ValueError: where a folder is no run, its corpus is gone, or runs had different ones.
    """
    hashes = {}
    for run in runs:
        # A run folder, or its `model/`.
        folder = run if (run / ENVIRONMENT).is_file() else run.parent
        if not (folder / ENVIRONMENT).is_file():
            raise ValueError(f"{run} is a model without its run, so its held-out text is not known: give --data")
        hashes[folder] = read_json(folder / ENVIRONMENT)["data_hash"]
    if len(set(hashes.values())) > 1:
        raise ValueError(f"{', '.join(map(str, hashes))}: trained on different corpora; give --data that none has seen")
    folder, wanted = next(iter(hashes.items()))
    for manifest in sorted((folder.resolve().parent.parent / "corpus").glob(f"*/{MANIFEST}")):
        corpus = open_prepared(manifest.parent)
        if corpus_facts(corpus).content_hash == wanted:
            return corpus
    raise ValueError(f"{folder}: the corpus of this run is not in {folder.parent.parent / 'corpus'}; give --data")


def _spread(items: list[tuple[str, Any]], most: int) -> list[tuple[str, Any]]:
    """Up to `most` of each domain, evenly spaced, in their order; each begins with its domain."""
    by_domain: dict[str, list[int]] = {}
    for place, (domain, _) in enumerate(items):
        by_domain.setdefault(domain, []).append(place)
    kept = [
        places[at]
        for places in by_domain.values()
        for at in np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).astype(int))
    ]
    return [items[place] for place in sorted(kept)]


def _counts(folder: Path, model: LanguageModel, documents: Sequence[tuple[str, np.ndarray]]) -> tuple[np.ndarray, str]:
    """How often each token occurs in the text that a model calibrates on, or, without one, in the documents; int64
    [V], and what was counted."""
    if (folder / CALIBRATION_FILE).is_file():
        return np.bincount(
            load_calibration_tokens(folder).flatten().numpy(), minlength=model.config.vocab_size
        ), "the model's calibration text"
    ids = np.concatenate([ids for _, ids in documents])
    return np.bincount(ids, minlength=model.config.vocab_size), "the measured text itself"
