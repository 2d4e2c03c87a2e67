"""What holds of every registered operation alike, forward and backward, in the interpreter: the same bits in every run,
wherever its inputs lie."""

import functools

import pytest
import torch

from triton_kernels.tools.agreement import results
from triton_kernels.tools.operations import operations, random_inputs

# Long enough for several blocks, chunks and steps, short enough for the interpreter.
SHORT = {"T": 70, "S": 80, "D": 48, "H": 4, "E": 8, "K": 64, "V": 64, "C": 16, "W": 40, "P": 32, "sequences": 3}


def small_inputs(name: str) -> dict:
    """An operation's inputs at its first checked shape, made small."""
    shape = dict(operations()[name].check_shapes[0])
    shape |= {axis: min(size, SHORT[axis]) for axis, size in shape.items() if axis in SHORT}
    shape |= {"G": shape["H"] // 2} if "G" in shape and "H" in shape else {}
    return operations()[name].inputs(torch.float16, "cpu", **shape)


def run(name: str, inputs: dict) -> dict[str, torch.Tensor]:
    return results(functools.partial(operations()[name].call, backend="triton"), inputs)


# Small enough for a dozen runs of the interpreter.
TINY = {"T": 20, "S": 24, "D": 16, "F": 16, "H": 2, "E": 4, "K": 16, "V": 16, "C": 8, "W": 6, "P": 8, "J": 2, "B": 2}
TINY |= {"sequences": 3, "N": 2}
OPTIONAL = {
    "decayed_linear_attention": "initial_state_BHKV",
    "gated_delta_rule": "initial_state_BHKV",
    "kimi_delta_attention": "initial_state_BHKV",
    "mixed_attention": "initial_state_NJKV sinks_H",
    "flash_attention": "sinks_H",
    "flash_decode": "sinks_H",
    "mixed_attention/decode": "sinks_H",
}
CAN_BE_PACKED = {*OPTIONAL, "causal_conv1d"} - {"flash_decode", "mixed_attention/decode"}
# What a decode step updates where it lies, which must be in one piece.
IN_PLACE = ("state_", "tail_BXW")


def tiny_shape(name: str) -> dict[str, int]:
    """Of the first checked shape, with several tokens and one group of heads."""
    shape = {axis: min(size, TINY.get(axis, size)) for axis, size in operations()[name].check_shapes[0].items()}
    return shape | {axis: size for axis, size in {"T": TINY["T"], "G": 1}.items() if axis in shape}


def every_argument(name: str, **changed: int) -> dict:
    """An operation's inputs with those that it may leave out: states, sinks, offsets of packed sequences."""
    shape = tiny_shape(name) | changed
    inputs = operations()[name].inputs(torch.float32, "cpu", **shape)
    n_states = len(inputs["cu_seqlens"]) - 1 if "cu_seqlens" in inputs else shape.get("B", 1)
    sizes = shape | {"N": n_states, "V": shape.get("V", shape.get("K", 1))}
    names = OPTIONAL.get(name, OPTIONAL.get(name.split("/")[0], "")).split()
    drawn = random_inputs(5, torch.float32, "cpu", sizes, *names)
    decodes = not any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs.values())
    inputs |= {key: x.detach() if decodes else x for key, x in drawn.items() if key not in inputs}
    if name.split("/")[0] in CAN_BE_PACKED and not decodes and shape["B"] == 1 and "cu_seqlens" not in inputs:
        T = shape["T"]
        inputs["cu_seqlens"] = torch.tensor([0, T // 3, T])
        for key in ("initial_state_BHKV", "initial_state_NJKV", "initial_tail"):
            if key in inputs:
                x = inputs[key].detach()
                inputs[key] = torch.cat([x, x.flip(1)]).requires_grad_()
    return inputs


def sliced(x: torch.Tensor) -> torch.Tensor:
    """Every second entry of every axis, from an offset on, of memory full of other numbers."""
    room = torch.full([2 * size + 3 for size in x.shape], 99, dtype=torch.float32).to(x.dtype)
    view = room[tuple(slice(3, 3 + 2 * size, 2) for size in x.shape)]
    return view.copy_(x)


def sliced_and_transposed(x: torch.Tensor) -> torch.Tensor:
    """The same, with the axes in memory in reversed order."""
    axes = tuple(reversed(range(x.dim())))
    return sliced(x.permute(axes)).permute(axes)


def odd_ones(x: torch.Tensor) -> torch.Tensor:
    """Axes of size 1 whose stride leads nowhere, as transposing or expanding leaves them."""
    x = x.contiguous()
    strides = [1000 + 7 * axis if size == 1 else step for axis, (size, step) in enumerate(zip(x.shape, x.stride()))]
    room = torch.cat([x.reshape(-1), x.new_full((5000,), 99)])
    return room.as_strided(x.shape, strides)


def expanded(x: torch.Tensor) -> torch.Tensor:
    """One entry of the first axis for all: the numbers change, so it is compared with a copy of itself."""
    return x[:1].expand(x.shape) if x.is_floating_point() and x.dim() else x


def moved(inputs: dict, layout) -> dict:
    def move(key: str, x):
        if isinstance(x, tuple):
            return tuple(move(key, part) for part in x)
        if not isinstance(x, torch.Tensor) or key.startswith(IN_PLACE):
            return x
        return layout(x.detach()).detach().requires_grad_(x.requires_grad)

    return {key: move(key, x) for key, x in inputs.items()}


# What a form with an axis of size 1 has to say that the first has not: with one sequence, arguments are packed.
LAYOUTS = {"": (sliced_and_transposed,), "T": (odd_ones,), "B": (sliced, odd_ones)}
FORMS = [(name, ones) for name in operations() for ones in LAYOUTS if not ones or tiny_shape(name).get(ones, 1) > 1]


def layouts(name: str, ones: str) -> tuple:
    """Of a form, with the one for axes of size 1 where no form of one sequence has it."""
    return LAYOUTS[ones] if ones or (name, "B") in FORMS else (*LAYOUTS[ones], odd_ones)


@pytest.mark.parametrize(("name", "ones"), FORMS)
def test_every_argument_may_lie_anywhere(name: str, ones: str) -> None:
    """Offsets, states, sinks and routing tables included; with axes of size 1, whose stride `.contiguous()` leaves as
    it is."""
    inputs = every_argument(name, **dict.fromkeys(ones, 1))
    first = run(name, inputs)
    assert not any(x.isnan().any() for x in first.values())
    for layout in layouts(name, ones):
        second = run(name, moved(inputs, layout))
        for result, x in first.items():
            assert torch.equal(x, second[result]), (layout.__name__, result)
    if not ones:
        first, second = run(name, moved(inputs, lambda x: expanded(x).clone())), run(name, moved(inputs, expanded))
        for result, x in first.items():
            assert torch.equal(x, second[result]), ("expanded", result)


@pytest.mark.long
@pytest.mark.parametrize("name", operations())
def test_two_runs_give_the_same_bits_at_several_blocks(name: str) -> None:
    inputs = small_inputs(name)
    first, second = run(name, inputs), run(name, moved(inputs, sliced))
    assert first.keys() == second.keys()
    for result, x in first.items():
        assert not x.isnan().any(), result
        assert torch.equal(x, second[result]), result


@pytest.mark.parametrize("name", operations())
def test_every_listed_shape_is_one_that_the_op_takes(name: str) -> None:
    """Also those that are only timed: of each, a piece of the tokens."""
    operation = operations()[name]
    few = {"B": 2, "T": 64, "S": 64, "D": 256, "E": 32}
    for shape in (operation.inspect_shape, *operation.check_shapes, *operation.bench_shapes, *operation.cpu_shapes):
        sizes = {axis: min(size, few.get(axis, size)) for axis, size in shape.items()}
        operation.call(**operation.inputs(torch.float32, "cpu", **sizes), backend="torch")


def test_an_integer_that_overflows_in_a_kernel_is_named() -> None:
    """As Triton's own interpreter does it, at a tenth of the time (tests/conftest.py)."""
    from triton.runtime import interpreter

    semantic = interpreter.interpreter_semantic
    large = semantic.scalar_constant(2**31 - 1, interpreter.tl.int32)
    one = semantic.scalar_constant(1, interpreter.tl.int32)
    assert semantic.sub(large, one, True).handle.data == 2**31 - 2
    with pytest.raises(AssertionError, match="add: int32 overflow"):
        semantic.add(large, one, True)
    with pytest.raises(AssertionError, match="sub: int32 overflow"):
        semantic.sub(semantic.minus(large), semantic.scalar_constant(2, interpreter.tl.int32), True)
    with pytest.raises(AssertionError, match="mul: int32 overflow"):
        semantic.mul(large, large, True)
