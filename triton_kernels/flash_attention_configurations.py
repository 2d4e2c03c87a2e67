"""Block sizes of the flash attention kernels, and the op's entries for inspect, bench and gpu-check.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, K key width, V value width.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from triton_kernels.configurations import Cost, LaunchOptions, LaunchTable, Operation, random_inputs
from triton_kernels.flash_attention import flash_attention

MAX_WIDTH = 256

# fp16 and bf16 first, fp32 second: `tables[dtype is fp32]`.
Tables = tuple[LaunchTable, LaunchTable]


def _options(block_m: int, block_n: int, warps: int, stages: int) -> tuple[LaunchOptions]:
    return (LaunchOptions(blocks={"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps, num_stages=stages),)


# fp32 products run on the plain multipliers: small blocks, one table for every architecture.
SINGLE = LaunchTable(lines={(80, 64): _options(32, 32, 8, 1), (80, 128): _options(32, 32, 4, 1), (80, 256): _options(16, 32, 4, 1)})

FORWARD: Tables = (
    LaunchTable(
        lines={
            (80, 64): _options(64, 64, 4, 3),
            (80, 128): _options(128, 32, 8, 3),
            (80, 256): _options(64, 32, 8, 2),
            (90, 64): _options(128, 128, 8, 3),
            (90, 128): _options(128, 64, 8, 3),
            (90, 256): _options(64, 64, 8, 2),
            (100, 64): _options(128, 64, 8, 3),
            (100, 128): _options(128, 64, 8, 3),
            (100, 256): _options(64, 64, 8, 2),
        }
    ),
    SINGLE,
)
QUERY_GRADIENT: Tables = (
    LaunchTable(
        lines={
            (80, 64): _options(64, 64, 4, 3),
            (80, 128): _options(64, 64, 8, 2),
            (80, 256): _options(64, 32, 8, 1),
            (90, 64): _options(128, 64, 8, 3),
            (90, 128): (*_options(64, 64, 4, 2), *_options(64, 32, 4, 3)),
            (90, 256): _options(64, 32, 8, 2),
        }
    ),
    SINGLE,
)
KEY_VALUE_GRADIENT: Tables = (
    LaunchTable(
        lines={
            (80, 64): _options(32, 64, 4, 2),
            (80, 128): _options(32, 64, 8, 2),
            (80, 256): _options(16, 64, 8, 2),
            (90, 64): _options(64, 128, 8, 2),
            (90, 128): (*_options(32, 64, 4, 2), *_options(32, 64, 8, 2)),
            (90, 256): _options(16, 64, 8, 2),
        }
    ),
    SINGLE,
)


def _inputs(
    dtype: torch.dtype, device: str, *, B: int, T: int, H: int, G: int, K: int, V: int, sinks: int = 0, sequences: int = 0, **_: int
) -> dict[str, Any]:
    """sinks: one logit per head; sequences: T is cut into so many, the first one empty."""
    shapes = {"q_BTHK": (B, T, H, K), "k_BSGK": (B, T, G, K), "v_BSGV": (B, T, G, V)} | ({"sinks_H": (H,)} if sinks else {})
    inputs: dict[str, Any] = {**random_inputs(0, dtype, device, shapes)}
    if sequences:
        inputs["cu_seqlens"] = torch.tensor([0, *(T * n // (sequences - 1) for n in range(sequences))]).to(device)
    return inputs


def _cost(element_size: int, *, B: int, T: int, H: int, G: int, K: int, V: int, W: int = 0, sequences: int = 0, **_: int) -> tuple[Cost, Cost]:
    """Visible pairs only: a product of the forward or backward costs 2 K (or 2 V) per pair. Saved statistics are fp32, one per query and head."""
    n_runs = max(1, sequences - 1)
    length = T // n_runs
    window = min(W or length, length)
    pairs = B * H * n_runs * (window * (window + 1) // 2 + (length - window) * window)
    queries, keys = B * T * H, B * T * G
    forward_bytes = element_size * (queries + keys) * (K + V) + 4 * queries
    backward_bytes = element_size * (queries * (2 * K + 2 * V) + keys * 2 * (K + V)) + 4 * queries
    return Cost(flops=2 * pairs * (K + V), bytes=forward_bytes), Cost(flops=2 * pairs * (3 * K + 2 * V), bytes=backward_bytes)


def _sdpa(backend_name: str):
    """Torch's fused attention on one of its backends."""

    def call(q_BTHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGV: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
        with sdpa_kernel(getattr(SDPBackend, backend_name)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return call


def _flex_attention(window: int | None):
    """FlexAttention with a causal (and windowed) block mask, compiled once."""
    compiled = []

    def call(q_BTHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGV: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        T = q_BTHK.shape[1]
        if not compiled:

            def mask(b, h, t, s):
                return (s <= t) if window is None else (s <= t) & (s > t - window)

            compiled.append((torch.compile(flex_attention), {}, mask))
        attend, block_masks, mask = compiled[0]
        if T not in block_masks:
            block_masks[T] = create_block_mask(mask, None, None, T, T, device=q_BTHK.device.type)
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
        return attend(q, k, v, block_mask=block_masks[T], enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return call


def _flash_attn(q_BTHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGV: torch.Tensor, window: int | None = None) -> torch.Tensor:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func(q_BTHK, k_BSGK, v_BSGV, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0))


def _dense(q_BTHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGV: torch.Tensor) -> torch.Tensor:
    """The plain formula with all its scores, as eager attention layers write it."""
    T, group = q_BTHK.shape[1], q_BTHK.shape[2] // k_BSGK.shape[2]
    k_BSHK, v_BSHV = (x.repeat_interleave(group, dim=2) for x in (k_BSGK, v_BSGV))
    s_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * q_BTHK.shape[-1] ** -0.5
    s_BHTS = s_BHTS.masked_fill(torch.ones(T, T, dtype=torch.bool, device=q_BTHK.device).triu(1), -torch.inf)
    return torch.einsum("bhts,bshv->bthv", s_BHTS.softmax(-1, dtype=torch.float32).to(v_BSHV.dtype), v_BSHV)


def _operation(name: str, shape: dict[str, int], check_shapes: tuple[dict[str, int], ...], **options: Any) -> Operation:
    window = shape.get("W")
    plain = not {"sinks", "sequences"} & shape.keys()
    peers = {"flash-attn": partial(_flash_attn, window=window), "FlexAttention": _flex_attention(window)} if plain else {}
    if window is None and plain:
        peers |= {"SDPA cuDNN": _sdpa("CUDNN_ATTENTION"), "SDPA flash": _sdpa("FLASH_ATTENTION")}
    return Operation(
        name=name,
        call=partial(flash_attention, window=window, **options),
        inputs=_inputs,
        cost=_cost,
        inspect_shape=shape,
        check_shapes=check_shapes,
        bench_shapes=(shape, {**shape, "B": 4}, {**shape, "T": 16384}) if plain else (shape,),
        cpu_shape={**shape, "T": 2048, "H": 8, "G": shape["G"] // 2, "K": 64, "V": 64},
        peers=peers,
        cpu_peers={"dense formula": _dense} if window is None and plain else {},
    )


def _heads(T: int, K: int, V: int, H: int = 4, G: int = 2, **more: int) -> dict[str, int]:
    return {"B": 2, "T": T, "H": H, "G": G, "K": K, "V": V, **more}


OPERATIONS = (
    _operation(
        "flash_attention",
        {"B": 1, "T": 4096, "H": 16, "G": 16, "K": 128, "V": 128},
        (_heads(1, 64, 64), _heads(63, 32, 32), _heads(257, 64, 64), _heads(1000, 128, 128, H=3, G=3), _heads(300, 256, 256), _heads(300, 192, 128)),
    ),
    _operation(
        "flash_attention/grouped", {"B": 1, "T": 4096, "H": 16, "G": 2, "K": 128, "V": 128}, (_heads(257, 128, 128, H=16), _heads(100, 64, 64))
    ),
    _operation(
        "flash_attention/window",
        {"B": 1, "T": 4096, "H": 16, "G": 4, "K": 128, "V": 128, "W": 1024},
        (_heads(1000, 128, 128, W=1024), _heads(1000, 64, 64, W=1024), _heads(1500, 128, 128, W=1024), _heads(1300, 256, 256, W=1024)),
    ),
    _operation(
        "flash_attention/sinks",
        {"B": 1, "T": 4096, "H": 16, "G": 4, "K": 128, "V": 128, "W": 1024, "sinks": 1},
        (_heads(257, 128, 128, sinks=1), _heads(1500, 64, 64, sinks=1)),
    ),
    _operation(
        "flash_attention/packed",
        {"B": 1, "T": 4096, "H": 16, "G": 4, "K": 128, "V": 128, "sequences": 5},
        ({**_heads(257, 128, 128, sequences=5), "B": 1}, {**_heads(1000, 64, 64, sequences=9), "B": 1}),
    ),
    _operation("flash_attention/width_64", {"B": 1, "T": 4096, "H": 16, "G": 16, "K": 64, "V": 64}, (_heads(257, 64, 64),)),
    _operation("flash_attention/width_256", {"B": 1, "T": 4096, "H": 8, "G": 8, "K": 256, "V": 256}, (_heads(257, 256, 256),)),
)
