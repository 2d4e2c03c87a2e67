"""Multi-query associative recall (MQAR, Zoology, arXiv 2312.04927): a text of pairs, then questions about all of them.

    key value key value ... | filler, and here and there a key: the model is to name its value as the next token

Keys are tokens of the lower half of the vocabulary, values of the upper half, filler is any token. Where the questions
stand is drawn by a power law over the places behind the pairs, so that most come early and some late.

What may be learnt by heart is kept apart from what is asked: every association, a key with a value, belongs to training
or to the test, decided by a hash of the two, so that a model that answers test questions has read the answer in the
text before it.

Legend: B rows, T tokens, P pairs, S places of a question.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from foundation.numbers import check_numbers
from lm.model import IGNORED_TARGET

# Share of all associations that training never shows.
HELD_OUT_SHARE = 1 / 8
# Values among which every key surely has one that is held out.
SURELY_ENOUGH = 256
# Of the power law of the published study; 1 would be uniform.
POWER = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Texts of one shape.

    Attributes:
        length: tokens of a text, the pairs included.
        pairs: associations, each of which is asked for once.
        weight: how often a batch is of this segment, beside the others of a mixture.

    Raises:
        ValueError: for a text that has no room for its questions.
    """

    length: int
    pairs: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, length=4, pairs=1, weight=0)
        # A question takes two tokens as a pair does: the key, and a token where the answer would stand.
        if 4 * self.pairs > self.length:
            raise ValueError(
                f"Segment.pairs: {self.pairs} in {self.length} tokens; legal: at most {self.length // 4}, four tokens"
                " for each"
            )

    def check(self, vocab_size: int) -> None:
        """Refuses a vocabulary with too few keys, or with a key that has no association in training or in the test.

        Raises:
            ValueError: naming the numbers.
        """
        if len(keys_of(vocab_size)) < self.pairs:
            raise ValueError(
                f"Segment.pairs: {self.pairs} of a vocabulary of {vocab_size}, which has {len(keys_of(vocab_size))}"
                " keys; legal: at most as many"
            )
        keys, values = np.array(keys_of(vocab_size)), np.array(values_of(vocab_size))
        # Where there are many values, every key has some on either side.
        held = is_held_out(keys[:, None], values[None, :SURELY_ENOUGH])
        if not (held.any(axis=1) & ~held.all(axis=1)).all():
            raise ValueError(
                f"vocab_size: {vocab_size}, of whose {len(values)} values a key has none that training shows, or none"
                " that it does not; legal: more tokens"
            )


def keys_of(vocab_size: int) -> range:
    """Tokens that are keys. Token 0 is none, as in the published study."""
    return range(1, vocab_size // 2)


def values_of(vocab_size: int) -> range:
    """Tokens that are values."""
    return range(vocab_size // 2, vocab_size)


def is_held_out(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whether associations belong to the test, elementwise.

    A hash of both tokens decides (the finaliser of splitmix64), not their sum or their order: a rule that a small model
    could learn would tell it which values a key never has in training.
    """
    mixed = (keys.astype(np.uint64) << np.uint64(32)) | values.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(40)) < np.uint64(HELD_OUT_SHARE * 2**24)


def draw_batch(
    segment: Segment, vocab_size: int, rows: int, generator: np.random.Generator, *, held_out: bool
) -> tuple[Tensor, Tensor]:
    """Texts with their answers.

    Args:
        rows: how many, the B of the shapes.
        held_out: draw associations of the test instead of those of training.

    Returns:
        tokens_BT and targets_BT, int64: the answer behind every question, `IGNORED_TARGET` elsewhere.
    """
    B, T, P = rows, segment.length, segment.pairs
    keys, values = np.array(keys_of(vocab_size)), np.array(values_of(vocab_size))
    # The first P of a shuffled list: no key comes twice in a text. Values may.
    key_BP = keys[np.argsort(generator.random((B, len(keys))), axis=1)[:, :P]]
    value_BP = generator.choice(values, (B, P))
    while (wrong_BP := is_held_out(key_BP, value_BP) != held_out).any():
        value_BP[wrong_BP] = generator.choice(values, int(wrong_BP.sum()))
    # Places without replacement, each weighed by the power law: the P largest of log-weights with Gumbel noise.
    S = (T - 2 * P) // 2
    log_weight_S = (POWER - 1) * np.log(np.arange(1, S + 1))
    place_BP = np.argsort(-(log_weight_S + generator.gumbel(size=(B, S))), axis=1)[:, :P]
    question_BP = 2 * P + 2 * place_BP
    tokens_BT = generator.integers(0, vocab_size, (B, T))
    tokens_BT[:, 0 : 2 * P : 2] = key_BP
    tokens_BT[:, 1 : 2 * P : 2] = value_BP
    np.put_along_axis(tokens_BT, question_BP, key_BP, axis=1)
    targets_BT = np.full((B, T), IGNORED_TARGET)
    np.put_along_axis(targets_BT, question_BP, value_BP, axis=1)
    return torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT)
