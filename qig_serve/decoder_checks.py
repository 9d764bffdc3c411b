"""Whether a checkpoint's tensors are those that its config.json and its manifest speak of.

From names, shapes and dtypes alone, so that a wrong checkpoint is refused before memory is taken:
vLLM would fill what is missing with zeros, and stop at an assertion on what does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from qig_serve.architectures import ARCHITECTURES
from qig_serve.formats import VOCABULARY_SCHEME
from qig_serve.manifest import QuantizationConfig
from qig_serve.model_directory import text_config

_LAYER = re.compile(r"(.*\blayers)\.(\d{1,6})\.(.*)")
_PARTS = ("weight_packed", "weight_scale", "weight_zero_point")


def problems(
    config: Mapping[str, Any],
    manifest: QuantizationConfig,
    names: Collection[str],
    linears: Mapping[str, tuple[int, int]],
    suffixes: Collection[str],
    vocabulary: Mapping[str, tuple[int, int]],
) -> Iterator[str]:
    """What does not fit, a sentence each.

    `config` is config.json, `names` those of all stored tensors, `linears` the quantized ones with
    their [N, K], `suffixes` the tensors that the scheme stores of one, `vocabulary` the output head
    and the embedding, those in 8 bits, with theirs.
    """
    yield from _another_architecture(config, manifest)
    yield from _other_vocabulary(config, manifest, vocabulary)
    layers: dict[int, set[str]] = {}
    decoders = {m[1] for n in linears if (m := _LAYER.fullmatch(n + "."))}
    for name in sorted(names):
        module, _, leaf = name.rpartition(".")
        place = _LAYER.fullmatch(name)
        if module in linears and leaf.startswith("weight") and leaf not in suffixes:
            yield f"{name}: {manifest.scheme} stores no such tensor of a quantized linear"
        elif module in vocabulary and leaf in VOCABULARY_SCHEME.suffixes:
            continue
        elif leaf in _PARTS and module not in linears:
            yield f"{name}: there is no {module}.weight_packed beside it"
        elif place and place[1] in decoders and f"{place[1]}.{place[2]}" not in manifest.ignore:
            layers.setdefault(int(place[2]), set()).add(place[3])
        elif not manifest.is_ignored(name):
            yield (
                f"{name}: neither in a decoder block nor listed in the manifest as left in 16 bits"
            )
    for module in manifest.ignore:
        if not any(n == module or n.startswith(module + ".") for n in names):
            yield f"{module}: listed as left in 16 bits, but no tensor is of it"
    text = text_config(config)
    family = ARCHITECTURES.get(str(config.get("model_type")))
    mixed = family is not None and len(family.kinds) > 1
    yield from _uneven_layers(layers, text, mixed)
    yield from _other_sizes(text, linears, mixed)


def _another_architecture(config: Mapping[str, Any], manifest: QuantizationConfig) -> Iterator[str]:
    claimed = {
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
    }
    recorded = {"model_type": manifest.model_type, "architectures": manifest.architectures}
    for key, value in recorded.items():
        if value and value != claimed[key]:
            yield f"config.json: {key} is {claimed[key]!r}, but {value!r} was quantized"


def _other_vocabulary(
    config: Mapping[str, Any],
    manifest: QuantizationConfig,
    vocabulary: Mapping[str, tuple[int, int]],
) -> Iterator[str]:
    text = text_config(config)
    each, blocks = text.get("hidden_size_per_layer_input"), text.get("num_hidden_layers")
    for name in manifest.eight_bit:
        sizes = (text.get("vocab_size"), text.get("hidden_size"))
        if name == manifest.eight_bit_per_block:
            width = each * blocks if isinstance(each, int) and isinstance(blocks, int) else None
            sizes = (text.get("vocab_size_per_layer_input"), width)
        if name not in vocabulary:
            yield f"{name}: listed as stored in 8 bits, but there is no {name}.weight_packed"
        elif all(isinstance(size, int) for size in sizes) and vocabulary[name] != sizes:
            n, k = vocabulary[name]
            yield f"{name}: {n} x {k}, but config.json asks for {sizes[0]} x {sizes[1]}"


def _kind_of_block(text: Mapping[str, Any], index: int) -> Any:
    """Its attention, whose keys it reads, and whether it comes before those with experts."""
    kinds, dense = text.get("layer_types"), text.get("first_k_dense_replace")
    kind = str(kinds[index]) if isinstance(kinds, list) and index < len(kinds) else ""
    return kind, _reads_others(text, index), isinstance(dense, int) and index < dense


def _reads_others(text: Mapping[str, Any], index: int) -> bool:
    """Whether a block reads the keys and values of an earlier one (Gemma 4's E2B and E4B)."""
    count, shared = text.get("num_hidden_layers"), text.get("num_kv_shared_layers")
    return isinstance(count, int) and isinstance(shared, int) and index >= count - shared


def _uneven_layers(
    layers: Mapping[int, set[str]], text: Mapping[str, Any], mixed: bool
) -> Iterator[str]:
    """Blocks that lack what others have, or if there are several kinds, others of their kind."""
    count = text.get("num_hidden_layers")
    if isinstance(count, int) and layers and (len(layers), max(layers) + 1) != (count, count):
        yield (
            f"config.json: num_hidden_layers is {count}, but the blocks stored are "
            f"{min(layers)} to {max(layers)}, {len(layers)} of them"
        )
    kinds = {index: _kind_of_block(text, index) if mixed else None for index in layers}
    every: dict[Any, set[str]] = {}
    for index, names in layers.items():
        every.setdefault(kinds[index], set()).update(names)
    for index, names in sorted(layers.items()):
        for name in sorted(every[kinds[index]] - names):
            yield f"decoder block {index} has no {name}, which other blocks have"


def _other_sizes(
    text: Mapping[str, Any], linears: Mapping[str, tuple[int, int]], mixed: bool
) -> Iterator[str]:
    """Of the first linear whose inputs or outputs are not as many as config.json says.

    Heads are left out where blocks are of mixed kinds: each kind has its own.
    """
    hidden = text.get("hidden_size")
    wanted = {"o_proj": (hidden, None)}
    for owner, inner in _mlp_widths(text).items():
        wanted |= dict.fromkeys((f"{owner}gate_proj", f"{owner}up_proj"), (inner, hidden))
        wanted[f"{owner}down_proj"] = (hidden, inner)
    wanted |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), (None, hidden))
    if isinstance(size := text.get("head_dim"), int) and not mixed:
        for names, key in (("q", "num_attention_heads"), ("kv", "num_key_value_heads")):
            if isinstance(heads := text.get(key), int):
                wanted |= dict.fromkeys((f"{n}_proj" for n in names), (heads * size, hidden))
    doubled: dict[str, tuple[Any, Any]] = {}
    if text.get("use_double_wide_mlp") and isinstance(inner := text.get("intermediate_size"), int):
        doubled = dict.fromkeys(("gate_proj", "up_proj"), (2 * inner, hidden))
        doubled["down_proj"] = (hidden, 2 * inner)
    for name, shape in sorted(linears.items()):
        place, kind = _LAYER.fullmatch(name), _kind(name)
        sizes = wanted.get(kind, (None, None))
        if place and _reads_others(text, int(place[2])):
            sizes = doubled.get(kind, sizes)
        if any(isinstance(w, int) and w != s for w, s in zip(sizes, shape, strict=True)):
            asked = " x ".join("any" if w is None else str(w) for w in sizes)
            yield f"{name}: {shape[0]} x {shape[1]}, but config.json asks for {asked}"
            return


def _mlp_widths(text: Mapping[str, Any]) -> dict[str, Any]:
    """What stands before the linears of an MLP -> its width, None where it is not said."""
    expert, shared = text.get("moe_intermediate_size"), text.get("n_shared_experts")
    return {
        "": text.get("intermediate_size"),
        "experts.": expert,
        "shared_expert.": text.get("shared_expert_intermediate_size"),
        "shared_experts.": expert * shared
        if isinstance(expert, int) and isinstance(shared, int)
        else None,
    }


def _kind(name: str) -> str:
    """A linear's last name, with that of the experts if it is of one of them."""
    *_, owner, above, leaf = ("", "", *name.split("."))
    owner = owner if above.isdecimal() else above
    return f"{owner}.{leaf}" if f"{owner}." in _mlp_widths({}) else leaf
