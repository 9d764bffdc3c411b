"""The GPU kernels behind the functions that the vLLM plugin calls.

A scheme is one row of formats.SCHEMES and one module here of the same name. It exports
prepare, apply, linear, zeros, warm_up, candidates, kernel, unsupported and FUSES_ACTIVATIONS, adds
its ops to library.py's, and has its tiles in tiles.json (tuning.py):

    qig::w3a16_linear    x [M, K] -> [M, N]; fused_linear.py adds what comes before it
    qig::w4a8_linear     codes and scale of qig::quantize_activation -> [M, N]
    qig::w8a16_linear    x [M, K] -> [M, N], and qig::w8a16_embedding ids [M] -> [M, K]

quantizer_ops.py has those that quantize activations, experts.py the one of a mixture of experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from qig_serve.formats import SCHEMES, QuantScheme, unsupported_shape
from qig_serve.kernels import launch, layout, library, tiles
from qig_serve.kernels.library import LinearJob, Prepared
from qig_serve.kernels.tiles import Tile
from qig_serve.kernels.warm_up import COMPILATION

KERNELS: dict[str, ModuleType] = {
    name: import_module(module) for name in SCHEMES if find_spec(module := f"{__package__}.{name}")
}
_DTYPES = (torch.bfloat16, torch.float16)
_INT32 = 1 << 31


def can_implement(
    scheme: QuantScheme,
    n: int,
    k: int,
    dtype: torch.dtype,
    device_capability: tuple[int, int] | None,
) -> tuple[bool, str]:
    """Whether a linear [N, K] can run in the scheme with activations of `dtype`, or why not."""
    if scheme.name not in KERNELS:
        return False, f"no GPU kernel for scheme {scheme.name}"
    if device_capability is None:
        return False, "the GPU kernels need a CUDA device, and none was found"
    version = ".".join(map(str, device_capability))
    if device_capability < (8, 0):
        return (
            False,
            f"the GPU kernels need compute capability 8.0 or newer, this one has {version}",
        )
    if tiles.architecture_of(device_capability) is None:
        return False, f"tiles.json has no tiles for compute capability {version}"
    if dtype not in _DTYPES:
        return False, f"activations must be bfloat16 or float16, not {dtype}"
    if reason := unsupported_shape(scheme, n, k):
        return False, reason
    if layout.padded_rows(n) * k >= _INT32:
        return False, f"N * K must stay below 2^31, got N={n}, K={k}"
    reason = KERNELS[scheme.name].unsupported(k)
    return not reason, reason


def prepare(scheme: QuantScheme, tensors: Prepared, dtype: torch.dtype) -> Prepared:
    """The checkpoint's tensors of one linear (formats.tensor_specs) in the kernels' layout.

    w3a16: weight_planes, scale_zero; w4a8: weight_nibbles, channel_scale; w8a16: weight_bytes,
    row_scale (layout.py). On the tensors' own device, whose scratch memory (launch.py) exists
    afterwards.
    """
    launch.scratch(tensors["weight_packed"].device)
    return KERNELS[scheme.name].prepare(tensors, dtype)


def linear(
    scheme: QuantScheme, x: torch.Tensor, prepared: Prepared, n: int, k: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x [..., K] times the prepared weight [N, K] transposed, plus bias [N]: [..., N]."""
    flat = x if x.dim() == 2 else x.reshape(-1, k)
    out = KERNELS[scheme.name].apply(flat, prepared, n, bias)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], n)


def embedding(
    scheme: QuantScheme,
    ids: torch.Tensor,
    prepared: Prepared,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows `ids` [...] of the prepared table [N, K] in `dtype`: [..., K]."""
    rows = KERNELS[scheme.name].embedding(ids.reshape(-1), prepared, n, k, dtype)
    return rows.reshape(*ids.shape, k)


def run(
    scheme: QuantScheme,
    x: torch.Tensor,
    prepared: Prepared,
    n: int,
    bias: torch.Tensor | None,
    tile: Tile,
    scratch: launch.Scratch | None = None,
) -> torch.Tensor:
    """`linear` of x [M, K] with a tile of one's own: for tuning, tests and warming up."""
    scratch = scratch or launch.scratch_for(tile, x.device)
    return KERNELS[scheme.name].linear(x, prepared, n, bias, tile, scratch, library.use_ptx(x))


def fuses_activations(scheme: QuantScheme) -> bool:
    """Whether vLLM's graphs are to put what comes before a linear into the linear's ops."""
    return bool(KERNELS[scheme.name].FUSES_ACTIVATIONS)


def token_counts(job: LinearJob) -> list[int]:
    """A number of tokens for each tile that a linear may run with."""
    return [m for _, m in warm_up_tiles(job.scheme, job.n, job.k, job.device)]


def compile_ahead(job: LinearJob) -> None:
    """Begin to compile, in the background, what a linear launches for any number of tokens."""
    if job.device.type != "cuda":
        return
    job = job._replace(device=(device := launch.indexed(job.device)))
    module, of_inputs = KERNELS[job.scheme.name], (job.k, job.dtype, device)
    COMPILATION.begin(
        (job.scheme.name, *of_inputs),
        functools.partial(on_device, device, module.warm_up, *of_inputs),
    )
    for tile, m in warm_up_tiles(job.scheme, job.n, job.k, device):
        COMPILATION.begin(
            (job, tile, m), functools.partial(on_device, device, _launch, job, tile, m)
        )


def warm_up(job: LinearJob) -> None:
    """Wait until every kernel that was begun, and this linear's, is compiled."""
    compile_ahead(job)
    COMPILATION.finish()


def on_device(device: torch.device, function: Callable[..., None], *arguments: Any) -> None:
    """Call it with the device set, and wait for what it launched."""
    with torch.cuda.device(device):
        function(*arguments)
        torch.cuda.synchronize(device)


def _launch(job: LinearJob, tile: Tile, m: int) -> None:
    """One launch on zeros, in scratch memory of its own: Triton compiles what it has not yet."""
    scheme, n, k, dtype, device, has_bias = job
    prepared = KERNELS[scheme.name].zeros(n, k, device)
    x = torch.zeros(m, k, dtype=dtype, device=device)
    bias = torch.zeros(n, dtype=dtype, device=device) if has_bias else None
    run(scheme, x, prepared, n, bias, tile)


def warm_up_tiles(
    scheme: QuantScheme, n: int, k: int, device: torch.device
) -> list[tuple[Tile, int]]:
    """(tile, smallest M of its bucket)."""
    found, m = [], 1
    for most, tile in tiles.buckets(scheme.name, launch.architecture(device), n, k):
        found.append((tile, m))
        m = int(most) + 1 if most != float("inf") else m
    return found
