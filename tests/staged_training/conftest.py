"""A model and a corpus small enough that a whole staged run takes about a second."""

import dataclasses
import random

import pytest

from attention.config import AttentionConfig
from corpus.prepare import CorpusConfig, prepare
from lm.config import ModelConfig
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig
from staged_training.execute import ExecutionConfig
from staged_training.optimizer import OptimizerConfig
from staged_training.staging import StagingConfig, corpus_facts, make_plan

VOCABULARY = 300


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """A folder of short texts with enough structure to learn something from."""
    folder = tmp_path_factory.mktemp("documents")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(60)]
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"document {number}: " + " ".join(draw.choices(words, k=120)))
    return folder


@pytest.fixture(scope="session")
def corpus(documents, tmp_path_factory):
    return prepare(CorpusConfig(data=(str(documents),), vocab_size=VOCABULARY), tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def model_config():
    return ModelConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        n_layers=4,
        attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=8, window=4),
        moe=MoEConfig(n_experts=4, d_expert=8, router=RouterConfig(policy=TopK(k=2), selection_bias_step=1e-3)),
    )


@pytest.fixture(scope="session")
def with_policy(model_config):
    """The tiny model under another routing policy."""

    def change(policy, **changes):
        router = dataclasses.replace(model_config.moe.router, policy=policy)
        return dataclasses.replace(model_config, moe=dataclasses.replace(model_config.moe, router=router), **changes)

    return change


@pytest.fixture(scope="session")
def staging():
    return StagingConfig(
        tokens=30 * 2 * 16,
        trunk_share=0.8,
        freeze=0.5,
        batch_size=2,
        seq_len=16,
        learning_rate=3e-3,
        optimizer=OptimizerConfig(kind="adamw", embedding_rate=1.0),
    )


@pytest.fixture(scope="session")
def plan_of(corpus, model_config, staging):
    """A plan over the tiny corpus: `plan_of([(method, model, seed), ...], freeze=...)`."""

    def make(branches, *, trunk_seed=0, model=model_config, rounding=(), **changes):
        return make_plan(
            dataclasses.replace(staging, **changes),
            corpus_facts(corpus),
            model,
            branches,
            trunk_seed=trunk_seed,
            rounding=rounding,
        )

    return make


@pytest.fixture(scope="session")
def execution_config():
    return ExecutionConfig(save_every=5, log_every=10)
