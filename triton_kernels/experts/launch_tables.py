"""Block sizes of grouped_mlp's kernels."""

from triton_kernels.common.launch_tables import launch_table

# The sum over a token's rows: rows and channels of a step.
SUM_ROWS, SUM_WIDTH = 8, 512
BLOCKS = "BLOCK_M BLOCK_N BLOCK_K"
# Up to model width 1024 the products wait for memory, and two programs on a processor hide each other's loads and
# stores; beyond, arithmetic is what there is most of, and the largest tile that fits the registers reuses its operands
# best.
WIDTHS = (1024, 2**20)
# fp32 products run on the plain multipliers: small blocks, one table for every architecture and kernel.
SINGLE = launch_table(BLOCKS, WIDTHS[1:], sm_80=[(32, 32, 32, 4, 2)])
# Of gate and up, BLOCK_N counts either.
GATE_UP = (
    launch_table(BLOCKS, WIDTHS, sm_80=[(64, 64, 32, 4, 3)] * 2, sm_90=[(128, 64, 64, 8, 3), (128, 128, 64, 8, 3)]),
    SINGLE,
)
ROW_PRODUCT = (
    launch_table(BLOCKS, WIDTHS, sm_80=[(128, 64, 32, 4, 3)] * 2, sm_90=[(128, 128, 64, 8, 3), (128, 256, 64, 8, 3)]),
    SINGLE,
)
ACTIVATION_GRADIENT = (
    launch_table(BLOCKS, WIDTHS, sm_80=[(128, 64, 32, 8, 3)] * 2, sm_90=[(128, 64, 64, 8, 3), (128, 128, 64, 8, 3)]),
    SINGLE,
)
WEIGHT_GRADIENT = (
    launch_table(BLOCKS, WIDTHS, sm_80=[(64, 128, 32, 4, 3)] * 2, sm_90=[(128, 128, 64, 8, 3), (128, 256, 64, 8, 3)]),
    SINGLE,
)
