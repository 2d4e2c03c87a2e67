"""A prompt in one call of C leaves what the layers leave: logits, keys and values, and how tokens were routed."""

import pytest
import torch

from routing.policies.top_p import TopP
from routing.router import NonFiniteScoresError, RouterConfig
from tests.lm.test_fast_decode import ONE_CALL, POLICIES, assert_same_routings, build, layer_by_layer
from triton_kernels.native import library

pytestmark = pytest.mark.skipif(library.native().library is None, reason=library.native().reason)

# Few tokens, and more than are computed by the forms for few.
PIECES = (2, 21, 3)


def prompted(model, batch_size, pieces=PIECES):
    """What a prompt in pieces leaves: logits behind each, the cache's tensors, and the routings."""
    cache, logits, routings = model.new_cache(batch_size, sum(pieces) + 1), [], []
    tokens_BT = torch.randint(50, (batch_size, sum(pieces)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for piece_BT in tokens_BT.split(pieces, dim=1):
            output = model(piece_BT, cache, last_only=True)
            logits.append(output.logits_BTV)
            routings += output.routings
        # What was written must also be found by the next token.
        logits.append(model(tokens_BT[:, :1], cache).logits_BTV)
    tensors = [tensor.float() for state in cache.layers for tensor in state.tensors.values()]
    return torch.cat(logits, dim=1).float(), tensors, routings, [state.length for state in cache.layers]


def compare(model, batch_size, monkeypatch, steps, n_calls=4, pieces=PIECES):
    ours, our_tensors, our_routings, our_lengths = prompted(model, batch_size, pieces)
    assert len(steps) == n_calls
    layer_by_layer(monkeypatch)
    theirs, tensors, routings, lengths = prompted(model, batch_size, pieces)
    assert len(steps) == n_calls
    assert our_lengths == lengths
    same = torch.cat(
        [
            (our.assignments.experts_per_token_T() == their.assignments.experts_per_token_T())
            for our, their in zip(our_routings, routings, strict=True)
        ]
    )
    bf16 = model.config.dtype == "bfloat16"
    # In bf16 a token may meet another expert where two scores are equal but for rounding: most must agree.
    assert same.float().mean() >= (0.8 if bf16 else 1.0)
    for our, their in zip([ours, *our_tensors], [theirs, *tensors], strict=True):
        # Rows that nobody has written are whatever was there.
        difference, size = (our - their).abs()[their.isfinite()], their[their.isfinite()].abs()
        assert difference.median() <= (0.05 if bf16 else 1e-5) * size.mean()
        assert difference.quantile(0.99) <= (1.0 if bf16 else 1e-4) * size.max()
    if not bf16:
        assert_same_routings(our_routings, routings, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plan", ONE_CALL)
def test_plans(plan, dtype, batch_size, monkeypatch, steps):
    compare(build(plan, dtype), batch_size, monkeypatch, steps)


@pytest.mark.parametrize("norm", ["pre", "post", "sandwich"])
def test_options(norm, monkeypatch, steps):
    model = build(
        "FRSrGKL", "float32", norm=norm, output_gate=True, sink_logits=True, rotary_fraction=0.5, qk_norm=False
    )
    compare(model, 3, monkeypatch, steps)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(policy, monkeypatch, steps):
    compare(build("F", "float32", RouterConfig(policy=policy())), 2, monkeypatch, steps)


@pytest.mark.parametrize("window", [1, 3, 20, 23, 26, 40])
def test_a_window_that_goes_round(window, monkeypatch, steps):
    """Within a piece, between two, just when the prompt ends, and never."""
    compare(build("SrF", "float32", window=window), 2, monkeypatch, steps)


def test_more_tokens_than_a_piece_of_any_part_takes(monkeypatch, steps):
    """Of the shared expert 240, of attention 512 keys, and a rest of each."""
    compare(build("FSG", "float32"), 2, monkeypatch, steps, n_calls=3, pieces=(520, 3))


def test_what_the_call_does_not_know_reads_a_prompt_by_itself(monkeypatch, steps):
    compare(build("FM", "float32"), 2, monkeypatch, steps, n_calls=0)


def test_all_logits_are_the_layers(steps):
    model = build("F", "float32")
    with torch.no_grad():
        assert model(torch.ones(1, 5, dtype=torch.int64), model.new_cache(1, 5)).logits_BTV.shape == (1, 5, 50)
    assert not steps


def test_what_is_refused_is_refused_alike(monkeypatch, steps):
    said = []
    for one_call in (True, False):
        if not one_call:
            layer_by_layer(monkeypatch)
        for tokens, nan in (([[1, 2, 50]], False), ([[1] * 9], False), ([[1, 2, 3]], True)):
            model = build("FF", "float32", RouterConfig(policy=TopP()))
            cache = model.new_cache(1, 8)
            with torch.no_grad():
                if nan:
                    model.routers()[1].policy.budget.threshold.fill_(torch.nan)
                with pytest.raises(ValueError) as error:
                    model(torch.tensor(tokens), cache, last_only=True)
            said.append((str(error.value), type(error.value), [state.length for state in cache.layers]))
            assert nan == isinstance(error.value, NonFiniteScoresError)
    assert said[:3] == said[3:]
    # The first two are seen before the call.
    assert len(steps) == 1


def test_the_number_of_threads_changes_no_bit(steps):
    model, before, results = build("FRSGKL", "bfloat16", head_dim=64), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(prompted(model, 2, (200, 300)))
    finally:
        torch.set_num_threads(before)
    assert len(steps) == 6
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("one_call", [True, False])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_the_last_block_routes_the_last_position_alone_where_it_can(policy, one_call, monkeypatch):
    if not one_call:
        layer_by_layer(monkeypatch)
    model = build("FS", "float32", RouterConfig(policy=policy()))
    tokens_BT = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    last = model.blocks[-1].moe.router
    n_last = 18 if policy.follows_sequences else 2
    with torch.no_grad():
        whole = model(tokens_BT)
        output = model(tokens_BT, model.new_cache(2, 9), last_only=True)
        # Who listens to a router hears of every token.
        last.register_forward_hook(lambda *_: None)
        heard = model(tokens_BT, model.new_cache(2, 9), last_only=True)
    assert [routing.assignments.n_tokens for routing in output.routings] == [18, 18, 18, n_last]
    assert [routing.assignments.n_tokens for routing in heard.routings] == [18] * 4
    for each in (output, heard):
        torch.testing.assert_close(each.logits_BTV, whole.logits_BTV[:, -1:], rtol=1e-4, atol=1e-4)
        experts_BL = [routing.assignments.experts_per_token_T()[-1] for routing in each.routings]
        assert experts_BL == [routing.assignments.experts_per_token_T()[-1] for routing in whole.routings]


def test_numbers_of_experts_told_by_token_are_all_used():
    model = build("FS", "float32", RouterConfig(policy=TopP()))
    tokens_BT = torch.randint(50, (1, 9), generator=torch.Generator().manual_seed(0))
    for router in model.routers():
        router.policy.counts_T = torch.arange(1, 10)
    with torch.no_grad():
        output = model(tokens_BT, model.new_cache(1, 9), last_only=True)
    for routing in output.routings:
        assert routing.assignments.experts_per_token_T().tolist() == list(range(1, 10))
