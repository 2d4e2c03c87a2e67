"""Packed experts: what is stored against its formula, and the forms that compute them against plain products with the
unpacked weights.

Legend: E experts, I inputs, O outputs, T tokens, D model width, F expert width.
"""

import pytest
import torch

from moe.backends import compute_experts
from moe.config import ClampedSwiGLU, ExpertFormat, MoEConfig
from moe.experts import Experts
from moe.packed import PackedExperts, PackedMatrices, pack
from moe.plain_experts import plain_experts
from routing.assignments import Assignments
from triton_kernels.native.library import native

FORMS = [
    ExpertFormat(bits=16),
    ExpertFormat(bits=8),
    ExpertFormat(bits=8, group=16, zero_point=True),
    ExpertFormat(bits=4),
    ExpertFormat(bits=4, group=8, zero_point=True),
    ExpertFormat(bits=4, group=128, zero_point=True),
]
NATIVE = pytest.mark.skipif(native().library is None, reason=native().reason)
E = 6


def weights(n_in, n_out, seed=0):
    # Groups of very different sizes, an expert of nothing but zeros, and a direction that is always positive.
    generator = torch.Generator().manual_seed(seed)
    w_EIO = torch.randn(E, n_in, n_out, generator=generator) * torch.logspace(-6, 1, n_in)[:, None] + 0.1
    w_EIO[2] = 0
    return w_EIO


def packed_matrices(w_EIO, form):
    made = PackedMatrices(form, *w_EIO.shape)
    for name, tensor in pack(w_EIO, form).items():
        made.register_buffer(name, tensor)
    return made


def steps_of(w_EIO, form):
    """How far two neighbouring codes of the widest scale lie apart, for each weight: [E, I, O]."""
    found = []
    for part_EIO in w_EIO.split(form.group, dim=1):
        low, high = part_EIO.amin(1, keepdim=True), part_EIO.amax(1, keepdim=True)
        size = torch.maximum(-low, high)
        step = (high - low) / (2**form.bits - 1) if form.zero_point else size / 2 ** (form.bits - 1)
        found.append(step.expand_as(part_EIO))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("n_in", [64, 45])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_weights_change_by_less_than_a_step(form, n_in):
    w_EIO = weights(n_in, 10)
    made = packed_matrices(w_EIO, form)
    got = made.unpacked(range(E))
    if form.bits == 16:
        assert torch.equal(got, w_EIO.bfloat16().float())
        return
    step = steps_of(w_EIO, form)
    # Half a step, what rounding an offset to bf16 moves all of a group by, and what extremes may be clipped by.
    error, size = (got - w_EIO).abs(), w_EIO.abs().amax(dim=1, keepdim=True)
    assert (error <= (1.5 if form.bits == 8 else 2.5) * step + 2**-8 * size * form.zero_point + 1e-12).all()
    assert (got[2] == 0).all()


@pytest.mark.parametrize(("bits", "gain"), [(8, 0.0), (4, 0.03)])
def test_clipping_pays_with_four_bits(bits, gain):
    w_EIO = torch.randn(E, 64, 40, generator=torch.Generator().manual_seed(0))
    form = ExpertFormat(bits=bits)
    step, highest = steps_of(w_EIO, form), 2 ** (bits - 1)
    nearest = (w_EIO / step).round().clamp(-highest, highest) * step
    error = (packed_matrices(w_EIO, form).unpacked(range(E)) - w_EIO).square().sum()
    assert error <= (1.02 - gain) * (nearest - w_EIO).square().sum()


@NATIVE
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_unpacking_in_c_is_that_of_torch(form, without_native, monkeypatch):
    made = packed_matrices(weights(45, 11), form)
    plain = made.unpacked([4, 0, 1])
    monkeypatch.undo()
    torch.testing.assert_close(made.unpacked([4, 0, 1]), plain, rtol=1e-6, atol=1e-7)


def experts(form, d_model=40, d_expert=24, **options):
    generator = torch.Generator().manual_seed(1)
    plain = Experts(n_experts=E, d_model=d_model, d_expert=d_expert, **options)
    plain.init_weights(generator)
    for bias in (plain.b_gate_up_EF2, plain.b_down_ED):
        if bias is not None:
            torch.nn.init.normal_(bias, generator=generator)
    packed = PackedExperts(form, n_experts=E, d_model=d_model, d_expert=d_expert, **options)
    with torch.no_grad():
        for name, weight in (("gate_up", plain.w_gate_up_EDF2), ("down", plain.w_down_EFD)):
            matrices = getattr(packed, name)
            for part, tensor in pack(weight, form).items():
                getattr(matrices, part).copy_(tensor)
            weight.copy_(matrices.unpacked(range(E)))
        packed.load_state_dict({k: v for k, v in plain.state_dict().items() if k.startswith("b_")}, strict=False)
    return plain.eval(), packed.eval()


def rows(n_tokens, seed=2):
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(n_tokens, E, generator=generator)
    keep_TK = torch.rand(n_tokens, 3, generator=generator) < 0.7
    expert_TK = scores_TE.topk(3, dim=-1)[1]
    # The last expert computes nothing.
    keep_TK &= expert_TK != E - 1
    return Assignments.from_slots(expert_TK, scores_TE.gather(1, expert_TK), keep_TK, n_experts=E)


@pytest.mark.parametrize("n_tokens", [1, 8, 32, 70])
@pytest.mark.parametrize("form", FORMS, ids=str)
@torch.no_grad()
def test_every_form_computes_what_unpacked_weights_give(form, n_tokens, monkeypatch):
    plain, packed = experts(form)
    x_TD = torch.randn(n_tokens, 40, generator=torch.Generator().manual_seed(3))
    expected = compute_experts(
        x_TD.double(), plain.w_gate_up_EDF2.double(), plain.w_down_EFD.double(), rows(n_tokens), backend="reference"
    )
    got = packed(x_TD, rows(n_tokens))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    # Some experts at a time.
    monkeypatch.setattr("moe.packed.UNPACKED_BYTES", 4 * 40 * 72 * 2)
    monkeypatch.setattr("moe.packed.takes_packed", lambda *_: False)
    torch.testing.assert_close(packed(x_TD, rows(n_tokens)).double(), expected, rtol=1e-5, atol=1e-5)


@NATIVE
@torch.no_grad()
def test_bits_do_not_depend_on_threads_and_bf16_tokens_stay_so():
    _, packed = experts(ExpertFormat(bits=4))
    x_TD = torch.randn(8, 40, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(packed(x_TD, rows(8)))
    torch.set_num_threads(before)
    assert torch.equal(*found)
    half = packed(x_TD.bfloat16(), rows(8))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), found[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "options", [{"bias": True, "clamped": ClampedSwiGLU()}, {"gated": False}], ids=["gpt-oss", "without gates"]
)
@torch.no_grad()
def test_options_are_kept(options):
    plain, packed = experts(ExpertFormat(bits=8), **options)
    x_TD = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    expected = plain_experts(
        x_TD,
        plain.w_gate_up_EDF2,
        plain.w_down_EFD,
        rows(5),
        b_gate_up_EF2=plain.b_gate_up_EF2,
        b_down_ED=plain.b_down_ED,
        clamped=plain.clamped,
        gated=plain.gated,
    )
    torch.testing.assert_close(packed(x_TD, rows(5)), expected)


def test_what_makes_no_sense_is_refused_by_name():
    _, packed = experts(ExpertFormat(bits=8))
    with pytest.raises(ValueError, match="experts of 8 bits cannot be trained; legal: the model that they were packed"):
        packed.train()(torch.randn(2, 40), rows(2))
    with pytest.raises(ValueError, match="experts of 8 bits have no fresh weights"):
        packed.init_weights(torch.Generator())
    with pytest.raises(ValueError, match=r"ExpertFormat.bits: 5; legal: 16, 8, 4"):
        ExpertFormat(bits=5)
    with pytest.raises(ValueError, match=r"ExpertFormat.group: 12; legal: a multiple of 8"):
        ExpertFormat(group=12)
    with pytest.raises(ValueError, match=r"MoEConfig.backend: 'cpu' with packed experts"):
        MoEConfig(backend="cpu", packed=ExpertFormat())
