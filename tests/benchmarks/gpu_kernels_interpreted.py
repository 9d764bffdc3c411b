"""Everything that the stages launch, on a CPU in Triton's interpreter; a test runs it.

    TRITON_INTERPRET=1 python tests/benchmarks/gpu_kernels_interpreted.py

Nothing is timed: each call runs once, and the errors that come out are printed as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
import gpu_kernels_bench as bench
import gpu_kernels_rivals as rivals
import gpu_kernels_time as stage_time
import gpu_kernels_warm as warm
import interpreter  # noqa: F401  (mends Triton's interpreter)
import torch

from qig_serve.kernels import tuning
from qig_serve.kernels.tiles import Tile

SIZE = (256, 384)
CPU = torch.device("cpu")


def once(calls: list[Callable[[], object]]) -> float:
    """Stands in for tuning.time_microseconds."""
    out = calls[-1]()
    assert not isinstance(out, torch.Tensor) or bool(out.isfinite().all())
    return 1.0


def main() -> None:
    """Warm's launches, the rows of time, quantizers, the head, and our kernels beside rivals."""
    for name, stand_in in (("time_microseconds", once), ("copies", lambda tensors: [tensors])):
        setattr(tuning, name, stand_in)
    bench.halves.product = _without_ptx(bench.halves.product)
    bench.w4a8.product = _without_ptx(bench.w4a8.product)
    bench.w3a16.linear = _without_ptx(bench.w3a16.linear)
    bench.w4a8.linear = _without_ptx(bench.w4a8.linear)
    n, k = warm.smallest_like(*SIZE)
    for scheme in ("w3a16", "w4a8"):
        seen = {t.regime: t for m in (1, 32, 128) for t in tuning.candidates(scheme, m)}
        for tile in seen.values():
            small = Tile(**{**tile.__dict__, "block_m": min(16, tile.block_m)})
            warm.launch_one(warm.Job(scheme, n, k, small), CPU)
    warm.launch_one(warm.Job("head", n, k, warm.HEAD_TILES[0]), CPU)
    made = bench.Bench(CPU)
    made.load(*SIZE)
    row = stage_time.linear_row(made, "o", *SIZE, 1)
    quantizers = made.quantizers(1, 384)
    made.load_head(*SIZE)
    head = made.head(3, warm.HEAD_TILES[0])
    weight = torch.randn(SIZE).to(bench.DTYPE) * 0.05
    x = torch.randn(3, SIZE[1]).to(bench.DTYPE)
    exact = x.float() @ weight.float().t()
    errors = {}
    for name in ("cublas_bf16", "w3a16", "w4a8"):
        got = rivals.RIVALS[name][1](weight)(x).float()
        errors[name] = float((got - exact).norm() / exact.norm())
    print(json.dumps({"row": row, "quantizers": quantizers, "head": head, "errors": errors}))


def _without_ptx(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Inline PTX does not run in the interpreter; its twin does."""

    def twin(*arguments: object) -> torch.Tensor:
        given = [a for a in arguments if not isinstance(a, bool)]
        return function(*given, use_ptx=False)

    return twin


if __name__ == "__main__":
    main()
