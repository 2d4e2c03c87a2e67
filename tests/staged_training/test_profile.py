"""The profile: what it times is all there, adds up, and is a step like any other."""

import pytest
import torch

from attention.config import AttentionConfig
from foundation.tables import read_rows
from lm.accounting import model_cost
from lm.config import ModelConfig
from lm.decode_profile import profile_decode
from lm.model import LanguageModel
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig
from staged_training.__main__ import main
from staged_training.flops import optimizer_flops
from staged_training.optimizer import OptimizerConfig
from staged_training.profile import ProfileConfig, ProfileRow, step_flops
from triton_kernels.native.decode_step import PARTS
from triton_kernels.native.library import native

PARTS_OF_A_STEP = {"attention", "router", "experts", "norms", "head and loss", "optimizer", "between"}


def config(plan="SFRG", **changes):
    return ModelConfig(
        vocab_size=97,
        d_model=16,
        n_layers=len(plan),
        layer_plan=plan,
        attention=AttentionConfig(head_dim=8, window=8),
        moe=MoEConfig(n_experts=6, d_expert=8, d_shared=8, router=RouterConfig(policy=TopK(k=2))),
        **changes,
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_part_of_both_steps_is_timed(optimizer, tmp_path, capsys):
    words = "--n-layers 3 --layer-plan SFR --d-model 16 --vocab-size 97"
    words += " --n-experts 20"
    sizes = "--d-shared 8 --head-dim 8 --batch-size 2 --seq-len 12 --context 40 --repeats 2"
    csv = tmp_path / "profile.csv"
    main(["profile", *f"{words} {sizes} --optimizer {optimizer} --csv {csv}".split()])
    printed = capsys.readouterr().out
    rows = read_rows(csv, ProfileRow)
    training = {row.part: row for row in rows if row.step == "training"}
    assert set(training) == PARTS_OF_A_STEP
    assert sum(row.share for row in training.values()) == pytest.approx(1)
    assert all(row.seconds > 0 for part, row in training.items() if part != "between")
    assert {part for part, row in training.items() if row.floor} == PARTS_OF_A_STEP - {"norms", "between"} - (
        {"optimizer"} if optimizer == "adamw" else set()
    )
    decoding = {row.part: row for row in rows if row.step == "decode"}
    assert sum(row.share for row in decoding.values()) == pytest.approx(1)
    if native().library is not None:
        assert set(decoding) == {*PARTS, "between"}
        assert all(row.seconds > 0 for row in decoding.values())
    assert "training step of 2 x 12 tokens" in printed
    assert "decode step of one sequence behind 40 tokens" in printed


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_parts_flops_are_those_of_the_step(kind):
    profiled, sizes = ProfileConfig(batch_size=2, seq_len=12, optimizer=OptimizerConfig(kind=kind)), config()
    model = LanguageModel(sizes).init_weights(0)
    flops = step_flops(model, profiled, experts=(2.0,) * 4)
    whole = model_cost(sizes, length=12, mean_experts=2.0).training_flops * 24
    assert sum(flops.values()) == pytest.approx(whole + optimizer_flops(sizes, profiled.optimizer))
    assert all(value > 0 for part, value in flops.items() if part != "optimizer")


def test_counting_changes_no_logits():
    model = LanguageModel(config("SF")).init_weights(0)
    with torch.no_grad():
        model.head_VD.normal_()
        before = model.eval()(torch.arange(9)[None]).logits_BTV
        profiled = profile_decode(model, context=5, steps=4)
        assert torch.equal(model(torch.arange(9)[None]).logits_BTV, before)
    assert not model.training
    assert profiled.experts == 2.0
    assert profiled.bytes_read > 0
    assert sum(profiled.parts.values()) < profiled.seconds


def test_without_a_compiler_a_decode_step_is_one_part(without_native):
    assert profile_decode(LanguageModel(config("F")).init_weights(0), context=5, steps=2).parts == {}
