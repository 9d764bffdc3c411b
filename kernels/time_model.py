"""Microseconds of a kernel from what it compiles to: a model of time that needs no GPU.

A step of the main loop (128 or 256 inputs of K) takes, when R programs share an SM, the p-norm of
five times, for they overlap but not wholly:

    issue     R * warps / 4 * instructions of a warp        four schedulers, one per cycle each
    chain     instructions of a warp, one after the other, and the tensor cores' own time: what one
              program alone on its SM waits for
    memory    R * bytes of weights / the SM's share of the memory's bandwidth
    cache     R * bytes of weights and activations / the SM's share of the L2 cache's
    tensor    R * multiplications / the tensor cores' rate

Programs come in rounds of as many as registers, shared memory and warps let an SM hold; to that
come the launch, the end of each tile, and where programs share a tile the writing and adding of
partial sums. The thirteen numbers of `Fit` were fitted to the 142 timings of 28 kernels on an H200
that tests/benchmarks/results/kernel-times-H200.json holds (with Triton 3.6; tests/benchmarks/
fit_time_model.py repeats the fit and prints its errors): median error 5%, 92% of the pairs of
tiles of a row (layer, M, scheme) in the right order. Of the kernels that came after, which the same
card timed then (kernel-times-H200-0af20ff.json: 1,264 rows, 82 kernels, tiles of 64 rows and of one
or two warps among them), it was 15% off (median), and its first choice cost 16% over the fastest;
fitted to those, 10% and 13%. For other GPUs only their own rates are put in, which is
extrapolation: good for choosing between tiles, not for promises."""

from __future__ import annotations

from dataclasses import dataclass

from qig_serve.kernels.launch import Kernel, programs, uses_wgmma
from qig_serve.kernels.sass import Counts


@dataclass(frozen=True)
class Gpu:
    """What a GPU does in a cycle of one SM."""

    name: str
    sms: int
    mhz: float
    """Clock under load."""
    bandwidth: float
    """Bytes per second that reading memory reaches."""
    bf16: int
    """Floating-point operations of the tensor cores per cycle and SM, sums in fp32."""
    int8: int
    shared: int = 102400
    """Bytes of shared memory per SM."""
    warps: int = 48
    early: bool = False
    """Whether a kernel may start before the one before it has ended."""


GPUS = {
    80: Gpu("A100", 108, 1410, 1.85e12, 2048, 4096, 167936, 64),
    86: Gpu("RTX 3090", 82, 1700, 0.88e12, 512, 2048),
    89: Gpu("RTX 4090", 128, 2520, 0.95e12, 512, 2048),
    90: Gpu("H200", 132, 1755, 4.28e12, 4096, 8192, 233472, 64, True),
    100: Gpu("B200", 148, 1850, 7.2e12, 8192, 16384, 233472, 64, True),
    120: Gpu("RTX 5090", 170, 2410, 1.65e12, 512, 2048, early=True),
}
"""A card of each compute capability: H200's bandwidth measured, the others' by datasheet, less
8%."""


@dataclass(frozen=True)
class Fit:
    """The model's numbers; times in microseconds, the others in cycles or as factors."""

    launch: float = 0.588
    early: float = 0.856
    """What a dependent launch saves."""
    chain: float = 1.532
    """Cycles per instruction, for a warp alone."""
    chain_tensor: float = 0.636
    issue: float = 0.946
    memory: float = 0.8
    cache: float = 80.0
    """Bytes per cycle and SM."""
    bf16: float = 0.916
    """Share of the tensor cores' rate."""
    int8: float = 1.065
    shared_tile: float = 4.624
    """Where programs share a tile."""
    partial: float = 1.696
    """A part of a tile of 25,000 numbers."""
    end: float = 4.209
    """The end of a tile of 32,768 numbers."""
    norm: float = 1.898


FIT = Fit()


@dataclass(frozen=True)
class Work:
    """A launch as the model sees it."""

    programs: int
    warps: int
    """Of a program."""
    steps: float
    """Of the main loop, a program."""
    parts: float
    """Programs that share an output tile; 1: none do."""
    operations: float
    """Of the tensor cores, a step: two a multiplication."""
    weight_bytes: float
    """A step."""
    activation_bytes: float
    outputs: int
    """Numbers of a tile that are stored."""
    integers: bool
    early: bool = True
    """Whether it starts before the kernel before has ended, where a GPU can."""


@dataclass(frozen=True)
class Prediction:
    """Microseconds, and what takes most of a step."""

    microseconds: float
    limit: str


def resident(counts: Counts, warps: int, gpu: Gpu) -> int:
    """Programs that an SM holds at once."""
    registers = -(-counts.registers // 8) * 8
    by_registers = 65536 // (registers * 32 * warps)
    return max(1, min(by_registers, gpu.shared // (counts.shared + 1024), gpu.warps // warps))


def work(kernel: Kernel, bits: float, m: int, n: int, k: int, sms: int) -> Work:
    """A linear [N, K] for M tokens; bits: stored of a weight."""
    tile, halves = kernel.tile, kernel.tile.regime == "halves"
    tiles = -(-n // tile.block_n) * -(-m // tile.block_m)
    steps = -(-k // kernel.inputs)
    count = tiles if tile.regime == "prefill" else programs(tile, tiles, steps, sms)
    whole = count % tiles == 0
    tokens = min(m, tile.block_m) if tile.block_m < 64 else tile.block_m
    narrow = tile.block_m * (2 if halves else 1)
    columns = max(16 if uses_wgmma(tile) else 8, narrow)  # wgmma takes no fewer
    integers = "codes_ptr" in kernel.arguments
    return Work(
        programs=count,
        warps=kernel.warps,
        steps=tiles * steps / count,
        parts=count / tiles if whole else max(2.0, count / tiles + 1),
        operations=2.0 * columns * tile.block_n * kernel.inputs,
        weight_bytes=tile.block_n * kernel.inputs * bits / 8,
        activation_bytes=tokens * kernel.inputs * (1 if integers else 2),
        outputs=min(m, tile.block_m) * tile.block_n,
        integers=integers or halves,
        early=tile.early >= 0,
    )


def step_cycles(
    work: Work, counts: Counts, programs_here: int, gpu: Gpu, fit: Fit = FIT
) -> dict[str, float]:
    """Cycles of each of the five times, when an SM holds `programs_here` programs."""
    rate = gpu.int8 * fit.int8 if work.integers else gpu.bf16 * fit.bf16
    tensor = work.operations / rate
    per_cycle = gpu.bandwidth / gpu.sms / gpu.mhz / 1e6
    r = programs_here
    return {
        "issue": r * counts.issued * work.warps / 4 * fit.issue,
        "chain": counts.issued * fit.chain + tensor * fit.chain_tensor,
        "memory": r * work.weight_bytes / per_cycle * fit.memory,
        "cache": r * (work.weight_bytes + work.activation_bytes) / fit.cache,
        "tensor": r * tensor,
    }


def predict(work: Work, counts: Counts, gpu: Gpu, fit: Fit = FIT) -> Prediction:
    """Of a launch. What a GPU cannot hold is infinitely slow."""
    per_sm = resident(counts, work.warps, gpu)
    if counts.shared + 1024 > gpu.shared:
        return Prediction(float("inf"), "shared memory")
    rounds, rest = divmod(-(-work.programs // gpu.sms), per_sm)
    full = step_cycles(work, counts, per_sm, gpu, fit)
    last = step_cycles(work, counts, rest, gpu, fit) if rest else full
    cycles = rounds * _norm(full, fit) + (rest > 0) * _norm(last, fit)
    microseconds = fit.launch + cycles * work.steps / gpu.mhz
    microseconds += (rounds + (rest > 0)) * fit.end * work.outputs / 32768
    if work.parts > 1:
        microseconds += fit.shared_tile + fit.partial * work.parts * work.outputs / 25000
    if gpu.early and work.early:
        microseconds -= fit.early
    shown = full if rounds else last
    return Prediction(microseconds, max(shown, key=lambda name: shown[name]))


def cublas(m: int, n: int, k: int, gpu: Gpu) -> float:
    """Microseconds of x [M, K] times W [N, K] transposed in 16 bits by the vendor's library.

    Its shares of the H200's rates as measured there: 88% of the bandwidth, 96% of tensor cores.
    """
    memory = 2 * (n * k + m * (n + k)) / (0.88 * gpu.bandwidth)
    tensor = 2 * m * n * k / (0.8 * gpu.bf16 * gpu.sms * gpu.mhz * 1e6)
    return 2.0 + max(memory, tensor) * 1e6


def dequantize(n: int, k: int, gpu: Gpu) -> float:
    """Microseconds of writing the weight [N, K] in 16 bits (3.1 of an H200's 4.28 TB/s)."""
    return 2.0 + 2 * n * k / (0.73 * gpu.bandwidth) * 1e6


def _norm(cycles: dict[str, float], fit: Fit) -> float:
    return float(sum(c**fit.norm for c in cycles.values()) ** (1 / fit.norm))
