"""Policies that follow sequences, and numbers of experts layer by layer: each against its definition; no later token
and no other document changes a decision, and decoding token by token takes the same ones.

Legend: B sequences, S tokens of each, T tokens, D model width, E experts, X numbers that are summed.
"""

import pytest
import torch

from lm.config import ModelConfig
from lm.generate import generate_batch
from lm.model import LanguageModel
from lm.sampling import SamplingConfig
from moe.config import MoEConfig
from routing.policies.document_pool import DocumentPool
from routing.policies.layer_top_k import LayerTopK
from routing.policies.sequence_budget import WIDTH, SequenceBudget
from routing.policies.top_k import TopK
from routing.router import Router, RouterConfig
from routing.sequences import Sequences, sums_so_far

D, E = 16, 12
FOLLOWING = [SequenceBudget(target_mean=4.0, cap=E), DocumentPool(k=3, pool=5, settle=6)]


def router(policy, **config) -> Router:
    built = Router(RouterConfig(policy=policy, **config), d_model=D, n_experts=E, layer_index=0)
    built.init_weights(torch.Generator().manual_seed(0))
    return built.eval()


def tokens(n, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def chosen_TE(routing) -> torch.Tensor:
    mask_TE = torch.zeros(routing.assignments.n_tokens, E, dtype=torch.bool)
    mask_TE[routing.assignments.token_N, routing.assignments.expert_N] = True
    return mask_TE


def test_sums_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    values_BSX = torch.rand(3, 20, 2, generator=generator)
    begins_BS = torch.rand(3, 20, generator=generator) < 0.2
    before_BX = torch.tensor([[1.0, 2.0, 5.0], [0.5, 0.0, 1.0], [0.0, 0.0, 0.0]])
    places = []
    sequences = Sequences(n=3, length=20, begins_BS=begins_BS, before_BX=before_BX)
    found = sums_so_far(
        lambda place_T: places.append(place_T) or values_BSX.flatten(0, 1), sequences, values_BSX.device
    )
    (place_T,) = places
    for b in range(3):
        sums_X, place = before_BX[b].clone(), int(before_BX[b, -1])
        for s in range(20):
            # The first token goes on with what came before, whether or not it is said to begin a document.
            if begins_BS[b, s] and s:
                sums_X, place = torch.zeros(3), 0
            assert int(place_T.view(3, 20)[b, s]) == place
            sums_X, place = sums_X + torch.tensor([*values_BSX[b, s].tolist(), 1.0]), place + 1
            torch.testing.assert_close(found[b, s], sums_X)


@pytest.mark.parametrize("policy", FOLLOWING, ids=lambda policy: type(policy).__name__)
def test_neither_later_tokens_nor_other_documents_decide(policy):
    built, x_TD = router(policy), tokens(48)
    whole_TE = chosen_TE(built(x_TD))
    assert torch.equal(whole_TE[:20], chosen_TE(built(x_TD[:20])))
    # Side by side, and as documents of one row.
    other_TD = tokens(48, seed=1)
    batch_TD = torch.cat([other_TD, x_TD])
    assert torch.equal(chosen_TE(built(batch_TD, Sequences(n=2, length=48)))[48:], whole_TE)
    begins_BS = torch.zeros(1, 96, dtype=torch.bool)
    begins_BS[0, 48] = True
    assert torch.equal(chosen_TE(built(batch_TD, Sequences(n=1, length=96, begins_BS=begins_BS)))[48:], whole_TE)
    # Without the boundary it is the other text that goes on.
    assert not torch.equal(chosen_TE(built(batch_TD, Sequences(n=1, length=96)))[48:], whole_TE)


@pytest.mark.parametrize("policy", FOLLOWING, ids=lambda policy: type(policy).__name__)
def test_decoding_takes_the_same_decisions(policy):
    built, x_BTD = router(policy), torch.stack([tokens(24), tokens(24, seed=1)])
    expected = chosen_TE(built(x_BTD.flatten(0, 1), Sequences(n=2, length=24))).view(2, 24, E)
    sums_BX, found = None, []
    for piece_BSD in (x_BTD[:, :9], *x_BTD[:, 9:].split(1, dim=1)):
        length = piece_BSD.shape[1]
        routing = built(piece_BSD.flatten(0, 1), Sequences(n=2, length=length, before_BX=sums_BX))
        sums_BX = routing.sums_BX
        found.append(chosen_TE(routing).view(2, length, E))
    assert torch.equal(torch.cat(found, dim=1), expected)


def test_a_sequences_slots_compete_by_rank():
    """A slot is used where it ranks among the first 4 t of t tokens, to within the scores of its bin."""
    built, x_TD = router(SequenceBudget(target_mean=4.0, floor=0, cap=E)), tokens(60)
    mask_TE, scores_TE = chosen_TE(built(x_TD)), built.scores(x_TD).scores_TE
    for t in (0, 1, 7, 59):
        so_far = scores_TE[: t + 1].flatten()
        for score, used in zip(scores_TE[t].tolist(), mask_TE[t].tolist()):
            bin_up, bin_down = (torch.tensor(score).log() + shift * WIDTH for shift in (1, -1))
            surely = int((so_far.log() > bin_down).sum()) <= 4 * (t + 1)
            surely_not = int((so_far.log() > bin_up).sum()) > 4 * (t + 1)
            assert used or not surely
            assert not (used and surely_not)
    counts_T = mask_TE.sum(dim=1).float()
    assert counts_T.std() > 0.5
    # For scores in no order the threshold is the number.
    assert chosen_TE(built(tokens(4096))).sum(dim=1).float().mean() == pytest.approx(4.0, rel=0.05)


def test_a_sequences_budget_is_held_in_training():
    built = router(SequenceBudget(target_mean=4.0, cap=E)).train()
    means = []
    for number in range(40):
        built.begin_step(number, seed=0)
        x_TD = tokens(1024, seed=number) * (1 + number / 40)
        means.append(float(built(x_TD, Sequences(n=8, length=128)).statistics.mean_experts))
        built.after_step()
    assert abs(sum(means[-20:]) / 20 / 4 - 1) < 0.01


def test_a_document_stays_in_its_pool():
    built, x_TD = router(DocumentPool(k=3, pool=5, settle=6)), tokens(200)
    mask_TE, probs_TE = chosen_TE(built(x_TD)), built.scores(x_TD).probs_TE
    assert (mask_TE.sum(dim=1) == 3).all()
    pool = set(probs_TE[:6].sum(dim=0).topk(5)[1].tolist())
    used = set(mask_TE[5:].any(dim=0).nonzero()[:, 0].tolist())
    assert used == pool
    assert mask_TE[:5].any(dim=0).sum() > 5
    # Of all experts it is plain top-k; beyond the pool the best others fill up.
    assert torch.equal(chosen_TE(router(DocumentPool(k=3, pool=99))(x_TD)), chosen_TE(router(TopK(k=3))(x_TD)))
    wide_TE = chosen_TE(router(DocumentPool(k=7, pool=5, settle=1))(x_TD))
    first = probs_TE[0].topk(5)[1]
    assert wide_TE[:, first].all()
    assert (wide_TE.sum(dim=1) == 7).all()


def model(policy, **options):
    moe = MoEConfig(n_experts=E, d_expert=8, router=RouterConfig(policy=policy))
    built = LanguageModel(ModelConfig(vocab_size=40, d_model=D, n_layers=2, moe=moe, **options)).init_weights(0)
    torch.nn.init.normal_(built.head_VD, std=0.5, generator=torch.Generator().manual_seed(1))
    return built.eval()


@pytest.mark.parametrize("policy", FOLLOWING, ids=lambda policy: type(policy).__name__)
@torch.no_grad()
def test_a_model_decodes_what_it_reads(policy):
    built = model(policy)
    tokens_BT = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = built(tokens_BT).logits_BTV
    cache = built.new_cache(2, 20)
    found = [built(piece_BT, cache).logits_BTV for piece_BT in (tokens_BT[:, :8], *tokens_BT[:, 8:12].split(1, dim=1))]
    moment = cache.snapshot()
    built(tokens_BT[:, :1], cache)
    with pytest.raises(ValueError, match="a router's sum over a text cannot forget"):
        cache.crop(12)
    cache.restore(moment)
    cache.reorder(torch.tensor([1, 0]))
    found += [built(piece_BT, cache).logits_BTV.flip(0) for piece_BT in tokens_BT[:, 12:].flip(0).split(1, dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-4)
    # Texts side by side, of different lengths, are what they are alone.
    prompts, options = [[1, 2, 3, 4, 5], [7]], SamplingConfig(temperature=0)
    together = list(generate_batch(built, prompts, max_new_tokens=8, sampling=options))
    for text, prompt in enumerate(prompts):
        alone = generate_batch(built, [prompt], max_new_tokens=8, sampling=options)
        assert [(step.token, step.experts) for step in alone] == [
            (step.token, step.experts) for step in together if step.text == text
        ]


@pytest.mark.parametrize("policy", FOLLOWING, ids=lambda policy: type(policy).__name__)
@torch.no_grad()
def test_isolated_documents_begin_anew(policy):
    built = model(policy, document_boundary=0)
    first, second = (
        [0, *torch.randint(1, 40, (n,), generator=torch.Generator().manual_seed(n)).tolist()] for n in (9, 12)
    )
    packed = built(torch.tensor([first + second])).logits_BTV[0]
    alone = torch.cat([built(torch.tensor([ids])).logits_BTV[0] for ids in (first, second)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_layer_has_its_own_number():
    built = model(LayerTopK(layers=(2, 5)))
    routings = built(torch.zeros(1, 6, dtype=torch.int64)).routings
    assert [float(routing.statistics.mean_experts) for routing in routings] == [2, 5]
    assert [router.policy.asked_experts for router in built.routers()] == [2, 5]
    assert LayerTopK(layers=(2, 5)).evaluated_experts == 3.5


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (SequenceBudget(target_mean=13.0, cap=E), "target_mean = 13.0"),
        (SequenceBudget(target_mean=4.0, cap=13), "cap = 13"),
        (DocumentPool(k=13), "DocumentPool.k = 13"),
        (DocumentPool(k=3, pool=0), "DocumentPool.pool = 0; legal: 1 or more"),
        (DocumentPool(k=3, settle=0), "DocumentPool.settle = 0; legal: 1 or more"),
        (LayerTopK(layers=()), r"LayerTopK.layers = \(\)"),
        (LayerTopK(layers=(13, 2)), r"LayerTopK.layers\[0\] = 13"),
    ],
    ids=repr,
)
def test_bad_policies_are_refused_by_name(policy, message):
    with pytest.raises(ValueError, match=message):
        router(policy)
