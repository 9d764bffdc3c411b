"""Mends Triton's interpreter, which multiplies bf16 as integers and truncates where a GPU rounds.

Seen in Triton 3.6 and 3.9: bf16 lives in uint16 arrays, `tl.dot` multiplies those as they are,
fp32 -> bf16 drops the low bits, and bf16 -> fp32 garbles denormals. In 3.6 `tl.fma` also rounds the
product before it adds. Import before a kernel runs under TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl
_convert = InterpreterBuilder.create_fp_to_fp


def _widened(handle: TensorHandle) -> np.ndarray:
    data = handle.data
    if handle.dtype.scalar == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float32) if data.dtype == np.float16 else data.astype(np.int32)


def _dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: Any
) -> TensorHandle:
    return TensorHandle(np.matmul(_widened(a), _widened(b)) + d.data, d.dtype.scalar)


def _rounded(src: TensorHandle) -> TensorHandle:
    wide = torch.from_numpy(np.ascontiguousarray(src.data, dtype=np.float32))
    bits = wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return TensorHandle(bits, tl.bfloat16)


def _to_bf16(src: TensorHandle, target: tl.dtype) -> bool:
    return src.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16


def _from_bf16(src: TensorHandle, target: tl.dtype) -> bool:
    return src.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32


def _cast_impl(self: InterpreterBuilder, src: TensorHandle, target: tl.dtype) -> TensorHandle:
    if _from_bf16(src, target):
        return TensorHandle(_widened(src), tl.float32)
    return _rounded(src) if _to_bf16(src, target) else _cast(self, src, target)


def _fp_to_fp(
    self: InterpreterBuilder, src: TensorHandle, target: tl.dtype, rounding_mode: Any
) -> TensorHandle:
    if _from_bf16(src, target):
        return TensorHandle(_widened(src), tl.float32)
    if _to_bf16(src, target):
        return _rounded(src)
    return _convert(self, src, target, rounding_mode)


def _fma(
    self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle
) -> TensorHandle:
    exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
    return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


InterpreterBuilder.create_dot = _dot
InterpreterBuilder.create_fma = _fma
InterpreterBuilder.cast_impl = _cast_impl
InterpreterBuilder.create_fp_to_fp = _fp_to_fp
np.seterr(all="ignore")  # to a GPU, NaN and infinity are numbers like others
