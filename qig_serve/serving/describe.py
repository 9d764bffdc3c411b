"""What a checkpoint is and which kernel serves which layer.

For the start-up log, `doctor` and /v1/quantization, which say the same. Reads config.json and the
headers of the safetensors files only.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qig_serve import sizes
from qig_serve.errors import UserError
from qig_serve.formats import VOCABULARY_SCHEME, QuantScheme, tensor_specs
from qig_serve.inspection import require_sound
from qig_serve.manifest import QuantizationConfig
from qig_serve.model_directory import (
    dtype_named,
    load_config,
    model_dtype,
    read_config,
    text_config,
)
from qig_serve.tensor_parallel import fitting_sizes, in_words, refused_sizes, shard, why_refused
from qig_serve.vllm_plugin import SUPPORTED_VLLM, check_vllm_version

_SHOWN = 3  # problems; usually the same one in every layer


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
    dtype: torch.dtype
    """Of the activations."""
    layers: tuple[LayerReport, ...]
    quantized_bytes: int
    """As stored."""
    other_bytes: int
    memory_bytes: int
    """Weights in one device's memory, the quantized ones in the kernels' own layout.

    Not more than this: what is in 16 bits is counted whole.
    """
    device_bytes: int
    """Memory of the device."""
    tensor_parallel_size: int
    tensor_parallel_refused: Mapping[int, str]
    """Sizes that do not fit, of tensor_parallel.SIZES and the one asked for -> why."""
    pipeline_parallel_size: int
    blocks: int | None
    """Of the decoder; None if config.json does not say."""
    kv_bytes_per_token: int | None
    """KV cache per token, over all devices; None if config.json does not say."""
    recovery: dict[str, Any] | None
    """What `quantize --evaluate` found, full precision and this checkpoint; None without it."""

    @property
    def tensor_parallel_sizes(self) -> list[int]:
        """Those of tensor_parallel.SIZES that fit."""
        return fitting_sizes(self.tensor_parallel_refused)

    @property
    def kernels(self) -> dict[str, int]:
        """Kernel -> layers it serves."""
        return dict(Counter(layer.kernel for layer in self.layers))

    @property
    def problems(self) -> list[str]:
        """Why the checkpoint cannot be served here; empty if it can."""
        problems = []
        per_layer = [f"{x.name}: {x.problem}" for x in self.layers if x.problem]
        if reason := self.tensor_parallel_refused.get(self.tensor_parallel_size):
            problems.append(
                f"tensor parallel size {self.tensor_parallel_size} does not fit: {reason} "
                f"(these sizes fit: {in_words(self.tensor_parallel_sizes, {})}); "
                "--pipeline-parallel-size splits by layers instead"
            )
            per_layer = []  # parts of no size
        if self.blocks is not None and self.pipeline_parallel_size > self.blocks:
            problems.append(
                f"pipeline parallel size {self.pipeline_parallel_size} does not fit: the decoder "
                f"has {self.blocks} blocks, and each device needs one at least"
            )
        if self.memory_bytes > self.device_bytes:
            needed, there_is = map(sizes.in_words, (self.memory_bytes, self.device_bytes))
            problems.append(
                f"the weights take {needed} of each device's memory, and it has {there_is}: use "
                "more devices (--tensor-parallel-size, --pipeline-parallel-size)"
            )
        return problems + per_layer

    def lines(self) -> list[str]:
        """For people: device, versions, kernels, sizes, memory, and why not."""
        stored = (
            f"{sizes.in_words(self.quantized_bytes)} in {len(self.layers)} quantized layers, "
            f"{sizes.in_words(self.other_bytes)} in 16 bits"
        )
        needed = f"{sizes.in_words(self.memory_bytes)} of weights"
        if self.kv_bytes_per_token is not None:
            needed += f" and {self.kv_bytes_per_token / 1024:g} KiB of KV cache per token"
        rows = [
            ("checkpoint", f"{self.manifest.scheme}, quantized with {self.manifest.method}"),
            ("recovery", _recovery_in_words(self.recovery)),
            ("device", f"{self.device}, computing in {str(self.dtype).removeprefix('torch.')}"),
            ("vLLM", f"{_vllm_version()} (supported: {SUPPORTED_VLLM})"),
            ("tensor parallel", in_words(self.tensor_parallel_sizes, self.tensor_parallel_refused)),
            ("weights stored", stored),
            ("memory needed", f"{needed}; a device has {sizes.in_words(self.device_bytes)}"),
        ]
        rows += [("kernel", f"{kernel}: {count} layers") for kernel, count in self.kernels.items()]
        problems = self.problems
        rows += [("cannot be served", problem) for problem in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            rows.append(("", f"and {len(problems) - _SHOWN} more (doctor --json lists them)"))
        return [f"{name:16}  {text}" for name, text in rows]

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
            "recovery": self.recovery,
            "vllm": _vllm_version(),
            "vllm_supported": SUPPORTED_VLLM,
            "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weight_bytes": {"quantized": self.quantized_bytes, "other": self.other_bytes},
            "memory_bytes": {"needed": self.memory_bytes, "device": self.device_bytes},
            "tensor_parallel_size": self.tensor_parallel_size,
            "tensor_parallel_sizes": self.tensor_parallel_sizes,
            "tensor_parallel_refused": {
                str(size): why for size, why in self.tensor_parallel_refused.items()
            },
            "pipeline_parallel_size": self.pipeline_parallel_size,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kernels": self.kernels,
            "layers": [asdict(layer) for layer in self.layers],
            "problems": self.problems,
        }


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


def unsupported_version() -> str | None:
    """One sentence if vLLM is missing or not of a supported version, or else None."""
    try:
        check_vllm_version(_vllm_version())
    except ModuleNotFoundError as error:
        return f"serving needs vLLM ({SUPPORTED_VLLM}), which does not import: {error}"
    except RuntimeError as error:
        return str(error)
    return None


def serving_dtype(directory: Path, asked: str = "auto") -> torch.dtype:
    """The dtype vLLM will compute in: what was asked for, or else the model's.

    A model of a dtype that the platform does not compute in is served in the platform's own, and
    so is one in float32, unless that is asked for: vLLM does the same.
    """
    if asked != "auto":
        return dtype_named(asked, "--dtype")
    from vllm.platforms import current_platform

    stored, supported = model_dtype(directory), current_platform.supported_dtypes
    return stored if stored in supported and stored != torch.float32 else supported[0]


def describe(
    directory: Path,
    dtype: torch.dtype,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    split_vision_tower: bool = True,
    expert_parallel: bool = False,
) -> Report:
    """The checkpoint in `directory`, served here in `dtype` over so many devices.

    split_vision_tower: whether tensor parallelism splits it too, as vLLM does by default.
    expert_parallel: whether whole experts are shared out, and none is split.
    UserError if it is no qig checkpoint, its files cannot be read, or vLLM is not a supported one.
    """
    if version := unsupported_version():
        raise UserError(version)
    from vllm.platforms import current_platform

    from qig_serve.vllm_plugin.linear import device_capability, kernel_backend, kernel_name

    stored = require_sound(directory)
    manifest = stored.config
    scheme = manifest.quant_scheme
    backend, capability = kernel_backend(), device_capability()
    layers, quantized, other, memory, vocabulary = [], 0, 0, 0, 0
    for name, tensor in sorted(stored.tensors.items()):
        prefix, _, suffix = name.rpartition(".")
        if suffix not in ("weight_packed", "weight_scale", "weight_zero_point"):
            other += tensor.nbytes
            continue
        quantized += tensor.nbytes
        if suffix != "weight_packed":
            continue
        its = VOCABULARY_SCHEME if prefix in manifest.eight_bit else scheme
        n, k = tensor.shape[0], tensor.shape[1] * 32 // its.bits
        whole = expert_parallel and ".experts." in prefix
        part = (n, k) if whole else shard(prefix, n, k, tensor_parallel_size)
        possible, reason = backend.can_implement(its, *part, dtype, capability)
        kernel = kernel_name(its, part[0], dtype) if possible else "none"
        layers.append(LayerReport(prefix, n, k, kernel, None if possible else reason))
        needed = part[0] * _bytes_of_rows(its, part[1], dtype) // _ROWS if possible else 0
        needed //= tensor_parallel_size if whole else 1
        if its is scheme:
            memory += needed
        else:
            vocabulary += needed
    device = "cpu" if capability is None else f"cuda {capability[0]}.{capability[1]}"
    config = load_config(directory)
    split = split_vision_tower, not expert_parallel
    refused = refused_sizes(config, scheme.cut_multiple, *split)
    size = tensor_parallel_size
    if reason := why_refused(config, scheme.cut_multiple, size, *split):
        refused[size] = reason
    text = text_config(read_config(directory))
    return Report(
        manifest=manifest,
        device=device,
        dtype=dtype,
        layers=tuple(layers),
        quantized_bytes=quantized,
        other_bytes=other,
        memory_bytes=memory // pipeline_parallel_size + vocabulary + other,
        device_bytes=current_platform.get_device_total_memory(),
        tensor_parallel_size=tensor_parallel_size,
        tensor_parallel_refused=refused,
        pipeline_parallel_size=pipeline_parallel_size,
        blocks=_positive(text, "num_hidden_layers"),
        kv_bytes_per_token=_kv_bytes_per_token(text, dtype),
        recovery=_read_recovery(directory),
    )


def _read_recovery(directory: Path) -> dict[str, Any] | None:
    """The evaluation in the checkpoint's report.json, in short; UserError if it is damaged."""
    path = directory / "report.json"
    if not path.exists():
        return None
    try:
        evaluation = json.loads(path.read_text("utf-8")).get("evaluation")
        if evaluation is None:
            return None
        results = evaluation["results"]
        ((_, own),) = ((name, r) for name, r in results.items() if name != "fp")
        return {
            "data": evaluation["data"],
            "questions": own["n"],
            "exact_match": own["exact_match"],
            "exact_match_full_precision": results["fp"]["exact_match"],
            "kl_mean": (own.get("kl") or {}).get("kl_mean"),
            "top1": (own.get("kl") or {}).get("top1"),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a report of this version ({type(error).__name__}: {error}); "
            f"try `qig-serve inspect --verify {directory}`"
        ) from None


def _recovery_in_words(recovery: dict[str, Any] | None) -> str:
    if recovery is None or recovery["exact_match"] is None:
        return "not measured (qig-serve quantize --evaluate)"
    words = (
        f"{recovery['exact_match']:.1%} exact match, full precision "
        f"{recovery['exact_match_full_precision']:.1%}, on {recovery['questions']} questions"
    )
    if recovery["kl_mean"] is not None:
        words += f"; KL {recovery['kl_mean']:.2g} nats per token, top-1 agreement "
        words += f"{recovery['top1']:.1%}"
    return words


_ROWS = 256  # a multiple of every kernel's block of output channels


@functools.cache
def _bytes_of_rows(scheme: QuantScheme, k: int, dtype: torch.dtype) -> int:
    """Bytes in memory of _ROWS output channels with K inputs, as the kernels keep them."""
    from qig_serve.vllm_plugin.linear import kernel_backend

    tensors = {}
    for suffix, spec in tensor_specs(scheme, _ROWS, k).items():
        stored = dtype if spec.dtype == "model" else getattr(torch, spec.dtype)
        tensors[suffix] = torch.ones(spec.shape, dtype=stored)
    prepared = kernel_backend().prepare(scheme, tensors, dtype)
    return sum(tensor.nbytes for tensor in prepared.values())


def _positive(config: Mapping[str, Any], key: str) -> int | None:
    """A size in a configuration; None where it is not there or is no size."""
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else None


_WITHOUT_KEYS = ("linear_attention", "conv")
"""Kinds of blocks whose state does not grow with the tokens."""


def _kv_bytes_per_token(text: Mapping[str, Any], dtype: torch.dtype) -> int | None:
    heads, layers = _positive(text, "num_attention_heads"), _positive(text, "num_hidden_layers")
    head = _positive(text, "head_dim")
    if head is None and heads is not None and (hidden := _positive(text, "hidden_size")):
        head = hidden // heads
    if heads is None or layers is None or head is None:
        return None
    kv_heads = _positive(text, "num_key_value_heads") or heads
    if isinstance(kinds := text.get("layer_types"), list):
        layers = sum(kind not in _WITHOUT_KEYS for kind in kinds)
    layers -= _positive(text, "num_kv_shared_layers") or 0
    return 2 * layers * kv_heads * head * dtype.itemsize
