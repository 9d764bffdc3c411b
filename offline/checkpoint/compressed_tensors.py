"""qig checkpoints in the form of compressed-tensors: the same numbers, for vLLM as it comes.

Codes, scales and zero points are those of the qig checkpoint; how they are laid out differs. A
quantized linear `P.weight` of shape [N, K] becomes ("pack-quantized", always 4 bits per code):

    P.weight_packed      int32 [N, K / 8], eight codes per word along K, as unsigned numbers
    P.weight_scale       as in the qig checkpoint: [N, K / 128] or [N, 1]
    P.weight_zero_point  int32 [ceil(N / 8), K / 128], eight per word along N (w3a16 only)
    P.weight_shape       int64 [2]: N, K

Why 3-bit codes lie in 4-bit fields: vLLM (0.32) reads 3-bit fields packed without gaps, on CUDA
and with the humming package alone, and the compressed-tensors it depends on (0.17; from 0.18 on
this changed) writes ten codes per word, so no 3-bit file suits both. 4 bits with zero points are
served everywhere, and a 3-bit code is a 4-bit code.

Written without the library: offline work does not need it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qig_serve.errors import UserError
from qig_serve.family_row import Architecture
from qig_serve.formats import QuantScheme
from qig_serve.offline.checkpoint.packed import packed_linears
from qig_serve.packing import dequantize, pack, unpack

_BITS = 4
_FORMAT = "pack-quantized"


def unsupported_shape(scheme: QuantScheme, k: int) -> str | None:
    """Why a linear of K inputs cannot be read in this form, or None.

    vLLM's verify_group_size_divides_partition takes whole groups alone.
    """
    if scheme.group_size is None or k % scheme.group_size == 0:
        return None
    return (
        f"as compressed-tensors vLLM reads whole groups of {scheme.group_size} inputs, and K={k}; "
        "use the form qig (leave --format out), or w4a8, which has no groups"
    )


def convert_linear(
    tensors: Mapping[str, torch.Tensor], scheme: QuantScheme
) -> dict[str, torch.Tensor]:
    """The tensors of packing.pack_linear in the layout above: suffix -> tensor.

    A signed code c (w4a8) is stored as c + 8, the library's offset for 4 bits.
    """
    codes = unpack(tensors["weight_packed"], scheme.bits, scheme.symmetric)  # [N, K]
    n, k = codes.shape
    if scheme.symmetric:
        codes = (codes.to(torch.int16) + (1 << (_BITS - 1))).to(torch.uint8)
    converted = {
        "weight_packed": pack(codes, _BITS),
        "weight_scale": tensors["weight_scale"],
        "weight_shape": torch.tensor([n, k]),
    }
    if not scheme.symmetric:
        zero = tensors["weight_zero_point"].t()  # [G, N]
        padded = torch.nn.functional.pad(zero, (0, -n % 32))
        words = pack(padded, _BITS)[:, : -(-n // 8)]  # [G, ceil(N / 8)]
        converted["weight_zero_point"] = words.t().contiguous()
    return converted


def decompress(tensors: Mapping[str, torch.Tensor], weights: Mapping[str, Any]) -> torch.Tensor:
    """The weight [N, K] in fp32 of one linear in the layout above; `weights` as in config.json."""
    bits = int(weights["num_bits"])
    n, k = map(int, tensors["weight_shape"].tolist())
    codes = unpack(tensors["weight_packed"], bits, signed=False)[:n, :k]
    if weights["symmetric"]:
        zero = torch.full_like(tensors["weight_scale"], 1 << (bits - 1))
    else:
        words = tensors["weight_zero_point"].t()  # [G, ceil(N / 8)]
        padded = torch.nn.functional.pad(words, (0, -words.shape[1] % 4))
        zero = unpack(padded.contiguous(), bits, signed=False)[:, :n].t()
    return dequantize(codes, tensors["weight_scale"], zero)


def group_of(config: Mapping[str, Any], linears: Iterable[str]) -> Mapping[str, Any]:
    """The one group of config.json's that quantizes all the linears; UserError if there is none."""
    (group,) = config["config_groups"].values()
    for name in linears:
        if not any(re.match(target.removeprefix("re:"), name) for target in group["targets"]):
            raise UserError(f"no target of quantization_config fits {name}")
        if any(re.match(ignored.removeprefix("re:"), name) for ignored in config["ignore"]):
            raise UserError(f"quantization_config leaves {name} out")
    return dict(group)


def compress(tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> dict[str, torch.Tensor]:
    """The tensors of a block's shard, by name; those that are not packed stay as they are."""
    linears, rest = packed_linears(tensors)
    for linear, parts in linears.items():
        for suffix, tensor in convert_linear(parts, scheme).items():
            rest[f"{linear}.{suffix}"] = tensor
    return rest


def quantization_config(
    arch: Architecture, scheme: QuantScheme, left_alone: Iterable[str]
) -> dict[str, Any]:
    """`quantization_config` of config.json, as the library reads it.

    Modules go by other names in the files, in transformers and in vLLM, and only some of them are
    translated; so linears are named by the parts of their names that all have in common.
    """
    decoder = arch.decoder.rpartition(".")[2]
    linears = "|".join(re.escape(name) for name in arch.linears)
    weights = {
        "num_bits": _BITS,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    inputs = {
        "num_bits": scheme.activation_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    group = {
        "targets": [rf"re:(.*\.)?{decoder}\.(.*\.)?layers\.\d+\.({linears})$"],
        "weights": weights,
        "input_activations": inputs if scheme.activation_bits else None,
        "output_activations": None,
        "format": _FORMAT,
    }
    ignored = {name.rpartition(".")[2] for name in left_alone}
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [rf"re:(.*\.)?{re.escape(name)}(\..*)?$" for name in sorted(ignored)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
