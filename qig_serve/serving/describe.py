"""What a checkpoint is and which kernel serves which layer: for /v1/quantization and `doctor`.

Reads config.json and the headers of the safetensors files only.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qig_serve.errors import UserError
from qig_serve.formats import QUANT_METHOD
from qig_serve.manifest import QuantizationConfig, read_quantization_config

_ROW_PARALLEL = ("o_proj", "down_proj")
"""Linears whose inputs tensor parallelism splits; it splits the outputs of the others."""


@dataclass(frozen=True)
class LayerReport:
    """One quantized linear as it is stored, and what runs it."""

    name: str
    n: int
    k: int
    kernel: str
    problem: str | None
    """Why it cannot run here, or None."""


@dataclass(frozen=True)
class Report:
    """A checkpoint, and how this machine serves it."""

    manifest: QuantizationConfig
    device: str
    layers: tuple[LayerReport, ...]
    quantized_bytes: int
    other_bytes: int

    @property
    def kernels(self) -> dict[str, int]:
        """Kernel -> layers it serves."""
        return dict(Counter(layer.kernel for layer in self.layers))

    @property
    def problems(self) -> list[str]:
        """Why the checkpoint cannot be served here; empty if it can."""
        return [f"{layer.name}: {layer.problem}" for layer in self.layers if layer.problem]

    def as_json(self) -> dict[str, Any]:
        """For HTTP and `--json`."""
        m = self.manifest
        return {
            "scheme": m.scheme,
            "method": m.method,
            "producer": m.producer,
            "bits": m.bits,
            "group_size": m.group_size,
            "ignore": m.ignore,
            "calibration": m.calibration.model_dump() if m.calibration else None,
            "recipe": m.recipe,
            "summary": m.summary,
            "device": self.device,
            "weight_bytes": {"quantized": self.quantized_bytes, "other": self.other_bytes},
            "kernels": self.kernels,
            "layers": [asdict(layer) for layer in self.layers],
        }


def read_manifest(directory: Path) -> QuantizationConfig:
    """The checkpoint's manifest; UserError if the directory is no qig checkpoint."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{directory}: no config.json there; give the directory that `qig-serve quantize` wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    quantization = config.get("quantization_config")
    if not quantization or quantization.get("quant_method") != QUANT_METHOD:
        raise UserError(
            f"{directory}: not quantized by qig-serve (no quantization_config with quant_method "
            f"{QUANT_METHOD!r} in config.json); run `qig-serve quantize` on it first"
        )
    return read_quantization_config(quantization, str(path))


def describe(directory: Path, dtype: str = "bfloat16", tensor_parallel_size: int = 1) -> Report:
    """The checkpoint in `directory`, served here in `dtype` over so many devices.

    UserError if it is no qig checkpoint or its files cannot be read.
    """
    import torch

    from qig_serve.vllm_plugin.linear import device_capability, kernel_backend

    manifest = read_manifest(directory)
    scheme = manifest.quant_scheme
    backend = kernel_backend()
    capability = device_capability()
    layers, quantized, other = [], 0, 0
    for name, (shape, size) in sorted(tensor_headers(directory).items()):
        prefix, _, suffix = name.rpartition(".")
        if suffix not in ("weight_packed", "weight_scale", "weight_zero_point"):
            other += size
            continue
        quantized += size
        if suffix != "weight_packed":
            continue
        n, k = shape[0], shape[1] * 32 // scheme.bits
        if prefix.endswith(_ROW_PARALLEL):
            k_here, n_here = k // tensor_parallel_size, n
        else:
            k_here, n_here = k, n // tensor_parallel_size
        possible, reason = backend.can_implement(
            scheme, n_here, k_here, getattr(torch, dtype), capability
        )
        kernel = backend.kernel_name(scheme, n_here, k_here, getattr(torch, dtype))
        layers.append(LayerReport(prefix, n, k, kernel, None if possible else reason))
    device = "cpu" if capability is None else f"cuda {capability[0]}.{capability[1]}"
    return Report(manifest, device, tuple(layers), quantized, other)


def tensor_headers(directory: Path) -> dict[str, tuple[list[int], int]]:
    """Every tensor of the directory's safetensors files: name -> (shape, bytes)."""
    tensors: dict[str, tuple[list[int], int]] = {}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory}: no .safetensors files there")
    for path in files:
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except (OSError, ValueError, struct.error, MemoryError) as error:
            raise UserError(
                f"{path}: not a readable safetensors file ({error}); "
                f"try `qig-serve inspect --verify {directory}`"
            ) from None
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = (entry["shape"], end - begin)
    return tensors
