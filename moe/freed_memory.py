"""Large freed tensors stay with the process instead of going back to the operating system.

The C library returns every large block at once and gets the next one as pages that the operating system has to clear:
0.5 to 2 ms per MB. A step of the expert layer at T=4096, D=512, E=80, F=256, k=12 asks for about 230 MB
(pre-activations and weight gradients), and clearing it took 12 % of the step's CPU time with the system's default pages
and about a quarter with large ones. Kept, the same memory serves later steps, but not at once: an aligned request does
not fit the freed block of its own size, so the first ones of a size still take new pages.
"""

import ctypes
import sys

# Of mallopt in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """For the rest of the process. Peak memory stays what it is, and is held until the end; telling it twice changes
    nothing.

    Returns:
        Whether the C library could be told so (glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    return bool(library.mallopt(M_MMAP_MAX, 0)) and bool(library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
