"""The registry: every method file is found, bears its name, asks its question, and changes what it says it changes."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from ablations.comparison.registry import all_methods, find_methods
from ablations.method import Method, with_plan
from attention.kinds import KINDS
from foundation.serialize import kinds
from lm.options import ModelOptions
from routing.policies.null_experts import NullExperts
from routing.policies.random_k import RandomK
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.policy import PolicyConfig
from staged_training.boundary import choose_cut

ROOT = Path(__file__).resolve().parents[3]
ASKED_FOR = {
    "baseline",
    "twin",
    "other_order",
    "top_p",
    "null_experts",
    "random_k",
    "sliding_window_hybrid",
    "shared_kv_hybrid",
    "shared_window_hybrid",
    "lightning_hybrid",
    "gated_delta_hybrid",
    "kda_hybrid",
    "zero_computation",
    "expert_choice",
    "skipping",
    "mixed_heads_hybrid",
    "latent_attention",
    "mamba_hybrid",
    "short_conv_hybrid",
}
ROUTING = ("top_p", "null_experts", "zero_computation", "random_k", "expert_choice", "skipping")


def test_every_file_with_a_method_is_found_and_listed(forked):
    files = {path.stem for path in (ROOT / "ablations").glob("*.py") if "\nMETHOD = " in path.read_text()}
    assert set(all_methods()) == files >= ASKED_FOR
    listed = subprocess.run(
        [sys.executable, "-m", "ablations", "list"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[0] for line in listed.splitlines()] == list(all_methods())
    assert all(method.question in listed for method in all_methods().values())


@pytest.mark.parametrize("name", sorted(ASKED_FOR))
def test_every_method_runs_alone_asks_a_question_and_says_what_it_changes(name):
    method = all_methods()[name]
    source = (ROOT / "ablations" / f"{name}.py").read_text()
    assert source.endswith('\nif __name__ == "__main__":\n    run_alone(METHOD)\n')
    assert method.question.endswith("?")
    kinds = {"baseline": "nothing", "twin": "rounding", "other_order": "seed"} | dict.fromkeys(ROUTING, "routing")
    baseline = ModelOptions(n_layers=8, layer_plan="F").config(4096)
    assert method.kind(baseline) == kinds.get(name, "architecture")


@pytest.mark.parametrize("k", [1, 2, 3, 12])
def test_routing_methods_hold_the_baselines_mean(k):
    base = ModelOptions(k=k, n_experts=16).config(4096)
    policies = {
        name: all_methods()[name].change(base).moe.router.policy for name in ("baseline", "other_order", *ROUTING)
    }
    for policy in policies.values():
        match policy:
            case TopK():
                assert policy.k == k
            case TopP() | NullExperts():
                assert policy.target_mean == k
            case RandomK():
                assert policy.k_eval == (policy.k_min + policy.k_max) / 2 == k


def test_every_policy_and_every_kind_of_attention_has_a_method():
    """Found by their registries: whoever adds one adds its method."""
    base = ModelOptions(n_layers=8, layer_plan="F").config(4096)
    models = [method.change(base) for method in all_methods().values()]
    folder = {kind for kind in kinds(PolicyConfig).values() if kind.__module__.startswith("routing.policies.")}
    assert folder <= {type(model.moe.router.policy) for model in models}
    assert set(KINDS) <= {letter for model in models for letter in model.plan.letters}


def test_architecture_is_what_cannot_take_the_trunks_weights():
    """One definition for the report and for the plan, whatever a method is called: letters or shapes of weights."""
    base = ModelOptions().config(4096)

    def wide_experts(model):
        return dataclasses.replace(model, moe=dataclasses.replace(model.moe, d_expert=2 * model.moe.d_expert))

    changes = {
        "wide_experts": (wide_experts, "architecture"),
        "windows": (lambda model: with_plan(model, "SF"), "architecture"),
        # Weights that a router has in addition (null columns) leave the trunk's where they were.
        "null_hybrid": (all_methods()["null_experts"].change, "routing"),
        "unchanged": (lambda model: model, "nothing"),
    }
    for name, (change, kind) in changes.items():
        method = Method(name=name, question="What does it change?", change=change)
        assert method.kind(base) == kind
        cut = choose_cut(base, {name: change(base)}, freeze=0.5)
        assert cut.fresh == (kind == "architecture")


def test_plans_are_the_ones_named():
    base = ModelOptions(n_layers=8, layer_plan="F").config(4096)
    plans = {name: "".join(all_methods()[name].change(base).plan.letters) for name in ASKED_FOR}
    plans = {name: letters for name, letters in plans.items() if letters != "F" * base.n_layers}
    assert plans == {
        "sliding_window_hybrid": "SSSFSSSF",
        "shared_kv_hybrid": "SSSFSSSR",
        "shared_window_hybrid": "SrrFSrrF",
        "lightning_hybrid": "LLLFLLLF",
        "gated_delta_hybrid": "GGGFGGGF",
        "kda_hybrid": "KKKFKKKF",
        "mixed_heads_hybrid": "MMMMMMMM",
        "latent_attention": "AAAAAAAA",
        "mamba_hybrid": "DDDFDDDF",
        "short_conv_hybrid": "CCFCCFCC",
    }


def test_the_help_of_the_layer_plan_names_every_letter(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(ModelOptions, args=["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for letter, kind in KINDS.items():
        assert f"{letter} ({kind.sentence})" in text


def test_the_baseline_comes_first_and_once():
    assert [method.name for method in find_methods(["top_p", "baseline", "twin", "top_p"])] == [
        "baseline",
        "top_p",
        "twin",
    ]
    assert [method.name for method in find_methods(["random_k"])] == ["baseline", "random_k"]


def test_a_misspelt_method_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"no method 'topp'; did you mean 'top_p'\?.*sliding_window_hybrid"):
        find_methods(["topp"])


def test_a_method_needs_a_baseline_of_plain_top_k():
    base = all_methods()["top_p"].change(ModelOptions().config(4096))
    with pytest.raises(ValueError, match="plain top-k"):
        all_methods()["random_k"].change(base)
