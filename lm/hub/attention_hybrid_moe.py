"""Attention of every kind that an exported model has, in torch alone. Part of the files that travel with the weights.

Linear layers go through a text token by token: it is written to be read.

Legend: B batch, T tokens, S keys, D model width, H heads, G key/value heads, K key width, V value width, X channels, W
convolution width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

# Added to the squared length that queries and keys of a delta rule are divided by.
LENGTH_EPS = 1e-6


class Norm(nn.Module):
    """RMSNorm over the last dimension, in fp32."""

    def __init__(self, width: int, eps: float, unit_offset: bool = False) -> None:
        super().__init__()
        self.eps, self.unit_offset = eps, unit_offset
        self.weight = nn.Parameter(torch.zeros(width) if unit_offset else torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.float() + (1.0 if self.unit_offset else 0.0)
        return functional.rms_norm(x.float(), scale.shape, scale, self.eps).to(x.dtype)


class Projection(nn.Linear):
    """A linear map in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.weight.to(input.dtype), bias)


class Past:
    """What a block needs to know of the tokens before, and of padding.

    Args:
        cache: transformers' cache, or None.
        position_BT: of the tokens of this call.
        mask_BS: 1 for tokens, 0 for padding, over past and present; None without padding.
    """

    def __init__(self, cache, position_BT: Tensor, mask_BS: Tensor | None) -> None:
        self.cache, self.position_BT, self.mask_BS = cache, position_BT, mask_BS
        self.length = 0 if cache is None else cache.get_seq_length()
        # Keys and values of this call by block, for blocks that read another's.
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def real_BT1(self, x_BTD: Tensor) -> Tensor | None:
        """1 for tokens and 0 for padding of this call, or None."""
        return None if self.mask_BS is None else self.mask_BS[:, -x_BTD.shape[1] :, None].to(x_BTD.dtype)

    def convolve(self, x_BTX: Tensor, weight_XW: Tensor, index: int) -> Tensor:
        """Causal depthwise convolution, behind what the cache remembers of its input."""
        (_, T, X), W = x_BTX.shape, weight_XW.shape[1]
        if (real_BT1 := self.real_BT1(x_BTX)) is not None:
            x_BTX = x_BTX * real_BT1
        x_BXT = x_BTX.transpose(1, 2)
        if self.cache is not None:
            x_BXT = self.cache.layers[index].update_conv_state(x_BXT, conv_kernel_size=W)
        x_BXT = functional.pad(x_BXT, (W - 1, 0))[..., -(T + W - 1) :]
        return functional.conv1d(x_BXT, weight_XW[:, None].to(x_BXT.dtype), groups=X).transpose(1, 2)

    def recur(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, index: int) -> Tensor:
        """S_t = e^{g} S_{t-1} + k (beta (v - k^T e^{g} S_{t-1}))^T, or without beta e^{g} S_{t-1} + k v^T; o = S_t^T q.

        Args:
            q, k: [B, T, H, K]; v: [B, T, H, V].
            log_decay: [B, T, H, 1] or [B, T, H, K].
            beta: [B, T, H] or None.

        Returns:
            o [B, T, H, V] in v's dtype. States are fp32.
        """
        dtype, layer = v.dtype, None if self.cache is None else self.cache.layers[index]
        q, k, v, log_decay = (x.float() for x in (q, k, v, log_decay))
        if (real := self.real_BT1(q.flatten(2))) is not None:
            # Padding writes nothing, and nothing is forgotten over it.
            k, log_decay = k * real[..., None], log_decay * real[..., None]
        state = None if layer is None else layer.recurrent_states[0]
        if state is None:
            state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
        outputs = []
        for t in range(q.shape[1]):
            state = log_decay[:, t, :, :, None].exp() * state
            written = v[:, t]
            if beta is not None:
                written = beta[:, t, :, None].float() * (written - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
            state = state + k[:, t, :, :, None] * written[:, :, None]
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        if layer is not None:
            layer.update_recurrent_state(state)
            # Convolutions set it, and not every linear layer has one.
            layer.has_previous_state[0] = True
        return torch.stack(outputs, dim=1).to(dtype)


def unit_length(x: Tensor) -> Tensor:
    """Vectors of the last dimension, in fp32, divided by their length."""
    x = x.float()
    return x * (x.square().sum(-1, keepdim=True) + LENGTH_EPS).rsqrt()


def rotate(x_BTHK: Tensor, position_BT: Tensor, rotary_dim: int, base: float) -> Tensor:
    """Turns the first channels of every head; halves are turned against each other."""
    if rotary_dim == 0:
        return x_BTHK
    exponent = torch.arange(0, rotary_dim, 2, device=x_BTHK.device, dtype=torch.float64) / rotary_dim
    angle = position_BT.to(torch.float64)[:, :, None, None] * base**-exponent
    cos, sin = angle.cos().float(), angle.sin().float()
    first, second, rest = x_BTHK.split([rotary_dim // 2, rotary_dim // 2, x_BTHK.shape[-1] - rotary_dim], dim=-1)
    first, second = first.float(), second.float()
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*(x.to(x_BTHK.dtype) for x in turned), rest], dim=-1)


def attend(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    past: Past,
    *,
    window: int | None = None,
    sink_H: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal softmax attention on all keys, or on those of a window: o [B, T, H * V].

    Keys are the newest S tokens; whether a query sees one is a matter of their distance and of padding.
    """
    (_, H, T, _), S, device = q_BHTK.shape, k_BGSK.shape[2], q_BHTK.device
    last = past.length + T
    query_T1 = torch.arange(last - T, last, device=device)[:, None]
    key_S = torch.arange(last - S, last, device=device)
    seen = key_S <= query_T1
    if window is not None:
        seen = seen & (query_T1 - key_S < window)
    seen = seen[None, None]
    if past.mask_BS is not None:
        # A query that is padding sees itself: a row of nothing would be no number.
        seen = seen & (past.mask_BS[:, None, None, last - S : last].bool() | (key_S == query_T1))
    bias = torch.zeros(seen.shape, dtype=q_BHTK.dtype, device=device).masked_fill(~seen, -torch.inf)
    groups = H // k_BGSK.shape[1]
    k_BHSK, v_BHSV = (x.repeat_interleave(groups, dim=1) for x in (k_BGSK, v_BGSV))
    if sink_H is not None:
        # One more key that holds nothing: its logit takes a share of the softmax.
        k_BHSK, v_BHSV = (functional.pad(x, (0, 0, 0, 1)) for x in (k_BHSK, v_BHSV))
        sink = sink_H.to(bias.dtype)[None, :, None, None].expand(len(bias), -1, T, 1)
        bias = torch.cat([bias.expand(-1, H, -1, -1), sink], dim=-1)
    o_BHTV = functional.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSV, attn_mask=bias, scale=scale)
    return o_BHTV.transpose(1, 2).flatten(2)


class SoftmaxAttention(nn.Module):
    """F, S, and R and r, which read the keys and values of a block below."""

    def __init__(self, block: dict, d_model: int, index: int) -> None:
        super().__init__()
        options = self.options = block["attention"]
        self.index, self.source = index, block["source"]
        self.window = options["window"] if block["letter"] in "Sr" else None
        H, G, K = options["n_heads"], options["n_kv_heads"], options["head_dim"]
        owns = self.source == index
        self.widths = [H * K, H * K if options["output_gate"] else 0, *([G * K, G * K] if owns else [0, 0])]
        self.to_inner = Projection(d_model, sum(self.widths), bias=options["qkv_bias"])
        self.to_out = Projection(H * K, d_model, bias=options["out_bias"])
        whole = options["qk_norm_whole"]
        self.q_norm = self._norm(H * K if whole else K)
        self.k_norm = self._norm(G * K if whole else K) if owns else nn.Identity()
        self.sink_H = nn.Parameter(torch.zeros(H)) if options["sink_logits"] else None

    def _norm(self, width: int) -> nn.Module:
        options = self.options
        return Norm(width, options["norm_eps"], options["unit_offset"]) if options["qk_norm"] else nn.Identity()

    def _heads(self, x_BTX: Tensor, norm: nn.Module, position_BT: Tensor) -> Tensor:
        K, whole = self.options["head_dim"], self.options["qk_norm_whole"]
        x_BTHK = (norm(x_BTX) if whole else x_BTX).unflatten(-1, (-1, K))
        x_BTHK = x_BTHK if whole else norm(x_BTHK)
        return rotate(x_BTHK, position_BT, self.options["rotary_dim"], self.options["rope_base"]).transpose(1, 2)

    def forward(self, x_BTD: Tensor, past: Past) -> Tensor:
        q, gate, k, v = self.to_inner(x_BTD).split(self.widths, dim=-1)
        if self.source == self.index:
            k_BGSK = self._heads(k, self.k_norm, past.position_BT)
            v_BGSK = v.unflatten(-1, (-1, self.options["head_dim"])).transpose(1, 2)
            if past.cache is not None:
                k_BGSK, v_BGSK = past.cache.update(k_BGSK, v_BGSK, self.index)
            past.kv[self.index] = k_BGSK, v_BGSK
        k_BGSK, v_BGSK = past.kv[self.source]
        q_BHTK = self._heads(q, self.q_norm, past.position_BT)
        o_BTX = attend(q_BHTK, k_BGSK, v_BGSK, past, window=self.window, sink_H=self.sink_H)
        if self.options["output_gate"]:
            o_BTX = o_BTX * gate.float().sigmoid().to(o_BTX.dtype)
        return self.to_out(o_BTX)


class LatentAttention(nn.Module):
    """A: keys and values of all heads are products of one latent per token, which is what is kept, with key channels
    that all heads share."""

    def __init__(self, block: dict, d_model: int, index: int) -> None:
        super().__init__()
        options = self.options = block["attention"]
        self.index = index
        (H, K, R, V, C, _), Q, eps = options["latent_shape"], options["latent_query_dim"], options["norm_eps"]
        self.widths = [Q or H * (R + K), C, R]
        self.to_inner = Projection(d_model, sum(self.widths), bias=False)
        self.q_norm = Norm(Q, eps) if Q else nn.Identity()
        self.to_query = Projection(Q, H * (R + K), bias=False) if Q else nn.Identity()
        self.kv_norm = Norm(C, eps)
        self.to_heads = Projection(C, H * (K + V), bias=False)
        self.to_out = Projection(H * V, d_model, bias=False)

    def forward(self, x_BTD: Tensor, past: Past) -> Tensor:
        H, K, R, V, _, turned = self.options["latent_shape"]
        q, latent_BTC, shared_BTR = self.to_inner(x_BTD).split(self.widths, dim=-1)
        where = (past.position_BT, turned, self.options["rope_base"])
        q_BHTK = rotate(self.to_query(self.q_norm(q)).unflatten(-1, (H, R + K)), *where).transpose(1, 2)
        latent_B1SC = self.kv_norm(latent_BTC)[:, None]
        shared_B1SR = rotate(shared_BTR[:, :, None], *where).transpose(1, 2)
        if past.cache is not None:
            latent_B1SC, shared_B1SR = past.cache.update(latent_B1SC, shared_B1SR, self.index)
        k, v = self.to_heads(latent_B1SC[:, 0]).split([H * K, H * V], dim=-1)
        k_BHSK, v_BHSV = k.unflatten(-1, (H, K)).transpose(1, 2), v.unflatten(-1, (H, V)).transpose(1, 2)
        k_BHSK = torch.cat([shared_B1SR.expand(-1, H, -1, -1), k_BHSK], dim=-1)
        return self.to_out(attend(q_BHTK, k_BHSK, v_BHSV, past, scale=self.options["latent_scale"]))


class LightningAttention(nn.Module):
    """L: a fixed decay per head and block."""

    def __init__(self, block: dict, d_model: int, index: int) -> None:
        super().__init__()
        self.options, self.index = block["attention"], index
        H, K, V = self.options["linear_shape"]
        self.to_inner = Projection(d_model, 2 * H * (K + V), bias=False)
        self.to_out = Projection(H * V, d_model, bias=False)
        self.norm = Norm(H * V, self.options["norm_eps"])

    def forward(self, x_BTD: Tensor, past: Past) -> Tensor:
        H, K, V = self.options["linear_shape"]
        qkv, gate = self.to_inner(x_BTD).split([H * (2 * K + V), H * V], dim=-1)
        q, k, v = functional.silu(qkv).split([H * K, H * K, H * V], dim=-1)
        q, k, v = q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (H, V))
        log_decay = torch.tensor(self.options["log_decays"], dtype=torch.float32, device=x_BTD.device)
        o = past.recur(q, k, v, log_decay[:, None].expand(*q.shape[:3], 1), None, self.index)
        o_BTX = self.norm(o.flatten(2).float()) * gate.float().sigmoid()
        return self.to_out(o_BTX.to(x_BTD.dtype))


class MixedAttention(nn.Module):
    """M: softmax heads and heads with a fixed decay side by side."""

    def __init__(self, block: dict, d_model: int, index: int) -> None:
        super().__init__()
        options = self.options = block["attention"]
        self.index = index
        (H, G, J), (_, K, V), W = options["mixed_heads"], options["linear_shape"], options["head_dim"]
        gate = H * W if options["output_gate"] else 0
        self.widths = [H * W, gate, G * W, G * W, J * (2 * K + V), J * V]
        self.to_inner = Projection(d_model, sum(self.widths), bias=False)
        self.to_out = Projection(H * W + J * V, d_model, bias=False)
        self.q_norm, self.k_norm = (
            Norm(W, options["norm_eps"]) if options["qk_norm"] else nn.Identity() for _ in range(2)
        )
        self.sink_H = nn.Parameter(torch.zeros(H)) if options["sink_logits"] else None
        self.norm = Norm(J * V, options["norm_eps"])

    def forward(self, x_BTD: Tensor, past: Past) -> Tensor:
        (_, _, J), (_, K, V), W = self.options["mixed_heads"], self.options["linear_shape"], self.options["head_dim"]
        q, gate, k, v, linear_qkv, linear_gate = self.to_inner(x_BTD).split(self.widths, dim=-1)
        where = (past.position_BT, self.options["rotary_dim"], self.options["rope_base"])
        q_BHTK, k_BGSK = (
            rotate(norm(x.unflatten(-1, (-1, W))), *where).transpose(1, 2)
            for x, norm in ((q, self.q_norm), (k, self.k_norm))
        )
        v_BGSK = v.unflatten(-1, (-1, W)).transpose(1, 2)
        if past.cache is not None:
            k_BGSK, v_BGSK = past.cache.update(k_BGSK, v_BGSK, self.index)
        o_BTX = attend(q_BHTK, k_BGSK, v_BGSK, past, window=self.options["mixed_window"], sink_H=self.sink_H)
        if self.options["output_gate"]:
            o_BTX = o_BTX * gate.float().sigmoid().to(o_BTX.dtype)
        parts = functional.silu(linear_qkv).split([J * K, J * K, J * V], dim=-1)
        q, k, v = (part.unflatten(-1, (J, -1)) for part in parts)
        log_decay = torch.tensor(self.options["log_decays"], dtype=torch.float32, device=x_BTD.device)
        o = past.recur(q, k, v, log_decay[:, None].expand(*q.shape[:3], 1), None, self.index)
        linear_o_BTX = self.norm(o.flatten(2).float()) * linear_gate.float().sigmoid()
        return self.to_out(torch.cat([o_BTX, linear_o_BTX.to(o_BTX.dtype)], dim=-1))


class DecayGate(nn.Module):
    """Log-decays of a delta rule or of Mamba-2: one rate per head, one bias per head or channel."""

    def __init__(self, n_heads: int, n_channels: int) -> None:
        super().__init__()
        self.A_log_H = nn.Parameter(torch.zeros(n_heads))
        self.dt_bias = nn.Parameter(torch.zeros(n_heads * n_channels))

    def forward(self, a_BTX: Tensor) -> Tensor:
        step = functional.softplus(a_BTX.float() + self.dt_bias.float())
        return -self.A_log_H.float().exp()[:, None] * step.unflatten(-1, (len(self.A_log_H), -1))


class DeltaAttention(nn.Module):
    """G (a decay per head) and K (a decay per key channel): the state is corrected by the delta rule."""

    def __init__(self, block: dict, d_model: int, index: int) -> None:
        super().__init__()
        options = self.options = block["attention"]
        self.index, self.by_channel = index, block["letter"] == "K"
        (H, K, V), G = options["linear_shape"], options["key_heads"]
        self.parts = [G * K, G * K, H * V]
        X = sum(self.parts)
        self.widths = [X, V, K, H] if self.by_channel else [X, H * V, H, H]
        self.to_inner = Projection(d_model, sum(self.widths), bias=False)
        if self.by_channel:
            self.to_gate, self.to_decay = Projection(V, H * V, bias=False), Projection(K, H * K, bias=False)
        self.conv_XW = nn.Parameter(torch.zeros(X, options["conv_width"]))
        self.decay_gate = DecayGate(H, K if self.by_channel else 1)
        self.norm = Norm(V, options["norm_eps"])
        self.to_out = Projection(H * V, d_model, bias=False)

    def forward(self, x_BTD: Tensor, past: Past) -> Tensor:
        H, K, V = self.options["linear_shape"]
        qkv, gate, a, b = self.to_inner(x_BTD).split(self.widths, dim=-1)
        if self.by_channel:
            gate, a = self.to_gate(gate), self.to_decay(a)
        qkv = functional.silu(past.convolve(qkv, self.conv_XW, self.index))
        q, k, v = qkv.split(self.parts, dim=-1)
        shared = H // self.options["key_heads"]
        q, k = (unit_length(x.unflatten(-1, (-1, K))).repeat_interleave(shared, dim=2) for x in (q, k))
        beta = b.float().sigmoid()
        o = past.recur(q * K**-0.5, k, v.unflatten(-1, (H, V)), self.decay_gate(a), beta, self.index)
        activated = gate.float().sigmoid() if self.by_channel else functional.silu(gate.float())
        o_BTHV = self.norm(o.float()) * activated.unflatten(-1, (H, V))
        return self.to_out(o_BTHV.flatten(2).to(x_BTD.dtype))


class Mamba2(nn.Module):
    """D: the time step of a token says how much is written and how much forgotten."""

    def __init__(self, block: dict, d_model: int, index: int) -> None:
        super().__init__()
        options = self.options = block["attention"]
        self.index = index
        (H, K, V), G = options["linear_shape"], options["mamba_groups"]
        self.parts = [G * K, G * K, H * V]
        X = sum(self.parts)
        self.widths = [X, H * V, H]
        self.to_inner = Projection(d_model, sum(self.widths), bias=False)
        self.conv_XW = nn.Parameter(torch.zeros(X, options["conv_width"]))
        self.conv_bias_X = nn.Parameter(torch.zeros(X))
        self.decay_gate = DecayGate(H, 1)
        self.skip_H = nn.Parameter(torch.ones(H))
        self.norm_X = nn.Parameter(torch.ones(H * V))
        self.to_out = Projection(H * V, d_model, bias=False)

    def forward(self, x_BTD: Tensor, past: Past) -> Tensor:
        (H, K, V), G = self.options["linear_shape"], self.options["mamba_groups"]
        qkv, gate, step = self.to_inner(x_BTD).split(self.widths, dim=-1)
        qkv = past.convolve(qkv, self.conv_XW, self.index) + self.conv_bias_X.to(qkv.dtype)
        q, k, v = functional.silu(qkv).split(self.parts, dim=-1)
        q, k = (x.unflatten(-1, (G, K)).repeat_interleave(H // G, dim=2) for x in (q, k))
        v = v.unflatten(-1, (H, V))
        step_BTH = functional.softplus(step.float() + self.decay_gate.dt_bias.float())
        log_decay = -self.decay_gate.A_log_H.float().exp() * step_BTH
        written = (v * step_BTH[..., None]).to(v.dtype)
        o = past.recur(q, k, written, log_decay[..., None], None, self.index) + self.skip_H.float()[:, None] * v
        gated = o.flatten(2) * functional.silu(gate.to(o.dtype))
        grouped = gated.unflatten(-1, (G, -1))
        normed = functional.rms_norm(grouped, grouped.shape[-1:], eps=self.options["norm_eps"]).flatten(-2)
        return self.to_out((normed * self.norm_X.float()).to(x_BTD.dtype))


class ShortConvolution(nn.Module):
    """C: a convolution between two gates."""

    def __init__(self, block: dict, d_model: int, index: int) -> None:
        super().__init__()
        self.index = index
        X, W = block["attention"]["short_conv_channels"], block["attention"]["conv_width"]
        self.to_inner = Projection(d_model, 3 * X, bias=False)
        self.conv_XW = nn.Parameter(torch.zeros(X, W))
        self.to_out = Projection(X, d_model, bias=False)

    def forward(self, x_BTD: Tensor, past: Past) -> Tensor:
        before, behind, u = self.to_inner(x_BTD).chunk(3, dim=-1)
        return self.to_out(behind * past.convolve(before * u, self.conv_XW, self.index))


ATTENTION = {
    **dict.fromkeys("FSRr", SoftmaxAttention),
    **{"A": LatentAttention, "L": LightningAttention, "M": MixedAttention, "D": Mamba2, "C": ShortConvolution},
    **dict.fromkeys("GK", DeltaAttention),
}
