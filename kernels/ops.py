"""The GPU kernels as torch ops, and the four functions that the vLLM plugin calls.

    qig::w3a16_linear           x [M, K] -> [M, N]
    qig::w4a8_linear            codes and scale of qig::quantize_activation -> [M, N]
    and those of quantizer_ops.py

Each has a fake implementation, so torch.compile sees through; each depends on shapes alone, waits
for nothing and searches nothing, so CUDA graphs capture it. The tile is looked up in tuning.py's
data by the number of tokens. Without a GPU the ops run under TRITON_INTERPRET=1, slowly, which is
how the tests run them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from qig_serve.formats import QuantScheme, get_scheme, unsupported_shape
from qig_serve.kernels import (
    fused_linear,
    launch,
    layout,
    quantize_activation,
    quantizer_ops,  # noqa: F401  (registers its ops)
    tuning,
    w3a16,
    w4a8,
)
from qig_serve.kernels.tuning import Tile

INTERPRETER_ARCHITECTURE = "sm_80"  # whose tiles are taken where there is no GPU
_DTYPES = (torch.bfloat16, torch.float16)
_INT32 = 1 << 31

Prepared = dict[str, torch.Tensor]


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return INTERPRETER_ARCHITECTURE
    capability = torch.cuda.get_device_capability(device)
    architecture = tuning.architecture_of(capability)
    if architecture is None:
        raise RuntimeError(f"no kernel tiles for compute capability {capability}")
    return architecture


@functools.cache
def workspace(device: torch.device) -> torch.Tensor:
    """int32 scratch for the partial sums of every linear on a device, whatever its tile.

    `prepare` allocates it, so that it is there before vLLM's memory profiling and outside of any
    CUDA graph's pool. Launches follow one another on one stream, as vLLM's do: they share it.
    """
    architecture = _architecture(device)
    sizes = [
        launch.workspace_size(tile, device)
        for (name, _, _), rows in tuning.tile_table().items()
        if name == architecture
        for _, tile in rows
    ]
    return torch.empty(max(sizes), dtype=torch.int32, device=device)


def can_implement(
    scheme: QuantScheme,
    n: int,
    k: int,
    dtype: torch.dtype,
    device_capability: tuple[int, int] | None,
) -> tuple[bool, str]:
    """Whether a linear [N, K] can run in the scheme with activations of `dtype`, or why not."""
    if scheme.name not in ("w3a16", "w4a8"):
        return False, f"no GPU kernel for scheme {scheme.name}"
    if device_capability is None:
        return False, "the GPU kernels need a CUDA device, and none was found"
    version = ".".join(map(str, device_capability))
    if device_capability < (8, 0):
        return (
            False,
            f"the GPU kernels need compute capability 8.0 or newer, this one has {version}",
        )
    if tuning.architecture_of(device_capability) is None:
        return False, f"tiles.json has no tiles for compute capability {version}"
    if dtype not in _DTYPES:
        return False, f"activations must be bfloat16 or float16, not {dtype}"
    if reason := unsupported_shape(scheme, n, k):
        return False, reason
    if layout.padded_rows(n) * k >= _INT32:
        return False, f"N * K must stay below 2^31, got N={n}, K={k}"
    if scheme.name == "w4a8" and k > quantize_activation.MAX_K:
        return False, f"w4a8 takes at most K={quantize_activation.MAX_K}, got K={k}"
    return True, ""


def prepare(scheme: QuantScheme, tensors: Prepared, dtype: torch.dtype) -> Prepared:
    """The checkpoint's tensors of one linear (formats.tensor_specs) in the kernels' layout.

    w3a16: weight_lanes, scale_zero; w4a8: weight_nibbles, channel_scale (layout.py); and counters,
    int32 zeros that every launch leaves at zero. On the tensors' own device, whose `workspace`
    exists afterwards.
    """
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    if scheme.name == "w3a16":
        prepared = layout.repack_w3a16(packed, scale, tensors["weight_zero_point"], dtype)
    else:
        prepared = layout.repack_w4a8(packed, scale)
    workspace(packed.device)
    return {**prepared, "counters": launch.counters(packed.shape[0], packed.device)}


def linear(
    scheme: QuantScheme,
    x: torch.Tensor,
    prepared: Prepared,
    n: int,
    k: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] times the prepared weight [N, K] transposed, plus bias [N]: [..., N]."""
    p = prepared
    flat = x if x.dim() == 2 else x.reshape(-1, k)
    if scheme.name == "w3a16":
        out = torch.ops.qig.w3a16_linear(
            flat, p["weight_lanes"], p["scale_zero"], p["counters"], bias, n
        )
    else:
        codes, token_scale = torch.ops.qig.quantize_activation(flat)
        out = torch.ops.qig.w4a8_linear(
            codes, token_scale, p["weight_nibbles"], p["channel_scale"], p["counters"], bias, n,
            x.dtype,
        )  # fmt: skip
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], n)


def run(
    scheme: QuantScheme,
    x: torch.Tensor,
    prepared: Prepared,
    n: int,
    bias: torch.Tensor | None,
    tile: Tile,
) -> torch.Tensor:
    """`linear` of x [M, K] with a tile of one's own: for tuning, tests and warming up."""
    p = prepared
    scratch = torch.empty(launch.workspace_size(tile, x.device), dtype=torch.int32, device=x.device)
    if scheme.name == "w3a16":
        return w3a16.linear(
            x, p["weight_lanes"], p["scale_zero"], p["counters"], scratch, bias, n, tile,
            use_ptx(x),
        )  # fmt: skip
    codes, token_scale = quantize_activation.quantize(x)
    return w4a8.linear(
        codes, token_scale, p["weight_nibbles"], p["channel_scale"], p["counters"], scratch, bias,
        n, x.dtype, tile, use_ptx(x),
    )  # fmt: skip


def fuses_activations(scheme: QuantScheme) -> bool:
    """Whether vLLM's graphs are to put what comes before a linear into the linear's ops."""
    return scheme.name == "w4a8"


def warm_up(scheme: QuantScheme, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile every bucket's kernel for a linear [N, K], with and without bias."""
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        for key in _warm_up_keys(scheme, n, k, device):
            _compile(scheme, n, k, dtype, device, *key)
        torch.cuda.synchronize(device)


def _warm_up_keys(
    scheme: QuantScheme, n: int, k: int, device: torch.device
) -> list[tuple[Tile, int]]:
    """(tile, smallest M of its bucket)."""
    tiles, m = [], 1
    for most, tile in tuning.buckets(scheme, _architecture(device), n, k):
        tiles.append((tile, m))
        m = int(most) + 1 if most != float("inf") else m
    return tiles


def _compile(
    scheme: QuantScheme,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    tile: Tile,
    m: int,
) -> None:
    """One launch on zeros: Triton compiles what it has not compiled yet."""
    prepared = _zeros(scheme, n, k, device)
    x = torch.zeros(m, k, dtype=dtype, device=device)
    for bias in (None, torch.zeros(n, dtype=dtype, device=device)):
        run(scheme, x, prepared, n, bias, tile)


def _zeros(scheme: QuantScheme, n: int, k: int, device: torch.device) -> Prepared:
    """Kernel tensors of zero weights, in the shapes of `prepare`."""
    blocks, rows = k // layout.GROUP, layout.padded_rows(n)
    counters = launch.counters(n, device)
    if scheme.name == "w3a16":
        lanes = torch.zeros(
            blocks, rows // layout.ROW_TILE, 3, 64, 16, dtype=torch.int16, device=device
        )
        scale_zero = torch.zeros(blocks, rows, dtype=torch.int32, device=device)
        return {"weight_lanes": lanes, "scale_zero": scale_zero, "counters": counters}
    nibbles = torch.zeros(blocks, rows, 64, dtype=torch.int8, device=device)
    channel_scale = torch.zeros(rows, dtype=torch.float32, device=device)
    return {"weight_nibbles": nibbles, "channel_scale": channel_scale, "counters": counters}


def use_ptx(x: torch.Tensor) -> bool:
    """Inline PTX runs on a GPU; the interpreter takes the pure Triton twin."""
    return x.device.type == "cuda"


def _ready(x: torch.Tensor) -> torch.Tensor:
    """Contiguous and 16-byte aligned, which the compiled loads count on."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _w3a16_linear(
    x: torch.Tensor,
    weight_lanes: torch.Tensor,
    scale_zero: torch.Tensor,
    counters: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
) -> torch.Tensor:
    m, k = x.shape
    if m == 0:
        return x.new_empty(0, n)
    tile = tuning.select(get_scheme("w3a16"), _architecture(x.device), n, k, m)
    return w3a16.linear(
        _ready(x), weight_lanes, scale_zero, counters, workspace(x.device), bias, n, tile,
        use_ptx(x),
    )  # fmt: skip


def _w4a8_linear(
    codes: torch.Tensor,
    token_scale: torch.Tensor,
    weight_nibbles: torch.Tensor,
    channel_scale: torch.Tensor,
    counters: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    m, k = codes.shape
    if m == 0:
        return codes.new_empty(0, n, dtype=dtype)
    tile = tuning.select(get_scheme("w4a8"), _architecture(codes.device), n, k, m)
    return w4a8.linear(
        _ready(codes), token_scale, weight_nibbles, channel_scale, counters,
        workspace(codes.device), bias, n, dtype, tile, use_ptx(codes),
    )  # fmt: skip


def _fake_w3a16_linear(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], rest[-1])


_library = torch.library.Library("qig", "FRAGMENT")
_WEIGHT = "Tensor counters, Tensor? bias, int n"
_W3A16 = f"Tensor weight_lanes, Tensor scale_zero, {_WEIGHT}"
_OPS = (
    (f"w3a16_linear(Tensor x, {_W3A16}) -> Tensor", _w3a16_linear, _fake_w3a16_linear),
    (
        "w4a8_linear(Tensor codes, Tensor token_scale, Tensor weight_nibbles, "
        f"Tensor channel_scale, {_WEIGHT}, ScalarType dtype) -> Tensor",
        _w4a8_linear,
        lambda codes, token_scale, weight_nibbles, channel_scale, counters, bias, n, dtype: (
            codes.new_empty(codes.shape[0], n, dtype=dtype)
        ),
    ),
)
for _schema, _implementation, _fake in _OPS:
    _name = _schema.split("(", 1)[0]
    _library.define(_schema)
    for _key in ("CUDA", "CPU"):  # on CPU tensors under TRITON_INTERPRET=1 alone
        _library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"qig::{_name}", _fake, lib=_library)
fused_linear.define_fused(
    "w3a16_linear", _W3A16, _w3a16_linear, lambda x, *rest: None, _fake_w3a16_linear
)
