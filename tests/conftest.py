"""One choice for the whole test process, made before anything imports Triton: kernels are interpreted (see
tests/triton_kernels/conftest.py).

Triton's own library functions (cumsum, say) are fixed as compiled or interpreted when `triton` is imported, which other
parts of torch do on their own: a conftest further down would come too late.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
