"""`lm layer-experts`: the numbers found are the best ones under their total, and the model written uses them."""

import itertools

import pytest
import torch

from corpus.tokenizer import Tokenizer
from lm.__main__ import main
from lm.config import ModelConfig
from lm.layer_experts import best_numbers, layer_losses
from lm.model import LanguageModel
from lm.pretrained import load_pretrained, save_pretrained
from moe.config import MoEConfig
from routing.policies.layer_top_k import LayerTopK
from routing.policies.top_p import TopP
from routing.router import RouterConfig


def test_the_best_numbers_are_those_of_trying_all():
    candidates = [1, 2, 4, 7]
    for seed in range(5):
        loss_LK = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)).tolist()
        for total in (3, 8, 12, 21):
            tried = [
                (sum(loss_LK[layer][candidates.index(k)] for layer, k in enumerate(numbers)), numbers)
                for numbers in itertools.product(candidates, repeat=3)
                if sum(numbers) <= total
            ]
            found = best_numbers(loss_LK, candidates, total)
            assert sum(found) <= total
            assert tuple(found) == min(tried)[1]
    with pytest.raises(ValueError, match="2 experts for 3 layers; legal: 1 each"):
        best_numbers(loss_LK, candidates, 2)


def test_a_layer_that_needs_its_experts_gets_them():
    """Planted: only the second layer's experts matter."""

    def bits(numbers):
        return 2.0 - 0.1 * min(numbers[1], 8)

    rows = layer_losses(bits, [4, 4, 4], [1, 4, 8, 12])
    loss_LK = [[row.more for row in rows if row.layer == layer] for layer in range(3)]
    assert best_numbers(loss_LK, [1, 4, 8, 12], 12) == [1, 8, 1]


def test_the_command_writes_a_model_that_uses_them(tmp_path, capsys):
    text = "def main(argv):\n    return argv[0] + 'of the text'\n"
    tokenizer = Tokenizer.train([text * 30], 280)
    moe = MoEConfig(n_experts=8, d_expert=8, router=RouterConfig(policy=TopP(target_mean=4.0, cap=8)))
    model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, d_model=16, n_layers=2, moe=moe)).init_weights(0)
    torch.nn.init.normal_(model.head_VD, std=0.3, generator=torch.Generator().manual_seed(1))
    source, out, table = tmp_path / "model", tmp_path / "found", tmp_path / "losses.csv"
    ids = torch.tensor(tokenizer.encode(text * 4))
    save_pretrained(source, model, ids[: len(ids) // 16 * 16].view(-1, 16), tokenizer)
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(text * 3)
    data = ["--data", str(tmp_path / "0.txt"), str(tmp_path / "1.txt")]
    options = ["--mean", "3", "--candidates", "1", "3", "5", "--csv", str(table)]
    main(["layer-experts", str(source), str(out), *data, *options])
    said = capsys.readouterr().out
    found = load_pretrained(out)
    numbers = [router.policy.asked_experts for router in found.routers()]
    assert f"{numbers[0]} {numbers[1]} experts in layers 0 1" in said
    assert sum(numbers) <= 6
    assert isinstance(found.config.block(1).moe.router.policy, LayerTopK)
    assert len(table.read_text().splitlines()) == 1 + 2 * 3
    main(["generate", "--run", str(out), "--max-new-tokens", "2"])
    assert f"mean experts {sum(numbers) / 2:.2f}" in capsys.readouterr().err
    main(["evaluate", "--run", str(out), *data, "--resamples", "2"])
    assert f"{sum(numbers) / 2:.2f} experts per token" in capsys.readouterr().out
    # Without text, on what is stored with the model.
    main(["layer-experts", str(source), str(out), "--mean", "2", "--candidates", "1", "3"])
    assert "experts in layers 0 1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        main(["layer-experts", str(source), str(out), "--mean", "3", "--candidates", "4"])
    assert "mean: 6 experts for 2 layers; legal: 4 each" in str(refused.value.code)
