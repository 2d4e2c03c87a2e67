"""Training on a mixture of domains: which tokens it reads, that it goes on to the same bits, what is refused."""

import dataclasses
import json
import random

import numpy as np
import pytest

from corpus.mixed_tokens import MixedTokens
from corpus.prepare import CorpusConfig, prepare
from staged_training.__main__ import main
from staged_training.data import TokenBatches
from staged_training.staging import StagingConfig, corpus_facts, make_plan, training_text
from tests.staged_training.test_killed_runs import results

OPTIONS = [
    *("--dtype", "float32", "--vocab-size", "300", "--d-model", "16", "--n-layers", "2", "--n-experts", "4"),
    *("--d-expert", "8", "--n-heads", "2", "--n-kv-heads", "1", "--head-dim", "8", "--k", "2"),
    *("--tokens", "5120", "--batch-size", "8", "--seq-len", "32", "--save-every", "7", "--log-every", "50"),
]
MIXTURE = ("--mixture", "letters=.75,figures=.25", "--epoch-cap", "4")


@pytest.fixture(scope="module")
def two_domains(tmp_path_factory):
    """A file of letters and a smaller one of figures."""
    folder = tmp_path_factory.mktemp("domains")
    draw = random.Random(0)
    for name, alphabet, count in (("letters", "abcdefgh", 120), ("figures", "12345678", 60)):
        # A figure is a token; so would be a space beside one.
        texts = [
            ("" if name == "figures" else " ").join("".join(draw.choices(alphabet, k=4)) for _ in range(60))
            for _ in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def prepared(two_domains, tmp_path_factory):
    return prepare(CorpusConfig(data=(str(two_domains),), vocab_size=300), tmp_path_factory.mktemp("corpus"))


STAGING = StagingConfig(tokens=4480, batch_size=2, seq_len=16, mixture="letters=.75,figures=.25", epoch_cap=4)


def test_no_batch_comes_twice_and_domains_have_their_shares(prepared, model_config):
    corpus = training_text(prepared, STAGING)
    facts = corpus_facts(corpus)
    assert facts.mixture == {"figures": 0.25, "letters": 0.75}
    assert facts.content_hash != corpus_facts(prepared).content_hash
    plan = make_plan(STAGING, facts, model_config, [("baseline", model_config, 0)])
    used = [*plan.trunk_batches(), *plan.branch_batches()]
    assert len(set(used)) == len(used)
    assert not {*used} & {*plan.calibration_batches()}
    batches = TokenBatches(corpus.train.tokens, batch_size=2, seq_len=16)
    trained = np.concatenate([batches[int(number)][0].numpy().ravel() for number in used])
    pieces = {token: corpus.tokenizer.decode_bytes([token]).strip() for token in set(trained.tolist())}
    figures = sum(pieces[token].isdigit() for token in trained.tolist())
    letters = sum(pieces[token].isalpha() for token in trained.tolist())
    assert abs(figures / (figures + letters) - 0.25) < 0.03


def test_the_longest_branch_finds_text_of_its_own(prepared, model_config):
    facts = corpus_facts(training_text(prepared, STAGING, longest=3))
    branches = [("baseline", model_config, 0), ("more", model_config, 0)]
    plan = make_plan(STAGING, facts, model_config, branches, lengths={"more": 3})
    used = [*plan.trunk_batches(), *plan.branch_batches()]
    assert len(set(used)) == len(used)


def test_without_a_mixture_nothing_changes(prepared):
    assert training_text(prepared, dataclasses.replace(STAGING, mixture=None, epoch_cap=None)) is prepared
    assert not isinstance(prepared.train, MixedTokens)


def test_a_command_that_does_not_mix_says_so(prepared, model_config):
    with pytest.raises(ValueError, match="trains on text as it was prepared"):
        make_plan(STAGING, corpus_facts(prepared), model_config, [])


def test_a_stopped_run_goes_on_to_the_same_bits(two_domains, tmp_path, monkeypatch):
    command = ["run", "--data", str(two_domains), *OPTIONS, *MIXTURE]
    main([*command, "--out", str(tmp_path / "straight")])
    from staged_training import loop

    update, done = loop.update, 0

    def stopped(*arguments):
        nonlocal done
        done += 1
        if done == 11:
            raise KeyboardInterrupt
        update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", stopped)
        with pytest.raises(KeyboardInterrupt):
            main([*command, "--out", str(tmp_path / "stopped")])
    main([*command, "--out", str(tmp_path / "stopped")])
    assert results(tmp_path / "stopped") == results(tmp_path / "straight")


def test_another_mixture_is_another_run(prepared, model_config):
    def hash_of(mixture):
        staging = dataclasses.replace(STAGING, mixture=mixture, epoch_cap=None)
        return make_plan(staging, corpus_facts(training_text(prepared, staging)), model_config, []).trunk_hash

    assert hash_of("uniform") == hash_of("letters=1,figures=1") != hash_of("letters=1,figures=2")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--epoch-cap", "2"), "only with one"),
        (("--mixture", "uniform", "--epoch-cap", "0"), "must be above 0"),
        (("--mixture", "words=1"), "no domain 'words'"),
        (("--mixture", "figures=1", "--epoch-cap", "0.5"), "passes over all domains"),
    ],
)
def test_what_cannot_be_mixed_is_refused(two_domains, tmp_path, capsys, options, said):
    with pytest.raises(SystemExit) as stop:
        main(["run", "--data", str(two_domains), "--out", str(tmp_path), *OPTIONS, *options])
    assert said in f"{stop.value} {capsys.readouterr().err}"
