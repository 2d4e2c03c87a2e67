"""A model whose true need of experts is known, because its weights are written down: half of the letters need one
expert, half need eight.

A letter's next letter is a fixed one, but for a tenth that is drawn. In the residual stream a letter votes for a wrong
next letter. For an easy letter its first expert adds the whole vote for the right one, and the others add nothing; for
a hard letter each of the eight experts adds an eighth, so that every expert lowers its loss by the same half a nat. The
right one never wins: a loss that bends would make uneven numbers costly in themselves. Which expert a letter ranks
first, and how sharp its scores are, is the router's matter: with top-p, sharp scores mean one expert and flat ones
eight.

Legend: V letters, D model width, E experts, F expert width.
"""

import json
import random

import numpy as np
import tokenizers
import torch

from ablations.method import with_policy
from attention.config import AttentionConfig
from corpus.byte_level_tokenizer import ByteLevelTokenizer
from lm.config import ModelConfig
from lm.model import LanguageModel
from lm.pretrained import save_pretrained
from moe.config import MoEConfig
from routing.policies.top_p import TopP
from routing.router import RouterConfig

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEF"
V, E = len(LETTERS), 8
HARD = np.arange(V) % 2 == 1
WANTED = TopP(target_mean=4.5, cap=E)
OWN_LENGTH, WRONG_VOTE, RIGHT_VOTE, TEMPERATURE = 8.0, 1.0, 0.5, 8.0
# SiLU of the gate's logit, by which an expert's unit for a letter answers.
GATE = 4.0
ANSWER = float(torch.nn.functional.silu(torch.tensor(GATE)))


def next_letter(letter):
    return (5 * letter + 7) % V


def tokenizer():
    """A token per byte, and a boundary."""
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    one = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    one.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    one.decoder = tokenizers.decoders.ByteLevel()
    one.add_special_tokens(["<|boundary|>"])
    return ByteLevelTokenizer(one.to_str(), json.dumps({"bos_token": "<|boundary|>"}))


def planted_model(sharp_V, seed=0, policy=WANTED):
    """The model, its router giving the letters of `sharp_V` one expert under top-p and the others eight; the seed
    decides which experts a letter ranks how."""
    bytes_of = tokenizer()
    ids = np.array([bytes_of.encode(letter)[0] for letter in LETTERS])
    config = ModelConfig(
        vocab_size=bytes_of.vocab_size,
        d_model=2 * V,
        n_layers=1,
        attention=AttentionConfig(n_heads=1, n_kv_heads=1, head_dim=8),
        moe=MoEConfig(n_experts=E, d_expert=V, router=RouterConfig(renormalise=False)),
    )
    model = LanguageModel(with_policy(config, policy)).init_weights(0)
    generator = np.random.default_rng(seed)
    # Seeds differ in how much their experts know.
    right_vote = RIGHT_VOTE * (1 + 0.05 * generator.normal())
    (block,) = model.blocks
    moe = block.moe
    with torch.no_grad():
        weights = (model.embedding_VD, model.head_VD, moe.router.weight_ED)
        for weight in (*weights, moe.experts.w_gate_up_EDF2, moe.experts.w_down_EFD, block.attention.to_out.weight):
            weight.zero_()
        scale = ((OWN_LENGTH**2 + WRONG_VOTE**2) / (2 * V)) ** 0.5
        for letter in range(V):
            right = next_letter(letter)
            wrong = (right + 1) % V
            model.embedding_VD[ids[letter], letter] = OWN_LENGTH
            model.embedding_VD[ids[letter], V + wrong] = WRONG_VOTE
            model.head_VD[ids[letter], V + letter] = TEMPERATURE * scale
            ranked = generator.permutation(E)
            logit_E = np.empty(E)
            logit_E[ranked] = -0.01 * np.arange(E)
            logit_E[ranked[0]] += 5.0 * sharp_V[letter]
            moe.router.weight_ED[:, letter] = torch.from_numpy(logit_E * scale / OWN_LENGTH)
            probability_E = np.exp(logit_E) / np.exp(logit_E).sum()
            vote_E = np.full(E, right_vote / E) if HARD[letter] else right_vote * (np.arange(E) == ranked[0])
            moe.experts.w_gate_up_EDF2[:, letter, letter] = GATE * scale / OWN_LENGTH
            moe.experts.w_gate_up_EDF2[:, letter, V + letter] = scale / OWN_LENGTH
            moe.experts.w_down_EFD[:, letter, V + right] = torch.from_numpy(vote_E / probability_E / ANSWER)
    return model.eval(), torch.from_numpy(ids)


# By name of the policy, whose scores are sharp: the easy letters', the hard ones', or half of both.
SHARP = {"right": ~HARD, "wrong": HARD, "blind": np.arange(V) % 4 < 2}


def write_planted(root):
    """Models of every policy and seed into a folder, `right_0` and so on, and `text.jsonl` of two domains."""
    rng = random.Random(0)
    lines = []
    for number in range(40):
        letters = [rng.randrange(V)]
        while len(letters) < 48:
            letters.append(rng.randrange(V) if rng.random() < 0.1 else next_letter(letters[-1]))
        text = "".join(LETTERS[letter] for letter in letters)
        lines.append(json.dumps({"text": text, "domain": ("north", "south")[number % 2]}))
    (root / "text.jsonl").write_text("\n".join(lines) + "\n")
    for name, sharp_V in SHARP.items():
        for seed in range(3):
            model, ids = planted_model(sharp_V, seed)
            # Every letter as often as any other: thresholds are then exact.
            save_pretrained(root / f"{name}_{seed}", model, ids.repeat(8).view(8, V), tokenizer())
    return root
