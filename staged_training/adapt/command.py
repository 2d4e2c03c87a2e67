"""`python -m staged_training adapt`: a trained model of a fixed number of experts learns to use fewer of them, more for
some tokens than for others, by a short further stage.

The idea of the stage is that of ZEDA (Lv et al., May 2026, "Post-Trained MoE Can Skip Half Experts via
Self-Distillation"): experts that output zero join the trained ones, and the model is distilled from its own frozen
original, first its routers alone, then its experts too. What differs: the number of experts is held by the threshold of
`routing.budget` and not by a loss over the two groups of columns, which would be constant where the number is held.

The budget falls from the original's k to the mean asked for over the first steps, so that no step meets a model that
computes something else than the one before. Weights that a phase does not train have no gradient, and so neither
weight decay nor moments: a packed tensor of experts is trained whole or not at all.

Legend: B batch, T tokens, D model width.
"""

import json

import torch

from corpus.prepare import prepare
from foundation.command import leave_options
from foundation.environment import environment
from foundation.serialize import to_dict
from lm.pretrained import find_model, load_pretrained, load_tokenizer
from staged_training.adapt.adaptation import Adaptation
from staged_training.adapt.model import adapted_config
from staged_training.adapt.options import AdaptConfig
from staged_training.adapt.table import adapted_text, write_adapted
from staged_training.record import RunRecord


def adapt(config: AdaptConfig) -> RunRecord | None:
    """Teaches, or continues, or finds it done; None of a dry run.

    Raises:
        ValueError: for a folder without a model, one whose number of experts varies already, or text that is too short.
        loop.NonFiniteLossError, foundation.stopping.Interrupted: everything saved; the same call continues.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = find_model(config.run)
    original = load_pretrained(folder, device).requires_grad_(False)
    # Refused before the text is read.
    adapted_config(original.config, config.teach.method, config.teach.mean)
    corpus = prepare(config.corpus(), config.out / "corpus", load_tokenizer(folder, original))
    adaptation = Adaptation(config, original, corpus)
    print(adaptation.describe(), flush=True)
    if config.dry_run:
        here = environment(data_hash=adaptation.plan.corpus.content_hash)
        print(json.dumps({"config": to_dict(config), "environment": here}, indent=2))
        return None
    leave_options(adaptation.stage_run.folder)
    record = adaptation.run()
    table, rows = write_adapted(config.out)
    print(f"\n{adapted_text(rows)}\n\ntable: {table}")
    return record
