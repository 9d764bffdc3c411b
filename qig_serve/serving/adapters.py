"""Whether LoRA adapters fit a quantized checkpoint, said before the engine takes its minutes.

An adapter's numbers belong to the activations of the model that it was trained on. Methods that
equalize rescale channels, folding the factors into the weights on both sides: the function is the
source model's, but what a linear reads between is not, and an adapter trained on the source would
add other numbers than it learned. One trained on the checkpoint itself, dequantized, fits.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qig_serve.errors import UserError
from qig_serve.manifest import QuantizationConfig
from qig_serve.model_directory import read_config, read_json

ADAPTER_FILE = "adapter_config.json"
_OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_adapters(
    directory: Path, manifest: QuantizationConfig, args: argparse.Namespace
) -> str | None:
    """UserError for adapters that vLLM would refuse later, or that would answer wrongly.

    args: of vLLM's server. Returns what is to be known about adapters that are loaded while the
    server runs; None if there is nothing.
    """
    if not args.enable_lora:
        return None
    architecture = (read_config(directory).get("architectures") or ["model"])[0]
    if not _takes_adapters(architecture):
        raise UserError(
            f"--enable-lora: vLLM's {architecture} takes no LoRA adapters: merge the adapter into "
            "the full-precision model (PEFT's merge_and_unload) and quantize that"
        )
    for adapter in args.lora_modules or ():
        _check_adapter(directory, manifest, adapter.name, adapter.path, args.max_lora_rank)
    if manifest.is_equalized:
        return (
            f"LoRA: {manifest.method} rescaled this checkpoint's channels; an adapter fits only "
            "if it was trained on this checkpoint (dequantized), not on the source model"
        )
    return None


def _check_adapter(
    directory: Path, manifest: QuantizationConfig, name: str, path: str, max_rank: int
) -> None:
    folder = Path(path)
    if not folder.exists() and _HUB_NAME.fullmatch(path):
        return  # on a hub: vLLM fetches it, or says that it cannot
    if not (folder / ADAPTER_FILE).is_file():
        raise UserError(
            f"the adapter {name}: {folder} has no {ADAPTER_FILE}: give the folder that PEFT's "
            "save_pretrained wrote"
        )
    config = read_json(folder / ADAPTER_FILE)
    if reason := _refused_by_vllm(config, max_rank):
        raise UserError(f"the adapter {name} ({folder / ADAPTER_FILE}): {reason}")
    base = str(config.get("base_model_name_or_path"))
    if manifest.is_equalized and Path(base).name != directory.resolve().name:
        raise UserError(
            f"the adapter {name} was trained on {base}, and {manifest.method} rescaled the "
            f"channels of {directory}, so it would add other numbers than it learned: train it on "
            "this checkpoint (dequantized), merge it before quantization, or quantize with "
            "--method gptq, which leaves the channels as they are. If it was trained on this "
            f"checkpoint, name it in base_model_name_or_path of {folder / ADAPTER_FILE}"
        )
    channels = manifest.summary.get("mlp_channels")
    if channels and Path(base).name != directory.resolve().name and _changes_mlp(config):
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


def _refused_by_vllm(config: dict[str, Any], max_rank: int) -> str | None:
    """In vLLM's own words; None if it takes an adapter of this configuration."""
    from qig_serve.vllm_plugin import compat

    limits = SimpleNamespace(max_lora_rank=max_rank, bias_enabled=False)
    try:
        compat.adapter_config().from_dict(config).validate_legal(limits)
    except (ValueError, TypeError) as error:
        return " ".join(str(error).split())
    return None
