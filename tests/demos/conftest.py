"""Two small models as folders: one with the same number of experts for every token, one whose numbers vary."""

import pytest
import torch

from attention.config import AttentionConfig
from corpus.tokenizer import Tokenizer
from lm.config import ModelConfig
from lm.model import LanguageModel
from lm.pretrained import save_pretrained
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.router import RouterConfig

TEXT = "def main(argv):\n    for name in argv:\n        print(name)\n\n" * 60


def saved(folder, policy, **config):
    tokenizer = Tokenizer.train([TEXT], 300)
    model = LanguageModel(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            d_model=32,
            attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16, window=16),
            moe=MoEConfig(n_experts=16, d_expert=16, router=RouterConfig(policy=policy)),
            **config,
        )
    ).init_weights(0)
    torch.nn.init.normal_(model.head_VD, std=0.3, generator=torch.Generator().manual_seed(1))
    # Never the most likely token: at temperature 0 a text does not end by itself.
    torch.nn.init.zeros_(model.head_VD[tokenizer.boundary_id])
    save_pretrained(folder, model, torch.tensor(tokenizer.encode(TEXT)[:512]).view(4, 128), tokenizer)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("fixed") / "model", TopK(k=4), n_layers=2, layer_plan="SF")


@pytest.fixture(scope="session")
def varied_folder(tmp_path_factory):
    policy = TopP(target_mean=4.0, cap=12)
    return saved(tmp_path_factory.mktemp("varied") / "model", policy, n_layers=3, layer_plan="SSF")
