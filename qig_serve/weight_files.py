"""Which files of a model directory hold its weights, and whether they are in full precision.

One reader decides, and everything that opens weights asks it: the quantizer for the blocks and for
what stands before them, the evaluation for its reference. Only headers are read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qig_serve.errors import UserError
from qig_serve.model_directory import (
    CONFIG_FILE,
    INDEX_FILE,
    damaged,
    is_pointer,
    read_config,
    read_json,
    tensor_headers,
)

SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_KEYS = ("quantization_config", "compression_config", "quantization")
"""The last is MLX's."""
_QUANTIZER_FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
)
"""Those of ModelOpt, AutoGPTQ, AutoAWQ and AutoRound, which leave config.json as it was."""
_COMPANION = re.compile(
    r"(weight_|input_|scale_)(global_)?(scale|weight|input)(_inv|_2)?|weight_(zero_point|packed|shape"
    r"|format)|SCB|qweight|qzeros|scales|g_idx|absmax|nested_absmax|quant_map|nested_quant_map"
    r"|quant_state.*"
)
_ADAPTER = re.compile(r".*\.(lora_(embedding_)?[AB]|lora_magnitude_vector|base_layer)(\..*)?")
_WRAPPERS = re.compile(
    r"(?:.*\.)?(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|parametrizations)\..*"
)
_INTEGER_BUFFERS = ("position_ids", "num_batches_tracked", "relative_position_index")
"""Tables of numbers that are no weights: copied, if no one reads them."""
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a directory that count."""

    names: list[str]
    weight_map: dict[str, str] = field(default_factory=dict)
    """Of the index: tensor -> file. Empty where there is none."""


def weight_files(directory: Path) -> WeightFiles:
    """The index's shards, or the single file. UserError where there are none, or two sets.

    transformers reads a model.safetensors before an index, vLLM the index before it: a directory
    that holds both is two models.
    """
    config = directory / CONFIG_FILE
    named = read_json(config).get("transformers_weights") if config.is_file() else None
    if named is not None and named not in (SINGLE_FILE, INDEX_FILE):
        raise UserError(
            f"{config}: transformers_weights names {named!r}, which vLLM does not "
            f"read: store the weights as {SINGLE_FILE} or as shards with {INDEX_FILE}"
        )
    adapter = next((directory / n for n in _ADAPTERS if (directory / n).is_file()), None)
    if adapter is not None:
        raise UserError(
            f"{directory} has the adapter {adapter.name} beside the model, and programs differ in "
            "whether they apply it: merge it into the weights, or move it away"
        )
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if index.is_file():
        found = _indexed(index)
        if single.is_file() and found.names != [SINGLE_FILE]:
            raise UserError(
                f"{directory} holds two sets of weights, {SINGLE_FILE} and the shards of "
                f"{INDEX_FILE}, and programs differ in which they read: move one of them away"
            )
        return found
    if single.is_file():
        check_pointers(directory, [SINGLE_FILE])
        return WeightFiles([SINGLE_FILE])
    for path in (index, single):
        if os.path.lexists(path):
            raise UserError(
                f"{path} is no file (a folder, or a link to nothing): download it again"
            )
    others = sorted(p.name for p in directory.glob("*.safetensors"))
    if others:
        raise UserError(
            f"{directory} has {others[0]}, but neither {SINGLE_FILE} nor {INDEX_FILE}: download "
            f"the index too, or rename a file that is alone to {SINGLE_FILE}"
        )
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UserError(
            f"{directory} has its weights in pickle form ({pickles[0]}), which can run code when "
            "it is read: convert it to safetensors"
        )
    if gguf := sorted(p.name for p in directory.glob("*.gguf")):
        raise UserError(
            f"{directory} has its weights as GGUF ({gguf[0]}), which is quantized already: give "
            "the full-precision model, with its safetensors files"
        )
    raise UserError(
        f"{directory} has no safetensors weights: download {SINGLE_FILE}, or the shards and "
        f"{INDEX_FILE}"
    )


def _indexed(index: Path) -> WeightFiles:
    try:
        value = json.loads(index.read_text(encoding="utf-8"))
        wanted = {str(k): str(v) for k, v in value["weight_map"].items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not an index of safetensors: download it again") from None
    if not wanted:
        raise UserError(f"{index} names no tensors: download it again")
    names = sorted(set(wanted.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, which is not a file beside it")
        if not os.path.isfile(index.parent / name):
            raise UserError(f"{index} names the shard {name}, which is missing: download it again")
    check_pointers(index.parent, names)
    return WeightFiles(names, wanted)


def check_index(directory: Path) -> None:
    """UserError for an index that transformers fails on, though nothing of it is missing."""
    index = directory / INDEX_FILE
    if index.is_file() and not isinstance(read_json(index).get("metadata"), Mapping):
        raise UserError(
            f'{index} has no "metadata", without which transformers does not read it: put '
            '"metadata": {} beside its weight_map'
        )


def check_pointers(directory: Path, names: list[str]) -> None:
    """UserError for a file of which Git has only fetched the pointer."""
    for name in names:
        if is_pointer(directory / name):
            raise damaged(directory / name, ValueError())


def check_full_precision(directory: Path) -> None:
    """UserError for a model that says, in any of the usual places, that it is quantized."""
    config = read_config(directory)
    for place, value in _claims(config, ""):
        method = value.get("quant_method") if isinstance(value, Mapping) else None
        kind = f" with {method}" if isinstance(method, str) else ""
        raise UserError(
            f"{directory} is quantized already{kind} ({CONFIG_FILE}: {place}): give the "
            "full-precision model that it was made from"
        )
    for name in _QUANTIZER_FILES:
        path = directory / name
        if path.is_file() and read_json(path):
            raise UserError(
                f"{directory} is quantized already ({name} says how): give the full-precision "
                "model that it was made from, or remove that file if it is left over"
            )


def _claims(part: Any, place: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Where in config.json a quantization is spoken of, and what is said."""
    if not isinstance(part, Mapping) or depth > 4:
        return
    for key, value in part.items():
        if key in _KEYS:
            if value:
                yield place + key, value
        else:
            yield from _claims(value, f"{place}{key}.", depth + 1)


def check_tensor(directory: Path, file: str, name: str, dtype: str) -> None:
    """UserError for a tensor that only a quantized model has, or one that is no 16 or 32 bits."""
    leaf = name.rpartition(".")[2]
    if leaf in _INTEGER_BUFFERS:
        return
    where = f"{name} in {directory / file}"
    if _ADAPTER.fullmatch(name):
        raise UserError(
            f"{where} is of a LoRA adapter that is not merged: give the model that PEFT's "
            "merge_and_unload returns, saved"
        )
    if wrapper := _WRAPPERS.fullmatch(name):
        raise UserError(
            f"{where}: {wrapper[1]!r} is of a wrapper that a training program put there: save the "
            "model inside of it"
        )
    if _COMPANION.fullmatch(leaf) or dtype.startswith(("F8", "F4", "F6_")):
        raise UserError(
            f"{directory} is quantized already: {where} is {_kind(leaf, dtype)}; give the "
            "full-precision model that it was made from"
        )
    if dtype not in FLOATS:
        raise UserError(
            f"{where} is {dtype}, and weights must be floating point of 16 or 32 bits: give the "
            "full-precision model"
        )


def _kind(leaf: str, dtype: str) -> str:
    if _COMPANION.fullmatch(leaf):
        return "part of a quantized weight"
    return f"stored in {dtype}"


def check_reference(directory: Path) -> None:
    """UserError for a directory that cannot be a full-precision reference."""
    check_full_precision(directory)
    if not any(directory.glob("*.safetensors")):
        return  # who loads it says what is missing
    for file in weight_files(directory).names:
        for name, dtype, _ in tensor_headers(directory / file):
            check_tensor(directory, file, name, dtype)
