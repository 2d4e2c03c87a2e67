"""What the compiler made of a kernel: registers, spills, instructions and occupancy, read from its cubin with the tools in the Triton wheel."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

# SASS opcodes by what they tell. Hopper's tensor cores are HGMMA, Blackwell's UTC*MMA; HMMA is Ampere's, and the slow way on the later ones.
OPCODES = {
    "hgmma": r"HGMMA",
    "hmma": r"HMMA",
    "utcmma": r"UTC\w*MMA",
    "ldgsts": r"LDGSTS",
    "utmaldg": r"UTMALDG",
    "ldg128": r"LDG\.[\w.]*128",
    "mufu": r"MUFU",
    "spills": r"(?:LDL|STL)\b",
}

# Shared memory of one multiprocessor, bytes.
SHARED_PER_PROCESSOR = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def report_binary(kernel: Any) -> dict[str, int]:
    """Take apart one compiled kernel (`triton.compiler.CompiledKernel`): registers and stack (bytes) per thread, shared memory (bytes) and warps per
    block, blocks resident at once on one multiprocessor, and how often each of OPCODES occurs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage, sass = (
            subprocess.run([TOOLS / tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage[:200]
    registers, stack = map(int, match.groups())
    shared, warps = int(kernel.metadata.shared), int(kernel.metadata.num_warps)
    blocks = resident_blocks(registers, warps, shared, kernel.metadata.target.arch)
    counts = {name: len(re.findall(rf"\b{pattern}", sass)) for name, pattern in OPCODES.items()}
    return {"registers": registers, "stack": stack, "shared": shared, "warps": warps, "blocks": blocks} | counts


def resident_blocks(registers: int, warps: int, shared: int, architecture: int) -> int:
    """Blocks one multiprocessor holds: the least of what 64 K registers (given out by 256 per warp), 64 warps, the shared memory (1 KiB more per
    block than asked for) and 32 block slots allow."""
    registers_per_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // (registers_per_warp * warps)
    by_shared = SHARED_PER_PROCESSOR[architecture] // (shared + 1024)
    return min(by_registers, 64 // warps, by_shared, 32)
