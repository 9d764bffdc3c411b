"""Activations to integers in one pass over x, alone or fused with the RMSNorm or SiLU before.

    codes    int8, one scale per token: what w4a8 multiplies.
    halves   16-bit fixed point, one power of two per (token, group of 128): what w3a16 multiplies
             on int8 tensor cores, as two int8 halves.

A kernel is a row maker and an epilogue (activation_rows.py, which has the numbers). act is SiLU, by
which kernels are named, or for experts one of ACTIVATIONS. Without a scale over the whole row
(halves of x or of SiLU * up) a program has 1,024 columns of a token, so that one token keeps many
multiprocessors busy; otherwise a program holds the token's row in registers. Codes of SiLU * up,
whose rows are long, take two kernels of chunks: the first leaves each chunk's largest magnitude,
the second has them all before it scales (H200, K=18944: one program per row took 6.3 us for one
token and 408 for 8,192, where SiLU * up and quantizing apart took 3.2 and 339).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from qig_serve.kernels import activation_rows as rows
from qig_serve.kernels import launch, layout
from qig_serve.kernels.launch import Kernel
from qig_serve.kernels.tiles import Tile

MAX_K = 65536
"""Longest row that a program's registers hold: 64 KiB an array at 32 warps."""
MANY_TOKENS = 512
"""From here on programs hide one another's waits, and fewer warps per row do."""
CHUNK = 1024
"""Columns per program of the kernels that need no scale of a whole row."""


@triton.jit
def _columns(BLOCK_K: tl.constexpr):
    """A program's token and its columns of the row."""
    return tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)


@triton.jit
def quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, K,
    BLOCK_K: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    token, columns = _columns(BLOCK_K)
    rows.begin(PDL)
    x = tl.load(x_ptr + token * K + columns, mask=columns < K, other=0.0)
    rows.store_codes(x, rows.largest(x, 0), columns, token, codes_ptr, scale_ptr, K, True, PAD)


@triton.jit
def rms_norm_quantize_kernel(
    x_ptr, residual_ptr, weight_ptr, codes_ptr, scale_ptr, added_ptr, K, eps,
    BLOCK_K: tl.constexpr, PAD: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    token, columns = _columns(BLOCK_K)
    row = rows.normalized(
        x_ptr, residual_ptr, weight_ptr, added_ptr, token, columns, K, eps, HAS_RESIDUAL, PDL
    )
    rows.store_codes(row, rows.largest(row, 0), columns, token, codes_ptr, scale_ptr, K, True, PAD)


@triton.jit
def silu_mul_largest_kernel(
    gate_up_ptr, out_ptr, largest_ptr, K,
    BLOCK_K: tl.constexpr, ACTIVATION: tl.constexpr = "silu", PDL: tl.constexpr = False,
):  # fmt: skip
    """A chunk of act(gate) * up in 16 bits, and its largest magnitude: int32 [M, chunks]."""
    token, columns = _columns(BLOCK_K)
    row = rows.gated(gate_up_ptr, token, columns, K, ACTIVATION, PDL)
    rows.store_row(row, columns, token, out_ptr, K)
    tl.store(largest_ptr + token * tl.num_programs(1) + tl.program_id(1), rows.largest(row, 0))


@triton.jit
def quantize_chunk_kernel(
    x_ptr, largest_ptr, codes_ptr, scale_ptr, K,
    CHUNKS: tl.constexpr, BLOCK_K: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """A chunk of x to codes, by the largest magnitudes of its token's chunks (CHUNKS or fewer)."""
    token, columns = _columns(BLOCK_K)
    chunk = tl.arange(0, CHUNKS)
    count = tl.num_programs(1)
    rows.begin(PDL)
    bits = tl.max(tl.load(largest_ptr + token * count + chunk, mask=chunk < count, other=0), axis=0)
    x = tl.load(x_ptr + token * K + columns, mask=columns < K, other=0.0)
    first = tl.program_id(1) == 0
    rows.store_codes(x, bits, columns, token, codes_ptr, scale_ptr, K, first, PAD)


@triton.jit(do_not_specialize=["M"])
def split_halves_kernel(
    x_ptr, halves_ptr, x_scale_sum_ptr, M, K,
    BLOCK_K: tl.constexpr, PAD: tl.constexpr, ORDER: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    token, columns = _columns(BLOCK_K)
    rows.begin(PDL)
    x = tl.load(x_ptr + token * K + columns, mask=columns < K, other=0.0)
    rows.store_halves(x, columns, token, halves_ptr, x_scale_sum_ptr, M, K, BLOCK_K, ORDER, PAD)


@triton.jit(do_not_specialize=["M"])
def rms_norm_halves_kernel(
    x_ptr, residual_ptr, weight_ptr, halves_ptr, x_scale_sum_ptr, added_ptr, M, K, eps,
    BLOCK_K: tl.constexpr, PAD: tl.constexpr, ORDER: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    token, columns = _columns(BLOCK_K)
    row = rows.normalized(
        x_ptr, residual_ptr, weight_ptr, added_ptr, token, columns, K, eps, HAS_RESIDUAL, PDL
    )
    rows.store_halves(row, columns, token, halves_ptr, x_scale_sum_ptr, M, K, BLOCK_K, ORDER, PAD)


@triton.jit(do_not_specialize=["M"])
def silu_mul_halves_kernel(
    gate_up_ptr, halves_ptr, x_scale_sum_ptr, M, K,
    BLOCK_K: tl.constexpr, PAD: tl.constexpr, ORDER: tl.constexpr,
    ACTIVATION: tl.constexpr = "silu", PDL: tl.constexpr = False,
):  # fmt: skip
    token, columns = _columns(BLOCK_K)
    row = rows.gated(gate_up_ptr, token, columns, K, ACTIVATION, PDL)
    rows.store_halves(row, columns, token, halves_ptr, x_scale_sum_ptr, M, K, BLOCK_K, ORDER, PAD)


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, added_ptr, K, eps,
    BLOCK_K: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    token, columns = _columns(BLOCK_K)
    row = rows.normalized(
        x_ptr, residual_ptr, weight_ptr, added_ptr, token, columns, K, eps, HAS_RESIDUAL, PDL
    )
    rows.store_row(row, columns, token, out_ptr, K)


@triton.jit
def silu_mul_kernel(
    gate_up_ptr, out_ptr, K,
    BLOCK_K: tl.constexpr, ACTIVATION: tl.constexpr = "silu", PDL: tl.constexpr = False,
):  # fmt: skip
    token, columns = _columns(BLOCK_K)
    row = rows.gated(gate_up_ptr, token, columns, K, ACTIVATION, PDL)
    rows.store_row(row, columns, token, out_ptr, K)


def row_options(k: int, m: int = 1) -> dict[str, int]:
    """BLOCK_K and compiler options of a kernel whose programs hold a row of K.

    The order in which RMSNorm adds squares follows from the warps: its kernels take those of m = 1
    for every M, so that a token's numbers do not depend on how many others there are.
    """
    if k > MAX_K:
        raise ValueError(f"activation rows of {k} are longer than {MAX_K}")
    block_k = max(256, triton.next_power_of_2(k))
    a_warp = 512 if m < MANY_TOKENS else 1024
    most = 16 if block_k <= 32768 else 32
    warps = min(most, max(4, block_k // a_warp))
    return {"BLOCK_K": block_k, "num_warps": warps, **launch.FUSED}


def chunk_options() -> dict[str, int]:
    """The same where programs hold CHUNK columns: 8 per thread, 16 bytes."""
    return {"BLOCK_K": CHUNK, "num_warps": CHUNK // 256, **launch.FUSED}


Codes = tuple[torch.Tensor, torch.Tensor]
"""codes int8 [M, K in whole groups], scale fp32 [M]."""
Halves = tuple[torch.Tensor, torch.Tensor]
"""halves int8 [M, 2, K in whole groups], x_scale_sum int32 [pairs, M, 2]: as split_halves' in
reference.py."""


def empty_codes(x: torch.Tensor, k: int) -> Codes:
    """Unwritten, for the tokens of x."""
    m = x.shape[0]
    return (
        torch.empty(m, layout.padded_inputs(k), dtype=torch.int8, device=x.device),
        torch.empty(m, dtype=torch.float32, device=x.device),
    )


def empty_halves(x: torch.Tensor, k: int) -> Halves:
    """Unwritten, for the tokens of x."""
    m = x.shape[0]
    return (
        torch.empty(m, 2, layout.padded_inputs(k), dtype=torch.int8, device=x.device),
        torch.empty(layout.padded_pairs(k), m, 2, dtype=torch.int32, device=x.device),
    )


def _order(x: torch.Tensor, tile: Tile | None) -> int:
    """Of halves for a tile; without one for those that use all of a program's warps."""
    orders = launch.orders(x.device)
    return orders.of_halves(tile) if tile else orders.activations


def _pad(k: int) -> dict[str, int]:
    """PAD of a row of K."""
    return {"PAD": layout.padded_inputs(k) - k}


def _chunks(m: int, k: int) -> tuple[int, int]:
    return m, triton.cdiv(k, CHUNK)


def quantize(x: torch.Tensor) -> Codes:
    """x [M, K] contiguous -> codes int8 [M, K], scale fp32 [M]."""
    m, k = x.shape
    codes, scale = empty_codes(x, k)
    if m:
        quantize_kernel[(m,)](
            x, codes, scale, k, **row_options(k, m), **_pad(k), **launch.early(x.device)
        )
    return codes, scale


def _launch_rms_norm(
    kernel: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None,
    out: tuple[torch.Tensor, ...], sizes: tuple[int, ...], **constants: int,
) -> torch.Tensor:  # fmt: skip
    """Run a kernel of RMSNorm, which fills `out`; the sum x + residual, or x."""
    m, k = x.shape
    added = x if residual is None else torch.empty_like(x)
    if m:
        kernel[(m,)](
            x, residual, weight, *out, added, *sizes, eps,
            HAS_RESIDUAL=residual is not None, **constants, **row_options(k),
            **launch.early(x.device),
        )  # fmt: skip
    return added


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm of x (+ residual) [M, K], then `quantize`: codes, scale, x + residual (or x)."""
    k = x.shape[1]
    out = empty_codes(x, k)
    added = _launch_rms_norm(
        rms_norm_quantize_kernel, x, weight, eps, residual, out, (k,), **_pad(k)
    )
    return *out, added


def silu_mul_quantize(gate_up: torch.Tensor, activation: str = "silu") -> Codes:
    """act(gate) * up of [M, 2 K], then `quantize`: codes int8 [M, K], scale fp32 [M]."""
    m, k = gate_up.shape[0], gate_up.shape[1] // 2
    codes, scale = empty_codes(gate_up, k)
    if m:
        grid, options = _chunks(m, k), {**chunk_options(), **launch.early(gate_up.device)}
        out = torch.empty(m, k, dtype=gate_up.dtype, device=gate_up.device)
        largest = torch.empty(grid, dtype=torch.int32, device=gate_up.device)
        silu_mul_largest_kernel[grid](gate_up, out, largest, k, ACTIVATION=activation, **options)
        quantize_chunk_kernel[grid](
            out, largest, codes, scale, k,
            CHUNKS=triton.next_power_of_2(grid[1]), **options, **_pad(k),
        )  # fmt: skip
    return codes, scale


def split_halves(x: torch.Tensor, tile: Tile | None = None) -> Halves:
    """x [M, K] contiguous, 32 dividing K -> halves and x_scale_sum (reference.split_halves).

    tile: of the product that takes them.
    """
    m, k = x.shape
    halves, x_scale_sum = empty_halves(x, k)
    if m:
        split_halves_kernel[_chunks(m, k)](
            x, halves, x_scale_sum, m, k,
            ORDER=_order(x, tile), **chunk_options(), **_pad(k), **launch.early(x.device),
        )  # fmt: skip
    return halves, x_scale_sum


def rms_norm_halves(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm of x (+ residual) [M, K], then `split_halves`, and x + residual (or x)."""
    m, k = x.shape
    out = empty_halves(x, k)
    added = _launch_rms_norm(
        rms_norm_halves_kernel, x, weight, eps, residual, out, (m, k), ORDER=_order(x, tile),
        **_pad(k),
    )  # fmt: skip
    return *out, added


def silu_mul_halves(
    gate_up: torch.Tensor, tile: Tile | None = None, activation: str = "silu"
) -> Halves:
    """act(gate) * up of [M, 2 K], then `split_halves`."""
    m, k = gate_up.shape[0], gate_up.shape[1] // 2
    halves, x_scale_sum = empty_halves(gate_up, k)
    if m:
        silu_mul_halves_kernel[_chunks(m, k)](
            gate_up, halves, x_scale_sum, m, k,
            ORDER=_order(gate_up, tile), ACTIVATION=activation, **chunk_options(), **_pad(k),
            **launch.early(gate_up.device),
        )  # fmt: skip
    return halves, x_scale_sum


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x (+ residual) [M, K] in its dtype, and x + residual (or x)."""
    out = torch.empty_like(x)
    return out, _launch_rms_norm(rms_norm_kernel, x, weight, eps, residual, (out,), (x.shape[1],))


def silu_mul(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """act(gate) * up of [M, 2 K] in its dtype: [M, K]."""
    m, k = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(m, k, dtype=gate_up.dtype, device=gate_up.device)
    if m:
        silu_mul_kernel[_chunks(m, k)](
            gate_up, out, k,
            ACTIVATION=activation, **chunk_options(), **launch.early(gate_up.device),
        )  # fmt: skip
    return out


ROWS = (3584, 18944)
"""The shortest and the longest row of tiles.LAYER_SHAPES."""


def kernels(dtype: str, order: int) -> list[Kernel]:
    """What launches on ROWS compile, for `dtype` ("bf16", "fp16") and an order of inputs."""
    x = f"*{dtype}"
    types = {
        "x_ptr": x, "residual_ptr": x, "weight_ptr": x, "added_ptr": x, "gate_up_ptr": x,
        "out_ptr": x, "codes_ptr": "*i8", "halves_ptr": "*i8", "scale_ptr": "*fp32",
        "x_scale_sum_ptr": "*i32", "largest_ptr": "*i32", "M": "i32", "K": "i32", "eps": "fp32",
    }  # fmt: skip
    found = []
    for function in (
        quantize_kernel, rms_norm_quantize_kernel, silu_mul_largest_kernel, quantize_chunk_kernel,
        split_halves_kernel, rms_norm_halves_kernel, silu_mul_halves_kernel, rms_norm_kernel,
        silu_mul_kernel,
    ):  # fmt: skip
        names = function.arg_names
        normalizes, chunks = "eps" in names, "largest_ptr" in names
        whole = normalizes or ("codes_ptr" in names and not chunks)
        variants = (
            [row_options(k, m) for k in ROWS for m in ((1,) if normalizes else (1, MANY_TOKENS))]
            if whole
            else [chunk_options()]
        )
        known: dict[str, Any] = {"HAS_RESIDUAL": True, "ORDER": order, "CHUNKS": 32, "PAD": 0}
        activations = rows.ACTIVATIONS if "ACTIVATION" in names else ("",)
        unlike = {tuple(v.items()): v for v in variants}.values()
        for options, activation in itertools.product(unlike, activations):
            known["ACTIVATION"] = activation
            constants = {name: value for name, value in known.items() if name in names}
            constants["BLOCK_K"] = options["BLOCK_K"]
            arguments = {name: types[name] for name in names if name in types}
            compiler = {"num_warps": options["num_warps"], **launch.FUSED}
            found.append(
                Kernel(function, arguments, constants, compiler, inputs=options["BLOCK_K"])
            )
    return found
