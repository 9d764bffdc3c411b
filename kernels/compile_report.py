"""Cross-compile the kernels without a GPU and count what came out: a benchmark on any machine.

    python -m qig_serve.kernels.compile_report [--arch 90 ...] [--json FILE]

For every kernel and tile of tiles.json: registers, shared memory, spills, the tensor-core
instruction in the PTX, and, in the SASS of the main loop, integer and issued instructions a weight
(of a thread's share of the tile's weights). Exit status 1 when a threshold is passed.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qig_serve.kernels import quantize_activation, tuning, w3a16, w4a8
from qig_serve.kernels.tuning import Tile

TARGETS = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory a program can have, by compute capability (CUDA programming guide)."""
MAX_INTEGER = {"w3a16": 1.2, "w4a8": 0.7}
"""Integer instructions a weight in the main loop of a decode tile."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INTEGER = re.compile(
    r"(LOP3?|PLOP3|SHF|SHL|SHR|IMAD|IADD3?|IABS|LEA|PRMT|ISETP|SEL|MOV|IMNMX|VIADD|VIMNMX|BMSK|SGXT)$"
)
_TENSOR = re.compile(r"[HIQ]MMA|[HIQ]GMMA|UTC[A-Z]*MMA")


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target, and what was counted."""

    kernel: str
    target: int
    dtype: str
    tile: str
    registers: int
    shared: int
    stack: int
    """Bytes of local memory a thread; spills go there."""
    spills: int
    """Local-memory instructions in the SASS."""
    tensor_core: str
    integer_per_weight: float | None
    issued_per_weight: float | None

    def problems(self) -> list[str]:
        """What is wrong with a tuned kernel, in words."""
        found = []
        where = f"{self.kernel} {self.dtype} sm_{self.target} {self.tile}"
        if self.spills or self.stack:
            found.append(f"{where}: {self.spills} spill instructions, {self.stack} B stack")
        if self.shared > SHARED_LIMIT[self.target]:
            found.append(f"{where}: {self.shared} B shared of {SHARED_LIMIT[self.target]}")
        if self.integer_per_weight is not None:
            if not self.tensor_core:
                found.append(f"{where}: no tensor-core instruction")
            most = MAX_INTEGER[self.kernel.split("_")[0]]
            if "decode" in self.kernel and self.integer_per_weight > most:
                found.append(f"{where}: {self.integer_per_weight:.2f} integer a weight > {most}")
        return found


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


def compile_kernel(
    kernel: Any,
    target: int,
    arguments: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    divisible: Iterable[str],
) -> Any:
    """triton.compile as a launch with 16-byte aligned tensors would."""
    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if arguments.get(name, "").startswith("*") or name in divisible
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _count(
    compiled: Any,
    name: str,
    target: int,
    dtype: str,
    tile: str,
    weights: float | None = None,
) -> Compiled:
    instructions, labels, usage = disassemble(compiled.asm["cubin"])
    loop = main_loop(instructions, labels)
    ops = collections.Counter(map(opcode, loop))
    integer = sum(count for op, count in ops.items() if _INTEGER.match(op))
    every = collections.Counter(map(opcode, instructions))
    return Compiled(
        kernel=name,
        target=target,
        dtype=dtype,
        tile=tile,
        registers=usage["REG"],
        shared=compiled.metadata.shared,
        stack=usage["STACK"],
        spills=every["STL"] + every["LDL"],
        tensor_core=tensor_core(compiled.asm["ptx"]),
        integer_per_weight=integer / weights if weights else None,
        issued_per_weight=len(loop) / weights if weights else None,
    )


def compile_tile(
    scheme: str, target: int, tile: Tile, dtype: str = "bf16", use_ptx: bool = True
) -> Compiled:
    """Compile the kernel of a tile for a target (80, ...) and count."""
    common = dict(M="i32", N="i32", K="i32")
    constants: dict[str, Any] = dict(
        BLOCK_M=tile.block_m, STAGES=tile.num_stages, HAS_BIAS=True, USE_PTX=use_ptx
    )
    if scheme == "w3a16":
        constants["ROWS"] = tile.block_n // 2
        arguments = dict(
            x_ptr=f"*{dtype}", lanes_ptr="*i16", scale_zero_ptr="*i32", bias_ptr=f"*{dtype}",
            out_ptr=f"*{dtype}", TILES="i32", **common,
        )  # fmt: skip
    else:
        constants["BLOCK_N"] = tile.block_n
        arguments = dict(
            codes_ptr="*i8", token_scale_ptr="*fp32", nibbles_ptr="*i8", channel_scale_ptr="*fp32",
            bias_ptr=f"*{dtype}", out_ptr=f"*{dtype}", N_PAD="i32", **common,
        )  # fmt: skip
    module = w3a16 if scheme == "w3a16" else w4a8
    weights: float | None = 128 * tile.block_n / (32 * tile.num_warps)
    divisible = ["N", "K", "N_PAD"]
    if tile.regime == "split_k":
        name = f"{scheme}_decode"
        constants["SPLIT"] = True
        partial = "*fp32" if scheme == "w3a16" else "*i32"
        a_split = "groups_a_split" if scheme == "w3a16" else "blocks_a_split"
        arguments |= {"workspace_ptr": partial, "counter_ptr": "*i32", a_split: "i32"}
    elif tile.regime == "prefill":
        name = f"{scheme}_prefill"
        constants["GROUP_M"] = tile.group_m
    else:
        name, weights = "w3a16_dequantize", None
        constants = {"USE_PTX": use_ptx}
        arguments = dict(
            lanes_ptr="*i16", scale_zero_ptr="*i32", weight_ptr=f"*{dtype}", N="i32", K="i32",
            TILES="i32",
        )  # fmt: skip
    kernel = getattr(module, f"{name}_kernel")
    warps = 4 if tile.regime == "dequantize" else tile.num_warps
    compiled = compile_kernel(kernel, target, arguments, constants, warps, divisible)
    shape = f"{tile.block_m}x{tile.block_n} {tile.num_warps}w {tile.num_stages}s"
    if tile.regime == "dequantize":
        shape = "128x128 4w"
    return _count(compiled, name, target, dtype, shape, weights)


def compile_quantizers(target: int, dtype: str = "bf16") -> Iterator[Compiled]:
    """The activation quantizers, for one token and many, at QUANTIZER_ROWS."""
    for name in QUANTIZERS:
        for block_k, warps in sorted(_quantizer_blocks(name)):
            compiled = compile_quantizer(name, target, dtype, block_k, warps)
            yield _count(compiled, name, target, dtype, f"{block_k} {warps}w")


QUANTIZERS = (
    "quantize", "rms_norm_quantize", "silu_mul_quantize",
    "halves", "rms_norm_halves", "silu_mul_halves",
    "rms_norm", "silu_mul",
)  # fmt: skip
QUANTIZER_ROWS = (3584, 18944)  # the shortest and the longest row of LAYER_SHAPES


def _quantizer_blocks(name: str) -> set[tuple[int, int]]:
    """(BLOCK_K, warps) of every variant that QUANTIZER_ROWS need."""
    if name in ("halves", "silu_mul_halves", "silu_mul"):
        return {tuple(quantize_activation.chunk_options().values())}  # type: ignore[arg-type]
    tokens = (1,) if name.startswith("rms_norm") else (1, quantize_activation.MANY_TOKENS)
    return {
        tuple(quantize_activation.row_options(k, m).values())  # type: ignore[misc]
        for k in QUANTIZER_ROWS
        for m in tokens
    }


def compile_quantizer(
    name: str, target: int, dtype: str, block_k: int, warps: int, pdl: bool = False
) -> Any:
    """One of QUANTIZERS, with a residual where it can have one."""
    x = f"*{dtype}"
    arguments = {
        "x_ptr": x, "residual_ptr": x, "weight_ptr": x, "added_ptr": x, "gate_up_ptr": x,
        "out_ptr": x, "codes_ptr": "*i8", "halves_ptr": "*i8", "scale_ptr": "*fp32",
        "sums_ptr": "*i32", "M": "i32", "K": "i32", "eps": "fp32",
    }  # fmt: skip
    constants: dict[str, Any] = {"BLOCK_K": block_k, "PDL": pdl}
    if name.startswith("rms_norm"):
        constants["HAS_RESIDUAL"] = True
    kernel = getattr(quantize_activation, f"{name}_kernel")
    arguments = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    return compile_kernel(kernel, target, arguments, constants, warps, ["K"])


def tuned_tiles(target: int) -> Iterator[tuple[str, Tile]]:
    """(scheme, tile) of every distinct tile of an architecture in tiles.json."""
    seen = set()
    for (architecture, scheme, _), rows in tuning.tile_table().items():
        for _, tile in rows:
            if architecture == f"sm_{target}" and (scheme, tile) not in seen:
                seen.add((scheme, tile))
                yield scheme, tile


def report(targets: Iterable[int], dtypes: Iterable[str] = ("bf16", "fp16")) -> Iterator[Compiled]:
    """Every kernel and tuned tile, target by target."""
    for target in targets:
        for dtype in dtypes:
            done = set()
            for scheme, tile in tuned_tiles(target):
                shape = (scheme, tile.regime, tile.block_m, tile.block_n, tile.num_warps)
                if (*shape, tile.num_stages) not in done:
                    done.add((*shape, tile.num_stages))
                    yield compile_tile(scheme, target, tile, dtype)
            yield from compile_quantizers(target, dtype)


_HEADER = (
    f"{'kernel':<20}{'target':<8}{'dtype':<6}{'tile':<17}{'regs':>5}{'shared':>8}{'spills':>7}"
    f"{'int/w':>7}{'issued/w':>9}  tensor core"
)


def row(c: Compiled) -> str:
    """A line of the table."""
    per_weight = " " * 16
    if c.integer_per_weight is not None and c.issued_per_weight is not None:
        per_weight = f"{c.integer_per_weight:>7.2f}{c.issued_per_weight:>9.2f}"
    return (
        f"{c.kernel:<20}{'sm_' + str(c.target):<8}{c.dtype:<6}{c.tile:<17}{c.registers:>5}"
        f"{c.shared:>8}{c.spills:>7}{per_weight}  {c.tensor_core}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if a threshold was passed."""
    parser = argparse.ArgumentParser(description=__doc__, prog="qig_serve.kernels.compile_report")
    parser.add_argument("--arch", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp16"), default=("bf16", "fp16"))
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args(arguments)
    print(f"Triton {triton.__version__}\n{_HEADER}")
    compiled = []
    for one in report(options.arch, options.dtype):
        print(row(one), flush=True)
        compiled.append(one)
    if options.json:
        figures = {"triton": triton.__version__, "kernels": [asdict(c) for c in compiled]}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    problems = [problem for one in compiled for problem in one.problems()]
    print("\n".join(problems) if problems else "no threshold passed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
