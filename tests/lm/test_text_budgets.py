"""Texts side by side with budgets of their own: each is what it would be alone under its budget, also where that
changes between two of its tokens."""

import copy

import numpy as np
import pytest
import torch

from corpus.tokenizer import Tokenizer
from lm.__main__ import main
from lm.budget import set_budget
from lm.config import ModelConfig
from lm.generate import generate, generate_batch
from lm.generation_trace import read_generation, read_scores
from lm.model import LanguageModel
from lm.pretrained import save_pretrained
from lm.sampling import SamplingConfig
from lm.text_budgets import BudgetChange, TextBudgets
from moe.config import MoEConfig
from routing.policies.difficulty_head import DifficultyHead
from routing.policies.null_experts import NullExperts
from routing.policies.random_k import RandomK
from routing.policies.relu import ReLU
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.router import RouterConfig

TOKENS_BT = torch.randint(50, (8, 32), generator=torch.Generator().manual_seed(0))
POLICIES = {
    "top_k": TopK(k=4),
    "random_k": RandomK(k_min=2, k_max=6, k_eval=4),
    "top_p": TopP(target_mean=4.0, cap=8),
    "null_experts": NullExperts(k=8, n_null=8, target_mean=4.0),
    "relu": ReLU(target_mean=4.0, cap=8),
    "difficulty_head": DifficultyHead(target_mean=4.0, cap=8),
}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5], [7, 7]]
GREEDY = SamplingConfig(temperature=0)


def build(policy) -> LanguageModel:
    moe = MoEConfig(n_experts=16, d_expert=16, router=RouterConfig(policy=policy))
    config = ModelConfig(vocab_size=50, d_model=32, n_layers=3, layer_plan="SGF", moe=moe)
    model = LanguageModel(config).init_weights(0)
    torch.nn.init.normal_(model.head_VD, std=0.5, generator=torch.Generator().manual_seed(1))
    set_budget(model, 4, TOKENS_BT)
    return model


def together(model, budgets, prompts=PROMPTS, change=None):
    """Tokens and experts of each text; `change` sees every token as it comes."""
    found = [[] for _ in prompts]
    for step in generate_batch(model, prompts, max_new_tokens=8, sampling=GREEDY, budgets=budgets):
        found[step.text].append((step.token, step.experts))
        if change is not None:
            change(step.text, len(found[step.text]))
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_each_text_is_what_it_is_alone_under_its_budget(name):
    model = build(POLICIES[name])
    means = [None, 2, 6, 4]
    alone = []
    for mean, prompt in zip(means, PROMPTS):
        other = copy.deepcopy(model)
        if mean is not None:
            set_budget(other, mean, TOKENS_BT)
        steps = generate(other, prompt, max_new_tokens=8, sampling=GREEDY)
        alone.append([(step.token, step.experts) for step in steps])
    before = [(router.policy, copy.deepcopy(router.policy.state_dict())) for router in model.routers()]
    budgets = TextBudgets(model, TOKENS_BT)
    for text, mean in enumerate(means):
        budgets.set(text, mean)
    assert together(model, budgets) == alone
    # Nothing of it is left in the model.
    for router, (policy, state) in zip(model.routers(), before):
        assert router.policy is policy
        assert policy.counts_T is None
        assert policy.budget is None or policy.budget.threshold_T1 is None
        assert all(torch.equal(value, policy.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize("name", ["top_k", "top_p"])
def test_a_budget_changes_while_texts_are_generated(name):
    model = build(POLICIES[name])

    def run(prompts, change):
        budgets = TextBudgets(model, TOKENS_BT)
        budgets.set(0, 6)
        return together(model, budgets, prompts, lambda text, count: change(budgets, text, count))

    def first(budgets, text, count):
        if (text, count) == (0, 3):
            budgets.set(0, 2)

    def second(budgets, text, count):
        first(budgets, text, count)
        if (text, count) == (1, 5):
            budgets.set(1, 7)

    changed, alone = run(PROMPTS[:2], second), run(PROMPTS[:1], first)
    assert changed[0] == alone[0]
    means = [[sum(experts) / len(experts) for _, experts in text] for text in changed]
    assert min(means[0][:3]) > max(means[0][3:])
    assert max(means[1][:5]) < min(means[1][5:])
    if name == "top_k":
        assert means == [[6.0] * 3 + [2.0] * 5, [4.0] * 5 + [7.0] * 3]


def test_what_cannot_be_held_is_refused_and_changes_nothing():
    model = build(TopP(target_mean=4.0, cap=8))
    budgets = TextBudgets(model, TOKENS_BT)
    budgets.set(0, 3)
    for mean in (0, 17, 8.5):
        with pytest.raises(ValueError, match=f"{mean:g}"):
            budgets.set(0, mean)
    assert budgets._means == {0: 3}
    assert not any(router.policy.budget.calibrates for router in model.routers())
    with pytest.raises(ValueError, match="no text to set thresholds on"):
        TextBudgets(model, None).set(0, 3)
    with pytest.raises(ValueError, match="whole number"):
        TextBudgets(build(TopK(k=4)), None).set(0, 2.5)


def test_the_command_gives_each_prompt_its_budget(tmp_path, capsys):
    tokenizer = Tokenizer.train([f"line {n}: the quick brown fox\n" * 5 for n in range(20)], 300)
    moe = MoEConfig(n_experts=16, d_expert=16, router=RouterConfig(policy=TopP(target_mean=4.0, cap=8)))
    config = ModelConfig(vocab_size=tokenizer.vocab_size, d_model=32, n_layers=2, moe=moe)
    model = LanguageModel(config).init_weights(0)
    tokens_BT = torch.randint(tokenizer.vocab_size, (16, 64), generator=torch.Generator().manual_seed(0))
    save_pretrained(tmp_path / "model", model, tokens_BT, tokenizer)

    def said(*words):
        main(["generate", "--run", str(tmp_path), "--max-new-tokens", "40", "--prompt", "the", "line 3:", *words])
        return capsys.readouterr()

    same, each = said("--experts", "3"), said("--experts", "2", "6")
    low, high = map(float, each.err.split("mean experts ")[1].rstrip("]\n").split(", "))
    assert abs(low - 2) < 0.5
    assert abs(high - 6) < 1
    assert len(same.err.split("mean experts ")[1].split(", ")) == 2
    with pytest.raises(SystemExit):
        said("--experts", "1", "2", "3")
    assert "3 numbers for 2 prompts" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_command_changes_a_budget_on_the_way_and_records_it(tmp_path, capsys):
    tokenizer = Tokenizer.train([f"line {n}: the quick brown fox\n" * 5 for n in range(20)], 300)
    moe = MoEConfig(n_experts=16, d_expert=16, router=RouterConfig(policy=TopP(target_mean=4.0, cap=8)))
    config = ModelConfig(vocab_size=tokenizer.vocab_size, d_model=32, n_layers=2, moe=moe)
    tokens_BT = torch.randint(tokenizer.vocab_size, (16, 64), generator=torch.Generator().manual_seed(0))
    save_pretrained(tmp_path / "model", LanguageModel(config).init_weights(0), tokens_BT, tokenizer)
    trace = tmp_path / "trace"
    command = ["generate", "--run", str(tmp_path), "--max-new-tokens", "30", "--prompt", "the", "--trace", str(trace)]
    main([*command, "--experts", "6", "--experts-at", "20:trained", "10:2"])
    text, experts_NL = read_generation(trace)
    assert text.budget == 6
    assert text.budget_changes == (BudgetChange(10, 2.0), BudgetChange(20, None))
    scores = read_scores(trace)
    # What is on record is what was used, by the thresholds that were in force.
    assert scores.keep_NLK.sum(-1).tolist() == experts_NL.tolist()
    for layer in range(2):
        high, low, trained = (scores.threshold_NL[places, layer] for places in np.split(np.arange(30), [10, 20]))
        assert len({*high}) == len({*low}) == len({*trained}) == 1
        assert low[0] < trained[0] < high[0]
    assert experts_NL[:10].mean() > experts_NL[20:].mean() > experts_NL[10:20].mean()
    for given, said in (("ten:2", "'ten:2'"), ("3:0", "'3:0'"), ("3", "'3'")):
        with pytest.raises(SystemExit):
            main([*command[:-2], "--experts-at", given])
        assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    with pytest.raises(SystemExit, match="9"):
        main([*command[:-2], "--experts-at", "3:9"])
