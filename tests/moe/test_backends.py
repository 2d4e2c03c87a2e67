"""Who computes the experts: the reference against its formula and finite differences, every other backend against the
reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.backends import choose_backend, compute_experts
from moe.cpu_experts import BLOCK_BYTES, LEAST_ROWS, MOST_EXPERTS, ROW_QUANTUM, expert_blocks, padded_places
from routing.assignments import Assignments
from triton_kernels.native.library import native

NATIVE = pytest.param("native", marks=pytest.mark.skipif(native().library is None, reason=native().reason))
ON_THE_CPU = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("cpu", torch.float64),
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        pytest.param("native", torch.float32, marks=NATIVE.marks),
    ],
    ids=str,
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1.5e-2}
NAMES = ("y", "dx", "dw_gate_up", "dw_down", "dweight")


def layout(mask_TE: torch.Tensor, weight_N: torch.Tensor | None = None, n_padding: int = 0) -> Assignments:
    """The rows of a dense map of which token goes to which expert, sorted without the routing package's own code;
    weights are 1 unless given."""
    expert_N, token_N = mask_TE.t().nonzero(as_tuple=True)
    row_of_slot_N = torch.sort(token_N, stable=True)[1]
    # Padding points at a real token: a backend that computed it would be found out.
    padding = torch.zeros(n_padding, dtype=torch.int64)
    return Assignments(
        token_N=torch.cat([token_N, padding]),
        expert_N=torch.cat([expert_N, padding]),
        weight_N=torch.ones(len(token_N) + n_padding) if weight_N is None else weight_N,
        expert_offsets=torch.nn.functional.pad(mask_TE.sum(0).cumsum(0), (1, 0)),
        token_offsets=torch.nn.functional.pad(mask_TE.sum(1).cumsum(0), (1, 0)),
        row_of_slot_N=torch.cat([row_of_slot_N, torch.arange(n_padding)]),
    )


def random_mask(n_tokens: int, n_experts: int, share: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed)) < share


def run(
    mask_TE, *, d_model, d_expert, backend, dtype, weight_dtype=None, n_padding=0, seed=0
) -> dict[str, torch.Tensor]:
    """Output and all gradients, from inputs that are the same numbers in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens, n_experts = mask_TE.shape

    def draw(*shape, dtype, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    weight_dtype = weight_dtype or dtype
    x = draw(n_tokens, d_model, dtype=dtype).requires_grad_()
    gate_up = draw(n_experts, d_model, 2 * d_expert, dtype=weight_dtype, scale=d_model**-0.5).requires_grad_()
    down = draw(n_experts, d_expert, d_model, dtype=weight_dtype, scale=d_expert**-0.5).requires_grad_()
    weight = draw(int(mask_TE.sum()) + n_padding, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    y = compute_experts(x, gate_up, down, layout(mask_TE, weight, n_padding), backend=backend)
    gradients = torch.autograd.grad(y, (x, gate_up, down, weight), draw(n_tokens, d_model, dtype=dtype))
    return dict(zip(NAMES, (y, *gradients)))


def assert_close_to_reference(mask_TE, *, d_model, d_expert, dtype, backend="cpu", **options) -> None:
    reference = run(
        mask_TE,
        d_model=d_model,
        d_expert=d_expert,
        backend="reference",
        dtype=torch.float64,
        **{k: v for k, v in options.items() if k != "weight_dtype"},
    )
    got, loop = (
        run(mask_TE, d_model=d_model, d_expert=d_expert, backend=name, dtype=dtype, **options)
        for name in (backend, "reference")
    )
    for name in NAMES:
        expected = reference[name].detach()
        assert got[name].shape == expected.shape
        assert got[name].isfinite().all(), name

        def error(found, expected=expected) -> float:
            # Relative to the whole tensor's size: single elements may cancel to almost nothing. So may all of a tensor
            # of two or three.
            return float((found.detach().double() - expected).norm() / expected.norm().clamp_min(1e-30))

        # The loop cancels as much, to within what two draws of rounding differ.
        budget = TOLERANCE[dtype] + 4 * error(loop[name])
        assert error(got[name]) < budget, f"{name}: relative error {error(got[name]):.2e}, budget {budget:.2e}"


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory():
    """torch.empty returns NaN instead of leftovers, so that a read before a write cannot pass unseen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def test_reference_is_the_formula():
    mask_TE = torch.tensor([[True, True], [False, True], [False, False]])
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (2, 4, 6), (2, 3, 4))
    )
    weight_N = torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64)
    y = compute_experts(x, gate_up, down, layout(mask_TE, weight_N), backend="reference")

    def expert(e, x_D):
        gate, up = x_D @ gate_up[e, :, :3], x_D @ gate_up[e, :, 3:]
        return (gate / (1 + (-gate).exp()) * up) @ down[e]

    # Rows sorted by expert, then token: (0, t0), (1, t0), (1, t1).
    torch.testing.assert_close(y[0], 0.5 * expert(0, x[0]) + 0.25 * expert(1, x[0]))
    torch.testing.assert_close(y[1], 2.0 * expert(1, x[1]))
    assert not y[2].any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend):
    mask_TE = random_mask(5, 4, 0.5)

    def op(x, gate_up, down, weight):
        return compute_experts(x, gate_up, down, layout(mask_TE, weight, n_padding=2), backend=backend)

    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 3), (4, 3, 4), (4, 2, 3), (int(mask_TE.sum()) + 2,))
    inputs = [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(op, inputs)


@ON_THE_CPU
@pytest.mark.parametrize(
    ("n_tokens", "d_model", "d_expert", "n_experts"),
    [(1, 16, 16, 1), (63, 24, 10, 5), (100, 33, 17, 13), (257, 64, 48, 40), (600, 40, 24, 2)],
)
def test_cpu_at_odd_sizes(n_tokens, d_model, d_expert, n_experts, backend, dtype):
    assert_close_to_reference(
        random_mask(n_tokens, n_experts, 0.4), d_model=d_model, d_expert=d_expert, backend=backend, dtype=dtype
    )


@pytest.mark.parametrize(
    "case",
    [
        "one expert takes all",
        "empty first and last",
        "tokens without rows",
        "no rows at all",
        "every token everywhere",
        "no tokens",
    ],
)
@ON_THE_CPU
def test_cpu_on_uneven_loads(case, backend, dtype):
    mask_TE = random_mask(50, 6, 0.5)
    if case == "one expert takes all":
        mask_TE = torch.zeros_like(mask_TE)
        mask_TE[:, 3] = True
    elif case == "empty first and last":
        mask_TE[:, [0, 2, 5]] = False
    elif case == "tokens without rows":
        mask_TE[[0, 7, 8, 49]] = False
    elif case == "no rows at all":
        mask_TE = torch.zeros_like(mask_TE)
    elif case == "every token everywhere":
        mask_TE = torch.ones_like(mask_TE)
    elif case == "no tokens":
        mask_TE = mask_TE[:0]
    assert_close_to_reference(mask_TE, d_model=24, d_expert=20, backend=backend, dtype=dtype)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 40),
    st.integers(1, 9),
    st.integers(1, 20),
    st.integers(1, 20),
    st.floats(0, 1),
    st.integers(0, 10**6),
    st.integers(0, 5),
)
@pytest.mark.parametrize("backend", ["cpu", NATIVE])
def test_cpu_on_ragged_assignments(backend, n_tokens, n_experts, d_model, d_expert, share, seed, n_padding):
    assert_close_to_reference(
        random_mask(n_tokens, n_experts, share, seed),
        d_model=d_model,
        d_expert=d_expert,
        backend=backend,
        dtype=torch.float32,
        n_padding=n_padding,
        seed=seed,
    )


@pytest.mark.parametrize("block_bytes", [1, 2**12, 2**30])
def test_cpu_is_the_same_whatever_the_blocks(monkeypatch, block_bytes):
    monkeypatch.setattr("moe.cpu_experts.BLOCK_BYTES", block_bytes)
    assert_close_to_reference(random_mask(40, 11, 0.3), d_model=16, d_expert=12, dtype=torch.float32)
    assert_close_to_reference(
        random_mask(40, 11, 0.3), d_model=16, d_expert=12, dtype=torch.bfloat16, weight_dtype=torch.float32
    )


@pytest.mark.parametrize("n_padding", [0, 7])
def test_cpu_with_rows_rounded_up(n_padding):
    mask_TE = random_mask(200, 5, 0.5)
    mask_TE[:, 3] = False
    assert mask_TE.sum(0).max() > LEAST_ROWS
    assert_close_to_reference(mask_TE, d_model=24, d_expert=16, dtype=torch.bfloat16, n_padding=n_padding)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(1, 2**14), st.sampled_from([1, ROW_QUANTUM]))
def test_blocks_give_every_row_a_place_of_its_own(sizes, row_bytes, quantum):
    blocks = expert_blocks(sizes, row_bytes, quantum)
    experts = [e for block in blocks for e in block.experts]
    assert sorted(experts) == [e for e, rows in enumerate(sizes) if rows]
    assert sum(block.rows.stop - block.rows.start for block in blocks) == (blocks[-1].rows.stop if blocks else 0)
    for block in blocks:
        most = max(sizes[e] for e in block.experts)
        assert block.rows.stop - block.rows.start == len(block.experts) * block.height
        assert most <= block.height < most + quantum
        assert len(block.experts) in (1, 2, 4, MOST_EXPERTS) or block is blocks[-1]
    place_N = padded_places(blocks, torch.tensor(sizes))
    assert len(set(place_N.tolist())) == len(place_N) == sum(sizes)
    starts = {e: block.rows.start + i * block.height for block in blocks for i, e in enumerate(block.experts)}
    assert place_N.tolist() == [starts[e] + row for e, rows in enumerate(sizes) for row in range(rows)]


def test_blocks_stay_in_cache():
    assert all(len(block.experts) == 1 for block in expert_blocks([100] * 20, BLOCK_BYTES, 1))
    assert all(len(block.experts) == MOST_EXPERTS for block in expert_blocks([100] * 16, 1, ROW_QUANTUM))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_looks_at_the_used_experts_only_and_gets_the_same(dtype):
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (torch.randn(*shape, generator=generator) for shape in ((3, 24), (40, 24, 32), (40, 16, 24)))
    mask_TE = random_mask(3, 40, 0.1)
    rows = layout(mask_TE, torch.rand(int(mask_TE.sum()), generator=generator))
    assert 0 < len(rows.weight_N) < 40
    with_grad = compute_experts(x.to(dtype), gate_up.requires_grad_(), down, rows)
    with torch.no_grad():
        y_TD = compute_experts(x.to(dtype), gate_up, down, rows)
    # Few tokens are computed by the fp32 weights as they are, more by weights that are rounded to bf16 first.
    error = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y_TD, with_grad, rtol=0, atol=error * with_grad.abs().max().item())


def test_fp32_master_weights_get_fp32_gradients():
    got = run(
        random_mask(40, 5, 0.5),
        d_model=24,
        d_expert=16,
        backend="cpu",
        dtype=torch.bfloat16,
        weight_dtype=torch.float32,
    )
    assert [got[name].dtype for name in NAMES] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.float32,
    ]
    assert_close_to_reference(
        random_mask(40, 5, 0.5), d_model=24, d_expert=16, dtype=torch.bfloat16, weight_dtype=torch.float32
    )


def test_two_runs_give_the_same_bits():
    first, second = (
        run(random_mask(200, 20, 0.3), d_model=32, d_expert=16, backend="cpu", dtype=torch.float32) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("backend", [NATIVE])
def test_native_has_the_same_bits_by_one_thread_or_more(backend):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            mask_TE = random_mask(400, 7, 0.6)
            results.append(run(mask_TE, d_model=200, d_expert=24, backend=backend, dtype=torch.float32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in NAMES)


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize("frozen", ["x", "gate_up", "down", "weight"])
def test_native_gradients_of_what_trains(backend, frozen):
    mask_TE = random_mask(90, 5, 0.5)
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (90, 24), "gate_up": (5, 24, 20), "down": (5, 10, 24), "weight": (int(mask_TE.sum()),)}
    inputs = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}

    def gradients(trained):
        leaves = {name: x.clone().requires_grad_(name in trained) for name, x in inputs.items()}
        rows = layout(mask_TE, leaves["weight"])
        compute_experts(leaves["x"], leaves["gate_up"], leaves["down"], rows, backend=backend).square().sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    all_of_them, some = gradients(inputs), gradients([name for name in inputs if name != frozen])
    assert some.pop(frozen) is None
    assert all(torch.equal(all_of_them[name], gradient) for name, gradient in some.items())


@pytest.mark.parametrize("backend", [NATIVE])
def test_native_keeps_nan_where_it_is(backend):
    x_TD = torch.ones(40, 8)
    x_TD[17, 3] = torch.nan
    rows = layout(torch.ones(40, 3, dtype=torch.bool))
    y_TD = compute_experts(x_TD, torch.ones(3, 8, 12), torch.ones(3, 6, 8), rows, backend=backend)
    assert y_TD[17].isnan().all()
    assert y_TD.isnan().any(dim=1).sum() == 1


@pytest.mark.parametrize("backend", ["cpu", NATIVE])
def test_only_asked_gradients_and_saved_tensors(backend):
    """The expert outputs are not kept for backward: of all rows, only the pre-activations are."""
    rows = layout(torch.eye(5, dtype=torch.bool).repeat(12, 1))
    n_rows, d_model, d_expert = rows.token_N.shape[0], 64, 8
    x, gate_up, down = (
        torch.randn(60, d_model),
        torch.randn(5, d_model, 2 * d_expert, requires_grad=True),
        torch.randn(5, d_expert, d_model),
    )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = compute_experts(x, gate_up, down, rows, backend=backend)
    assert n_rows == 60
    assert saved.count((n_rows, 2 * d_expert)) == 1
    assert saved.count((n_rows, d_model)) == 1, "x itself"
    y.sum().backward()
    assert gate_up.grad is not None


@pytest.mark.parametrize("backend", ["reference", "cpu", "grouped_mm", NATIVE])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_offsets": torch.tensor([0, 3, 2, 4])}, "must start at 0 and never fall"),
        ({"expert_offsets": torch.tensor([0, 1, 2, 9])}, "expert_offsets must .* exceed 4, got"),
        ({"expert_offsets": torch.tensor([0, 1, 4])}, r"expert_offsets has shape \[3\], expected \[E\+1=4\]"),
        ({"token_offsets": torch.tensor([0, 4])}, r"token_offsets has shape \[2\], expected \[T\+1=3\]"),
        ({"weight_N": torch.ones(3)}, r"weight_N has shape \[3\], expected \[N=4\]"),
        ({"w_down_EFD": torch.zeros(3, 4, 8)}, r"w_down_EFD has shape \[3, 4, 8\], expected \[E, F, D=4\]"),
        (
            {"w_gate_up_EDF2": torch.zeros(3, 4, 10)},
            r"w_gate_up_EDF2 has shape \[3, 4, 10\], expected \[E=3, D=4, F2=8\]",
        ),
        ({"x_TD": torch.zeros(2, 1, 4)}, r"x_TD has shape \[2, 1, 4\], expected \[T, D\]"),
        (
            {"backend": "magic"},
            "backend = 'magic' is not one of auto, reference, native, cpu, grouped_mm, triton, megablocks",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_arguments_that_do_not_fit_are_refused(change, message, backend):
    tensors = {
        "x_TD": torch.zeros(2, 4),
        "w_gate_up_EDF2": torch.zeros(3, 4, 8),
        "w_down_EFD": torch.zeros(3, 4, 4),
        "backend": backend,
    }
    rows = {
        "token_N": torch.tensor([0, 1, 0, 1]),
        "expert_N": torch.tensor([0, 0, 1, 2]),
        "weight_N": torch.ones(4),
        "expert_offsets": torch.tensor([0, 2, 3, 4]),
        "token_offsets": torch.tensor([0, 2, 4]),
        "row_of_slot_N": torch.tensor([0, 2, 1, 3]),
    }
    compute_experts(**tensors, rows=Assignments(**rows))
    wrong = {name: change.get(name, x) for name, x in rows.items()}
    with pytest.raises(ValueError, match=message):
        compute_experts(**{name: change.get(name, x) for name, x in tensors.items()}, rows=Assignments(**wrong))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_padding", [0, 9])
def test_grouped_mm_agrees_and_ignores_padding(dtype, n_padding):
    mask_TE = random_mask(70, 9, 0.3)
    mask_TE[:, [0, 4, 8]] = False
    mask_TE[3] = False
    assert_close_to_reference(mask_TE, d_model=32, d_expert=16, dtype=dtype, backend="grouped_mm", n_padding=n_padding)


@pytest.mark.parametrize("case", ["one expert takes all", "no rows at all", "no tokens"])
def test_grouped_mm_at_the_extremes(case):
    mask_TE = torch.zeros(0 if case == "no tokens" else 40, 6, dtype=torch.bool)
    mask_TE[:, 3] = case == "one expert takes all"
    assert_close_to_reference(
        mask_TE, d_model=32, d_expert=16, dtype=torch.float32, backend="grouped_mm", n_padding=4 if len(mask_TE) else 0
    )


def test_the_choice_says_why():
    x, down = torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(2, 16, 8)
    assert choose_backend(x.half(), down) == (
        "cpu",
        "the form in C takes float32, and bfloat16 but where torch knows products of it (AMX, ARM), or few tokens"
        " without gradients by float32 weights",
    )
    assert choose_backend(x.float(), down.float()).name == ("native" if native().library else "cpu")
    assert choose_backend(x, down, "reference") == ("reference", "asked for")
    assert choose_backend(x.to("meta"), down).name == "grouped_mm"
    assert choose_backend(x.to("meta", torch.float64), down) == ("reference", "grouped_mm does not take torch.float64")
    with pytest.raises(ValueError, match="needs tensors on the CPU, these are on meta"):
        choose_backend(x.to("meta"), down, "cpu")
    with pytest.raises(
        ValueError,
        match=(
            r"'grouped_mm' cannot run: grouped_mm needs widths that are multiples of 8 in torch.bfloat16, got \(15, 8\)"
        ),
    ):
        choose_backend(x, down[:, :15], "grouped_mm")
    assert choose_backend(torch.zeros(1, 16), torch.zeros(2, 16, 16), "triton") == ("triton", "asked for")
    with pytest.raises(
        ValueError, match=r"'triton' cannot run: the Triton kernels need widths that are multiples of 16, got \(16, 8\)"
    ):
        choose_backend(x, down, "triton")


def test_a_tensor_without_memory_of_its_own_is_named_as_the_reason():
    class Spread(torch.Tensor):
        """As one that lies in several processes."""

    if native().library is None:
        pytest.skip(native().reason)
    x, down = torch.zeros(1, 8), torch.zeros(2, 16, 8).as_subclass(Spread)
    assert "spread over processes" in choose_backend(x, down).reason
