"""What holds of every registered operation alike, forward and backward, in the interpreter: the same bits in every run,
wherever its inputs lie."""

import functools

import pytest
import torch

from triton_kernels.tools.agreement import results
from triton_kernels.tools.operations import operations

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


def laid_out_otherwise(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with three more channels beside every row and a gap between the rows of the first axis, like
    slices of fused projections."""
    if x.dim() < 2 or not x.is_floating_point():
        return x
    room = torch.full((2 * x.shape[0], *x.shape[1:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    view = room[::2, ..., : x.shape[-1]]
    view.copy_(x.detach())
    return view.detach().requires_grad_(x.requires_grad)


@pytest.mark.parametrize("name", operations())
def test_two_runs_give_the_same_bits_wherever_the_inputs_lie(name: str) -> None:
    inputs = small_inputs(name)
    # A decode step updates its state and tail where they lie, which must be in one piece.
    in_place = ("state", "tail_BXW")
    moved = {
        key: x if key.startswith(in_place) or not isinstance(x, torch.Tensor) else laid_out_otherwise(x)
        for key, x in inputs.items()
    }
    first, second = run(name, inputs), run(name, moved)
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
