"""What is timed on the GPU: linears of both schemes and cuBLAS beside them, quantizers, the head.

Every time is the mean of a call in a CUDA graph that goes through copies of the weights, 400 MB of
them, so that none is in the L2 cache; the median of five replays. Activations are what the kernel
before has just written, and so are in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from qig_serve.formats import SCHEMES
from qig_serve.kernels import (
    halves,
    launch,
    layout,
    ops,
    quantize_activation,
    tuning,
    w3a16,
    w4a8,
)
from qig_serve.kernels.tiles import Tile, select

DTYPE = torch.bfloat16
MANY = 1024
"""Tokens from which a call is long and reads so much else that two copies of a weight do."""
AGAIN = 20
"""Times that a quantizer stands in a graph."""
Tensors = dict[str, torch.Tensor]


def gemm(scheme: str, x: torch.Tensor, n: int, tile: Tile) -> Callable[[Tensors], torch.Tensor]:
    """A linear's GEMM with a tile, as a function of prepared tensors: x is quantized already."""
    scratch = launch.scratch_for(tile, x.device)
    if scheme == "w4a8":
        codes = quantize_activation.quantize(x)
        return lambda p: w4a8.product(*codes, p, n, None, x.dtype, tile, scratch)
    if tile.regime == "halves":
        given = quantize_activation.split_halves(x, tile)
        return lambda p: halves.product(
            *given, p["weight_planes"], p["scale_zero"], None, n, x.dtype, tile, scratch
        )
    return lambda p: w3a16.linear(x, p, n, None, tile, scratch)


def quantizers(m: int, k: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Everything that makes integers of activations [M, K], and the 16-bit twins beside it."""
    x = torch.randn(m, k, device=device).to(DTYPE)
    gate_up = torch.randn(m, 2 * k, device=device).to(DTYPE)
    weight, residual = torch.rand(k, device=device).to(DTYPE), torch.randn_like(x)
    q = quantize_activation
    return {
        "quantize": lambda: q.quantize(x),
        "split_halves": lambda: q.split_halves(x),
        "rms_norm": lambda: q.rms_norm(x, weight, 1e-6, residual),
        "rms_norm_quantize": lambda: q.rms_norm_quantize(x, weight, 1e-6, residual),
        "rms_norm_halves": lambda: q.rms_norm_halves(x, weight, 1e-6, residual),
        "silu_mul": lambda: q.silu_mul(gate_up),
        "silu_mul_quantize": lambda: q.silu_mul_quantize(gate_up),
        "silu_mul_halves": lambda: q.silu_mul_halves(gate_up),
    }


def weight_of(scheme: str, prepared: Tensors, n: int, k: int) -> torch.Tensor:
    """What prepared tensors stand for, fp32 [N, K]."""
    if scheme == "w4a8":
        codes, scale = layout.unpack_w4a8(prepared["weight_nibbles"], prepared["channel_scale"], n)
        return codes.float().mul_(scale)
    planes, words = prepared["weight_planes"], prepared["scale_zero"]
    order = launch.orders(planes.device).weights
    codes, scale, zero = layout.unpack_w3a16(planes, words, n, k, order, DTYPE)
    grouped = codes.float().view(n, -1, layout.GROUP)
    return grouped.sub_(zero[..., None]).mul_(scale.float()[..., None]).view(n, k)


class Bench:
    """Times on the GPU at hand, in microseconds. `load` a linear, then ask."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        self.architecture = launch.architecture(self.device)
        self.shape = (0, 0)
        self.weights: dict[str, list[Any]] = {}
        self.activations: dict[int, torch.Tensor] = {}
        self.exact: Tensors = {}
        self.errors: dict[Any, float] = {}

    def load(self, n: int, k: int) -> None:
        """A linear [N, K] with random weights; the one before is freed."""
        self.weights.clear()
        self.activations.clear()
        self.exact.clear()
        torch.cuda.empty_cache()
        self.shape = (n, k)

    def _weights(self, name: str) -> list[Any]:
        """Copies, of a scheme or "cublas"."""
        if name not in self.weights:
            n, k = self.shape
            if name == "cublas":
                exact = {"weight": torch.randn(n, k, device=self.device, dtype=DTYPE) * 0.05}
                self.weights[name] = [c["weight"] for c in tuning.copies(exact)]
            else:
                made = tuning.random_linear(SCHEMES[name], n, k, DTYPE, self.device)
                self.weights[name] = tuning.copies(made)
        return self.weights[name]

    def _x(self, m: int) -> torch.Tensor:
        if m not in self.activations:
            self.activations.clear()
            self.activations[m] = torch.randn(m, self.shape[1], device=self.device).to(DTYPE)
        return self.activations[m]

    def _time(self, call: Callable[[Any], object], weights: list[Any], m: int) -> float:
        some = weights[:2] if m >= MANY else weights
        return tuning.time_microseconds([functools.partial(call, w) for w in some])

    def tile(self, scheme: str, m: int) -> Tile:
        """Whose tile of tiles.json serves M tokens."""
        return select(scheme, self.architecture, *self.shape, m)

    def gemm(self, scheme: str, m: int, tile: Tile) -> float | None:
        """The GEMM alone; None if the device cannot run the tile."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        try:
            call = gemm(scheme, self._x(m), self.shape[0], tile)
            return self._time(call, self._weights(scheme), m)
        except (OutOfResources, CompilationError, PTXASError):
            return None

    def linear(self, scheme: str, m: int) -> float:
        """The whole linear, as served: x made integers, then the GEMM of tiles.json."""
        x, n = self._x(m), self.shape[0]
        scratch = launch.scratch(self.device)
        tile = self.tile(scheme, m)
        kernels = ops.KERNELS[scheme]
        return self._time(
            lambda p: kernels.linear(x, p, n, None, tile, scratch), self._weights(scheme), m
        )

    def error(self, scheme: str, m: int) -> float:
        """Of the linear, against fp32 with the same weights, relative."""
        x, prepared, (n, k) = self._x(m), self._weights(scheme)[0], self.shape
        return self._error(scheme, x, ops.linear(SCHEMES[scheme], x, prepared, n, k))

    def tile_error(self, scheme: str, m: int, tile: Tile) -> float:
        """Of the GEMM with a tile: the same, of a few of M tokens compared once per tile."""
        key = (scheme, m > 16, tile, self.shape)
        if key not in self.errors:
            x = self._x(m)[: min(m, 48)].contiguous()
            got = gemm(scheme, x, self.shape[0], tile)(self._weights(scheme)[0])
            self.errors[key] = self._error(scheme, x, got)
        return self.errors[key]

    def _error(self, scheme: str, x: torch.Tensor, got: torch.Tensor) -> float:
        if scheme not in self.exact:
            self.exact = {scheme: weight_of(scheme, self._weights(scheme)[0], *self.shape)}
        exact = x.float() @ self.exact[scheme].t()
        return float((got.float() - exact).norm() / exact.norm())

    def cublas(self, m: int) -> float:
        """x times a 16-bit weight."""
        x = self._x(m)
        return self._time(lambda w: linear(x, w), self._weights("cublas"), m)

    def quantizers(self, m: int, k: int) -> dict[str, float]:
        """Microseconds by name."""
        return {
            name: tuning.time_microseconds([call] * AGAIN)
            for name, call in quantizers(m, k, self.device).items()
        }

    def load_head(self, n: int, k: int) -> None:
        """An output head [N, K] in 8 bits, and in 16 beside it."""
        self.load(n, k)
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=self.device)
        scale = torch.rand(n, 1, device=self.device) * 1e-3
        order = launch.orders(self.device).activations
        self.weights["head"] = tuning.copies(layout.repack_w8a16(codes, scale, order))

    def head(self, m: int, tile: Tile) -> float:
        """The head's product in 8 bits, with x made halves."""
        x, scratch = self._x(m), launch.scratch_for(tile, self.device)

        def call(p: Tensors) -> torch.Tensor:
            given = quantize_activation.split_halves(x, tile)
            return halves.product(
                *given, p["weight_bytes"], p["row_scale"], None, self.shape[0], DTYPE, tile, scratch
            )

        return self._time(call, self._weights("head"), m)

    def limits(self) -> dict[str, float]:
        """Measured: bytes per second of reading and copying, and operations in bf16 and int8."""
        source = torch.empty(1 << 30, dtype=torch.int8, device=self.device).random_(0, 127)
        target = torch.empty_like(source)
        numbers = source.view(torch.float32)
        read = tuning.time_microseconds([numbers.sum] * 3)
        copy = tuning.time_microseconds([lambda: target.copy_(source)] * 3)
        a, b = (torch.randn(8192, 8192, dtype=DTYPE, device=self.device) for _ in range(2))
        bf16 = tuning.time_microseconds([lambda: a @ b] * 3)
        codes = source[: 8192 * 8192].view(8192, 8192)
        int8 = tuning.time_microseconds([lambda: torch._int_mm(codes, codes.t())] * 3)
        return {
            "read": source.numel() / read * 1e6,
            "copy": 2 * source.numel() / copy * 1e6,
            "bf16": 2 * 8192**3 / bf16 * 1e6,
            "int8": 2 * 8192**3 / int8 * 1e6,
        }
