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

import torch

from qig_serve.errors import UserError
from qig_serve.formats import QUANT_METHOD, QuantScheme, unsupported_shape
from qig_serve.manifest import QuantizationConfig, read_quantization_config

_ROW_PARALLEL = ("o_proj", "down_proj")
"""Linears whose inputs tensor parallelism splits; it splits the outputs of the others."""

_SIZES = (1, 2, 4, 8)


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
    tensor_parallel_sizes: tuple[int, ...]
    """Sizes up to 8 that split every quantized layer and the attention heads evenly."""
    kv_bytes_per_token: int | None
    """KV cache a token, over all devices; None if config.json does not tell."""

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
            "produced_by": m.produced_by,
            "bits": m.bits,
            "group_size": m.group_size,
            "ignore": m.ignore,
            "calibration": m.calibration.model_dump() if m.calibration else None,
            "recipe": m.recipe,
            "summary": m.summary,
            "device": self.device,
            "weight_bytes": {"quantized": self.quantized_bytes, "other": self.other_bytes},
            "tensor_parallel_sizes": list(self.tensor_parallel_sizes),
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kernels": self.kernels,
            "layers": [asdict(layer) for layer in self.layers],
        }


def read_config(directory: Path) -> dict[str, Any]:
    """config.json; UserError if there is none or it cannot be read."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{directory}: no config.json there; give the directory that `qig-serve quantize` wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: is not a JSON object")
    return config


def read_manifest(directory: Path) -> QuantizationConfig:
    """The checkpoint's manifest; UserError if the directory is no qig checkpoint."""
    quantization = read_config(directory).get("quantization_config")
    if not quantization or quantization.get("quant_method") != QUANT_METHOD:
        raise UserError(
            f"{directory}: not quantized by qig-serve (config.json has no quantization_config with "
            f"quant_method {QUANT_METHOD!r}); run `qig-serve quantize` on it first"
        )
    return read_quantization_config(quantization, str(directory / "config.json"))


def model_dtype(directory: Path, asked: str = "auto") -> torch.dtype:
    """The dtype vLLM will compute in: what was asked for, or else config.json's."""
    names = {"half": "float16", "float": "float32"}
    if asked == "auto":
        config = read_config(directory)
        text = config.get("text_config") or {}
        found = [c.get(key) for c in (config, text) for key in ("dtype", "torch_dtype")]
        asked = next((name for name in found if name), "bfloat16")
        asked = "float16" if asked == "float32" else asked  # as vLLM does
    dtype: torch.dtype = getattr(torch, names.get(asked, asked))
    return dtype


def describe(directory: Path, dtype: torch.dtype, tensor_parallel_size: int = 1) -> Report:
    """The checkpoint in `directory`, served here in `dtype` over so many devices.

    UserError if it is no qig checkpoint or its files cannot be read.
    """
    from qig_serve.vllm_plugin.linear import device_capability, kernel_backend, kernel_name

    manifest = read_manifest(directory)
    scheme = manifest.quant_scheme
    backend, capability = kernel_backend(), device_capability()
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
        part = _shard(prefix, n, k, tensor_parallel_size)
        possible, reason = backend.can_implement(scheme, *part, dtype, capability)
        kernel = kernel_name(scheme, *part, dtype)
        layers.append(LayerReport(prefix, n, k, kernel, None if possible else reason))
    device = "cpu" if capability is None else f"cuda {capability[0]}.{capability[1]}"
    config = read_config(directory)
    text = config.get("text_config") or config
    sizes = tuple(t for t in _SIZES if _splits(scheme, layers, text, t))
    kv = _kv_bytes_per_token(text, dtype)
    return Report(manifest, device, tuple(layers), quantized, other, sizes, kv)


def _shard(name: str, n: int, k: int, size: int) -> tuple[int, int]:
    """[N, K] of one device's part of a linear."""
    return (n, k // size) if name.endswith(_ROW_PARALLEL) else (n // size, k)


def _splits(
    scheme: QuantScheme, layers: list[LayerReport], text: dict[str, Any], size: int
) -> bool:
    heads = text.get("num_attention_heads", size)
    kv_heads = text.get("num_key_value_heads") or heads
    if heads % size or (kv_heads % size and size % kv_heads):
        return False
    for layer in layers:
        n, k = _shard(layer.name, layer.n, layer.k, size)
        replicated = layer.name.endswith(("k_proj", "v_proj")) and size > kv_heads
        if (n * size != layer.n and k * size != layer.k and not replicated) or unsupported_shape(
            scheme, max(n, 1), k
        ):
            return False
    return True


def _kv_bytes_per_token(text: dict[str, Any], dtype: torch.dtype) -> int | None:
    try:
        heads = text["num_attention_heads"]
        head = text.get("head_dim") or text["hidden_size"] // heads
        kv_heads = text.get("num_key_value_heads") or heads
        return int(2 * text["num_hidden_layers"] * kv_heads * head * dtype.itemsize)
    except (KeyError, TypeError):
        return None


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
        except (OSError, ValueError, struct.error, MemoryError, OverflowError) as error:
            raise UserError(
                f"{path}: not a readable safetensors file ({error}); "
                f"try `qig-serve inspect --verify {directory}`"
            ) from None
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = (entry["shape"], end - begin)
    return tensors
