"""Experts in fewer bits: their weights are stored, and read, in 16, 8 or 4 bits; activations are what they were.

A weight [I, O] is cut into groups of `group` consecutive inputs. Within a group every output has a scale of its own,
and, with a zero point, an offset: w[i, o] ~ scale[g, o] code[i, o] + offset[g, o], the codes whole numbers from
-2^(b-1) to 2^(b-1) - 1. Without an offset that is the scheme of GGUF's Q8_0 and Q4_0 (github.com/ggml-org/ggml), with
one that of its Q4_1; groups of 128 along the inputs are those of GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978).
That experts alone bear it well is MoQE's finding (arXiv 2310.02410). Of each group the scale with the smallest squared
error among a few is taken, some of which clip, as AWQ does.

Scales and offsets are bf16, which costs no range and next to no error: codes are chosen for the rounded ones. Outputs
lie side by side, so that one input's weights become a vector in registers; of 4 bits two inputs share a byte, the lower
one in its low half, stored as code + 8.

Few tokens on a CPU are computed by weights as they lie (triton_kernels/native/packed.c). Otherwise the experts that are
used are unpacked, some at a time, and computed as ever.

Legend: E experts, I inputs, O outputs, G groups, T tokens, D model width, F expert width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe.backends import Choice, compute_experts
from moe.config import ClampedSwiGLU, ExpertFormat
from moe.plain_experts import plain_experts
from routing.assignments import Assignments
from triton_kernels.experts.packed import packed_experts_native, takes_packed, unpack_native
from triton_kernels.native.decode_step import NativeBlock, NativeMatrices, NotInOneCall, Watch

# What is tried, as shares of a group's range. A little more has room for what rounding a scale to bf16 takes away and,
# without an offset, for the sign that has one code less; with 4 bits, extremes may be worth less than others' steps.
RANGES = {8: (1.0, 1.01), 4: (1.0, *(1.1 - 0.05 * step for step in range(11)))}
# How much of a layer is unpacked at once.
UNPACKED_BYTES = 2**27
CODE_DTYPES = {16: torch.bfloat16, 8: torch.int8, 4: torch.uint8}
NIBBLE_ZERO = 8


def pack(weight_EIO: Tensor, form: ExpertFormat) -> dict[str, Tensor]:
    """What a `PackedMatrices` holds of these weights: "codes" [E, I, O], of 4 bits [E, ceil(I / 2), O], and, below 16
    bits, "scale" and, with a zero point, "offset" [E, G, O]."""
    if form.bits == 16:
        return {"codes": weight_EIO.to(torch.bfloat16)}
    # Expert by expert: what is tried exists for one of them.
    parts = [_pack_one(weight_IO.float(), form) for weight_IO in weight_EIO]
    packed = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    if form.bits == 4:
        packed["codes"] = _two_in_a_byte(packed["codes"])
    return packed


def _pack_one(weight_IO: Tensor, form: ExpertFormat) -> dict[str, Tensor]:
    n_in, n_out = weight_IO.shape
    # A last group that is short repeats its last input: no range changes by that.
    short = -n_in % form.group
    full_IO = torch.cat([weight_IO, weight_IO[-1:].expand(short, -1)])
    w_GIO = full_IO.view(-1, form.group, n_out)
    highest = 2 ** (form.bits - 1) - 1
    low_G1O, high_G1O = w_GIO.amin(1, keepdim=True), w_GIO.amax(1, keepdim=True)
    # The code of largest size is negative, and so may be the scale.
    peak_G1O = torch.where(high_G1O > -low_G1O, high_G1O, low_G1O)
    best: dict[str, Tensor] = {}
    for share in RANGES[form.bits]:
        if form.zero_point:
            middle, half = (high_G1O + low_G1O) / 2, share * (high_G1O - low_G1O) / 2
            scale = _rounded(2 * half / (2 * highest + 1))
            offset = _rounded(middle - half + (highest + 1) * scale)
        else:
            scale, offset = _rounded(-share * peak_G1O / (highest + 1)), torch.zeros_like(peak_G1O)
        codes = torch.where(scale == 0, 0.0, (w_GIO - offset) / scale).round().clamp(-highest - 1, highest)
        error_G1O = (scale * codes + offset - w_GIO).square().sum(1, keepdim=True)
        found = {"codes": codes, "scale": scale, "offset": offset, "error": error_G1O}
        better = error_G1O < best["error"] if best else torch.ones_like(error_G1O, dtype=torch.bool)
        best = {name: torch.where(better, new, best.get(name, new)) for name, new in found.items()}
    packed = {
        "codes": best["codes"].reshape(-1, n_out)[:n_in].to(torch.int8),
        "scale": best["scale"][:, 0].to(torch.bfloat16),
    }
    return packed | ({"offset": best["offset"][:, 0].to(torch.bfloat16)} if form.zero_point else {})


def _rounded(x: Tensor) -> Tensor:
    """To what bf16 holds, still fp32."""
    return x.to(torch.bfloat16).float()


def _two_in_a_byte(codes_EIO: Tensor) -> Tensor:
    stored = (codes_EIO + NIBBLE_ZERO).to(torch.uint8)
    stored = functional.pad(stored, (0, 0, 0, stored.shape[1] % 2))
    return stored[:, 0::2] | stored[:, 1::2] << 4


class PackedMatrices(nn.Module):
    """One weight of all experts of a layer, E x [I, O], in the buffers that `pack` makes; nothing of it is trained."""

    codes: Tensor
    scale: Tensor | None
    offset: Tensor | None

    def __init__(self, form: ExpertFormat, n_experts: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.form, self.shape = form, (n_experts, n_in, n_out)
        lines = -(-n_in // 2) if form.bits == 4 else n_in
        self.register_buffer("codes", torch.empty(n_experts, lines, n_out, dtype=CODE_DTYPES[form.bits]))
        for name, present in (("scale", form.bits < 16), ("offset", form.bits < 16 and form.zero_point)):
            of_groups = torch.empty(n_experts, -(-n_in // form.group), n_out, dtype=torch.bfloat16)
            self.register_buffer(name, of_groups if present else None)

    def unpacked(self, experts: Sequence[int]) -> Tensor:
        """The weights of some experts in fp32, [len(experts), I, O]."""
        if takes_packed(self.codes):
            return unpack_native(self, experts, bits=self.form.bits, group=self.form.group)
        codes = self.codes[list(experts)]
        if self.form.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1, 2)[:, : self.shape[1]]
        w_EIO = codes.float() - (NIBBLE_ZERO if self.form.bits == 4 else 0)
        group_I = torch.arange(self.shape[1], device=codes.device) // self.form.group
        if self.scale is not None:
            w_EIO = w_EIO * self.scale[list(experts)][:, group_I].float()
        if self.offset is not None:
            w_EIO = w_EIO + self.offset[list(experts)][:, group_I].float()
        return w_EIO

    def describe(self, watch: Watch) -> NativeMatrices:
        """As a decode step that is one call of C takes it.

        Raises:
            NotInOneCall: where it does not lie as it was made.
        """
        watch.module(self)
        watch.same(self, "form", "shape")
        n_experts, n_in, n_out = self.shape
        n_groups = -(-n_in // self.form.group)
        at = {"codes": watch.tensor(self._buffers, "codes", self.codes.shape, [self.codes.dtype])}
        for name in ("scale", "offset"):
            if self._buffers[name] is not None:
                at[name] = watch.tensor(self._buffers, name, (n_experts, n_groups, n_out), [torch.bfloat16])
        return NativeMatrices(**at, bits=self.form.bits, group=self.form.group)


class PackedExperts(nn.Module):
    """`moe.experts.Experts` of packed weights, for evaluation and generation alone.

    Attributes:
        gate_up, down: w_gate_up_EDF2 and w_down_EFD.
        b_gate_up_EF2, b_down_ED, clamped, gated: as there.
    """

    def __init__(
        self,
        form: ExpertFormat,
        *,
        n_experts: int,
        d_model: int,
        d_expert: int,
        bias: bool = False,
        clamped: ClampedSwiGLU | None = None,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.form, self.clamped, self.gated = form, clamped, gated
        width = 2 * d_expert if gated else d_expert
        self.b_gate_up_EF2 = nn.Parameter(torch.zeros(n_experts, width)) if bias else None
        self.b_down_ED = nn.Parameter(torch.zeros(n_experts, d_model)) if bias else None
        self.gate_up = PackedMatrices(form, n_experts, d_model, width)
        self.down = PackedMatrices(form, n_experts, d_expert, d_model)

    def init_weights(self, generator: torch.Generator, *, down_scale: float = 1.0) -> None:
        """Refuses by a ValueError: there is nothing to begin from."""
        raise ValueError(f"experts of {self.form.bits} bits have no fresh weights; legal: those of a model, packed")

    @property
    def d_expert(self) -> int:
        """F, above 0."""
        return self.down.shape[1]

    @property
    def has_options(self) -> bool:
        """Whether these experts are computed by `moe.plain_experts`."""
        return self.clamped is not None or self.b_down_ED is not None or not self.gated

    def choice(self, x_TD: Tensor, n_rows: int) -> Choice:
        """What computes them, and why."""
        return Choice("packed", f"weights of {self.form.bits} bits")

    def forward(self, x_TD: Tensor, assignments: Assignments) -> Tensor:
        """y_TD [T, D] in the dtype of x_TD.

        Raises:
            ValueError: in training.
        """
        if self.training:
            raise ValueError(
                f"experts of {self.form.bits} bits cannot be trained; legal: the model that they were packed from, or"
                " `python -m lm quantize --bits 32` of this one"
            )
        if not self.has_options and takes_packed(self.gate_up.codes, x_TD):
            return packed_experts_native(
                x_TD, self.gate_up, self.down, assignments, bits=self.form.bits, group=self.form.group
            )
        n_rows = int(assignments.expert_offsets[-1])
        token_N, expert_N = assignments.token_N[:n_rows], assignments.expert_N[:n_rows]
        used = assignments.rows_per_expert_E().nonzero()[:, 0].tolist()
        _, D, width = self.gate_up.shape
        at_once = max(1, UNPACKED_BYTES // (4 * D * (width + self.down.shape[1])))
        offsets = assignments.expert_offsets.tolist()
        y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        for first in range(0, len(used), at_once):
            some = used[first : first + at_once]
            rows = slice(offsets[some[0]], offsets[some[-1] + 1])
            number_E = torch.zeros(self.gate_up.shape[0], dtype=torch.int64, device=expert_N.device)
            number_E[some] = torch.arange(len(some), device=expert_N.device)
            own = Assignments.from_rows(
                token_N[rows],
                number_E[expert_N[rows]],
                assignments.weight_N[rows],
                n_tokens=len(x_TD),
                n_experts=len(some),
            )
            y_TD += self._computed(x_TD, some, own)
        return y_TD.to(x_TD.dtype)

    def _computed(self, x_TD: Tensor, experts: list[int], rows: Assignments) -> Tensor:
        """y_TD of some experts, numbered anew in `rows`."""
        gate_up, down = self.gate_up.unpacked(experts), self.down.unpacked(experts)
        if not self.has_options:
            return compute_experts(x_TD, gate_up, down, rows)
        return plain_experts(
            x_TD,
            gate_up,
            down,
            rows,
            b_gate_up_EF2=None if self.b_gate_up_EF2 is None else self.b_gate_up_EF2[experts],
            b_down_ED=None if self.b_down_ED is None else self.b_down_ED[experts],
            clamped=self.clamped,
            gated=self.gated,
        )

    def describe(self, block: NativeBlock, watch: Watch) -> None:
        """As `Experts.describe`."""
        E, D, width = self.gate_up.shape
        if type(self) is not PackedExperts or self.has_options or (block.experts, watch.d_model) != (E, D):
            raise NotInOneCall(f"experts that are {type(self).__name__}, or have options")
        watch.module(self)
        block.d_expert = width // 2
        block.gate_up, block.down = self.gate_up.describe(watch), self.down.describe(watch)
