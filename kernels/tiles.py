"""Tile choices per architecture and number of tokens, as data (tiles.json).

tiles.json: {"sm_90": {"source": how the figures were had, scheme: {"default" or "NxK": [tile with
"max_m", ...]}}}, tiles by ascending max_m, the last one without a bound (null). tuning.py measures
them on a GPU, time_model.py chooses them where none was at hand. Nothing is searched at serve time.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TILES_FILE = Path(__file__).with_name("tiles.json")

LAYER_SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "Qwen2-VL-7B": {  # and LLaVA-OneVision-7B
        "qkv": (4608, 3584),
        "o": (3584, 3584),
        "gate_up": (37888, 3584),
        "down": (3584, 18944),
    },
    "InternVL2-8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
}
"""(N, K) of a decoder layer's fused linears, without tensor parallelism."""

Regime = Literal["halves", "split_k", "stream_k", "prefill", "dequantize"]
SHARED: tuple[Regime, ...] = ("halves", "split_k", "stream_k")
"""What divides the K of an output tile among programs."""


@dataclass(frozen=True)
class Tile:
    """How a kernel is shaped. Regimes: see the headers of w3a16.py and w4a8.py."""

    regime: Regime
    block_m: int = 16
    """Tokens per tile; of dequantize, nothing."""
    block_n: int = 128
    """Outputs per tile; of dequantize, rows dequantized at once (0: all), a multiple of 128."""
    num_warps: int = 4
    num_stages: int = 4
    """Loads in flight along K."""
    programs_per_sm: int = 2
    """Of what is in SHARED: programs that an SM is to hold at once."""
    group_m: int = 8
    """prefill: token tiles that share a column of outputs."""
    early: int = 1
    """1: starts before the kernel before has ended, and fetches weights; 0: starts so; -1: not."""


Buckets = list[tuple[float, Tile]]


@functools.cache
def tile_table() -> dict[tuple[str, str, str], Buckets]:
    """(architecture, scheme, "default" or "NxK") -> [(largest M, tile), ...] of tiles.json."""
    table: dict[tuple[str, str, str], Buckets] = {}
    for architecture, schemes in json.loads(TILES_FILE.read_text()).items():
        for scheme, shapes in schemes.items():
            if scheme == "source":
                continue
            for shape, rows in shapes.items():
                table[architecture, scheme, shape] = [
                    (
                        float("inf") if row["max_m"] is None else row["max_m"],
                        Tile(**{k: v for k, v in row.items() if k != "max_m"}),
                    )
                    for row in rows
                ]
    return table


def tiles_of(architecture: str, scheme: str, regime: Regime) -> list[Tile]:
    """Those of a scheme and regime, of all shapes."""
    return [
        tile
        for (of, by, _), rows in tile_table().items()
        if (of, by) == (architecture, scheme)
        for _, tile in rows
        if tile.regime == regime
    ]


def architecture_of(capability: tuple[int, int]) -> str | None:
    """Whose tiles in tiles.json a device takes: those of its major version, and not newer."""
    major, minor = capability
    known = {int(name[3:]) for name, _, _ in tile_table()}
    fits = [number for number in known if number // 10 == major and number % 10 <= minor]
    return f"sm_{max(fits)}" if fits else None


def buckets(scheme: str, architecture: str, n: int, k: int) -> Buckets:
    """[(largest M, tile), ...] for a linear [N, K], ascending; the last M is infinite."""
    table = tile_table()
    measured = table.get((architecture, scheme, f"{n}x{k}"))
    return measured or table[architecture, scheme, "default"]


@functools.cache
def select(scheme: str, architecture: str, n: int, k: int, m: int) -> Tile:
    """The tile for M tokens."""
    return next(tile for most, tile in buckets(scheme, architecture, n, k) if m <= most)
