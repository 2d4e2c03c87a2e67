import dataclasses
import json
import math
import shutil

import pytest
import torch

from foundation.files import CorruptFileError, json_text, write_into_seal
from foundation.tables import read_rows
from lm.accounting import model_cost
from lm.budget import experts_per_token
from lm.evaluate import evaluate
from lm.model import LanguageModel
from lm.pretrained import load_calibration_tokens, load_pretrained
from routing.policies.null_experts import NullExperts
from routing.policies.random_k import RandomK
from routing.policies.top_p import TopP
from staged_training.checkpoint import WEIGHTS, load_latest, restore_model
from staged_training.data import TokenBatches
from staged_training.describe import describe
from staged_training.estimate import estimate
from staged_training.execute import Execution, in_order, run_plan
from staged_training.optimizer import OptimizerConfig, build_optimizer, restore_optimizer, update
from staged_training.progress import DIAGNOSTICS, METRICS, TIMING, read_metrics
from staged_training.record import LEDGER, SECTIONS, Ledger, RunMismatchError, SectionLoss, read_run
from staged_training.step import clipped_gradients
from staged_training.validation import VALIDATED


@pytest.fixture(scope="module")
def plan_of(plan_of):
    """With as many steps on four times the tokens: the validation text, which every run is measured on, is a quarter of
    the batches."""
    wide = {"batch_size": 4, "seq_len": 32, "tokens": 30 * 4 * 32}
    return lambda branches, **changes: plan_of(branches, **wide | changes)


@pytest.fixture(scope="module")
def plan(plan_of, model_config, with_policy):
    methods = {
        "baseline": model_config,
        "top_p": with_policy(TopP(target_mean=2, cap=4)),
        "null": with_policy(NullExperts(k=3, n_null=2, target_mean=2)),
        "random": with_policy(RandomK(k_min=1, k_max=4, k_eval=2)),
    }
    return plan_of([(name, model, 0) for name, model in methods.items()])


@pytest.fixture(scope="module")
def finished(plan, corpus, execution_config, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return root, run_plan(plan, corpus, root, execution_config)


def weights(record):
    (newest, *_) = sorted((record.folder / "checkpoints").iterdir(), reverse=True)
    return (newest / WEIGHTS).read_bytes()


def test_every_method_is_trained_and_measured(finished, plan):
    _, (trunk, *branches) = finished
    assert [record.result["method"] for record in branches] == ["baseline", "top_p", "null", "random"]
    assert all(0 < record.result["bits_per_byte"] < 20 for record in branches)
    # What the branches learnt after the trunk, on the same text: the decay must help.
    assert all(record.result["bits_per_byte"] < trunk.result["bits_per_byte"] for record in branches)
    assert branches[0].result["mean_experts"] == [2.0, 2.0]
    for record in (trunk, *branches):
        names = {path.name for path in record.folder.iterdir()}
        assert {
            "config.json",
            "environment.json",
            "metrics.jsonl",
            "checkpoints",
            "ledger.json",
            "result.json",
            "model",
        } <= names
    assert trunk.folder.name == plan.trunk_hash


def test_the_whole_validation_text_is_covered_by_whole_models(finished, corpus, plan):
    _, (_, *branches) = finished
    batches = TokenBatches(corpus.valid.tokens, batch_size=plan.batch_size, seq_len=plan.seq_len, pad=True)
    for record in branches:
        assert record.result["valid_tokens"] == len(corpus.valid) - 1
        assert record.result["valid_bytes"] == len(corpus.valid_text())
        # The exported model, run from its first block on, is what was evaluated from the stored activations.
        whole = evaluate(load_pretrained(record.folder / "model"), in_order(batches), n_bytes=corpus.valid.n_bytes)
        assert whole.bits_per_byte == record.result["bits_per_byte"]


def test_the_loss_of_every_section_is_kept_and_sealed(finished, corpus):
    _, records = finished
    for record in records:
        losses = read_rows(record.folder / SECTIONS, SectionLoss)
        assert {line.document for line in losses} == set(range(corpus.valid.n_documents))
        assert sum(line.n_bytes for line in losses) == corpus.valid.n_bytes
        nats = record.result["bits_per_byte"] * corpus.valid.n_bytes * math.log(2)
        assert sum(line.nats for line in losses) == pytest.approx(nats, rel=1e-12)
        assert SECTIONS in json.loads((record.folder / "seal.json").read_text())["content"]["files"]


def test_budgets_are_calibrated_on_text_that_no_stage_saw(finished, corpus, plan):
    _, (_, *branches) = finished
    train = TokenBatches(corpus.train.tokens, batch_size=plan.batch_size, seq_len=plan.seq_len)
    unseen_BT = torch.cat([train[int(batch)][0] for batch in plan.calibration_batches()])
    assert unseen_BT.shape[0] == plan.n_calibration * plan.batch_size
    by_method = {record.result["method"]: record for record in branches}
    for method in ("top_p", "null"):
        folder = by_method[method].folder / "model"
        assert torch.equal(load_calibration_tokens(folder), unseen_BT)
        model = load_pretrained(folder)
        # Saved with the weights: the loaded model meets its target exactly where it was calibrated, without being
        # calibrated again.
        assert experts_per_token(model, unseen_BT, (2, 3)).mean().item() == pytest.approx(2, abs=0.01)
        # Exact there, not on the text that is measured.
        assert by_method[method].result["mean_experts"] != [2.0, 2.0]


def test_stored_activations_give_the_same_losses_and_weights_bit_for_bit(
    finished, plan, corpus, execution_config, tmp_path
):
    _, stored = finished
    recomputed = run_plan(plan, corpus, tmp_path, dataclasses.replace(execution_config, cache=False))
    assert not list(tmp_path.rglob("activations"))
    for first, second in zip(stored, recomputed):
        assert (first.folder / METRICS).read_bytes() == (second.folder / METRICS).read_bytes()
        assert weights(first) == weights(second)
        assert first.result == second.result


def test_the_ledger_counts_what_was_run(finished, plan, corpus, model_config):
    _, (trunk, baseline, *_) = finished
    cost = model_cost(model_config, length=plan.seq_len, mean_experts=2.0)
    boundary, tokens = plan.branches[0].boundary, plan.tokens_per_batch
    n_valid = -(-(len(corpus.valid) - 1) // tokens)
    assert trunk.ledger.costs["trunk"]["flops"] == pytest.approx(cost.training_flops * 24 * tokens)
    assert trunk.ledger.costs["caching"]["flops"] == pytest.approx(
        cost.flops(last=boundary, head=False) * (6 + n_valid) * tokens
    )
    assert baseline.ledger.costs["branches"]["flops"] == pytest.approx(3 * cost.flops(first=boundary) * 6 * tokens)
    # Once whole at the end, and one look at a few batches where the only interval of progress ends.
    evaluated = (n_valid + VALIDATED) * tokens
    assert baseline.ledger.costs["evaluation"]["flops"] == pytest.approx(cost.flops(first=boundary) * evaluated)
    assert all(entry["seconds"] > 0 for record in (trunk, baseline) for entry in record.ledger.costs.values())
    assert json.loads((baseline.folder / "ledger.json").read_text()) == baseline.ledger.costs


def test_activations_of_a_process_that_died_ahead_of_the_ledger_are_paid_for_once(
    finished, plan, corpus, execution_config, tmp_path
):
    root, (trunk, *_) = finished
    folder = shutil.copytree(root / "trunks", tmp_path / "trunks") / trunk.folder.name
    write_into_seal(folder, {LEDGER: json_text({"trunk": trunk.ledger.costs["trunk"]})})
    for _ in range(2):
        Execution(plan, corpus, tmp_path, execution_config).activations()
        paid = Ledger.load(folder).costs["caching"]
        assert paid["flops"] == trunk.ledger.costs["caching"]["flops"]
        assert len(paid["parts"]) == 2


def test_finished_runs_are_not_run_again(finished, plan, corpus, execution_config, capsys):
    root, records = finished
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    again = run_plan(plan, corpus, root, execution_config)
    assert [record.result for record in again] == [record.result for record in records]
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before
    assert capsys.readouterr().out.count("finished before") == 5


def test_another_comparison_shares_the_trunk(finished, plan_of, model_config, corpus, execution_config):
    root, (trunk, *_) = finished
    hybrid = dataclasses.replace(model_config, layer_plan="SLGS")
    plan = plan_of([("baseline", model_config, 1), ("hybrid", hybrid, 1)])
    before = weights(trunk)
    shared, baseline, other = run_plan(plan, corpus, root, execution_config)
    assert shared.folder == trunk.folder
    assert weights(shared) == before
    assert plan.branches[0].fresh
    assert baseline.result["bits_per_byte"] != other.result["bits_per_byte"]


def test_a_folder_of_another_run_is_refused_by_key(finished, plan_of, model_config, corpus, execution_config):
    root, (trunk, *_) = finished
    plan = plan_of([("baseline", model_config, 0)], anneal="merge")
    with pytest.raises(RunMismatchError, match=r"branch\.stage\.schedule\.anneal: stored .?decay.?, asked .?merge"):
        run_plan(plan, corpus, root, execution_config)
    other = plan_of([], trunk_seed=1)
    with pytest.raises(RunMismatchError, match="trunk_seed: stored 0, asked 1"):
        run_plan(other, corpus, root, execution_config, trunk_folder=trunk.folder)


@pytest.mark.parametrize(
    ("harmed", "said"),
    [
        ("step_00000024/optimizer.safetensors", "training on from step 20"),
        ("step_00000024", "training on from step 20"),
        ("*/weights.safetensors", "training again from the start"),
        ("*", "training again from the start"),
    ],
)
def test_a_finished_trunk_without_its_last_checkpoint_is_trained_on(
    finished, plan, corpus, execution_config, tmp_path, caplog, harmed, said
):
    _, (trunk, baseline, *_) = finished
    shutil.copytree(trunk.folder, tmp_path / "trunk")
    for path in list((tmp_path / "trunk" / "checkpoints").glob(harmed)):
        if path.is_file():
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        else:
            shutil.rmtree(path)
    execution = Execution(plan, corpus, tmp_path, execution_config, trunk_folder=tmp_path / "trunk")
    _, again = execution.trunk()
    assert said in caplog.text
    assert again.result["bits_per_byte"] == trunk.result["bits_per_byte"]
    assert again.ledger.costs["caching"] == trunk.ledger.costs["caching"]
    for name in (METRICS, "model/weights.safetensors", f"checkpoints/step_00000024/{WEIGHTS}"):
        assert (again.folder / name).read_bytes() == (trunk.folder / name).read_bytes()
    if said.endswith("start"):
        # Once is enough: the branch is forked from the same bits.
        return
    assert execution.branch(plan.branches[0]).result == baseline.result


@pytest.mark.parametrize(
    "name", ["config.json", "environment.json", METRICS, DIAGNOSTICS, TIMING, "ledger.json", "result.json", "seal.json"]
)
def test_one_changed_digit_of_a_finished_run_is_named(finished, plan, corpus, execution_config, tmp_path, name):
    _, (trunk, *_) = finished
    shutil.copytree(trunk.folder, tmp_path / "trunk")
    path = tmp_path / "trunk" / name
    text = path.read_text()
    place = max(text.rfind(digit) for digit in "123456789")
    path.write_text(f"{text[:place]}0{text[place + 1 :]}")
    with pytest.raises(CorruptFileError, match=rf"{name} (does not match|has \d+ bytes).*cannot be trusted"):
        read_run(tmp_path / "trunk")
    path.write_text(text)
    assert read_run(tmp_path / "trunk").result == trunk.result
    path.unlink()
    if name not in ("result.json", "seal.json"):
        with pytest.raises(CorruptFileError, match=f"{name} is missing"):
            read_run(tmp_path / "trunk")


def test_freeze_zero_trains_the_whole_network(plan_of, model_config, corpus, execution_config, tmp_path):
    trunk, branch = run_plan(plan_of([("baseline", model_config, 0)], freeze=0.0), corpus, tmp_path, execution_config)
    assert "caching" not in trunk.ledger.costs
    models = [load_pretrained(record.folder / "model").state_dict() for record in (trunk, branch)]
    assert all(
        not torch.equal(tensor, models[1][name])
        for name, tensor in models[0].items()
        if name.endswith(("VD", "ED", "EFD"))
    )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_branch_of_the_baseline_is_the_trunk_gone_on_with(
    kind, plan_of, model_config, corpus, execution_config, tmp_path
):
    plan = plan_of([("baseline", model_config, 0)], freeze=0.0, optimizer=OptimizerConfig(kind=kind))
    trunk, branch = run_plan(plan, corpus, tmp_path, execution_config)
    # The same steps by hand, from the trunk's last checkpoint.
    saved = load_latest(trunk.folder / "checkpoints")
    assert saved is not None
    model = LanguageModel(model_config)
    restore_model(model, saved.weights, "trunk")
    optimizer = build_optimizer(model, plan.optimizer, 0)
    restore_optimizer(model, optimizer, 0, saved.optimizer)
    run = plan.branch_run(plan.branches[0], branch.folder)
    tokens = TokenBatches(corpus.train.tokens, batch_size=plan.batch_size, seq_len=plan.seq_len)
    model.train()
    for step in range(run.stage.n_batches):
        model.begin_step(step, run.seed)
        clipped_gradients(model, optimizer, *tokens[run.order[step]], boundary=0, clip=plan.optimizer.clip)
        update(optimizer, run.stage.schedule.value(step, run.stage.n_batches))
        model.after_step()
    assert run.stage.schedule.value(0, run.stage.n_batches) == run.stage.schedule.peak
    reached = load_latest(branch.folder / "checkpoints")
    assert reached is not None
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(reached.weights[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    assert reached.optimizer["step:head_VD"] == plan.trunk.n_batches + run.stage.n_batches


def test_the_frozen_part_stays_the_trunks(finished):
    _, (trunk, *branches) = finished
    stored = load_pretrained(trunk.folder / "model").state_dict()
    for record in branches:
        model = load_pretrained(record.folder / "model").state_dict()
        frozen = [name for name in model if name.startswith(("embedding", "blocks.0.", "blocks.1."))]
        assert all(torch.equal(model[name], stored[name]) for name in frozen)
        assert not torch.equal(model["head_VD"], stored["head_VD"])


def test_estimates_only_what_is_left_and_touches_nothing(
    finished, plan, plan_of, model_config, corpus, execution_config, tmp_path
):
    root, _ = finished
    nothing = estimate(Execution(plan, corpus, root, execution_config))
    assert nothing.total == 0
    assert nothing.peak_bytes > 0
    fresh = Execution(plan, corpus, tmp_path, execution_config)
    everything = estimate(fresh)
    assert min(everything.trunk, everything.caching, everything.branches, everything.evaluation) > 0
    assert "estimated time" in str(everything)
    assert "GiB" in str(everything)
    assert everything.starting == 0
    # Two processes: each has to start and to be held in memory, and branches are evaluated at other budgets, too.
    shared = estimate(fresh, jobs=2, budgets=50, budget_batches=2)
    assert shared.starting > 0
    assert shared.evaluation > everything.evaluation
    assert shared.peak_bytes > 2 * everything.peak_bytes
    assert list(tmp_path.iterdir()) == []


def test_comparisons_that_share_a_trunk_each_add_what_their_caches_took(
    plan_of, model_config, corpus, execution_config, tmp_path
):
    plans = [plan_of([("baseline", model_config, 0)], freeze=freeze) for freeze in (0.5, 0.7)]
    executions = [Execution(plan, corpus, tmp_path, execution_config) for plan in plans]
    # Both have read the trunk's record before either has stored anything.
    records = [execution.trunk()[1] for execution in executions]
    for execution in executions:
        execution.activations()
    cost = model_cost(model_config, length=plans[0].seq_len, mean_experts=2.0)
    tokens, n_valid = plans[0].tokens_per_batch, len(executions[0].valid_tokens)
    first, second = (cost.flops(last=plan.boundary, head=False) * (6 + n_valid) * tokens for plan in plans)
    assert first != second
    costs = read_run(executions[0].trunk_folder).ledger.costs
    assert costs["caching"]["flops"] == pytest.approx(first + second)
    assert costs["trunk"] == records[0].ledger.costs["trunk"]
    # Each sees what lies on the disk since it wrote itself.
    assert executions[1].trunk()[1].ledger.costs == costs


@pytest.fixture(scope="module")
def budgeted(plan_of, model_config, with_policy):
    """A plan whose trunk has a budget, so that its frozen prefix routes by thresholds."""
    top_p = with_policy(TopP(target_mean=2, cap=4))
    return plan_of([("baseline", model_config, 0), ("top_p", top_p, 0)], model=top_p)


def test_a_restarted_comparison_routes_as_an_uninterrupted_one(budgeted, corpus, execution_config, tmp_path, caplog):
    straight = run_plan(budgeted, corpus, tmp_path / "straight", execution_config)
    Execution(budgeted, corpus, tmp_path / "restarted", execution_config).branch(budgeted.branches[0])
    (cache,) = (tmp_path / "restarted").glob("trunks/*/activations")
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    restarted = run_plan(budgeted, corpus, tmp_path / "restarted", execution_config)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == written
    assert "activation cache refused" not in caplog.text
    for one, other in zip(straight, restarted, strict=True):
        assert weights(one) == weights(other)
        assert (one.folder / METRICS).read_bytes() == (other.folder / METRICS).read_bytes()
        assert one.result == other.result


def test_the_last_checkpoint_of_a_trunk_is_the_trunk(budgeted, corpus, execution_config, tmp_path, monkeypatch):
    def is_killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("staged_training.execute.evaluate", is_killed)
        with pytest.raises(KeyboardInterrupt):
            Execution(budgeted, corpus, tmp_path, execution_config).trunk()
    (folder,) = tmp_path.glob("trunks/*")
    last = folder / "checkpoints" / f"step_{budgeted.trunk.n_batches:08d}" / WEIGHTS
    before = last.read_bytes()
    trained, _ = Execution(budgeted, corpus, tmp_path, execution_config).trunk()
    restored, _ = Execution(budgeted, corpus, tmp_path, execution_config).trunk()
    assert last.read_bytes() == before == (folder / "model" / "weights.safetensors").read_bytes()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, restored.state_dict()[name]), name


def test_merged_ends_are_calibrated_and_branches_start_from_the_merged_trunk(
    plan_of, model_config, with_policy, corpus, execution_config, tmp_path
):
    top_p = with_policy(TopP(target_mean=2, cap=4))
    branches = [("top_p", top_p, 0)]
    plan = plan_of(branches, model=top_p, anneal="merge", trunk_merge_share=0.25, freeze=0.0)
    execution = Execution(plan, corpus, tmp_path, execution_config)
    model, trunk = execution.trunk()
    record = execution.branch(plan.branches[0])
    for each in (trunk, record):
        rates = [step["lr"] for step in read_metrics(each.folder)]
        assert rates[-1] == max(rates)
        whole = load_pretrained(each.folder / "model")
        unseen_BT = load_calibration_tokens(each.folder / "model")
        assert experts_per_token(whole, unseen_BT, (0, 1, 2, 3)).mean().item() == pytest.approx(2, abs=0.01)
    restored, _ = Execution(plan, corpus, tmp_path, execution_config).trunk()
    assert all(torch.equal(tensor, restored.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert record.result["bits_per_byte"] < trunk.result["bits_per_byte"]
    text = describe(plan)
    assert "1 steps warm-up, 17 stable, 6 at the peak whose weights are averaged as a linear decay would" in text
    assert "0 steps warm-up, 0 stable, 6 at the peak whose weights are averaged" in text
    assert plan.trunk_hash != plan_of(branches, model=top_p).trunk_hash
