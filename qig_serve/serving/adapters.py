"""Whether LoRA adapters fit a quantized checkpoint, said before the engine takes its minutes.

An adapter's numbers belong to the activations of the model that it was trained on. Methods that
equalize rescale channels, folding the factors into the weights on both sides: the function is the
source model's, but what a linear reads between is not, and an adapter trained on the source would
add other numbers than it learned. One trained on the checkpoint itself, dequantized, fits.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qig_serve.errors import UserError
from qig_serve.manifest import QuantizationConfig
from qig_serve.model_directory import check_mark, model_name, read_config, read_json

ADAPTER_FILE = "adapter_config.json"
_MERGE = "merge it into the full-precision model (PEFT's merge_and_unload) and quantize that"
_SAVE_AGAIN = "save the adapter again with PEFT's save_pretrained"
_OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CHANGE_THE_SUM = (
    *("rank_pattern", "alpha_pattern", "lora_bias", "alora_invocation_tokens"),
    *("layer_replication", "use_bdlora", "use_qalora", "arrow_config", "init_lora_weights"),
)
"""Keys that, if they hold anything, have PEFT compute something else than B A x alpha / r. vLLM
passes over those that its version does not know."""
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Beginnings of a training that leave the base as it was; other words change it."""


def check_adapters(
    directory: Path, manifest: QuantizationConfig, args: argparse.Namespace
) -> str | None:
    """UserError for adapters that vLLM would refuse later, or that would answer wrongly.

    args: of vLLM's server. Returns what is to be known about adapters that are loaded while the
    server runs; None if there is nothing.
    """
    adapters = named_adapters(args)
    if not args.enable_lora:
        if adapters:
            raise UserError(f"the adapter {adapters[0][0]}: vLLM takes none without --enable-lora")
        return None
    architecture = (read_config(directory).get("architectures") or ["model"])[0]
    if not _takes_adapters(architecture):
        raise UserError(
            f"--enable-lora: vLLM's {architecture} takes no LoRA adapters: merge the adapter into "
            "the full-precision model (PEFT's merge_and_unload) and quantize that"
        )
    for name, path in adapters:
        _check_adapter(directory, manifest, name, path, args.max_lora_rank)
    if manifest.is_equalized:
        return (
            f"LoRA: {manifest.method} rescaled this checkpoint's channels; an adapter fits only "
            "if it was trained on this checkpoint (dequantized), not on the source model"
        )
    return None


def named_adapters(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(name, path) of every adapter that vLLM loads at its start.

    UserError for a name that is not one adapter's alone.
    """
    found = [(module.name, module.path) for module in args.lora_modules or ()]
    found += (args.default_mm_loras or {}).items()
    names = [name for name, _ in found]
    for name in names:
        if not name:
            raise UserError("--lora-modules: an adapter has no name: write NAME=DIR")
        if name in (args.served_model_name or [args.model]):
            raise UserError(
                f"the adapter {name} has the name of the model itself: give it another, or the "
                "model with --served-model-name"
            )
        if names.count(name) > 1:
            raise UserError(f"two adapters have the name {name}: give each its own")
    return found


def _check_adapter(
    directory: Path, manifest: QuantizationConfig, name: str, path: str, max_rank: int
) -> None:
    folder = Path(path).expanduser()
    if not folder.exists() and _HUB_NAME.fullmatch(path):
        return  # on a hub: vLLM fetches it, or says that it cannot
    if not (folder / ADAPTER_FILE).is_file():
        raise UserError(
            f"the adapter {name}: {folder} has no {ADAPTER_FILE}: give the folder that PEFT's "
            "save_pretrained wrote"
        )
    config = read_json(folder / ADAPTER_FILE)
    check_mark(folder / ADAPTER_FILE)
    if reason := _not_plain(config) or _refused_by_vllm(config, max_rank):
        raise UserError(f"the adapter {name} ({folder / ADAPTER_FILE}): {reason}")
    base = str(config.get("base_model_name_or_path"))
    if manifest.is_equalized and Path(base).name != model_name(directory):
        raise UserError(
            f"the adapter {name} was trained on {base}, and {manifest.method} rescaled the "
            f"channels of {directory}, so it would add other numbers than it learned: train it on "
            "this checkpoint (dequantized), merge it before quantization, or quantize with "
            "--method gptq, which leaves the channels as they are. If it was trained on this "
            f"checkpoint, name it in base_model_name_or_path of {folder / ADAPTER_FILE}"
        )
    channels = manifest.summary.get("mlp_channels")
    if channels and Path(base).name != model_name(directory) and _changes_mlp(config):
        raise UserError(
            f"the adapter {name} was trained on {base}, and the MLP of {directory} is stored with "
            f"channels of zeros behind its own, {channels} in all, for which the adapter has no "
            "numbers: quantize with --no-pad-mlp, or merge it before quantization"
        )


def _changes_mlp(config: dict[str, Any]) -> bool:
    """Whether an adapter may change more than attention; all that is not a list may."""
    targets = config.get("target_modules")
    return not isinstance(targets, list) or any(
        str(target).rpartition(".")[2] not in _OF_ATTENTION for target in targets
    )


def _takes_adapters(architecture: str) -> bool:
    from qig_serve.vllm_plugin import compat

    model = compat.model_registry().models.get(architecture)
    return model is not None and bool(compat.lora_support()(model.load_model_cls()))


def _not_plain(config: dict[str, Any]) -> str | None:
    """What vLLM would take for another value, or pass over; None for a plain LoRA adapter."""
    from qig_serve.vllm_plugin import compat

    kind = config.get("peft_type") or "LORA"
    if str(kind).upper() != "LORA":
        return f"peft_type is {kind!r}, and vLLM takes LoRA adapters alone: {_MERGE}"
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    for key, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(pattern, Mapping) or not all(map(_is_pattern, pattern)):
            return f"{key} is not a table of modules' names and numbers: {_SAVE_AGAIN}"
    for rank in (config.get("r", 1), *ranks.values()):
        if type(rank) is not int:
            return f"a rank is {rank!r}, and no whole number: {_SAVE_AGAIN}"
    for alpha in (config.get("lora_alpha", 1), *alphas.values()):
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            return f"an alpha is {alpha!r}, and no number: {_SAVE_AGAIN}"
    for key in ("use_rslora", "use_dora"):
        if config.get(key) not in (None, True, False):
            return f"{key} is {config[key]!r}, neither true nor false: {_SAVE_AGAIN}"
    known = {field.name for field in dataclasses.fields(compat.adapter_config())}
    for key in _CHANGE_THE_SUM:
        value = config.get(key)
        plain = key == "init_lora_weights" and (
            not isinstance(value, str) or value.lower() in _PLAIN_STARTS
        )
        if value and not plain and key not in known:
            return f"{key} is {value!r}, which this vLLM passes over: {_MERGE}"
    return None


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _refused_by_vllm(config: dict[str, Any], max_rank: int) -> str | None:
    """In vLLM's own words; None if it takes an adapter of this configuration."""
    from qig_serve.vllm_plugin import compat

    limits = SimpleNamespace(max_lora_rank=max_rank, bias_enabled=False)
    try:
        compat.adapter_config().from_dict(config).validate_legal(limits)
    except (ValueError, TypeError) as error:
        return " ".join(str(error).split())
    return None
