"""Predicted microseconds of a mixture-of-experts layer on a GPU that is not here.

    python -m qig_serve.kernels.expert_times [--arch 90]

For Qwen3-VL-30B-A3B and a router that spreads tokens evenly: the two grouped products by the model
of time_model.py, from what they compile to, beside 16-bit weights at the rates of `cublas`. What
surrounds them (sort, activations, SiLU * up, sum) is left out on both sides. The model counts the
weights of every block, also of those that find them in L2.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from qig_serve.formats import SCHEMES
from qig_serve.kernels import experts, launch, time_model
from qig_serve.kernels.sass import Counts, count
from qig_serve.kernels.tiles import Tile
from qig_serve.kernels.time_model import Gpu, Prediction, Work
from qig_serve.kernels.tuning import stored_bits

TOKENS = (1, 16, 256)


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer."""

    hidden: int
    inter: int
    experts: int
    top_k: int

    @property
    def products(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(N, K) of gate_up and of down."""
        return (2 * self.inter, self.hidden), (self.hidden, self.inter)


QWEN3_VL_30B_A3B = Layer(hidden=2048, inter=768, experts=128, top_k=8)


def blocks(layer: Layer, m: int, block_m: int) -> float:
    """Blocks of M tokens, on average; with block_m = M, experts that have any."""
    p = layer.top_k / layer.experts
    total, odds = 0.0, (1 - p) ** m  # of an expert having c tokens, from c = 0 on
    for c in range(1, m + 1):
        odds *= (m - c + 1) / c * p / (1 - p)
        total += odds * -(-c // block_m)
    return layer.experts * total


def sixteen_bits(layer: Layer, m: int, gpu: Gpu) -> float:
    """Microseconds with 16-bit weights: time_model.cublas's rates and launches."""
    weights = sum(n * k for n, k in layer.products)
    memory = 2 * weights * blocks(layer, m, m) / (0.88 * gpu.bandwidth)
    tensor = 2 * weights * m * layer.top_k / (0.8 * gpu.bf16 * gpu.sms * gpu.mhz * 1e6)
    return 2 * 2.0 + max(memory, tensor) * 1e6


def predict(
    layer: Layer, scheme: str, m: int, n: int, k: int, tile: Tile, counts: Counts, gpu: Gpu
) -> Prediction:
    """One grouped product."""
    halves = tile.regime == "halves"
    inputs = 256 if halves else 128
    columns = max(16 if launch.uses_wgmma(tile) else 8, tile.block_m * (2 if halves else 1))
    integers = scheme == "w4a8"
    tokens = min(m, tile.block_m)
    bits = stored_bits(SCHEMES[scheme])
    work = Work(
        programs=round(blocks(layer, m, tile.block_m) * -(-n // tile.block_n)),
        warps=tile.num_warps,
        steps=-(-k // inputs),
        parts=1,
        operations=2.0 * columns * tile.block_n * inputs,
        weight_bytes=tile.block_n * inputs * bits / 8,
        activation_bytes=tokens * inputs * (1 if integers else 2),
        outputs=tokens * tile.block_n,
        integers=integers or halves,
        early=False,  # nothing is fetched before the kernel before has ended
    )
    return time_model.predict(work, counts, gpu)


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, prog="qig_serve.kernels.expert_times")
    parser.add_argument("--arch", type=int, choices=tuple(time_model.GPUS), default=90)
    target = parser.parse_args(arguments).arch
    gpu, layer = time_model.GPUS[target], QWEN3_VL_30B_A3B
    orders = launch.orders_for(target)
    print(f"sm_{target} ({gpu.name}), {layer}: us, predicted; x: of 16 bits")
    print(f"{'M':>4}{'experts':>9}{'MB bf16':>9}{'bf16':>7}  scheme: gate_up + down = sum, x")
    for m in TOKENS:
        hit = blocks(layer, m, m)
        size = 2 * hit * sum(n * k for n, k in layer.products) / 1e6
        reference = sixteen_bits(layer, m, gpu)
        line = f"{m:>4}{hit:>9.1f}{size:>9.1f}{reference:>7.1f}"
        for scheme in experts.TILES:
            tile = experts.select(scheme, m * layer.top_k, layer.experts)
            times = []
            for (n, k), weighted in zip(layer.products, (False, True), strict=True):
                kernel = experts.kernel(scheme, tile, "bf16", orders, weighted)
                counts = count(kernel, target)
                times.append(predict(layer, scheme, m, n, k, tile, counts, gpu).microseconds)
            total = sum(times)
            shown = " + ".join(f"{time:.1f}" for time in times)
            line += f"  {scheme}: {shown} = {total:.1f}, {reference / total:.2f}x"
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
