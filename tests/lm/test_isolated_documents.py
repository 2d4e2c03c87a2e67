"""Packed documents that attention keeps apart: each is what it is alone, forward and backward, for every kind."""

import dataclasses
import json
import random

import pytest
import torch

from attention.config import AttentionConfig
from attention.isolation import find_documents
from attention.kinds import KINDS
from lm.config import ModelConfig
from lm.model import LanguageModel
from lm.options import ModelOptions
from moe.config import MoEConfig
from routing.policies.expert_choice import ExpertChoice
from routing.policies.skipping import Skipping
from routing.policies.top_k import TopK
from routing.router import RouterConfig
from staged_training.__main__ import main

BOUNDARY = 1
SHORTEST = {letter: (kind.reads or "") + letter for letter, kind in KINDS.items()}
EVERY = "FRSrLGKMADC"
# Of each row, the last of them cut by its end; the second row begins in the middle of a document.
LENGTHS = ((5, 1, 9, 2, 7), (3, 12, 4, 5))


def config_of(plan, policy=None, **changes):
    config = ModelConfig(
        vocab_size=50,
        d_model=16,
        n_layers=len(plan),
        layer_plan=plan,
        attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=8, window=4, chunk_size=4, output_gate=True),
        moe=MoEConfig(n_experts=4, d_expert=8, router=RouterConfig(policy=policy or TopK(k=2))),
        document_boundary=BOUNDARY,
    )
    return dataclasses.replace(config, **changes)


def model_of(config):
    model = LanguageModel(config).init_weights(0)
    torch.nn.init.normal_(model.head_VD, std=0.3, generator=torch.Generator().manual_seed(0))
    return model.train()


def packed():
    """tokens_BT, targets_BT and the documents as (row, start, stop)."""
    draw = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(2, 50, (len(LENGTHS), sum(LENGTHS[0])), generator=draw)
    targets_BT = torch.randint(0, 50, tokens_BT.shape, generator=draw)
    places = []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            if row == 0 or start:
                tokens_BT[row, start] = BOUNDARY
            places.append((row, start, start + length))
            start += length
    return tokens_BT, targets_BT, places


# Routing knows no documents, so one plan shows what it does.
CASES = [*((plan, TopK(k=2)) for plan in (*SHORTEST.values(), EVERY)), (EVERY, Skipping(k=2))]


@pytest.mark.parametrize(("plan", "policy"), CASES, ids=[f"{plan}-{type(policy).__name__}" for plan, policy in CASES])
def test_a_packed_document_is_what_it_is_alone(plan, policy):
    model = model_of(config_of(plan, policy))
    tokens_BT, targets_BT, places = packed()
    output = model(tokens_BT, targets_BT=targets_BT)
    (output.loss * tokens_BT.numel()).backward()
    together = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    for row, start, stop in places:
        alone = model(tokens_BT[row : row + 1, start:stop], targets_BT=targets_BT[row : row + 1, start:stop])
        torch.testing.assert_close(output.losses_BT[row, start:stop], alone.losses_BT[0], rtol=1e-4, atol=1e-5)
        (alone.loss * (stop - start)).backward()
    for name, parameter in model.named_parameters():
        if name in together:
            torch.testing.assert_close(together[name], parameter.grad, rtol=2e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("plan", SHORTEST.values())
def test_a_document_does_not_see_another(plan):
    model = model_of(config_of(plan)).eval()
    tokens_BT, _, places = packed()
    changed_BT = tokens_BT.clone()
    _, start, stop = places[2]
    changed_BT[0, start + 1 : stop] = 7
    with torch.no_grad():
        before, after = model(tokens_BT).logits_BTV, model(changed_BT).logits_BTV
        assert torch.equal(before[0, :start], after[0, :start])
        assert torch.equal(before[0, stop:], after[0, stop:])
        assert torch.equal(before[1], after[1])
        # Which it does where nothing keeps them apart; a short convolution reaches as far as its taps.
        packed_model = LanguageModel(dataclasses.replace(model.config, document_boundary=None))
        packed_model.load_state_dict(model.state_dict())
        before, after = packed_model(tokens_BT).logits_BTV, packed_model(changed_BT).logits_BTV
        assert not torch.equal(before[0, stop], after[0, stop])


def test_rows_of_one_document_each_are_left_as_they_are():
    tokens_BT, _, _ = packed()
    tokens_BT[tokens_BT == BOUNDARY] = 2
    assert find_documents(tokens_BT, BOUNDARY) is None
    tokens_BT[:, 0] = BOUNDARY
    assert find_documents(tokens_BT, BOUNDARY) is None


def test_every_token_lies_in_one_group_of_documents_of_like_length():
    tokens_BT, _, places = packed()
    documents = find_documents(tokens_BT, BOUNDARY)
    inside = torch.cat([group.source_NL[group.inside_NL] for group in documents])
    assert inside.sort().values.tolist() == list(range(tokens_BT.numel()))
    for group in documents:
        lengths = group.inside_NL.sum(dim=1)
        assert lengths.max() < 2 * lengths.min() or lengths.max() <= 2
    assert sum(len(group.source_NL) for group in documents) == len(places)


def test_what_cannot_keep_documents_apart_is_refused():
    with pytest.raises(ValueError, match="ExpertChoice in block 0 chooses a token's experts by the other tokens"):
        config_of("F", ExpertChoice(k=2))
    with pytest.raises(ValueError, match="legal: a token below 50"):
        config_of("F", document_boundary=50)
    with pytest.raises(ValueError, match="does not say where documents begin"):
        model_of(config_of("FF")).run(torch.zeros(1, 2, 16), 1)
    with pytest.raises(ValueError, match="packs no documents"):
        ModelOptions(isolate_documents=True).config(300)


def test_a_cache_reads_one_document():
    model = model_of(config_of("FL")).eval()
    tokens_BT = torch.tensor([[BOUNDARY, 5, 6, 7]])
    cache = model.new_cache(1, 4)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT, cache).logits_BTV, model(tokens_BT).logits_BTV)


def test_a_command_trains_on_isolated_documents(tmp_path, capsys):
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcd ", k=draw.randint(5, 60))) for _ in range(200)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [
        *("run", "--data", str(tmp_path / "text.jsonl"), "--vocab-size", "270", "--d-model", "16", "--n-layers", "2"),
        *("--layer-plan", "SL", "--n-heads", "2", "--n-kv-heads", "1", "--head-dim", "8", "--n-experts", "4"),
        *("--d-expert", "8", "--k", "2", "--tokens", "1024", "--batch-size", "4", "--seq-len", "64", "--no-branch"),
        *("--dtype", "float32", "--log-every", "1", "--valid-share", "0.06"),
    ]
    losses = []
    for name, options in (("packed", []), ("apart", ["--isolate-documents"])):
        main([*command, "--out", str(tmp_path / name), *options])
        (metrics,) = (tmp_path / name).glob("trunks/*/metrics.jsonl")
        losses.append([json.loads(line)["loss"] for line in metrics.read_text().splitlines()])
    # The head begins at zero, so the first loss knows nothing of what attention saw.
    assert losses[0][0] == losses[1][0]
    assert losses[0][1:] != losses[1][1:]
    (config,) = (tmp_path / "apart").glob("trunks/*/model/config.json")
    assert json.loads(config.read_text())["document_boundary"] is not None
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--out", str(tmp_path / "frozen"), "--isolate-documents", "--freeze", "0.5"])
    assert "legal: 0" in f"{stopped.value} {capsys.readouterr().err}"
