"""Cross-compile a kernel without a GPU, and count what came out."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qig_serve.kernels.launch import Kernel

SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory a program can have, by compute capability (CUDA programming guide)."""
TARGETS = tuple(SHARED_LIMIT)

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INTEGER = re.compile(
    r"(LOP3?|PLOP3|SHF|SHL|SHR|IMAD|IADD3?|IABS|LEA|PRMT|ISETP|SEL|MOV|IMNMX|VIADD|VIMNMX|BMSK|SGXT)$"
)
_TENSOR = re.compile(r"[HIQ]MMA|[HIQ]GMMA|UTC[A-Z]*MMA")


@dataclass(frozen=True)
class Counts:
    """What a compiled kernel takes; of the main loop, for a step of K by one warp."""

    registers: int
    shared: int
    """Bytes per program."""
    stack: int
    """Bytes of local memory per thread; spills go there."""
    spills: int
    """Local-memory instructions."""
    tensor_core: str
    """Its instruction, as PTX names it."""
    issued: int
    """Instructions of the main loop; 0 if there is none."""
    integer: int
    """Those of them on the integer pipe."""


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True
    ).stdout


def disassemble(cubin: bytes) -> tuple[list[str], dict[str, int], dict[str, int]]:
    """(instructions, label -> index, resource usage) of a cubin with one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        listing = _tool("nvdisasm", "-c", str(path))
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    return instructions, labels, {k: int(v) for k, v in re.findall(r"\b([A-Z]+):(\d+)", usage)}


def opcode(instruction: str) -> str:
    """The mnemonic without predicate and modifiers."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def main_loop(instructions: list[str], labels: dict[str, int]) -> list[str]:
    """The loop with most tensor-core instructions, shortest first; empty if there is none."""
    best: tuple[int, int, list[str]] = (0, 0, [])
    for i, instruction in enumerate(instructions):
        jump = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction)
        if jump and labels.get(jump[1], i + 1) <= i:
            body = instructions[labels[jump[1]] : i + 1]
            tensor = sum(bool(_TENSOR.match(opcode(line))) for line in body)
            best = max(best, (tensor, -len(body), body), key=lambda b: b[:2])
    return best[2]


def tensor_core(ptx: str) -> str:
    """The tensor-core instruction of the PTX, shortened."""
    found = re.search(
        r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\S*?(?:\.(m\d+n\d+k\d+)\S*|\.kind::(\S+))", ptx
    )
    if not found:
        return ""
    return f"{found[1].split('.')[0]} {found[2] or found[3]}"


def compile_kernel(kernel: Kernel, target: int) -> Any:
    """triton.compile as a launch with 16-byte aligned tensors would, for compute capability
    80..."""
    function = kernel.function
    names = function.arg_names
    early = {"PDL": target >= 90 and kernel.tile.early >= 0} if "PDL" in names else {}
    signature = {name: kernel.arguments.get(name, "constexpr") for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if kernel.arguments.get(name, "").startswith("*") or name in ("N", "K", "N_PAD")
    }
    constants = {**kernel.constants, **early}
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=kernel.options)


def count(kernel: Kernel, target: int) -> Counts:
    """Compile and count."""
    compiled = compile_kernel(kernel, target)
    instructions, labels, usage = disassemble(compiled.asm["cubin"])
    loop = collections.Counter(map(opcode, main_loop(instructions, labels)))
    every = collections.Counter(map(opcode, instructions))
    return Counts(
        registers=usage["REG"],
        shared=compiled.metadata.shared,
        stack=usage["STACK"],
        spills=every["STL"] + every["LDL"],
        tensor_core=tensor_core(compiled.asm["ptx"]),
        issued=loop.total(),
        integer=sum(n for op, n in loop.items() if _INTEGER.match(op)),
    )
