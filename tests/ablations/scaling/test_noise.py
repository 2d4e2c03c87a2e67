"""The gradient-noise scale: planted in made-up gradients and found again, and that of a model against gradients of
single rows.

Legend: P parameters, R rows, T tokens.
"""

import csv
import dataclasses
import math

import pytest
import torch

from ablations.scaling.noise import NoiseRow, measure, noise_command, noise_text
from ablations.scaling.noise_options import NoiseOptions
from ablations.scaling.noise_scale import Gradients, gradient_of
from ablations.scaling.plan import read_noise
from corpus.tokenizer import Tokenizer
from foundation.tables import write_rows
from lm.model import LanguageModel
from lm.options import ModelOptions
from lm.pretrained import save_pretrained


def planted(scale, *, batches, rows=4, size=400, seed=0):
    """Gradients of small batches whose noise scale is known."""
    generator = torch.Generator().manual_seed(seed)
    signal_P = torch.randn(size, generator=generator)
    signal_P /= signal_P.norm()
    gradients = Gradients(8)
    for _ in range(batches):
        noise_P = torch.randn(size, generator=generator) * math.sqrt(scale / size / rows)
        gradients.add(signal_P + noise_P)
    return gradients.noise_scale(rows)


def test_a_planted_noise_scale_is_found():
    found = planted(100.0, batches=160)
    assert found.rows == pytest.approx(100.0, rel=0.1)
    assert (found.gradient_square, found.variance) == (pytest.approx(1.0, rel=0.1), pytest.approx(100.0, rel=0.05))
    assert found.low_95 < 100.0 < found.high_95 < 1.5 * found.low_95
    assert (found.rows_small, found.rows_large) == (4, 640)


def test_intervals_hold_the_planted_scale_as_often_as_they_say():
    found = [planted(200.0, batches=64, size=100, seed=seed) for seed in range(60)]
    assert 53 <= sum(each.low_95 <= 200.0 <= each.high_95 for each in found) <= 60
    # Square and variance are unbiased: their means lie at the truth.
    assert sum(each.gradient_square for each in found) / 60 == pytest.approx(1.0, abs=0.05)
    assert sum(each.variance for each in found) / 60 == pytest.approx(200.0, rel=0.02)


def test_noise_alone_has_no_scale():
    gradients, generator = Gradients(8), torch.Generator().manual_seed(2)
    for _ in range(32):
        gradients.add(torch.randn(50, generator=generator))
    found = gradients.noise_scale(4)
    # About half of the draws of |G|^2 are negative; this one is made so by what it is averaged with.
    if found.gradient_square <= 0:
        assert found.rows == math.inf
    assert (found.low_95, found.high_95) == (0.0, math.inf)
    few = Gradients(8)
    for _ in range(8):
        few.add(torch.ones(2))
    with pytest.raises(ValueError, match="8 small batches in 8 groups; each needs at least 2"):
        few.noise_scale(1)


MODEL = ModelOptions(
    n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, window=8, n_experts=4, d_expert=8, k=2, dtype="float32"
)


def test_a_models_scale_is_that_of_its_rows_gradients():
    model = LanguageModel(MODEL.config(40)).init_weights(0)
    with torch.no_grad():
        model.head_VD.normal_(generator=torch.Generator().manual_seed(1))
    options = NoiseOptions(run="none", rows=64, small=4, seq_len=8)
    rows_RT = torch.randint(0, 40, (64, 9), generator=torch.Generator().manual_seed(0))
    row = measure(model, rows_RT, options)
    single = []
    for each_T in rows_RT:
        model.zero_grad()
        model(each_T[None, :-1], targets_BT=each_T[None, 1:]).loss.backward()
        single.append(gradient_of(model.parameters()))
    every_RP = torch.stack(single).double()
    variance = float(every_RP.var(0).sum())
    square = float(every_RP.mean(0).square().sum()) - variance / 64
    assert row.variance == pytest.approx(variance, rel=0.3)
    assert row.gradient_square == pytest.approx(square, rel=0.3)
    assert row.noise_tokens == pytest.approx(8 * row.variance / row.gradient_square)


def test_the_command_measures_a_model_folder(tmp_path, text_folder, capsys):
    texts = [path.read_text() for path in sorted(text_folder.glob("*"))]
    tokenizer = Tokenizer.train(texts, 300)
    model = LanguageModel(MODEL.config(tokenizer.vocab_size)).init_weights(0)
    save_pretrained(tmp_path / "model", model, tokenizer=tokenizer)
    options = NoiseOptions(
        run=tmp_path, data=(str(text_folder),), rows=64, small=2, seq_len=16, csv=tmp_path / "noise.csv"
    )
    row = noise_command(options)
    assert "gradient-noise scale" in capsys.readouterr().out
    with (tmp_path / "noise.csv").open() as file:
        (stored,) = csv.DictReader(file)
    assert float(stored["noise_tokens"]) == row.noise_tokens
    assert read_noise(tmp_path / "noise.csv") == (row.noise_tokens, row.loss)
    with pytest.raises(ValueError, match=r"rows of 16 tokens, must be at least 100000 \(--rows\)"):
        noise_command(dataclasses.replace(options, rows=100_000))


def test_a_scale_that_was_not_measured_is_refused(tmp_path):
    row = NoiseRow(
        run="run",
        loss=3.0,
        params=10,
        seq_len=16,
        rows_small=2,
        rows_large=64,
        gradient_square=-0.1,
        variance=3.0,
        noise_tokens=math.inf,
        low_95=0.0,
        high_95=math.inf,
    )
    assert "is not told from noise" in noise_text(row)
    write_rows(tmp_path / "noise.csv", NoiseRow, [row])
    with pytest.raises(ValueError, match="column noise_tokens: 'inf' is no positive finite number"):
        read_noise(tmp_path / "noise.csv")
    write_rows(tmp_path / "noise.csv", NoiseRow, [row, row])
    with pytest.raises(ValueError, match="2 rows; --noise takes the table of one model"):
        read_noise(tmp_path / "noise.csv")
    with pytest.raises(ValueError, match="32 rows are 8 small batches of 4; an interval needs at least 16"):
        NoiseOptions(run="none", rows=32)
