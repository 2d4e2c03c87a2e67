"""Large freed tensors stay with the process instead of going back to the operating system.

The C library returns every large block at once and gets the next one as pages that the operating system has to clear: 0.5 to 2 ms per MB. A step of
the expert layer at T=4096, D=512, E=80, F=256, k=12 asks for about 230 MB (pre-activations and weight gradients), so on a CPU this costs as
much as a third of its products. Kept, the same memory serves every step.
"""

import ctypes
import sys

# Of mallopt in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """For the rest of the process; True if the C library could be told so (glibc). Peak memory stays what it is, and is held until the end."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    return bool(library.mallopt(M_MMAP_MAX, 0)) and bool(library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
