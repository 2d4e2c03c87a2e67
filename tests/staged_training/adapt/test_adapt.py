"""A trained model learns to use fewer experts: it begins as its original, each phase trains what it says, the budget
holds, and a stopped stage continues to the same bits.

Legend: B batch, T tokens, V vocabulary.
"""

import csv
import dataclasses
import json
import os
import signal

import pytest
import torch
from torch.nn import functional

from foundation.numbers import check_numbers
from lm.budget import set_budget
from lm.model import LanguageModel
from lm.pretrained import load_pretrained, save_pretrained
from moe.config import MoEConfig
from routing.policies.null_experts import NullExperts
from routing.policies.top_k import TopK
from routing.router import RouterConfig
from staged_training.__main__ import main
from staged_training.adapt import adaptation as adaptation_module
from staged_training.adapt.adaptation import Adaptation
from staged_training.adapt.distillation import Distillation, Teacher, divergence_BT
from staged_training.adapt.model import ADAPT_METHODS, adapted_config, adapted_model, trained_names
from staged_training.adapt.options import AdaptConfig
from staged_training.adapt.teaching import Teaching
from staged_training.checkpoint import WEIGHTS, load_latest
from staged_training.record import read_run

K, MEAN = 4, 2.0
N_STEPS = 12


@pytest.fixture(scope="module")
def original_config(model_config):
    moe = MoEConfig(n_experts=8, d_expert=8, router=RouterConfig(policy=TopK(k=K)))
    return dataclasses.replace(model_config, n_layers=2, moe=moe)


@pytest.fixture(scope="module")
def original(original_config):
    """Untrained, but with a head that says something: no logits are all zero."""
    model = LanguageModel(original_config).init_weights(0).eval()
    with torch.no_grad():
        model.head_VD.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def run_folder(original, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "model"
    save_pretrained(folder, original, tokenizer=corpus.tokenizer)
    return folder.parent


@pytest.fixture
def config(run_folder, documents, tmp_path):
    def make(**changes):
        teach = Teaching(**{"tokens": N_STEPS * 32, "batch_size": 2, "seq_len": 16, "mean": MEAN, **changes})
        return AdaptConfig(
            run=run_folder, teach=teach, out=tmp_path, data=(str(documents),), save_every=5, log_every=N_STEPS
        )

    return make


@pytest.fixture
def adaptation(config, original, corpus):
    return lambda **changes: Adaptation(config(**changes), original, corpus)


@pytest.mark.parametrize("method", ["zero_experts", "top_p", "threshold"])
def test_it_begins_as_its_original(method, adaptation, original):
    stage = adaptation(method=method)
    model = stage.start()
    # Log-probabilities of some 6 are rounded to 2e-7 in fp32, by processors in different ways.
    assert stage.divergence(model) < 1e-8
    tokens_BT = stage.calibration()[:2]
    torch.testing.assert_close(model(tokens_BT).logits_BTV, original(tokens_BT).logits_BTV)
    # And all that it has beside its original's weights is its policy's.
    taken = {name: tensor for name, tensor in original.state_dict().items() if ".policy." not in name}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in taken.items())


@pytest.mark.parametrize("renormalise", [True, False])
def test_null_columns_join_routers_that_do_not_renormalise(renormalise, original_config, original, adaptation):
    router = dataclasses.replace(original_config.moe.router, renormalise=renormalise)
    config = dataclasses.replace(original_config, moe=dataclasses.replace(original_config.moe, router=router))
    other = LanguageModel(config).eval()
    other.load_state_dict(original.state_dict())
    model = adapted_model(other, adapted_config(config, "zero_experts", MEAN)).eval()
    tokens_BT = adaptation().calibration()[:4]
    set_budget(model, K, tokens_BT)
    torch.testing.assert_close(model(tokens_BT).logits_BTV, other(tokens_BT).logits_BTV)


# Null columns and a number that is drawn are what differs; the other methods have a threshold as `zero_experts` has.
BOTH_KINDS = ("zero_experts", "random_k")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in BOTH_KINDS else pytest.mark.long) for name in ADAPT_METHODS]
)
def test_every_method_is_taught_exported_and_measured(method, config, original):
    asked = config(method=method)
    command = ["adapt", "--run", str(asked.run), "--out", str(asked.out), "--data", *asked.data, "--method", method]
    command += ["--mean", "2", "--tokens", str(N_STEPS * 32), "--batch-size", "2", "--seq-len", "16"]
    main(command)
    (folder,) = asked.out.glob(f"{method}_mean_2_seed_0_*")
    record = read_run(folder)
    result = record.result
    assert result["steps"] == N_STEPS
    assert result["original_experts"] == K
    assert 0 < result["bits_per_byte"] < result["original_bits_per_byte"] + 1
    assert all(mean == pytest.approx(MEAN, rel=0.15) for mean in result["mean_experts"])
    assert all(record.ledger.costs[kind]["flops"] > 0 for kind in ("adaptation", "caching", "evaluation"))
    model = load_pretrained(folder / "model")
    assert {type(router.policy.config) for router in model.routers()} != {TopK}
    assert (folder / "options.toml").is_file()
    (row,) = list(csv.DictReader((asked.out / "adapted.csv").open()))
    assert (row["method"], float(row["bits_per_byte"])) == (method, result["bits_per_byte"])
    # The export is what was measured: the validation text again, by a model that was loaded.
    stage = Adaptation(asked, original, adaptation_corpus(asked))
    again = stage._evaluated(model)
    assert again.bits_per_byte == pytest.approx(result["bits_per_byte"], abs=1e-6)


def adaptation_corpus(config):
    from corpus.prepare import CorpusConfig, prepare
    from lm.pretrained import find_model, load_pretrained, load_tokenizer

    folder = find_model(config.run)
    return prepare(
        CorpusConfig(data=config.data), config.out / "corpus", load_tokenizer(folder, load_pretrained(folder))
    )


def test_phases_train_what_they_say_and_leave_the_rest_bit_for_bit(adaptation, original, monkeypatch):
    """Behind the routers' phase only routers have moved; behind the experts' phase experts too, and attention never:
    neither by a gradient nor by weight decay."""
    seen = {}
    stage = adaptation(router_share=0.5)
    names = {what: trained_names(stage.start(), what) for what in ("routers", "experts", "everything")}
    assert names["routers"] < names["experts"] < names["everything"]

    def moved(weights):
        return {name for name, tensor in original.named_parameters() if not torch.equal(weights[name], tensor)}

    real = adaptation_module.Phases.__call__

    def watching(self, step):
        seen[step] = moved(dict(self.model.named_parameters()))
        real(self, step)

    monkeypatch.setattr(adaptation_module.Phases, "__call__", watching)
    record = stage.run()
    assert seen[0] == set()
    assert {name.rpartition("router.")[2] for name in seen[N_STEPS // 2]} == {"weight_ED"}
    end = moved(load_latest(record.folder / "checkpoints").weights)  # type: ignore[union-attr]
    assert {name.rpartition(".")[2] for name in end} == {"weight_ED", "w_gate_up_EDF2", "w_down_EFD"}
    # A part of the model that no phase names has no state in the optimizer either.
    states = load_latest(record.folder / "checkpoints").optimizer  # type: ignore[union-attr]
    assert {name.rpartition(":")[2] for name in states} <= names["experts"]


def test_the_budget_falls_as_it_is_told_and_then_holds(adaptation):
    teach = Teaching(tokens=40 * 32, batch_size=2, seq_len=16, mean=2.0, ramp_share=0.5)
    assert [teach.mean_at(step, 4) for step in (0, 10, 20, 39)] == [4.0, 3.0, 2.0, 2.0]
    assert dataclasses.replace(teach, ramp_share=0.0).mean_at(0, 4) == 2.0
    record = adaptation(tokens=40 * 32, ramp_share=0.5).run()
    lines = [json.loads(line) for line in (record.folder / "metrics.jsonl").read_text().splitlines()]
    means = [line["mean_experts"] for line in lines]
    # Exact to a slot of the batch while it falls.
    assert means[:20] == pytest.approx([teach.mean_at(step, 4) for step in range(20)], abs=1 / 32)
    assert sum(means[-12:]) / 12 == pytest.approx(2.0, abs=0.1)


def test_a_stopped_stage_continues_to_the_same_bits(adaptation, config, original, corpus, monkeypatch, tmp_path):
    straight = adaptation().run()
    files = ("metrics.jsonl", "result.json", "model/weights.safetensors")
    expected = {name: (straight.folder / name).read_bytes() for name in files}
    other = dataclasses.replace(config(), out=tmp_path / "stopped")
    real = adaptation_module.Phases.__call__
    for at in (2, 7):

        def stop(self, step, at=at):
            real(self, step)
            if step == at:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(adaptation_module.Phases, "__call__", stop)
        with pytest.raises(BaseException, match=f"saved at step {at + 1} of {N_STEPS}"):
            Adaptation(other, original, corpus).run()
    monkeypatch.setattr(adaptation_module.Phases, "__call__", real)
    record = Adaptation(other, original, corpus).run()
    assert {name: (record.folder / name).read_bytes() for name in files} == expected
    (newest,) = {max((each.folder / "checkpoints").iterdir()).name for each in (record, straight)}
    weights = [(each.folder / "checkpoints" / newest / WEIGHTS).read_bytes() for each in (record, straight)]
    assert weights[0] == weights[1]


@pytest.mark.long
def test_stored_states_and_recomputed_ones_teach_the_same(adaptation, config, original, corpus):
    stored = adaptation().run()
    again = dataclasses.replace(config(), cache=False, out=config().out / "again")
    computed = Adaptation(again, original, corpus).run()
    assert computed.result == stored.result
    assert not list((again.out / "teachers").glob("*/activations.bin"))


def test_the_divergence_and_its_gradient_are_the_definition():
    generator = torch.Generator().manual_seed(0)
    own_BTV, theirs_BTV = (torch.randn(2, 3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    p_BTV = (theirs_BTV / 2).softmax(dim=-1)
    expected_BT = (p_BTV * (p_BTV.log() - (own_BTV / 2).log_softmax(dim=-1))).sum(dim=-1)
    torch.testing.assert_close(divergence_BT(own_BTV, theirs_BTV, 2.0).double(), expected_BT, rtol=1e-5, atol=1e-6)
    assert divergence_BT(own_BTV, own_BTV).abs().max() < 1e-6
    own_BTV.requires_grad_(True)
    divergence_BT(own_BTV, theirs_BTV, 2.0).sum().backward()
    torch.testing.assert_close(own_BTV.grad, ((own_BTV / 2).softmax(dim=-1) - p_BTV).detach() / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("share", "temperature"), [(0.0, 1.0), (0.25, 2.0), (1.0, 1.0)])
def test_the_loss_is_the_share_of_both(share, temperature, original, adaptation):
    stage = adaptation()
    tokens_BT, targets_BT = stage.train_tokens[0]
    model = stage.start()
    x_BTD = original.prefix(tokens_BT, original.config.n_layers)
    forward = Distillation(Teacher(original), share=share, temperature=temperature)(
        model, (tokens_BT, x_BTD), targets_BT, 0
    )
    text = functional.cross_entropy(model(tokens_BT).logits_BTV.flatten(0, 1), targets_BT.flatten())
    torch.testing.assert_close(forward.loss, text)
    # It begins as its original: nothing to learn from it yet.
    torch.testing.assert_close(forward.minimised, (1 - share) * text, rtol=1e-5, atol=1e-6)
    assert Teacher(original).logits(x_BTD).equal(original(tokens_BT).logits_BTV)


def test_what_cannot_be_adapted_is_refused(original_config):
    with pytest.raises(ValueError, match="--mean 5: must lie above 0 and be at most 4"):
        adapted_config(original_config, "top_p", 5)
    with pytest.raises(ValueError, match=r"--mean 2\.5: random_k needs a whole number"):
        adapted_config(original_config, "random_k", 2.5)
    varied = adapted_config(original_config, "zero_experts", 2)
    assert isinstance(varied.moe.router.policy, NullExperts)
    with pytest.raises(ValueError, match="its number of experts varies already"):
        adapted_config(varied, "top_p", 2)
    grouped = dataclasses.replace(original_config.moe.router, policy=TopK(k=2, n_groups=4, top_groups=2))
    with pytest.raises(ValueError, match="chooses 2 of 4 groups"):
        adapted_config(
            dataclasses.replace(original_config, moe=dataclasses.replace(original_config.moe, router=grouped)),
            "zero_experts",
            1,
        )


def test_a_dense_block_stays_as_it_is(original_config):
    dense = dataclasses.replace(original_config.block(0), moe=MoEConfig(n_experts=1, d_expert=16))
    config = original_config.with_blocks([dense, original_config.block(1)])
    adapted = adapted_config(config, "zero_experts", 2)
    assert adapted.block(0) == config.block(0)
    assert isinstance(adapted.block(1).moe.router.policy, NullExperts)


def test_a_dry_run_says_what_and_trains_nothing(config, capsys):
    asked = config()
    main(
        [
            *("adapt", "--run", str(asked.run), "--out", str(asked.out), "--data", *asked.data, "--dry-run"),
            *("--mean", "2", "--tokens", "384", "--batch-size", "2", "--seq-len", "16"),
        ]
    )
    said, _, rest = capsys.readouterr().out.partition("\n{")
    assert "mean 2 of its 4 experts" in said
    assert "from 4 to 2 over 4 steps" in said
    printed = json.loads("{" + rest)
    assert printed["config"]["teach"]["mean"] == 2
    assert [path.name for path in asked.out.iterdir()] == ["corpus"]
    check_numbers(asked)
