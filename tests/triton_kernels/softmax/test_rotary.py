"""Rotary positions: the op that turns keys, and queries turned inside flash_attention, against complex numbers in
fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_kernels.native.library import native
from triton_kernels.softmax.flash_attention import flash_attention
from triton_kernels.softmax.rotary import rotary_tables, rotate


def turned(x_BTHK, position_T, rotary_dim, base):
    """Channel c is the real part, channel c + P/2 the imaginary one of a number that is multiplied by e^{i angle}."""
    half = rotary_dim // 2
    angle_TP = position_T.double()[:, None] / base ** (torch.arange(half, dtype=torch.float64) * 2 / max(rotary_dim, 1))
    z = (
        torch.complex(x_BTHK[..., :half], x_BTHK[..., half:rotary_dim])
        * torch.polar(torch.ones_like(angle_TP), angle_TP)[:, None, :]
    )
    return torch.cat([z.real, z.imag, x_BTHK[..., rotary_dim:]], dim=-1)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(name, ours, by_torch, exact):
    """At most twice as far from fp64 as torch in the same dtype, plus a few roundings; written so that a NaN fails."""
    budget = 2 * (by_torch.double() - exact).abs().max() + 8 * torch.finfo(ours.dtype).eps * max(1.0, exact.abs().max())
    assert (ours.double() - exact).abs().max() <= budget, name


# The interpreter of the kernels computes bf16 wrongly.
FORMS = [(torch.float32, "triton"), (torch.float16, "triton")]
if native().library is not None:
    FORMS += [(torch.float32, "native"), (torch.bfloat16, "native")]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(1, 1, 1, 32), (2, 7, 3, 48), (1, 150, 2, 64), (2, 3, 1, 256)]),
    share=st.sampled_from([0, 0.25, 0.5, 1]),
    first=st.sampled_from([0, 5, 100_000]),
    form=st.sampled_from(FORMS),
    strided=st.booleans(),
)
def test_rotate_equals_complex_numbers(shape, share, first, form, strided):
    """Any positions, any share of the channels, outputs and gradients; of a tensor whose heads are slices of a
    projection too."""
    dtype, ours = form
    rotary_dim = int(share * shape[3])
    position_T = torch.randint(first, first + 1000, shape[1:2], generator=torch.Generator().manual_seed(1))
    rotary = rotary_tables(position_T, rotary_dim=rotary_dim, base=100.0)
    x, dy = random(*shape).to(dtype), random(*shape, seed=2).to(dtype)
    if strided:
        x = torch.cat([x, x], -1)[..., : shape[3]]
    leaf = x.double().requires_grad_()
    exact = turned(leaf, position_T, rotary_dim, 100.0)
    exact = (exact, *torch.autograd.grad(exact, leaf, dy.double()))
    results = []
    for backend in ("torch", ours):
        leaf = x.detach().requires_grad_()
        y = rotate(leaf, rotary, backend=backend)
        results.append((y, *torch.autograd.grad(y, leaf, dy)))
    for name, by_torch, ours, reference in zip(("y", "dx"), *results, exact):
        assert ours.dtype == dtype
        assert_close(name, ours, by_torch, reference)
        torch.testing.assert_close(by_torch.double(), reference, rtol=0, atol=8 * torch.finfo(dtype).eps)


def output_and_gradients(q, k, v, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = flash_attention(*leaves, **options)
    return dict(zip(("o", "q", "k", "v"), (o, *torch.autograd.grad(o, leaves, random(*o.shape, seed=5).to(o.dtype)))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("T", "S", "H", "G", "K", "rotary_dim", "options"),
    [
        (70, 70, 2, 1, 32, 32, {}),
        (33, 50, 2, 2, 64, 16, {"window": 20}),
        (70, 70, 3, 1, 48, 24, {"cu_seqlens": [0, 0, 1, 40, 40, 70]}),
        (5, 3, 1, 1, 32, 0, {"causal": False}),
        (3, 3, 1, 1, 160, 64, {}),
    ],
)
def test_queries_turned_inside_attention_equal_turned_queries(T, S, H, G, K, rotary_dim, options, dtype):
    """Packed sequences restart their positions through the table; the gradient comes back turned the other way."""
    position_T = torch.arange(T) + S - T
    if "cu_seqlens" in options:
        options = {"cu_seqlens": torch.tensor(options["cu_seqlens"])}
        position_T = (
            position_T - options["cu_seqlens"][torch.bucketize(position_T, options["cu_seqlens"][1:], right=True)]
        )
    rotary = rotary_tables(position_T, rotary_dim=rotary_dim, base=50.0)
    q, k, v = (
        random(2 if "cu_seqlens" not in options else 1, *shape, seed=i).to(dtype)
        for i, shape in enumerate(((T, H, K), (S, G, K), (S, G, 32)))
    )
    leaf = q.double().requires_grad_()
    q_exact = turned(leaf, position_T, rotary_dim, 50.0)
    exact = output_and_gradients(q_exact, k.double(), v.double(), **options)
    exact["q"] = torch.autograd.grad(q_exact, leaf, exact["q"])[0]
    by_torch, ours = (
        output_and_gradients(q, k, v, rotary=rotary, backend=backend, **options) for backend in ("torch", "triton")
    )
    for name, x in ours.items():
        assert x.dtype == dtype
        assert_close(name, x, by_torch[name], exact[name])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 50), st.integers(0, 50))
def test_rotated_products_depend_on_the_distance_only(start, first, second):
    q, k = random(2, 1, 1, 1, 8)

    def product(shift):
        tables = (
            rotary_tables(torch.tensor([shift + position]), rotary_dim=8, base=100.0) for position in (first, second)
        )
        return (rotate(q, next(tables)) * rotate(k, next(tables))).sum()

    torch.testing.assert_close(product(start), product(0), rtol=0, atol=1e-9)


def test_rotation_keeps_lengths_and_the_unrotated_channels():
    x_BTHK = random(2, 5, 3, 8)
    y_BTHK = rotate(x_BTHK, rotary_tables(torch.arange(3, 8), rotary_dim=4, base=10.0))
    torch.testing.assert_close(y_BTHK.norm(dim=-1), x_BTHK.norm(dim=-1))
    assert torch.equal(y_BTHK[..., 4:], x_BTHK[..., 4:])
    assert not torch.allclose(y_BTHK[..., :4], x_BTHK[..., :4])


def test_the_operator_is_registered_soundly():
    from triton_kernels.softmax.rotary_launch import rotate_op

    tables = rotary_tables(torch.arange(5), rotary_dim=8, base=10.0)
    arguments = (torch.randn(1, 5, 2, 16, requires_grad=True), *tables, False)
    torch.library.opcheck(
        rotate_op, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


@pytest.mark.parametrize(
    ("cos", "sin", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(4, 2), r"cosines_TP has shape \[4, 2\], expected \[T=5"),
        (torch.zeros(5, 2), torch.zeros(5, 3), "sines_TP has shape"),
        (torch.zeros(5, 5), torch.zeros(5, 5), "turn 10 channels, heads have K=8"),
        (torch.zeros(5, 2), torch.zeros(5, 2).double(), "sines_TP is torch.float64"),
        (torch.zeros(5, 2).long(), torch.zeros(5, 2).long(), "cosines_TP is torch.int64"),
    ],
)
def test_wrong_tables_are_refused_by_name(cos, sin, message):
    x = torch.zeros(1, 5, 2, 8)
    for call in (lambda: rotate(x, (cos, sin)), lambda: flash_attention(x, x, x, rotary=(cos, sin))):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_the_kernel_does_not_take_is_refused():
    with pytest.raises(ValueError, match="x_BTHK is float64"):
        rotate(torch.zeros(1, 5, 2, 8, dtype=torch.float64), (torch.zeros(5, 2), torch.zeros(5, 2)), backend="triton")
