"""Operations at random shapes, layouts and strengths of their gates: the torch form in fp64 against the definition,
token by token, and both backends in fp32 against the torch form in fp64, forward and gradients.

Legend: B batch, T tokens, S keys, G key/value (or query/key) heads, H heads, K key width, V value width, E experts.
"""

import functools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.soak.attempts import attempt
from tests.soak.world import Outcome, World
from tests.triton_kernels.softmax.test_flash_attention_torch import dense_attention
from tests.triton_kernels.softmax.test_flash_decode import dense_decode
from tests.triton_kernels.tools.test_every_operation import moved, odd_ones, sliced
from triton_kernels.linear.linear_attention_torch import linear_attention_recurrence
from triton_kernels.tools.agreement import Reference, is_float, largest_error, results
from triton_kernels.tools.operations import Operation, operations, shape_label

TOKENS = (1, 2, 3, 7, 16, 17, 31, 33, 64, 65, 70)
WIDTHS = (1, 2, 3, 8, 15, 16, 17, 24, 32, 33)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The axes in memory in reversed order."""
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


LAYOUTS = {"as drawn": lambda x: x, "sliced": sliced, "transposed": transposed, "odd ones": odd_ones}
# Of the largest entry: an fp32 result that is further off is wrong, whatever its conditioning.
COARSE = 1e-3
REFUSED, WRONG = "REFUSED", "WRONG"


def random_shape(operation: Operation, draw: random.Random) -> dict[str, int]:
    """A shape with the letters of one that the operation is checked at; what makes a variant of it stays."""
    shape = dict(draw.choice(operation.check_shapes))
    # In one order: that of a set is another in every process.
    for letter in (letter for letter in "BTDFJXV" if letter in shape):
        shape[letter] = draw.choice({"B": (1, 2, 3), "T": TOKENS, "J": (1, 2, 3)}.get(letter, WIDTHS))
    if "E" in shape:
        shape["E"] = draw.choice((1, 2, 5, 8))
        shape |= {letter: draw.randint(1, shape["E"]) for letter in "kK" if letter in shape}
    elif "K" in shape:
        shape["K"] = draw.choice(WIDTHS)
    if "G" in shape:
        shape["G"] = draw.choice((1, 2, 3))
    if "H" in shape:
        shape["H"] = draw.choice((1, 2, 3)) * shape.get("G", 1)
    if "S" in shape:
        shape["S"] = draw.choice((1, 3, 17, 40)) * shape.get("C", 1)
    if "W" in shape:
        shape["W"] = draw.choice((2, 3, 4)) if operation.name.startswith(("causal", "linear")) else draw.choice(TOKENS)
    if "P" in shape:
        shape["P"] = 2 * draw.randint(0, shape["K"] // 2)
    if "sequences" in shape:
        shape |= {"B": 1, "sequences": draw.choice((2, 3, 5))}
    return shape


def drawn_inputs(operation: Operation, shape: dict[str, int], draw: random.Random) -> dict[str, Any]:
    """The catalogue's inputs, some of them stronger or weaker, lying anywhere."""
    inputs = operation.inputs(torch.float32, "cpu", **shape)
    factors = {name: draw.choice((1, 1, 1, 0.01, 3)) for name in inputs}
    factors |= {name: draw.choice((1, 0, 1e-3, 30, 1000)) for name in inputs if name.startswith("log_decay")}
    factors |= dict.fromkeys(("rotary", "beta_BTH", "threshold", "k_scale", "v_scale"), 1)

    def scaled(name: str, x: Any) -> Any:
        return (x.detach() * factors[name]).requires_grad_(x.requires_grad) if is_float(x) else x

    return moved({name: scaled(name, x) for name, x in inputs.items()}, LAYOUTS[draw.choice(list(LAYOUTS))])


def definition(name: str, **inputs: Any) -> Tensor | None:
    """The first output by the definition of an operation in the inputs' dtype; None where this file has none."""
    op = name.split("/")[0]
    # The recurrence below is of whole rows, from nothing.
    if op != "flash_attention" and inputs.keys() & {"cu_seqlens", "initial_state_BHKV"}:
        return None
    if op == "decayed_linear_attention":
        q, k, v, g, scale = (inputs[key] for key in ("q_BTHK", "k_BTHK", "v_BTHV", "log_decay", "scale"))
        initial = v.new_zeros(q.shape[0], *q.shape[2:], v.shape[3])
        return linear_attention_recurrence(q, k, v, g.expand(q.shape[:3]), None, initial, scale=scale)[0]
    if op in ("gated_delta_rule", "kimi_delta_attention"):
        v, g, beta = inputs["v_BTHV"], inputs["log_decay"], inputs["beta_BTH"]
        q, k = (inputs[key].repeat_interleave(v.shape[2] // inputs[key].shape[2], 2) for key in ("q_BTGK", "k_BTGK"))
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        initial = v.new_zeros(q.shape[0], *q.shape[2:], v.shape[3])
        g = torch.zeros_like(beta) if g is None else g
        return linear_attention_recurrence(q, k, v, g, beta, initial, scale=q.shape[-1] ** -0.5)[0]
    if op == "flash_attention" and "rotary" not in inputs:
        window = operations()[name].inspect_shape.get("W")
        q, k, v, *_ = inputs.values()
        named = {key: inputs[key] for key in ("sinks_H", "cu_seqlens") if key in inputs}
        return dense_attention(q, k, v, window=window, **named)
    if name in ("flash_decode", "flash_decode/latent"):
        return dense_decode(*(inputs[key] for key in ("q_BHK", "k_cache", "v_cache", "lengths_B")))
    return None


def judged(name: str, draw: random.Random) -> str:
    """One operation at one draw: "" where all agrees, otherwise REFUSED or WRONG and what it is."""
    operation = operations()[name]
    shape = random_shape(operation, draw)
    try:
        inputs = drawn_inputs(operation, shape, draw)
        reference = Reference(operation, inputs)
    except ValueError as error:
        return f"{REFUSED} at {shape_label(shape)}: {error}"
    exact = {
        key: x.detach().double().requires_grad_(x.requires_grad) if is_float(x) else x for key, x in inputs.items()
    }
    defined = functools.partial(definition, name)
    if defined(**exact) is not None:
        for part, right in results(defined, exact).items():
            if error := too_far(reference.exact[part], right, 1e-9):
                return f"{WRONG} at {shape_label(shape)}: torch in fp64 against the definition, {part}: {error}"
    call: Callable[..., Any] = functools.partial(operation.call, backend="torch")
    for part, found in results(call, inputs).items():
        if found.is_floating_point() and (error := too_far(found, reference.exact[part].double(), COARSE)):
            return f"{WRONG} at {shape_label(shape)}: torch in fp32, {part}: {error}"
    try:
        agreement = reference.check(functools.partial(operation.call, backend="triton"))
    except ValueError as error:
        return f"{WRONG} at {shape_label(shape)}: the Triton form refuses what the torch form takes: {error}"
    if not agreement.ok:
        return f"{WRONG} at {shape_label(shape)}: triton, {agreement.where}: {agreement.worst:.2f} times its budget"
    return ""


def too_far(found: Tensor, right: Tensor, tolerance: float) -> str:
    if not right.numel():
        return ""
    error = float(largest_error(found, right))
    allowed = tolerance * (1 + float(right.masked_fill(right.isinf(), 0.0).abs().max()))
    # Written so that a NaN is too far.
    return "" if error <= allowed else f"error {error:.2e}, allowed {allowed:.2e}"


def case(world: World, seed: int) -> Outcome:
    draw = random.Random(f"ops {seed}")
    name = draw.choice(list(operations()))

    def work() -> None:
        # Uninitialised memory is NaN, so that an entry which nobody wrote cannot look right.
        torch.use_deterministic_algorithms(True, warn_only=True)
        if said := judged(name, draw):
            print(said)

    ended = attempt(work)
    said = next((line for line in ended.output.splitlines() if line.startswith((REFUSED, WRONG))), "")
    problem = ended.problem or (said if said.startswith(WRONG) else "")
    if not problem and ended.code:
        problem = f"code {ended.code}: {ended.last_line}"
    return Outcome(subject=name, how="refused" if said.startswith(REFUSED) else "agrees", problem=problem)
