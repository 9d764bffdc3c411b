"""Mends Triton's interpreter, which multiplies bf16 as integers and truncates where a GPU rounds.

Seen in Triton 3.6 and 3.9: bf16 lives in uint16 arrays, `tl.dot` multiplies those as they are,
fp32 -> bf16 drops the low bits, and bf16 -> fp32 garbles denormals. In 3.6 `tl.fma` also rounds the
product before it adds. Import before a kernel runs under TRITON_INTERPRET=1.

It also spends half of its time on what these tests do not need: here it replaces the functions of
`triton.language` once for each module that uses them, not at every call of a device function, and
does not compute every sum and product of integers a second time to look for overflow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_replace = interpreter._patch_lang
_replaced: set[int] = set()
_cast = InterpreterBuilder.cast_impl
_convert = InterpreterBuilder.create_fp_to_fp


class _Kept:
    """What a launch restores at its end: nothing."""

    def restore(self) -> None:
        pass


def _replace_once(function: Callable[..., Any]) -> _Kept:
    if id(function.__globals__) not in _replaced:
        _replaced.add(id(function.__globals__))
        _replace(function)
    return _Kept()


_array_type_of = functools.cache(interpreter._get_np_dtype)  # makes a dict of all at each call


def _array_type(dtype: tl.dtype) -> np.dtype[Any]:
    pointer = isinstance(dtype.scalar, tl.pointer_type)
    return np.dtype(np.uint64) if pointer else _array_type_of(dtype.scalar)


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


interpreter._patch_lang = _replace_once
interpreter._get_np_dtype = _array_type
# No sum or product of 32-bit integers comes near their end in shapes that can be waited for.
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
InterpreterBuilder.create_dot = _dot
InterpreterBuilder.create_fma = _fma
InterpreterBuilder.cast_impl = _cast_impl
InterpreterBuilder.create_fp_to_fp = _fp_to_fp
np.seterr(all="ignore")  # to a GPU, NaN and infinity are numbers like others
