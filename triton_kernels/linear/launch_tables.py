"""Block sizes of the linear-attention kernels."""

from triton_kernels.common.launch_tables import Tables, launch_table

# Decayed linear attention, for 2-byte elements and for fp32. Slices of the state widest first, each the widest that the
# offline compiler fits into registers without a spill in each pass, and a cap on the chunk length.
DECAYED: Tables = (
    launch_table(
        "BLOCK CHUNK",
        (64, 128, 256),
        sm_80=[(32, 64, 4, 2), (32, 32, 8, 2), (16, 16, 8, 1)],
        sm_90=[[(64, 64, 8, 2), (32, 64, 4, 2)], (32, 64, 4, 2), (16, 16, 8, 2)],
        sm_100=[(32, 64, 4, 2), (16, 64, 8, 2), (16, 64, 8, 2)],
    ),
    launch_table("BLOCK CHUNK", (64, 128, 256), sm_80=[(16, 16, 4, 1), (16, 16, 8, 1), (16, 16, 8, 1)]),
)
# Its gate's gradient is summed within slots of this many chunks: shorter ones move more bytes of state, longer ones
# pile up rounding errors.
ANCHOR = 4
# The delta rules, for a decay per token (or none) and for one per key channel, each for 2-byte elements and for fp32.
NARROW = launch_table("BLOCK", (128,), sm_80=[(16, 8, 1)])
WIDE = launch_table("BLOCK", (128,), sm_80=[(32, 8, 1)])
PREPARE: Tables = (
    launch_table("BLOCK", (128,), sm_80=[(128, 4, 1)]),
    WIDE,
    launch_table("BLOCK", (64, 128), sm_80=[(16, 8, 1), (16, 8, 1)], sm_90=[(32, 8, 1), (32, 8, 1)]),
    WIDE,
)
SCAN = launch_table("BLOCK", (128,), sm_80=[(16, 4, 2)], sm_90=[[(32, 4, 2), (16, 4, 2)]])
SCAN_FORWARD: Tables = (SCAN, NARROW, SCAN, NARROW)
SCAN_BACKWARD: Tables = (
    launch_table("BLOCK", (128,), sm_80=[(16, 4, 1)], sm_90=[[(32, 4, 2), (16, 4, 2)]], sm_100=[(16, 4, 2)]),
    NARROW,
    launch_table("BLOCK", (128,), sm_80=[(16, 4, 1)], sm_90=[[(32, 4, 2), (16, 4, 2)]], sm_100=[(16, 8, 2)]),
    NARROW,
)
# The pass that starts segments from those before them, forward and backward.
SEGMENTS = launch_table("BLOCK", (128,), sm_80=[(16, 8, 1)], sm_90=[(32, 8, 2)], sm_100=[(16, 8, 2)])
SCAN_SEGMENTS: Tables = (SEGMENTS, NARROW, SEGMENTS, NARROW)
GRADIENT = launch_table("BLOCK", (128,), sm_80=[(64, 8, 1)])
GRADIENTS: Tables = (GRADIENT, WIDE, GRADIENT, NARROW)
# Channels of one program of the gradients of a decay per channel, and rows of one that finishes them.
CHANNELS = 32
FINISH_ROWS = 32
