"""The forms for few tokens on a CPU compute what the torch forms compute, by one thread or more alike.

Legend: T tokens, D model width, E experts, F expert width, K slots per token or head width, B sequences, H heads, G
key/value heads, V value width.
"""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.norm import RMSNorm
from triton_kernels.experts.expert_slots import RULES, SCORES, router_scores, sort_slots
from triton_kernels.experts.grouped_mlp import grouped_mlp
from triton_kernels.linear.linear_decode import delta_decode, lightning_decode
from triton_kernels.native.library import linear, native, rms_norm, rounds_products
from triton_kernels.native.projection import project
from triton_kernels.softmax.native import rotary_at, softmax_decode_native

pytestmark = pytest.mark.skipif(native().library is None, reason=native().reason)
DTYPES = [torch.float32, torch.bfloat16]
PRODUCTS = tuple(f"triton_kernels.{name}" for name in ("experts.grouped_mlp", "experts.native", "native.projection"))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def by_threads(compute):
    """The result, which must have the same bits with one, two and three threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    return results[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "n_in", "n_out"), [(1, 256, 512), (3, 33, 7), (8, 130, 1030), (2, 1, 1)])
def test_linear_and_norm(dtype, T, n_in, n_out):
    x_TI, weight_OI, gain_I = draw(T, n_in, dtype=dtype), draw(n_out, n_in), draw(n_in)
    y_TO = by_threads(lambda: linear(x_TI, weight_OI))
    expected_TO = (x_TI.double() @ weight_OI.double().T).to(dtype)
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y_TO, expected_TO, rtol=rtol, atol=1e-4)
    expected_TI = torch.nn.functional.rms_norm(x_TI.double(), (n_in,), gain_I.double(), 1e-5).to(dtype)
    torch.testing.assert_close(
        rms_norm(x_TI, gain_I, 1e-5), expected_TI, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 32),
    E=st.integers(1, 81),
    rule=st.sampled_from(RULES),
    score=st.sampled_from(SCORES),
    renormalise=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_decisions_and_rows(T, E, rule, score, renormalise, seed, data):
    k = data.draw(st.integers(1, E))
    floor = data.draw(st.integers(0, k))
    logits_TE, bias_E = draw(T, E, seed=seed), 0.1 * draw(E, seed=seed)
    threshold = torch.tensor({"top_k": 0.0, "top_p": 0.4, "threshold": -1.5 / E}[rule])

    def decide(backend):
        return router_scores(
            logits_TE,
            bias_E,
            threshold,
            k=k,
            rule=rule,
            score=score,
            renormalise=renormalise,
            floor=floor,
            backend=backend,
        )

    ours, theirs = decide("native"), decide("torch")
    assert torch.equal(ours.expert_TK, theirs.expert_TK)
    torch.testing.assert_close(ours.level_TK, theirs.level_TK, rtol=1e-5, atol=1e-6)
    # A level within rounding of the threshold may fall to either side.
    clear_TK = (theirs.level_TK - threshold).abs() > 1e-5
    assert torch.equal(ours.keep_TK[clear_TK], theirs.keep_TK[clear_TK])
    if bool(clear_TK.all()):
        torch.testing.assert_close(ours.weight_TK, theirs.weight_TK, rtol=1e-4, atol=1e-6)
    for keep_TK in (ours.keep_TK, None):
        rows = [
            sort_slots(ours.expert_TK, ours.weight_TK, keep_TK, n_experts=E, padded=False, backend=backend)
            for backend in ("native", "torch")
        ]
        assert all(torch.equal(x, y) for x, y in zip(*rows))


def test_nan_is_chosen_and_stays():
    logits_TE = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    for bias_E, threshold in ((torch.tensor([torch.nan, 0, 0, 0]), 0.5), (torch.zeros(4), torch.nan)):
        slots = router_scores(logits_TE, bias_E, torch.tensor(threshold), k=2, rule="top_p", backend="native")
        assert bool(slots.keep_TK.all())
        assert bool(slots.expert_TK.lt(4).all())
    slots = router_scores(torch.full((1, 4), torch.nan), torch.zeros(4), torch.tensor(0.0), k=2, backend="native")
    assert slots.expert_TK.tolist() == [[0, 1]]
    assert bool(slots.weight_TK.isnan().all())


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 32),
    E=st.integers(1, 20),
    D=st.integers(1, 70),
    F=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_experts(T, E, D, F, dtype, seed, data):
    K = data.draw(st.integers(1, E))
    expert_TK = draw(T, E, seed=seed).topk(K)[1]
    rows = sort_slots(expert_TK, draw(T, K, seed=seed), draw(T, K, seed=seed + 1) > -0.5, n_experts=E, padded=False)
    x_TD, gate_up, down = draw(T, D, dtype=dtype, seed=seed), draw(E, D, 2 * F, seed=seed), draw(E, F, D, seed=seed)
    y_TD = by_threads(lambda: grouped_mlp(x_TD, gate_up, down, **_by_name(rows), backend="native"))
    expected_TD = grouped_mlp(x_TD.double(), gate_up.double(), down.double(), **_by_name(rows), backend="torch")
    scale = expected_TD.abs().max().item() + 1e-6
    torch.testing.assert_close(
        y_TD.double(), expected_TD, rtol=0, atol=scale * (1e-2 if dtype == torch.bfloat16 else 1e-5)
    )


def test_rows_that_lead_elsewhere_are_refused():
    rows = sort_slots(torch.tensor([[0, 1]]), torch.ones(1, 2), None, n_experts=2, padded=False)
    for name, wrong in (("token_N", [0, 1]), ("row_of_slot_N", [0, 2]), ("expert_offsets", [0, 3, 2])):
        broken = _by_name(rows) | {name: torch.tensor(wrong)}
        with pytest.raises(ValueError):
            grouped_mlp(torch.ones(1, 4), torch.ones(2, 4, 6), torch.ones(2, 3, 4), **broken, backend="native")


# Of one block of rows and more, up to its last row, and of widths that fill registers and that do not.
@pytest.mark.parametrize("S", [1, 5, 256, 700])
@pytest.mark.parametrize("K", [8, 16, 32, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_decode(dtype, K, S):
    B, H, G, row = 2, 6, 3, S // 2
    q_BX, k_BX, v_BX, sinks_H = draw(B, H * K), draw(B, G * K), draw(B, G * K, seed=1), draw(H)
    # Sequences lie apart from each other, as in a cache that has room for more.
    k_BSGK, v_BSGK = (draw(B, S + 3, G, K, dtype=dtype, seed=seed)[:, :S] for seed in (2, 3))
    gain_K, rotary = draw(K, seed=4), rotary_at(S, K - 4, 1e4)
    expected_k, expected_v = k_BSGK.double(), v_BSGK.double()
    q_BHK, new_BGK = (
        torch.nn.functional.rms_norm(x_BX.view(B, -1, K).double(), (K,), gain_K.double(), 1e-5) for x_BX in (q_BX, k_BX)
    )
    q_BHK, new_BGK = (turned(x, rotary) for x in (q_BHK, new_BGK))
    expected_k[:, row], expected_v[:, row] = new_BGK.to(dtype).double(), v_BX.view(B, G, K).to(dtype).double()
    logits_BHS = torch.einsum("bhk,bshk->bhs", q_BHK, expected_k.repeat_interleave(H // G, 2)) * K**-0.5
    sinks_BH1 = sinks_H.double()[None, :, None].expand(B, H, 1)
    p_BHS = torch.cat([logits_BHS, sinks_BH1], dim=2).softmax(2)[..., :-1]
    expected = torch.einsum("bhs,bshk->bhk", p_BHS, expected_v.repeat_interleave(H // G, 2)).flatten(1)
    o_BX = by_threads(
        lambda: softmax_decode_native(
            *(q_BX, (k_BX, v_BX), (k_BSGK, v_BSGK)),
            row=row,
            q_norm_K=gain_K,
            k_norm_K=gain_K,
            eps=1e-5,
            rotary=rotary,
            sinks_H=sinks_H,
        )
    )
    # A key that is rounded to bf16 from the other side of a tie is another key, by a 256th.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(o_BX, expected.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(k_BSGK.double(), expected_k, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert torch.equal(v_BSGK.double(), expected_v)


def turned(x_BHK, rotary):
    cosine_P, sine_P = rotary
    first, second, rest = x_BHK.split([len(cosine_P), len(cosine_P), x_BHK.shape[-1] - 2 * len(cosine_P)], dim=-1)
    return torch.cat([first * cosine_P - second * sine_P, second * cosine_P + first * sine_P, rest], dim=-1)


def test_shapes_that_would_lead_elsewhere_are_refused():
    rows = _by_name(sort_slots(torch.tensor([[0, 1]]), torch.ones(1, 2), None, n_experts=2, padded=False))
    for gate_up, down in (((2, 4, 5), (2, 3, 4)), ((1, 4, 6), (2, 3, 4)), ((2, 4, 6), (2, 3, 5))):
        with pytest.raises(ValueError, match="has shape"):
            grouped_mlp(torch.ones(1, 4), torch.ones(gate_up), torch.ones(down), **rows, backend="native")
    with pytest.raises(RuntimeError):
        project(torch.ones(1, 5), torch.ones(3, 4))
    with pytest.raises(RuntimeError):
        RMSNorm(4)(torch.ones(1, 5))
    assert project(torch.ones(4), torch.ones(3, 4)).tolist() == [4.0] * 3
    cache = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 4)
    options = {
        "row": 0,
        "q_norm_K": None,
        "k_norm_K": None,
        "eps": 0.0,
        "rotary": rotary_at(0, 4, 1e4),
        "sinks_H": None,
    }
    for q, kv in ((16, 4), (12, 8)):
        with pytest.raises(ValueError, match="does not fit a cache"):
            softmax_decode_native(torch.ones(1, q), (torch.ones(1, kv), torch.ones(1, kv)), cache, **options)


def test_weights_of_any_layout_and_dtype_are_taken():
    rows = _by_name(sort_slots(torch.tensor([[0, 1]]), torch.ones(1, 2), None, n_experts=2, padded=False))
    x_TD, gate_up, down = draw(1, 4), draw(2, 6, 4).mT, draw(2, 3, 4).double()
    expected_TD = grouped_mlp(x_TD.double(), gate_up.double(), down, **rows, backend="torch")
    torch.testing.assert_close(grouped_mlp(x_TD, gate_up, down, **rows, backend="native"), expected_TD.float())


def _by_name(rows):
    return {name: x for name, x in rows._asdict().items() if name != "expert_N"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("W", [2, 4])
def test_delta_decode(dtype, per_channel, W):
    B, H, K, V = 2, 3, 16, 24
    channels, X = H * K if per_channel else H, H * (2 * K + V)
    # Parts of one projection, as the layer hands them over.
    parts = draw(B, X + H * V + channels + H, dtype=dtype).split([X, H * V, channels, H], dim=-1)

    def run(backend):
        state, tail = draw(B, H, K, V), draw(B, X, W - 1, dtype=dtype)
        y = delta_decode(
            parts[0],
            parts[1].view(B, H, V),
            *parts[2:],
            conv_XW=draw(X, W),
            A_log_H=draw(H),
            dt_bias=draw(channels),
            norm_V=draw(V),
            state_BHKV=state,
            tail_BXW=tail,
            eps=1e-5,
            activation="silu" if per_channel else "sigmoid",
            backend=backend,
        )
        return torch.cat([x.float().flatten() for x in (y, state, tail)])

    tolerance = 3e-2 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(by_threads(lambda: run("native")), run("torch"), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lightning_decode(dtype):
    B, H, K, V = 2, 3, 16, 24

    def run(backend):
        state = draw(B, H, K, V)
        qkv_BX = draw(B, H * (2 * K + V) + 5, dtype=dtype)[:, :-5]
        o = lightning_decode(qkv_BX, -draw(H).abs(), state_BHKV=state, backend=backend)
        return torch.cat([o.float().flatten(), state.flatten()])

    tolerance = 3e-2 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(run("native"), run("torch"), rtol=tolerance, atol=tolerance)


def test_fp64_is_left_to_torch_and_bf16_where_torch_multiplies_it(monkeypatch):
    x, weight = torch.ones(1, 4), torch.ones(2, 4, 6)
    rows = _by_name(sort_slots(torch.tensor([[0, 1]]), torch.ones(1, 2), None, n_experts=2, padded=False))
    with pytest.raises(ValueError, match="takes few tokens"):
        grouped_mlp(x.double(), weight, torch.ones(2, 3, 4), **rows, backend="native")
    for module in PRODUCTS[:2]:
        monkeypatch.setattr(sys.modules[module], "products_here", lambda: (torch.float32,))
    with torch.enable_grad(), pytest.raises(ValueError, match="takes few tokens"):
        grouped_mlp(x.bfloat16(), weight, torch.ones(2, 3, 4), **rows, backend="native")


@pytest.mark.skipif(not rounds_products(torch.bfloat16), reason="this processor has no AVX512-BF16")
@pytest.mark.parametrize(
    ("rows", "wide", "out"), [(1, 1, 1), (61, 3, 33), (130, 257, 65), (7, 1030, 31), (301, 64, 96)]
)
def test_products_of_bf16_are_exact_but_for_their_sums(rows, wide, out):
    """Inputs that bf16 holds give what fp64 gives, up to the rounding of fp32 sums and of what is given back."""
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(*s, generator=generator).bfloat16() for s in ((rows, wide), (out, wide), (rows, out)))

    def run(dtype, weight_dtype):
        given = x.to(dtype).requires_grad_(), weight.to(weight_dtype).requires_grad_()
        with torch.enable_grad():
            y = project(*given)
            y.backward(dy.to(dtype))
        return y, *(tensor.grad for tensor in given)

    for found, exact in zip(run(torch.bfloat16, torch.float32), run(torch.float64, torch.float64)):
        # The weights' gradient is not rounded to bf16.
        unit = 1e-6 if found.dtype == torch.float32 else 2**-8
        torch.testing.assert_close(found.double(), exact, rtol=unit, atol=unit * exact.abs().max().item())


def test_what_is_brought_to_fp32_is_rounded_once(monkeypatch):
    """Values and gradients are those of fp32, rounded, whether or not products are of bf16."""
    for module in PRODUCTS:
        monkeypatch.setattr(sys.modules[module], "products_here", lambda: (torch.float32, torch.bfloat16))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=generator).bfloat16()
    up, down, weight = (torch.randn(*shape, generator=generator) for shape in ((4, 8, 12), (4, 6, 8), (5, 8)))
    chosen = torch.randint(4, (50, 1), generator=generator)
    rows = _by_name(sort_slots(chosen, torch.ones(50, 1), None, n_experts=4, padded=False))

    def run(dtype):
        given = [x.to(dtype).requires_grad_(), *(w.to(dtype).float().requires_grad_() for w in (up, down, weight))]
        with torch.enable_grad():
            y_TD = grouped_mlp(*given[:3], **rows, backend="native")
            y = torch.cat([y_TD, project(given[0], given[3])], dim=1)
            y.float().square().sum().backward()
        return y, *(tensor.grad for tensor in given)

    for found, exact in zip(run(torch.bfloat16), run(torch.float32)):
        torch.testing.assert_close(found.float(), exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item())
    assert run(torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_forked_process_has_no_helpers_and_computes_the_same():
    program = """
import os, torch
from triton_kernels.native.library import linear
torch.set_num_threads(2)
x, w = torch.ones(1, 256), torch.ones(4096, 256)
with torch.no_grad():
    linear(x, w)
    child = os.fork()
    good = bool((linear(x, w) == 256).all())
    if child == 0:
        os._exit(0 if good else 1)
    print(good, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "0"], done.stderr


@pytest.mark.parametrize(
    ("name", "value", "reason"), [("HYBRID_MOE_NATIVE", "0", "switched off"), ("PATH", "", "no C compiler")]
)
def test_without_a_compiler_the_reason_is_said(name, value, reason, monkeypatch):
    monkeypatch.setenv(name, value)
    found = native.__wrapped__()
    assert found.library is None
    assert reason in found.reason
