"""Block sizes of mixed_attention's common launch."""

from functools import partial

from triton_kernels.common.launch_tables import Tables, launch_table
from triton_kernels.softmax.launch_tables import WIDTHS

# The common launch. Small blocks of queries: two programs then share a processor, so that a scan, which waits for
# memory, has a block of queries beside it. fp32 products run on the plain
# multipliers: small blocks, one row for every architecture.
MIXED_BLOCKS = partial(launch_table, "BLOCK_M BLOCK_N BLOCK CHUNK", WIDTHS)
MIXED_FORWARD: Tables = (
    MIXED_BLOCKS(
        sm_80=[(64, 64, 32, 64, 4, 2), (64, 32, 32, 32, 4, 3), (64, 32, 16, 16, 8, 2)],
        sm_90=[(64, 64, 32, 64, 4, 3), (64, 64, 32, 64, 4, 2), (64, 32, 16, 16, 8, 2)],
        sm_100=[(64, 64, 32, 64, 8, 2), (64, 64, 16, 64, 4, 2), (64, 64, 16, 64, 8, 2)],
    ),
    MIXED_BLOCKS(sm_80=[(32, 32, 16, 16, 8, 1), (16, 16, 16, 16, 8, 1), (16, 16, 16, 16, 8, 1)]),
)
