"""Windows of held-out documents, and what is observed of them: losses as evaluation has them, physical experts,
permuted decisions."""

import random

import numpy as np
import pytest
import torch

from ablations.difficulty.observe import observe
from ablations.difficulty.tasks import generate, write_problems
from ablations.difficulty.windows import REAL_PROBLEM, held_out
from ablations.method import with_policy
from attention.config import AttentionConfig
from corpus.prepare import CorpusConfig, prepare
from lm.budget import set_budget
from lm.config import ModelConfig
from lm.evaluate import evaluate
from lm.model import LanguageModel
from moe.config import MoEConfig
from routing.policies.difficulty_head import DifficultyHead
from routing.policies.null_experts import NullExperts
from routing.policies.top_p import TopP

SEQ = 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("observed")
    rng = random.Random(0)
    for number in range(40):
        text = " ".join(str(rng.randrange(1000)) for _ in range(rng.choice((5, 150))))
        (folder / f"{number}.txt").write_text(text + ("\n<<1+1=2>> <<2+2=4>>\n#### 4" if number % 2 else ""))
    problems = generate(60, seed=0)
    write_problems(problems, folder / "problems.jsonl")
    return prepare(CorpusConfig(data=(str(folder),), vocab_size=300, valid_share=0.5), folder / "out"), {
        problem.text: problem for problem in problems
    }


@pytest.fixture(scope="module")
def data(corpus):
    return held_out(corpus[0], corpus[1], seq_len=SEQ, windows_per_document=3)


def test_windows_are_the_documents_tokens(corpus, data):
    prepared, _ = corpus
    stream = np.asarray(prepared.valid.tokens[:])
    valid = [
        stream[start:stop]
        for start, stop in zip(prepared.valid.document_offsets[:-1], prepared.valid.document_offsets[1:])
    ]
    followed_by = {tuple(ids[i : i + 5]) for ids in valid for i in range(len(ids))}
    windows = data.text
    for row, counted in zip(range(len(windows.tokens_WT)), windows.counted_WT):
        inputs, targets = windows.tokens_WT[row].numpy()[counted], windows.targets_WT[row].numpy()[counted]
        assert (inputs[1:] == targets[:-1]).all()
        assert tuple([*inputs, targets[-1]][:5]) in followed_by
    assert windows.n_bytes_N.sum() == len(prepared.tokenizer.decode_bytes(windows.targets_N))
    assert len(windows.document_N) == len(windows.position_N) == len(windows.inputs_N) == windows.counted_WT.sum()
    assert np.bincount(windows.document_W).max() == 3
    assert data.calibration_BT.shape[1] == SEQ


def test_answers_of_problems_are_their_last_tokens(corpus, data):
    tokenizer, probes = corpus[0].tokenizer, data.probes
    assert {"addition", "recall", "word_problem", REAL_PROBLEM} == set(probes.task_W)
    for window in range(len(probes.level_W)):
        here = probes.windows.document_N == window
        answer = tokenizer.decode(probes.windows.targets_N[here & probes.answer_N])
        whole = tokenizer.decode(probes.windows.targets_N[here])
        if probes.task_W[window] == REAL_PROBLEM:
            assert (answer.strip(), probes.level_W[window]) == ("4", 2)
        else:
            problem = corpus[1][whole]
            assert problem.level == probes.level_W[window]
            assert answer.strip() == problem.text[problem.answer_start :].strip()


def small_model(policy):
    model = ModelConfig(
        vocab_size=300,
        d_model=16,
        n_layers=2,
        attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=8),
        moe=MoEConfig(n_experts=8, d_expert=16),
    )
    model = LanguageModel(with_policy(model, policy)).init_weights(0)
    for router in model.routers():
        if isinstance(policy, DifficultyHead):
            torch.nn.init.normal_(router.policy.head_D, generator=torch.Generator().manual_seed(1))
    # A head of zeros would hide what the experts do.
    torch.nn.init.normal_(model.head_VD, generator=torch.Generator().manual_seed(2))
    return model


POLICIES = [TopP(target_mean=3, cap=6), DifficultyHead(target_mean=3, cap=6), NullExperts(k=6, n_null=8, target_mean=3)]


@pytest.mark.parametrize("policy", POLICIES, ids=["top_p", "difficulty_head", "null_experts"])
def test_numbers_from_outside_are_what_is_computed_and_nothing_else(data, policy):
    model = small_model(policy)
    set_budget(model, 3, data.calibration_BT)
    before = observe(model, data.text)
    windows = data.text
    evaluation = evaluate(model, [(windows.tokens_WT, windows.targets_WT)], n_bytes=1)
    assert before.nats_N.sum() == pytest.approx(evaluation.nats, rel=1e-5)
    assert before.experts_NL.mean(0) == pytest.approx(evaluation.mean_experts)
    dealt_NL = np.random.default_rng(0).permutation(before.experts_NL)
    after = observe(model, windows, counts_NL=dealt_NL)
    assert np.array_equal(after.experts_NL, dealt_NL)
    assert not np.allclose(before.nats_N, after.nats_N)
    # Its own numbers are its own choice; the difficulty head's predictions are no whole numbers.
    own = observe(model, windows, counts_NL=before.experts_NL)
    np.testing.assert_allclose(own.nats_N, before.nats_N, atol=0.5 if isinstance(policy, DifficultyHead) else 1e-5)
    # Observing leaves nothing behind.
    assert np.array_equal(observe(model, windows).nats_N, before.nats_N)


def test_more_experts_than_slots_are_refused(data):
    model = small_model(POLICIES[0])
    with pytest.raises(ValueError, match="7 experts for a token: TopP fills at most 6 slots"):
        observe(model, data.text, counts_NL=np.full((len(data.text.targets_N), 2), 7))


def test_a_policy_that_takes_no_numbers_is_refused(data, monkeypatch):
    model = small_model(POLICIES[0])
    policy = type(model.routers()[0].policy)
    monkeypatch.setattr(policy, "within_budget", lambda self, level_TK: torch.ones_like(level_TK, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"layer 0: TopP used .* it does not take numbers from outside"):
        observe(model, data.text, counts_NL=np.full((len(data.text.targets_N), 2), 2))


def test_a_document_knows_its_domain(data):
    assert set(data.domain_D) <= {str(number) for number in range(40)}
    assert len(data.domain_D) == data.text.document_W.max() + 1
