"""GPTQ's loop over columns on a GPU: a block of them by one launch.

Column by column a weight is rounded, and its error made up for by the columns that follow. In torch
a column takes nine launches; the linears of a layer of Qwen2-VL-7B have 40,000 columns, eight times
over where rows make up for each other: 17 s a layer at 6 us a launch, however fast the GPU. Here a
program has ROWS rows and goes through a block's columns, all errors so far in its registers, so
that what they ask of a column is one product of [BLOCK] with [BLOCK, ROWS]:

    w_i = W_i - sum_{j < i} U_ji e_j,    e_i = (w_i - level_i scale_i) / U_ii

These are the sums of GPTQ's algorithm 1 (arXiv 2210.17323), in another order: there each error is
subtracted from all columns behind it at once. What a block's errors ask of the columns behind the
block is one product of cuBLAS afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qig_serve.kernels import launch
from qig_serve.kernels.activation_rows import ROUND

BLOCK = 128
"""Columns at most of a launch."""
_ROWS = 8


@triton.jit
def round_columns_kernel(
    w_ptr, scale_ptr, zero_ptr, upper_ptr, codes_ptr, errors_ptr, N, COLUMNS,
    QMIN: tl.constexpr, QMAX: tl.constexpr, HAS_ZERO: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows,); [COLUMNS, N] each, and upper [BLOCK, BLOCK]: U transposed."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < N
    place = tl.arange(0, BLOCK)
    errors = tl.zeros([BLOCK, ROWS], tl.float32)
    for i in range(COLUMNS):
        at = i * N + row
        before = tl.load(upper_ptr + i * BLOCK + place, mask=place < i, other=0.0)
        w = tl.load(w_ptr + at, mask=there, other=0.0)
        w -= tl.sum(before[:, None] * errors, axis=0)
        scale = tl.load(scale_ptr + at, mask=there, other=1.0)
        low = tl.full([ROWS], QMIN, tl.float32)
        high = tl.full([ROWS], QMAX, tl.float32)
        zero = tl.zeros([ROWS], tl.float32)
        if HAS_ZERO:
            zero = tl.load(zero_ptr + at, mask=there, other=0.0)
        level = tl.minimum(tl.maximum(tl.div_rn(w, scale), low - zero), high - zero)
        level = (level + ROUND) - ROUND  # half to even
        error = tl.div_rn(w - level * scale, tl.load(upper_ptr + i * BLOCK + i))
        tl.store(codes_ptr + at, (level + zero).to(codes_ptr.dtype.element_ty), mask=there)
        tl.store(errors_ptr + at, error, mask=there)
        errors = tl.where(place[:, None] == i, error[None, :], errors)


def round_columns(
    w: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    upper: torch.Tensor,
    ends: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of `dtype` and errors fp32 [C, N] of C <= BLOCK columns of a weight, [C, N] fp32.

    scales and zeros (None if symmetric) fp32 [C, N]; upper fp32 [C, C], their part of the factor U;
    ends: the least and the greatest code. All contiguous but `upper`, on one GPU.
    """
    columns, n = w.shape
    codes, errors = torch.empty_like(w, dtype=dtype), torch.empty_like(w)
    transposed = upper.new_zeros(BLOCK, BLOCK)
    transposed[:columns, :columns] = upper.T
    with torch.cuda.device_of(w):
        round_columns_kernel[(triton.cdiv(n, _ROWS),)](
            w, scales, zeros, transposed, codes, errors, n, columns,
            QMIN=ends[0], QMAX=ends[1], HAS_ZERO=zeros is not None, **_options(),
        )  # fmt: skip
    return codes, errors


def _options() -> dict[str, Any]:
    return dict(BLOCK=BLOCK, ROWS=_ROWS, num_warps=1, **launch.FUSED)


def kernel(symmetric: bool) -> launch.Kernel:
    """What a launch compiles: for compile_report.py."""
    pointers = ("w_ptr", "scale_ptr", "zero_ptr", "upper_ptr", "errors_ptr")
    arguments = {name: "*fp32" for name in pointers}
    arguments |= {"codes_ptr": "*i8" if symmetric else "*u8", "N": "i32", "COLUMNS": "i32"}
    constants = _options() | dict(QMIN=-8 if symmetric else 0, QMAX=7, HAS_ZERO=not symmetric)
    compiler = {name: constants.pop(name) for name in ("num_warps", *launch.FUSED)}
    if symmetric:
        arguments.pop("zero_ptr")
        constants["zero_ptr"] = None
    ordered = {
        name: arguments[name] for name in round_columns_kernel.arg_names if name in arguments
    }
    return launch.Kernel(round_columns_kernel, ordered, constants, compiler, inputs=1)
