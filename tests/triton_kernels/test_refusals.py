"""What every operation refuses alike: it names the argument, its value and what is legal, on either backend."""

import functools
import math
from typing import Any

import pytest
import torch

from triton_kernels.common import checks
from triton_kernels.experts.expert_slots import sort_slots
from triton_kernels.linear.gated_delta_rule import gated_delta_rule
from triton_kernels.linear.kimi_delta_attention import kimi_delta_attention
from triton_kernels.softmax.flash_attention import flash_attention
from triton_kernels.softmax.flash_decode import flash_decode
from triton_kernels.tools.operations import operations

FEW = {"T": 20, "S": 24, "D": 16, "F": 16, "H": 2, "E": 4, "K": 16, "V": 16, "C": 8, "W": 4, "P": 8, "J": 2, "G": 1}


def inputs_of(name: str) -> dict[str, Any]:
    shape = {axis: min(size, FEW.get(axis, size)) for axis, size in operations()[name].check_shapes[0].items()}
    return operations()[name].inputs(torch.float32, "cpu", **shape)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", operations())
def test_every_tensor_has_its_device_and_its_kind_of_dtype(name: str, backend: str) -> None:
    inputs = inputs_of(name)
    call = functools.partial(operations()[name].call, backend=backend)
    for key, x in inputs.items():
        if isinstance(x, torch.Tensor):
            wrong = x.detach().to(torch.complex64)
            with pytest.raises(ValueError, match="complex64"):
                call(**{**inputs, key: wrong})
            if x.is_floating_point():
                with pytest.raises(ValueError, match=r"float16|int64"):
                    call(**{**inputs, key: x.detach().to(torch.int64)})
            with pytest.raises(ValueError, match=r"meta"):
                call(**{**inputs, key: x.detach().to("meta")})


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", operations())
def test_forward_mode_differentiation_is_refused_by_name(name: str, backend: str) -> None:
    """An operator without a forward derivative is passed by without a word: the tangent would be 0."""
    inputs = inputs_of(name)
    key, x = next((key, x) for key, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point())

    def call(changed: torch.Tensor) -> Any:
        result = operations()[name].call(**{**inputs, key: changed}, backend=backend)
        return result[0] if isinstance(result, tuple) else result

    with pytest.raises(ValueError, match=f"{key[:2]}.* carries a tangent"):
        torch.func.jvp(call, (x.detach(),), (torch.ones_like(x),))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_values_that_are_no_number_are_refused(backend: str) -> None:
    q, cache = torch.randn(1, 6, 2, 16), torch.randn(2, 8, 2, 16)
    step = functools.partial(flash_decode, q[0, :2], cache, cache, backend=backend)
    beta, lengths = torch.rand(1, 6, 2), torch.tensor([3, 8])
    table = torch.tensor([[0, 1], [1, 7]])
    cases: list[tuple[Any, str]] = [
        (lambda: flash_attention(q, q, q, scale=math.nan, backend=backend), "scale=nan"),
        (lambda: flash_attention(q, q, q, window=2.5, backend=backend), "window=2.5"),  # pyright: ignore[reportArgumentType]
        (lambda: step(lengths, window=2.5), "window=2.5"),  # pyright: ignore[reportArgumentType]
        (lambda: step(torch.tensor([3, 9]), window=4), "lengths_B holds 9, legal are 0 to 8"),
        (lambda: step(torch.tensor([-1, 8])), "lengths_B holds -1"),
        (lambda: step(torch.tensor([3, 17]), block_table_BN=table), "lengths_B holds 17, legal are 0 to 16"),
        (lambda: step(torch.tensor([3, 9]), block_table_BN=table), "block_table_BN holds 7, legal are 0 to 1"),
        (lambda: gated_delta_rule(q, q, q, None, beta, scale=math.nan, backend=backend), "scale=nan"),
        (lambda: gated_delta_rule(q, q, q, None, 3 + beta, backend=backend), "beta_BTH holds 3.*legal are 0 to 2"),
        (lambda: gated_delta_rule(q, q, q, 1 + beta, beta, backend=backend), "log_decay holds 1.*legal are -inf to 0"),
        (lambda: kimi_delta_attention(q, q, q, None, beta, backend=backend), "log_decay_BTHK=None"),  # pyright: ignore[reportArgumentType]
        (
            lambda: sort_slots(table, beta[0, :2], None, n_experts=4, backend=backend),
            "expert_TK holds 7, legal are 0 to 3",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    # Past a sequence's end a table may hold anything, and a full ring any length.
    step(torch.tensor([3, 8]), block_table_BN=table)
    step(torch.tensor([3, 900]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("token_N", 0, 20),
        ("token_N", 1, -1),
        ("row_of_slot_N", 0, 99),
        ("expert_offsets", 1, 99),
        ("token_offsets", 1, 99),
    ],
)
def test_routing_tables_that_read_elsewhere_are_refused(name: str, place: int, value: int, backend: str) -> None:
    inputs = inputs_of("grouped_mlp")
    inputs[name] = inputs[name].clone()
    inputs[name][place] = value
    with pytest.raises(ValueError, match=f"grouped_mlp: {name}"):
        operations()["grouped_mlp"].call(**inputs, backend=backend)


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that the host must not look at, as on a GPU."""
    monkeypatch.setattr(checks, "values_are_free", lambda _: False)
    monkeypatch.setattr(checks, "values_are_checked", lambda _: True)


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize(
    ("name", "key", "place", "value"),
    [
        ("grouped_mlp", "token_N", 0, 20),
        ("grouped_mlp", "row_of_slot_N", 0, 99),
        ("grouped_mlp", "expert_offsets", 1, 99),
        ("grouped_mlp", "token_offsets", 1, 99),
        ("flash_decode/paged", "block_table_BN", 0, 10**6),
        ("flash_decode/paged", "lengths_B", 0, -1),
        ("flash_attention/packed", "cu_seqlens", 0, 1),
    ],
)
def test_a_device_refuses_indices_that_read_elsewhere(name: str, key: str, place: int, value: int) -> None:
    inputs = inputs_of(name)
    operations()[name].call(**inputs, backend="torch")
    inputs[key] = inputs[key].clone()
    inputs[key][place] = value
    with pytest.raises(RuntimeError, match=rf"{name.split('/')[0]}: {key}"):
        operations()[name].call(**inputs, backend="torch")


@pytest.mark.usefixtures("on_a_device")
def test_checks_of_a_device_are_traced_and_stay() -> None:
    def checked(offsets: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        checks.check_offsets("op", "offsets", offsets, 9)
        checks.check_range("op", "x", x, 0, 3, x > -5)
        return x + 1

    traced = torch.compile(checked, backend="aot_eager", fullgraph=True)
    offsets, x = torch.tensor([0, 2, 9]), torch.tensor([0, 3, -7])
    assert torch.equal(traced(offsets, x), x + 1)
    with pytest.raises(RuntimeError, match="op: x holds"):
        traced(offsets, x + 1)
    with pytest.raises(RuntimeError, match="op: offsets must"):
        traced(offsets.flip(0), x)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_of_gradients_are_refused_by_name(backend: str) -> None:
    """Through an operator whose gradient is no differentiable function; anything but a refusal would be a wrong
    number."""
    inputs = inputs_of("decayed_linear_attention/token")
    outputs = operations()["decayed_linear_attention/token"].call(**inputs, backend=backend)
    (gradient,) = torch.autograd.grad(outputs[0].square().sum(), inputs["q_BTHK"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_attention_backward has no derivative"):
        gradient.sum().backward()
