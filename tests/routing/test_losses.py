"""Balance and z losses, selection bias, and that every consumer reads the assignments that were dispatched."""

import pytest
import torch

import routing.router as router_module
from routing.assignments import Assignments
from routing.losses import ThreeLevelBalance, switch_balance_loss, three_level_balance_loss, z_loss
from routing.policies.null_experts import NullExperts
from routing.policies.random_k import RandomK
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.router import Router, RouterConfig
from routing.selection_bias import updated_selection_bias

D, E = 16, 12


def router(**config) -> Router:
    built = Router(RouterConfig(**({"policy": TopK(k=3)} | config)), d_model=D, n_experts=E, layer_index=0)
    built.init_weights(torch.Generator().manual_seed(0))
    return built.train()


def tokens(n=64, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def test_switch_loss_is_its_formula():
    rows_E = torch.tensor([6.0, 2.0, 0.0])
    probs_TE = torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.1, 0.2]])
    # 3 * (0.75 * 0.6 + 0.25 * 0.2)
    assert float(switch_balance_loss(rows_E, probs_TE)) == pytest.approx(1.5)
    assert float(switch_balance_loss(torch.full((3,), 5), probs_TE)) == pytest.approx(1.0)
    assert float(switch_balance_loss(torch.zeros(3), probs_TE)) == pytest.approx(1.0)
    assert float(switch_balance_loss(rows_E, probs_TE[:0])) == 0.0


def test_z_loss_is_its_formula():
    logits_TE = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = (torch.log(torch.tensor(2.0)) ** 2 + (1 + torch.log(torch.tensor(2.0))) ** 2) / 2
    assert float(z_loss(logits_TE)) == pytest.approx(float(expected))


def test_gradients_are_finite_at_perfect_balance_and_at_collapse():
    for logits_TE in (torch.zeros(8, E), torch.eye(E) * 80):
        logits_TE.requires_grad_()
        for rows_E in (torch.full((E,), 7), torch.eye(E)[0] * 100, torch.zeros(E)):
            (gradient,) = torch.autograd.grad(
                switch_balance_loss(rows_E, logits_TE.softmax(dim=-1)) + z_loss(logits_TE), logits_TE
            )
            assert gradient.isfinite().all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_shrinking_all_scores_gains_nothing(score):
    # The trap: sigmoid scores normalised with an epsilon, where a router lowers the loss by lowering every score.
    # Subtracting from all logits is what "lowering every score" means, and it must leave the loss where it was.
    built = router(score=score, balance_coefficient=1.0, z_coefficient=0.0)
    built.load_E.copy_(torch.arange(E))
    x_TD = tokens()
    # Equal steps of this feature's weights move all logits of a token together.
    x_TD[:, 0] = 1.0
    (gradient_ED,) = torch.autograd.grad(built(x_TD).losses["balance"], built.weight_ED)
    assert gradient_ED.abs().max() > 1e-3
    assert abs(float(gradient_ED[:, 0].sum())) < 1e-6


@pytest.mark.parametrize(
    "policy", [TopK(k=3), TopP(target_mean=4.0, cap=8), NullExperts(k=6, n_null=9, target_mean=4.0)], ids=repr
)
def test_balance_is_independent_of_gradient_accumulation(policy):
    x_TD = tokens(96)
    gradients, states = [], []
    for cuts in ([96], [32, 32, 32]):
        built = router(policy=policy, selection_bias_step=0.01)
        for step in range(3):
            built.begin_step(step, seed=0)
            built.zero_grad()
            for part_TD in x_TD.split(cuts):
                losses = built(part_TD).losses
                ((losses["balance"] + losses["z"]) * part_TD.shape[0] / 96).backward()
            built.after_step()
        assert built.weight_ED.grad is not None
        gradients.append(built.weight_ED.grad)
        # The controllers' thresholds too: a quantile of all the step's levels, however they were cut.
        states.append({name: value for name, value in built.state_dict().items() if name != "weight_ED"})
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(states[0], states[1])


def test_a_recomputed_forward_gives_the_same_losses_and_moves_nothing_else():
    built = router(policy=RandomK(k_min=1, k_max=8, k_eval=4), selection_bias_step=0.1)
    built.begin_step(5, seed=1)
    first, second = built(tokens()), built(tokens())
    assert torch.equal(first.assignments.weight_N, second.assignments.weight_N)
    assert all(torch.equal(first.losses[name], second.losses[name]) for name in first.losses)
    built.after_step()
    once = router(policy=RandomK(k_min=1, k_max=8, k_eval=4), selection_bias_step=0.1)
    once.begin_step(5, seed=1)
    once(tokens())
    once.after_step()
    # Counting everything twice changes neither the shares nor the sign of the deviation.
    torch.testing.assert_close(built.load_E / built.load_E.sum(), once.load_E / once.load_E.sum())
    torch.testing.assert_close(built.selection_bias_E, once.selection_bias_E)


def test_everything_reads_the_dispatched_assignments(monkeypatch):
    """Replace what is dispatched: load, bias, the next loss and the statistics must all follow the replacement, not the
    policy's decision."""
    dispatched = Assignments.from_slots(torch.full((64, 1), 7), torch.ones(64, 1), n_experts=E)
    monkeypatch.setattr(router_module.Assignments, "from_slots", staticmethod(lambda *_, **__: dispatched))
    built = router(selection_bias_step=0.5, balance_coefficient=1.0)
    built.begin_step(0, seed=0)
    routing = built(tokens())
    assert routing.statistics.mean_experts == 1
    assert routing.statistics.rows_per_expert.tolist() == [0] * 7 + [64] + [0] * 4
    assert routing.statistics.dead_experts == E - 1
    assert routing.statistics.max_load == E
    built.after_step()
    assert built.load_E.tolist() == routing.statistics.rows_per_expert.tolist()
    assert built.selection_bias_E.tolist() == [0.5] * 7 + [-0.5] + [0.5] * 4
    routing = built(tokens())
    assert routing.losses["balance"].item() == pytest.approx(float(E * routing.probs_TE[:, 7].detach().mean()))


def test_selection_bias_moves_against_the_load():
    bias_E = updated_selection_bias(torch.zeros(4), torch.tensor([4, 0, 2, 2]), step=0.1)
    torch.testing.assert_close(bias_E, torch.tensor([-0.1, 0.1, 0.0, 0.0]))
    torch.testing.assert_close(updated_selection_bias(bias_E, torch.zeros(4), step=0.1), bias_E)


def test_selection_bias_evens_out_a_lopsided_router():
    built = router(selection_bias_step=0.005, balance_coefficient=0.0)
    built.weight_ED.data[0] = 0.0
    x_TD = tokens(512)
    x_TD[:, 0] = 1.0
    built.weight_ED.data[3, 0] += 3.0
    loads = []
    for step in range(150):
        built.begin_step(step, seed=0)
        loads.append(float(built(x_TD).statistics.max_load))
        built.after_step()
    assert loads[0] > 2.5
    assert loads[-1] < 1.5


@pytest.mark.parametrize(
    "policy",
    [TopK(k=3), TopP(target_mean=4.0, cap=8, entropy_coefficient=0.5), NullExperts(k=6, n_null=9, target_mean=4.0)],
    ids=repr,
)
def test_no_tokens_are_no_news(policy):
    built = router(policy=policy, selection_bias_step=0.1)
    built.load_E.copy_(torch.arange(E))
    before = {name: value.clone() for name, value in built.state_dict().items()}
    built.begin_step(0, seed=0)
    routing = built(tokens(0))
    assert all(loss == 0 for loss in routing.losses.values())
    built.after_step()
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


def test_entropy_loss_of_top_p():
    built = router(policy=TopP(target_mean=None, cap=8, entropy_coefficient=0.5))
    routing = built(tokens())
    entropy_T = torch.distributions.Categorical(probs=routing.probs_TE).entropy()
    torch.testing.assert_close(routing.losses["entropy"], 0.5 * entropy_T.mean())


def test_statistics_count_physical_rows():
    expert_TK = torch.tensor([[0, 1], [0, 2], [0, 1]])
    keep_TK = torch.tensor([[True, True], [True, False], [False, False]])
    assignments = Assignments.from_slots(expert_TK, torch.ones(3, 2), keep_TK, n_experts=4)
    statistics = router_module.routing_statistics(assignments, torch.full((3, 4), 0.25))
    assert statistics.mean_experts == 1
    assert statistics.histogram.tolist() == [1, 1, 1, 0, 0]
    assert statistics.rows_per_expert.tolist() == [2, 1, 0, 0]
    assert statistics.dead_experts == 2
    assert float(statistics.max_load) == pytest.approx(8 / 3)
    assert float(statistics.entropy) == pytest.approx(1.3862943611)


def test_three_level_balance_is_its_formula():
    config = ThreeLevelBalance(
        n_groups=2, n_partitions=2, expert_coefficient=1.0, group_coefficient=10.0, partition_coefficient=100.0
    )
    rows_E = torch.tensor([3.0, 1.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0])
    probs_TE = torch.tensor([[0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]])
    experts = 8 * (3 * 0.3 + 1 * 0.1 + 2 * 0.1 + 2 * 0.1) / 8
    groups = 2 * (0.5 * 0.6 + 0.5 * 0.4)
    partitions = 4 * (0.5 * 0.4 + 0.5 * 0.2)
    assert float(three_level_balance_loss(config, rows_E, probs_TE)) == pytest.approx(
        experts + 10 * groups + 100 * partitions
    )
    even = three_level_balance_loss(config, torch.ones(8), probs_TE)
    assert float(even) == pytest.approx(111.0)


def test_three_level_balance_reaches_the_router():
    built = router(three_level_balance=ThreeLevelBalance(n_groups=3, n_partitions=2))
    built.load_E.copy_(torch.arange(E))
    routing = built(tokens())
    (gradient,) = torch.autograd.grad(routing.losses["three_level_balance"], built.weight_ED)
    assert gradient.abs().sum() > 0
    with pytest.raises(ValueError, match="n_experts = 12 cannot be divided into n_groups = 5"):
        _ = router(three_level_balance=ThreeLevelBalance(n_groups=5))(tokens()).losses
