"""Which dtype this machine multiplies fast."""

import torch


def fast_dtype() -> str:
    """ "bfloat16" where products in it are fast (a GPU that has it, a CPU with AVX512-BF16 or AMX), otherwise
    "float32".

    Elsewhere a CPU converts every element on the way: slower than fp32, and less exact.
    """
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # Private names, so a torch that renames them falls back to what is right everywhere.
    supported = (
        getattr(torch.cpu, name, lambda: False) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return "bfloat16" if any(check() for check in supported) else "float32"
