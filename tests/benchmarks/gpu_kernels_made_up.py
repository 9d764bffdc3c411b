"""Stands in for the GPU in tests: times by the model of time, on a clock of its own."""

from __future__ import annotations

from pathlib import Path

import gpu_kernels_plan as plan

from qig_serve.formats import SCHEMES
from qig_serve.kernels import tiles, time_model, tuning
from qig_serve.kernels.tiles import Tile

LIMITS = {"read": 4e12, "copy": 3e12, "bf16": 8e14, "int8": 9e14}
ABOUT = {
    "card": "NVIDIA Made-up 1", "capability": 90, "sms": 132, "date": "2000-01-01",
    "commit": "0123456789", "versions": {"torch": "2.11.0", "triton": "3.6.0"},
}  # fmt: skip


class Clock:
    """Time that passes when it is asked to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class MadeUp:
    """Stands in for gpu_kernels_bench.Bench: times by the model, each taking a second or so."""

    architecture = "sm_90"

    def __init__(self, found: tuning.Found, clock: Clock, second: float = 0.0) -> None:
        self.found, self.clock, self.second, self.shape = found, clock, second, (0, 0)

    def _took(self, us: float) -> float:
        self.clock.now += self.second
        return us

    def load(self, n: int, k: int) -> None:
        self.shape = (n, k)

    load_head = load

    def tile(self, scheme: str, m: int) -> Tile:
        return tiles.select(scheme, self.architecture, *self.shape, m)

    def tile_error(self, scheme: str, m: int, tile: Tile) -> float:
        return 0.001

    def gemm(self, scheme: str, m: int, tile: Tile) -> float | None:
        us = tuning.predicted(SCHEMES[scheme], tile, self.found, 90, m, *self.shape)
        return self._took(us) if us < float("inf") else None

    def linear(self, scheme: str, m: int) -> float:
        return self._took(self.cublas(m) / 2)

    def cublas(self, m: int) -> float:
        return self._took(time_model.cublas(m, *self.shape, time_model.GPUS[90]))

    def error(self, scheme: str, m: int) -> float:
        return 2e-3

    def quantizers(self, m: int, k: int) -> dict[str, float]:
        names = ["quantize", "split_halves", "rms_norm", "silu_mul"]
        fused = [f"{a}_{b}" for a in ("rms_norm", "silu_mul") for b in ("quantize", "halves")]
        return {**dict.fromkeys(names, 2.0), **dict.fromkeys(fused, 2.5)}

    def head(self, m: int, tile: Tile) -> float:
        return self._took(100.0 + tile.block_m)

    def limits(self) -> dict[str, float]:
        return LIMITS


def context(folder: Path, clock: Clock, seconds: float = 1e6) -> plan.Context:
    """What a stage is given, with so many seconds left."""
    return plan.Context(plan.Results(folder / "results.json"), clock.now + seconds, folder, clock)
