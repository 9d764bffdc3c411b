"""Random-weight models at real sizes, as checkpoints of every variant that vLLM is timed with.

    make_checkpoints("qwen2-vl-7b", ["bf16", "w3a16"], directory, device="cuda")

Nothing is downloaded and no calibration runs: weights are drawn from a seed per layer, and every
quantized variant is those same weights rounded to nearest by the package's own packing. What all
variants share (vision tower, norms) lies in one file that they link to, and output head and
embedding in another, of 16 bits or of 8.
`tiny=True` makes the same models with few and narrow layers, for a machine without a GPU.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_vllm_configs import MODELS, STD, BenchModel, make_tokenizer, shapes
from gpu_vllm_run import COMPLETE
from safetensors import safe_open
from safetensors.torch import save_file

from qig_serve import packing
from qig_serve.architectures import get_architecture
from qig_serve.formats import FORMAT_VERSION, VOCABULARY_SCHEME, QuantScheme, get_scheme
from qig_serve.manifest import EMBEDDING, HEAD
from qig_serve.offline.checkpoint import compressed_tensors
from qig_serve.offline.source.surplus import outside_blocks

Tensors = dict[str, torch.Tensor]
LINEARS = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))


_W4A16 = QuantScheme("w4a16", bits=4, symmetric=True, group_size=128, servable=False)
_W3A16_SYMMETRIC = QuantScheme(
    "w3a16-symmetric", bits=3, symmetric=True, group_size=128, servable=False
)
CHECKPOINTS: dict[str, QuantScheme | None] = {
    "bf16": None,
    "w3a16": get_scheme("w3a16"),
    "w4a8": get_scheme("w4a8"),
    "w3a16-head16": get_scheme("w3a16"),
    # compressed-tensors: what `quantize --format compressed-tensors` writes of the two above ...
    "ct-w3a16": get_scheme("w3a16"),
    "ct-w4a8": get_scheme("w4a8"),
    # ... one bit more, for Marlin and Machete; and 3 bits without gaps, for Humming, which vLLM
    # takes without zero points alone.
    "ct-w4a16": _W4A16,
    "ct-w3a16-dense": _W3A16_SYMMETRIC,
}
"""What is written -> how its linears are stored; None: not quantized."""
EIGHT_BIT = ("w3a16", "w4a8")
"""What has output head and embedding in 8 bits, as `quantize` leaves them."""


def _draw(name: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """bf16 weights of a tensor: the same for the same name, whatever else is made."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * STD
    return values + 1 if "norm" in name and name.endswith("weight") else values


def _packed(
    weight: torch.Tensor, kind: str, scheme: QuantScheme
) -> dict[str, torch.Tensor]:  # suffix -> tensor
    """The weight [N, K] rounded to nearest, as the checkpoint of this kind stores it."""
    dtype = packing.scale_dtype(scheme, weight.dtype)
    scale, zero = packing.minmax_params(weight, scheme, dtype)
    codes = packing.quantize(weight, scale, zero, scheme)
    if kind == "ct-w3a16-dense":
        unsigned = (codes.to(torch.int16) + (1 << (scheme.bits - 1))).to(torch.uint8)
        return {
            "weight_packed": packing.pack(unsigned, scheme.bits),
            "weight_scale": scale.to(dtype),
            "weight_shape": torch.tensor(list(weight.shape)),
        }
    stored = packing.pack_linear(codes, scale, zero, scheme, weight.dtype)
    return compressed_tensors.convert_linear(stored, scheme) if kind.startswith("ct-") else stored


def quantization_config(
    model: BenchModel, kind: str, config: Any, left_alone: Sequence[str], tables: Sequence[str]
) -> dict[str, Any] | None:
    """`quantization_config` of config.json; None in full precision."""
    scheme = CHECKPOINTS[kind]
    if scheme is None:
        return None
    if kind.startswith("ct-"):
        arch = get_architecture(model.family)
        found = compressed_tensors.quantization_config(arch, scheme, left_alone)
        found["config_groups"]["group_0"]["weights"]["num_bits"] = (
            3 if kind == "ct-w3a16-dense" else 4
        )
        return found
    return {
        "quant_method": "qig", "format_version": FORMAT_VERSION, "scheme": scheme.name,
        "bits": scheme.bits, "group_size": scheme.group_size,
        "ignore": [name for name in left_alone if name not in tables], "eight_bit": list(tables),
        "model_type": config.model_type, "architectures": config.architectures, "method": "rtn",
        "produced_by": "random weights, for timing",
    }  # fmt: skip


def make_checkpoints(
    name: str, kinds: Sequence[str], directory: Path, device: str = "cpu", tiny: bool = False,
    layers: int | None = None,
) -> dict[str, Path]:  # fmt: skip
    """Kind -> its checkpoint under `directory`; those that are complete are left as they are.

    `layers` overrides the number of decoder blocks (to try real widths on a small machine).
    """
    model = MODELS[name]
    targets = {kind: directory / f"{name}{'-tiny' if tiny else ''}" / kind for kind in kinds}
    wanted = {k: path for k, path in targets.items() if not (path / COMPLETE).exists()}
    if not wanted:
        return targets
    tokenizer = make_tokenizer(model, tiny)
    config = model.config(tokenizer, tiny)
    config.dtype = "bfloat16"
    if layers is not None:
        config.text_config.num_hidden_layers = layers
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = config.text_config.layer_types[:layers]
    everything = shapes(model, config)
    prefix = next(
        p for p in get_architecture(model.family).source_prefixes
        if any(n.startswith(p) for n in everything)
    )  # fmt: skip
    in_layers = [n for n in everything if n.startswith(prefix)]
    left_alone = outside_blocks(everything, prefix)
    outside = [n for n in everything if n not in in_layers]
    in_tables = [n for n in outside if n.endswith((f"{EMBEDDING}.weight", f"{HEAD}.weight"))]
    tables = [n.removesuffix(".weight") for n in in_tables]
    for kind, path in wanted.items():
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        config.save_pretrained(path)
        written = json.loads((path / "config.json").read_text())
        in_8_bits = tables if kind in EIGHT_BIT else []
        quantization = quantization_config(model, kind, config, left_alone, in_8_bits)
        if quantization is not None:
            written["quantization_config"] = quantization
        (path / "config.json").write_text(json.dumps(written, indent=2) + "\n")
        model.processor(tokenizer, tokenizer.chat_template, tiny).save_pretrained(path)
        tokenizer.save_pretrained(path)

    index: dict[str, dict[str, str]] = {kind: {} for kind in wanted}
    home = directory / f"{name}{'-tiny' if tiny else ''}"

    def drawn(names: Sequence[str]) -> Tensors:
        return {n: _draw(n, everything[n], device).cpu() for n in names}

    rest = [n for n in outside if n not in in_tables]
    parts = {
        "rest.safetensors": (list(wanted), lambda: drawn(rest)),
        "tables.safetensors": (
            [kind for kind in wanted if kind not in EIGHT_BIT], lambda: drawn(in_tables)
        ),
        "tables-8.safetensors": (
            [kind for kind in wanted if kind in EIGHT_BIT], lambda: _in_8_bits(drawn(in_tables))
        ),
    }  # fmt: skip
    for file, (sharing, make) in parts.items():
        names = _shared(home / file, [wanted[kind] for kind in sharing], make) if sharing else []
        for kind in sharing:
            index[kind] |= dict.fromkeys(names, file)
    for layer in range(config.text_config.num_hidden_layers):
        file = f"layer-{layer:03d}.safetensors"
        names = [n for n in in_layers if n.startswith(f"{prefix}{layer}.")]
        weights = {n: _draw(n, everything[n], device) for n in names}
        for kind, path in wanted.items():
            tensors = _layer(weights, kind)
            save_file(tensors, path / file, {"format": "pt"})
            index[kind] |= dict.fromkeys(tensors, file)
    for kind, path in wanted.items():
        contents = {"metadata": {}, "weight_map": index[kind]}
        (path / "model.safetensors.index.json").write_text(json.dumps(contents) + "\n")
        (path / COMPLETE).touch()
    if device == "cuda":
        torch.cuda.empty_cache()  # an engine is next to want the memory
    return targets


def _shared(path: Path, folders: Sequence[Path], make: Callable[[], Tensors]) -> list[str]:
    """Links a file into all folders; the first process that wants it makes it. Its tensors."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            save_file(make(), path.with_suffix(".tmp"), {"format": "pt"})
            path.with_suffix(".tmp").rename(path)
    for folder in folders:
        os.link(path, folder / path.name)
    with safe_open(path, "pt") as opened:
        return list(opened.keys())


def _in_8_bits(weights: Tensors) -> Tensors:
    return {
        f"{name.removesuffix('.weight')}.{suffix}": tensor
        for name, weight in weights.items()
        for suffix, tensor in packing.pack_rows(weight, VOCABULARY_SCHEME).items()
    }


def _layer(weights: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """A decoder block's tensors as a checkpoint of the kind stores them, on the CPU."""
    scheme = CHECKPOINTS[kind]
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        linear = name.removesuffix(".weight")
        if scheme is None or not linear.endswith(LINEARS) or tensor.dim() != 2:
            stored[name] = tensor.cpu()
        else:
            packed = _packed(tensor, kind, scheme)
            stored |= {f"{linear}.{s}": t.cpu().contiguous() for s, t in packed.items()}
    return stored


def weight_bytes(directory: Path) -> int:
    """Bytes of a checkpoint's shards."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
