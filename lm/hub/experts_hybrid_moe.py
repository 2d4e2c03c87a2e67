"""Router and experts of an exported model, in torch alone. Part of the files that travel with the weights.

Legend: T tokens, D model width, E experts, F expert width, K slots per token, N tokens of one expert.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Router(nn.Module):
    """Scores of experts, and which of them a token gets: its k best, of which those are kept whose level is at or below
    a threshold. Levels by rule: "top_k" none, "top_p" the probability ahead, "threshold" minus the score, "ratio" minus
    the share of the best score, "null" by how much the column that computes nothing and competes for a slot leads."""

    selection_bias_E: Tensor
    threshold: Tensor

    def __init__(self, options: dict, n_experts: int, d_model: int) -> None:
        super().__init__()
        self.options = options
        self.weight_ED = nn.Parameter(torch.zeros(n_experts, d_model))
        self.bias_E = nn.Parameter(torch.zeros(n_experts)) if options["bias"] else None
        n_null = options.get("n_null", 0)
        self.null_weight_ZD = nn.Parameter(torch.zeros(n_null, d_model)) if n_null else None
        # Its square is what chosen null columns weigh more or less than their scores.
        self.root_1 = nn.Parameter(torch.ones(1)) if options.get("null_gain") else None
        self.register_buffer("selection_bias_E", torch.zeros(n_experts))
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their weights, 0 for those it does not use; both [T, k]."""
        options = self.options
        bias_E = None if self.bias_E is None else self.bias_E.float()
        logits_TE = functional.linear(x_TD.float(), self.weight_ED.float(), bias_E)
        scores_TE, null_TZ = self._scores(x_TD, logits_TE)
        selection_TE = scores_TE.detach() + self.selection_bias_E.float()
        expert_TK = selection_TE.topk(options["k"], dim=-1)[1]
        score_TK = scores_TE.gather(-1, expert_TK)
        level_TK = torch.full_like(score_TK, -torch.inf)
        if options["rule"] == "top_p":
            mass_TK = logits_TE.detach().softmax(dim=-1).gather(-1, expert_TK)
            level_TK = mass_TK.cumsum(dim=-1) - mass_TK
        elif options["rule"] == "threshold":
            level_TK = -selection_TE.gather(-1, expert_TK)
        elif options["rule"] == "ratio":
            level_TK = -score_TK.detach() / score_TK.detach().amax(dim=-1, keepdim=True)
        elif options["rule"] == "null":
            # Slot j meets null column k - j + 1; slots whose rival does not exist are always real.
            rivals_TK = null_TZ.topk(min(options["k"], null_TZ.shape[-1]), dim=-1)[0]
            level_TK[:, options["k"] - rivals_TK.shape[-1] :] = rivals_TK.detach().flip(-1)
            level_TK = level_TK - selection_TE.gather(-1, expert_TK)
        level_TK[:, : options["floor"]] = -torch.inf
        kept_TK = ~(level_TK > self.threshold.float())
        weight_TK = score_TK * kept_TK
        total_T1 = weight_TK.sum(dim=-1, keepdim=True)
        if options["rule"] == "null" and options["null_weighs"]:
            # The best null columns fill the slots that are left, and take their share.
            n_null_T1 = options["k"] - kept_TK.sum(dim=-1, keepdim=True)
            chosen_TK = torch.arange(rivals_TK.shape[-1], device=x_TD.device) < n_null_T1
            rest_T1 = (rivals_TK * chosen_TK).sum(dim=-1, keepdim=True)
            total_T1 = total_T1 + (rest_T1 if self.root_1 is None else rest_T1 * self.root_1.float().square())
        if options["renormalise"]:
            weight_TK = weight_TK / total_T1.clamp_min(torch.finfo(weight_TK.dtype).tiny)
        return expert_TK, weight_TK * options["scaling"]

    def _scores(self, x_TD: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of the experts, and of the null columns."""
        sigmoid = self.options["score"] == "sigmoid"
        if self.null_weight_ZD is None:
            return logits_TE.sigmoid() if sigmoid else logits_TE.softmax(dim=-1), None
        null_TZ = functional.linear(x_TD.float(), self.null_weight_ZD.float())
        if sigmoid:
            return logits_TE.sigmoid(), null_TZ.sigmoid()
        if self.options["null_apart"]:
            # By the measure of the experts' own softmax.
            return logits_TE.softmax(dim=-1), (null_TZ - logits_TE.logsumexp(dim=-1, keepdim=True)).exp()
        together = torch.cat([logits_TE, null_TZ], dim=-1).softmax(dim=-1)
        return together[:, : logits_TE.shape[-1]], together[:, logits_TE.shape[-1] :]


class Experts(nn.Module):
    """SwiGLU networks in two packed parameters."""

    def __init__(self, options: dict, d_model: int) -> None:
        super().__init__()
        E, F = options["n_experts"], options["d_expert"]
        self.clamped = options["clamped"]
        self.w_gate_up_EDF2 = nn.Parameter(torch.zeros(E, d_model, 2 * F))
        self.w_down_EFD = nn.Parameter(torch.zeros(E, F, d_model))
        self.b_gate_up_EF2 = nn.Parameter(torch.zeros(E, 2 * F)) if options["expert_bias"] else None
        self.b_down_ED = nn.Parameter(torch.zeros(E, d_model)) if options["expert_bias"] else None

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for e in expert_TK[weight_TK != 0].unique().tolist():
            token_N, slot_N = ((expert_TK == e) & (weight_TK != 0)).nonzero(as_tuple=True)
            h_NF2 = x_TD[token_N] @ self.w_gate_up_EDF2[e].to(x_TD.dtype)
            if self.b_gate_up_EF2 is not None:
                h_NF2 = h_NF2 + self.b_gate_up_EF2[e].to(x_TD.dtype)
            out_ND = swiglu(h_NF2, self.clamped) @ self.w_down_EFD[e].to(x_TD.dtype)
            if self.b_down_ED is not None:
                out_ND = out_ND + self.b_down_ED[e].to(x_TD.dtype)
            y_TD = y_TD.index_add(0, token_N, out_ND.float() * weight_TK[token_N, slot_N, None])
        return y_TD.to(x_TD.dtype)


class SharedExpert(nn.Module):
    """One SwiGLU network for every token."""

    def __init__(self, d_model: int, d_shared: int) -> None:
        super().__init__()
        self.w_gate_up_DF2 = nn.Parameter(torch.zeros(d_model, 2 * d_shared))
        self.w_down_FD = nn.Parameter(torch.zeros(d_shared, d_model))

    def forward(self, x_TD: Tensor) -> Tensor:
        return swiglu(x_TD @ self.w_gate_up_DF2.to(x_TD.dtype), None) @ self.w_down_FD.to(x_TD.dtype)


def swiglu(h: Tensor, clamped: dict | None) -> Tensor:
    """SiLU(gate) * up, or gpt-oss's clamped form of it."""
    gate, up = h.chunk(2, dim=-1)
    if clamped is None:
        return functional.silu(gate) * up
    gate, up = gate.clamp(max=clamped["limit"]), up.clamp(-clamped["limit"], clamped["limit"])
    return gate * (clamped["slope"] * gate).sigmoid() * (up + 1)


class MoE(nn.Module):
    """Route, compute, add up."""

    def __init__(self, block: dict, d_model: int) -> None:
        super().__init__()
        options = block["experts"]
        self.router = Router(block["router"], options["n_experts"], d_model)
        self.experts = Experts(options, d_model)
        self.shared_expert = SharedExpert(d_model, options["d_shared"]) if options["d_shared"] else None
        self.shared_gate_D = nn.Parameter(torch.zeros(d_model)) if options["shared_gate"] else None

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = self.experts(x_TD, *self.router(x_TD))
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(x_TD)
            if self.shared_gate_D is not None:
                shared_TD = (x_TD @ self.shared_gate_D.to(x_TD.dtype)).sigmoid()[:, None] * shared_TD
            y_TD = y_TD + shared_TD
        return y_TD
