"""What holds for every kind of layer: causality, gradients, a training step, reproducible weights, refusals by name."""

import pytest
import torch

from attention import build_attention
from attention.kinds import KINDS
from attention.softmax import SoftmaxKind

# The shortest plan in which each letter can stand, itself last.
SHORTEST = {letter: (kind.reads or "") + letter for letter, kind in KINDS.items()}


@pytest.mark.parametrize("letter", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_future_tokens_change_no_bit_of_past_outputs(make_stack, tiny, letter, dtype):
    stack = make_stack(SHORTEST[letter], tiny)
    x_BTD = stack.input(2, 19, dtype=dtype)
    for length in (1, 4, 8, 13):
        changed_BTD = x_BTD.clone()
        changed_BTD[:, length:] = 7 * stack.input(2, 19 - length, seed=5, dtype=dtype)
        with torch.no_grad():
            before_BTD, after_BTD = stack(x_BTD), stack(changed_BTD)
        assert torch.equal(before_BTD[:, :length], after_BTD[:, :length])
        assert not torch.equal(before_BTD[:, length:], after_BTD[:, length:])


@pytest.mark.parametrize("letter", KINDS)
def test_the_past_within_reach_changes_the_output(make_stack, tiny, letter):
    stack = make_stack(SHORTEST[letter], tiny)
    x_BTD = stack.input(1, 12).requires_grad_()
    (gradient_BTD,) = torch.autograd.grad(stack(x_BTD)[:, -1].square().sum(), x_BTD)
    reached = gradient_BTD[0].abs().sum(-1) > 0
    # A second S would reach twice as far; r does not, because the keys and values it reuses come from the input of the
    # S below.
    kind = KINDS[letter]
    window = tiny.window if isinstance(kind, SoftmaxKind) and kind.sliding else 12
    reach = tiny.conv_width if letter == "C" else window
    assert reached.tolist() == [False] * (12 - reach) + [True] * reach


@pytest.mark.parametrize("letter", KINDS)
def test_every_parameter_receives_a_gradient_and_one_step_lowers_the_loss(make_stack, tiny, letter):
    stack = make_stack(SHORTEST[letter], tiny)
    x_BTD, target_BTD = stack.input(2, 21), stack.input(2, 21, seed=3)
    optimizer = torch.optim.SGD(stack.parameters(), lr=1e-2)

    def loss():
        return (stack(x_BTD) - target_BTD).square().mean()

    before = loss()
    before.backward()
    for name, parameter in stack.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    optimizer.step()
    assert loss() < before


@pytest.mark.parametrize("letter", KINDS)
def test_gradients_agree_with_finite_differences(make_stack, tiny, letter):
    stack = make_stack(SHORTEST[letter], tiny, d_model=6).double()
    x_BTD = stack.input(1, 7, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(stack, x_BTD, eps=1e-6, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("letter", KINDS)
def test_weights_depend_on_the_generator_alone_and_have_the_documented_scale(tiny, letter):
    def fresh(seed, global_seed):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        layer = build_attention(letter, tiny, d_model=256, layer_index=1, n_layers=8)
        assert torch.equal(torch.get_rng_state(), before), "construction draws nothing"
        layer.init_weights(torch.Generator().manual_seed(seed))
        return layer

    one, same, other = fresh(0, 1), fresh(0, 2), fresh(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    assert not torch.equal(one.to_inner.weight, other.to_inner.weight)
    assert one.to_inner.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert one.to_out.weight.std().item() == pytest.approx((one.to_out.in_features * 16) ** -0.5, rel=0.05)
    # Drawing again must leave nothing of the trained weights.
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    other.init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


@pytest.mark.parametrize("letter", KINDS)
def test_calls_that_do_not_fit_are_refused_by_the_layers_name(make_stack, tiny, letter):
    stack = make_stack(SHORTEST[letter], tiny)
    layer = stack.layers[-1]
    name = rf"attention layer {len(stack.layers) - 1} \({letter}, "
    for shape in ((2, 32), (2, 3, 31), (2, 0, 32)):
        with pytest.raises(ValueError, match=name + r".*legal: \[batch, tokens >= 1, 32\]"):
            layer(torch.zeros(shape))
    with pytest.raises(ValueError, match=name + ".*start=-1"):
        layer(stack.input(1, 3), start=-1)


@pytest.mark.parametrize("letter", [letter for letter, kind in KINDS.items() if kind.reads is None])
def test_caches_that_do_not_fit_are_refused_by_the_layers_name(make_stack, tiny, letter):
    stack = make_stack(letter, tiny)
    layer, x_BTD = stack.layers[0], stack.input(2, 6)
    cache = stack.cache(2, 8)
    with torch.no_grad():
        layer(x_BTD, state=cache.layers[0])
        for start in (0, 5, 7):
            with pytest.raises(
                ValueError,
                match=rf"layer 0 \({letter}, .*start={start}, but the cache has seen 6 tokens; legal: start=6",
            ):
                layer(x_BTD, start=start, state=cache.layers[0])
        with pytest.raises(ValueError, match=r"tokens 6 to 8 do not fit a cache made for 8"):
            layer(x_BTD[:, :3], start=6, state=cache.layers[0])
        with pytest.raises(ValueError, match=r"input has batch size 1, the cache 2"):
            layer(x_BTD[:1, :1], start=6, state=cache.layers[0])
        wrong = make_stack("F" if letter != "F" else "L", tiny).cache(2, 8).layers[0]
        with pytest.raises(ValueError, match=rf"layer 0 \({letter}, .*state is a (GrowingKV|RecurrentState); legal"):
            layer(x_BTD, state=wrong)
        # A refused call leaves the cache as it was.
        layer(x_BTD[:, :2], start=6, state=cache.layers[0])
    assert cache.length == 8


def test_an_unknown_letter_is_refused(tiny):
    with pytest.raises(ValueError, match="attention layer 3: unknown letter 'X'; legal: F, S, R, r, L, G, K"):
        build_attention("X", tiny, d_model=8, layer_index=3, n_layers=4)


@pytest.mark.parametrize("letter", KINDS)
def test_a_kind_is_listed_under_its_own_letter_and_reads_one_that_owns(letter):
    kind = KINDS[letter]
    assert kind.letter == letter
    assert len(letter) == 1
    assert kind.sentence
    assert kind.reads is None or KINDS[kind.reads].reads is None
