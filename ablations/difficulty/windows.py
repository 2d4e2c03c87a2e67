"""The held-out tokens on which experts and losses are counted: windows of documents, which stay the unit of resampling.

Legend: W windows, T tokens of a window, N counted tokens (those with a target), B, T calibration rows.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ablations.difficulty.domains import validation_domains
from ablations.difficulty.tasks import Problem
from corpus.prepare import PreparedCorpus
from lm.model import IGNORED_TARGET

# Real word problems carry their steps as <<...>> and their answer behind ####.
STEP_MARK, ANSWER_MARK, REAL_PROBLEM = b"<<", b"#### ", "word_problem_real"
# One document in this many sets thresholds and is not measured.
CALIBRATION_EVERY = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """Rows of one width, padded with targets of `IGNORED_TARGET`.

    Attributes:
        tokens_WT, targets_WT: int64.
        document_W: which document a window is of, int64, counted from 0 without gaps.
        n_bytes_N: UTF-8 bytes of each target.
    """

    tokens_WT: Tensor
    targets_WT: Tensor
    document_W: np.ndarray
    n_bytes_N: np.ndarray

    @property
    def counted_WT(self) -> np.ndarray:
        return (self.targets_WT != IGNORED_TARGET).numpy()

    @property
    def document_N(self) -> np.ndarray:
        return np.repeat(self.document_W, self.counted_WT.sum(1))

    @property
    def position_N(self) -> np.ndarray:
        return np.nonzero(self.counted_WT)[1]

    @property
    def inputs_N(self) -> np.ndarray:
        return self.tokens_WT.numpy()[self.counted_WT]

    @property
    def targets_N(self) -> np.ndarray:
        return self.targets_WT.numpy()[self.counted_WT]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probes:
    """Problems, one window each, with their labels.

    Attributes:
        answer_N: whether the counted token's target belongs to the answer.
        task_W, level_W: of each window's problem.
    """

    windows: Windows
    answer_N: np.ndarray
    task_W: np.ndarray
    level_W: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Validation documents in three parts that share none: real text measured, real text for thresholds (rows without
    padding), problems.

    Attributes:
        domain_D: of each document of the measured text.
    """

    text: Windows
    domain_D: np.ndarray
    calibration_BT: Tensor
    probes: Probes


def held_out(
    corpus: PreparedCorpus, problems: Mapping[str, Problem], *, seq_len: int, windows_per_document: int
) -> HeldOut:
    """Cuts the validation documents: evenly spaced windows of real text, whole problems.

    Raises:
        ValueError: where the validation text has too few documents for the three parts.
    """
    offsets = corpus.valid.document_offsets
    text, domains, calibration, probes = [], [], [], []
    n_text = 0
    for domain, (start, stop) in zip(validation_domains(corpus).tolist(), itertools.pairwise(offsets.tolist())):
        ids = np.asarray(corpus.valid.tokens[start:stop], dtype=np.int64)
        data = corpus.tokenizer.decode_bytes(ids[1:])
        problem = problems.get(data.decode())
        if problem is not None and len(ids) <= seq_len + 1:
            probes.append((ids, problem.task, problem.level, problem.answer_start))
        if problem is not None:
            continue
        n_text += 1
        if n_text % CALIBRATION_EVERY == 0:
            calibration += cut_windows(ids, seq_len, windows_per_document)
            continue
        text.append(cut_windows(ids, seq_len, windows_per_document))
        domains.append(domain)
        if STEP_MARK in data and ANSWER_MARK in data and len(ids) <= seq_len + 1:
            probes.append((ids, REAL_PROBLEM, data.count(STEP_MARK), data.rindex(ANSWER_MARK) + len(ANSWER_MARK)))
    n_rows = sum(len(window) for window in calibration) // seq_len
    if n_rows < 1 or not text or not probes:
        raise ValueError(
            f"the validation text has {n_text} documents of real text and {len(probes)} problems: too few, raise"
            " --valid-documents"
        )
    stream = np.concatenate(calibration)[: n_rows * seq_len]
    return HeldOut(
        text=windows_of(text, corpus.tokenizer.n_bytes_V, seq_len),
        domain_D=np.array(domains),
        calibration_BT=torch.from_numpy(stream).view(n_rows, seq_len),
        # By length, so that a batch of them is hardly padded.
        probes=_probes(sorted(probes, key=lambda probe: len(probe[0])), corpus, seq_len),
    )


def cut_windows(ids: np.ndarray, seq_len: int, most: int) -> list[np.ndarray]:
    """Up to `most` stretches of `seq_len` tokens and the target behind the last, evenly spaced; the whole document
    where it is shorter."""
    n_windows = min(most, max(1, (len(ids) - 1) // seq_len))
    starts = np.linspace(0, max(0, len(ids) - 1 - seq_len), n_windows).astype(int)
    return [ids[start : start + seq_len + 1] for start in starts]


def windows_of(documents: Sequence[Sequence[np.ndarray]], n_bytes_V: np.ndarray, seq_len: int) -> Windows:
    """Rows of the windows of some documents.

    Args:
        documents: of each its windows as token ids, one more than `seq_len` at most; the first is only read.
        n_bytes_V: UTF-8 bytes of each token of the vocabulary.
    """
    rows = [(number, ids) for number, windows in enumerate(documents) for ids in windows]
    tokens_WT = np.zeros((len(rows), seq_len), dtype=np.int64)
    targets_WT = np.full((len(rows), seq_len), IGNORED_TARGET, dtype=np.int64)
    for row, (_, ids) in enumerate(rows):
        tokens_WT[row, : len(ids) - 1], targets_WT[row, : len(ids) - 1] = ids[:-1], ids[1:]
    return Windows(
        tokens_WT=torch.from_numpy(tokens_WT),
        targets_WT=torch.from_numpy(targets_WT),
        document_W=np.array([number for number, _ in rows]),
        n_bytes_N=n_bytes_V[targets_WT[targets_WT != IGNORED_TARGET]],
    )


def _probes(probes: Sequence[tuple[np.ndarray, str, int, int]], corpus: PreparedCorpus, seq_len: int) -> Probes:
    answers = []
    for ids, _, _, answer_start in probes:
        # A target belongs to the answer if its last byte does; the space before an answer may be part of its first
        # token.
        answers.append(np.cumsum(corpus.tokenizer.n_bytes_V[ids[1:]]) > answer_start)
    return Probes(
        windows=windows_of([[ids] for ids, *_ in probes], corpus.tokenizer.n_bytes_V, seq_len),
        answer_N=np.concatenate(answers),
        task_W=np.array([task for _, task, _, _ in probes]),
        level_W=np.array([level for _, _, level, _ in probes]),
    )
