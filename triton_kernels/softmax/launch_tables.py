"""Block sizes of the softmax kernels: flash_attention and flash_decode."""

from functools import partial

from triton_kernels.common.launch_tables import Tables, launch_table

WIDTHS = (64, 128, 256)
# Three tables each: for 2-byte elements, for fp32, and for 2-byte elements where a few more registers are needed: in
# packed sequences, with rotary queries, and at lengths that are no multiple of 16.
BLOCKS = partial(launch_table, "BLOCK_M BLOCK_N", WIDTHS)
# fp32 products run on the plain multipliers: small blocks, one row for every architecture.
SINGLE = BLOCKS(sm_80=[(32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)])
FORWARD_80 = [(64, 64, 4, 3), (128, 32, 8, 3), (64, 32, 8, 2)]
FORWARD_100 = [(128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)]
FORWARD: Tables = (
    BLOCKS(sm_80=FORWARD_80, sm_90=[(128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)], sm_100=FORWARD_100),
    SINGLE,
    BLOCKS(sm_80=FORWARD_80, sm_90=[(128, 128, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)], sm_100=FORWARD_100),
)
QUERY_80 = [(64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 8, 1)]
QUERY_GRADIENT: Tables = (
    BLOCKS(
        sm_80=QUERY_80,
        sm_90=[(128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 8, 2)],
        sm_100=[(64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 8, 2)],
    ),
    SINGLE,
    BLOCKS(
        sm_80=QUERY_80,
        sm_90=[(128, 64, 8, 3), (64, 32, 4, 3), (64, 32, 8, 2)],
        sm_100=[(64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 8, 2)],
    ),
)
KEY_VALUE_80 = [(32, 64, 4, 2), (32, 64, 8, 2), (16, 64, 8, 2)]
KEY_VALUE_GRADIENT: Tables = (
    BLOCKS(sm_80=KEY_VALUE_80, sm_90=[(64, 128, 8, 2), (32, 64, 4, 2), (16, 64, 8, 2)]),
    SINGLE,
    BLOCKS(sm_80=KEY_VALUE_80, sm_90=[(64, 128, 8, 2), (32, 64, 8, 2), (16, 64, 8, 2)]),
)

DECODE_WIDTHS = (64, 128, 256, 1024)
SPLIT: Tables = (
    launch_table(
        "BLOCK_N",
        DECODE_WIDTHS,
        sm_80=[(64, 4, 3), (64, 4, 3), (32, 4, 2), (16, 4, 1)],
        sm_100=[(64, 4, 3), (32, 4, 3), (32, 4, 2), (16, 4, 1)],
    ),
    launch_table("BLOCK_N", DECODE_WIDTHS, sm_80=[(32, 4, 2), (32, 8, 1), (16, 8, 2), (16, 16, 1)]),
)
