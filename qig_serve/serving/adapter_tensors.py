"""What a LoRA adapter's file holds, against the linears of the checkpoint that it is to change.

vLLM looks for a tensor of each linear by name: one whose name is no linear's is left out without a
word, and one of another shape ends the engine after its start.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qig_serve.errors import UserError
from qig_serve.inspection import Inspection, inspect
from qig_serve.model_directory import read_config, read_json, text_config
from qig_serve.serving.adapters import ADAPTER_FILE, named_adapters
from qig_serve.weight_files import check_pointers

TENSORS_FILE = "adapter_model.safetensors"
_SAVED_TABLES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
"""PEFT saves an output head or embedding that it adapts, too; vLLM passes over these names."""
_PICKLES = ("adapter_model.bin", "adapter_model.pt")

Names = Callable[[str], tuple[str, bool]]
"""The name of an adapter's tensor -> vLLM's name of the module, and whether it is A."""


@dataclass(frozen=True)
class Table:
    """Output head or embedding of a checkpoint, in 16 bits."""

    path: Path
    """Of the file that holds it."""
    tensor: str
    shape: tuple[int, int]
    """[N, K] as an adapter has them: of the head entries and channels, of the embedding channels
    and entries."""


@dataclass(frozen=True)
class Adaptable:
    """What adapters may change, by vLLM's names of the modules."""

    linears: Mapping[str, tuple[int, int]]
    """Decoder linears: [N, K]."""
    eight_bit: frozenset[str]
    """Output head and embedding where they are stored in 8 bits."""
    tables: Mapping[str, Table]
    """Output head and embedding in 16 bits, where vLLM adapts them."""
    others: frozenset[str]
    """Every other module with a weight."""
    tower: bool
    """Whether vLLM is to adapt the vision tower as well."""


def check_adapter_tensors(directory: Path, args: argparse.Namespace) -> None:
    """UserError for adapters on this machine that vLLM would not apply as they were trained.

    args: of vLLM's server.
    """
    named = ((name, Path(path).expanduser()) for name, path in named_adapters(args))
    folders = [(name, folder) for name, folder in named if folder.exists()]
    if not args.enable_lora or not folders:
        return
    from qig_serve.vllm_plugin import compat

    config = read_config(directory)
    architecture = (config.get("architectures") or ["model"])[0]
    model = compat.model_registry().models[architecture].load_model_cls()
    to_vllm, names = compat.adapter_names(model)
    tables = compat.adapted_tables(model, str(text_config(config).get("model_type")))
    found = adaptable(inspect(directory), to_vllm, tables, args.enable_tower_connector_lora)
    for name, folder in folders:
        rank_of = compat.adapter_ranks(read_json(folder / ADAPTER_FILE))
        check_tensors(folder, found, names, rank_of, f"the adapter {name}")


def adaptable(
    found: Inspection, to_vllm: Callable[[str], str], tables: Collection[str], tower: bool
) -> Adaptable:
    """Of a checkpoint; `to_vllm` makes vLLM's name of a tensor of the one of the file.

    tables: which of `lm_head` and `embed_tokens` vLLM adapts.
    """

    def module(name: str) -> str:
        return to_vllm(f"{name}.weight").removesuffix(".weight")

    linears = {module(linear.name): (linear.n, linear.k) for linear in found.linears}
    eight_bit = frozenset(module(table.name) for table in found.vocabulary)
    weights = (n.removesuffix(".weight") for n in found.tensors if n.endswith(".weight"))
    others = {module(name): name for name in weights}
    in_16_bits = {}
    for module_name, name in others.items():
        leaf = module_name.rpartition(".")[2]
        if leaf in tables:
            stored = found.tensors[f"{name}.weight"]
            entries, channels = stored.shape
            shape = (entries, channels) if leaf == "lm_head" else (channels, entries)
            path = found.directory / stored.file
            in_16_bits[module_name] = Table(path, f"{name}.weight", shape)
    return Adaptable(linears, eight_bit, in_16_bits, frozenset(others), tower)


def check_tensors(
    folder: Path, model: Adaptable, names: Names, rank_of: Callable[[str], int], where: str
) -> None:
    """UserError, which `where` begins, for tensors that would not be applied as they were trained.

    rank_of: by the adapter's configuration, of a tensor. Reads the whole file. Adapters in pickle
    form are refused.
    """
    path = folder / TENSORS_FILE
    pickled = next((n for n in _PICKLES if (folder / n).is_file()), None)
    if not path.is_file():
        if pickled is None:
            raise UserError(f"{where}: {folder} has no {TENSORS_FILE}: copy it there too")
        raise UserError(
            f"{where}: its weights are in pickle form ({pickled}), which can run code when it is "
            "read: save it again with PEFT's save_pretrained, which writes safetensors"
        )
    shapes = _finite_shapes(path, where)
    if not shapes:
        raise UserError(f"{where}: {path} holds no tensors: save the trained adapter again")
    first: dict[tuple[str, bool], str] = {}
    for name, shape in shapes.items():
        if name.endswith(_SAVED_TABLES):
            _check_saved_table(path, name, model, names, where)
            continue
        try:
            module, is_a = names(name)
        except ValueError:
            raise UserError(
                f"{where}: {name} in {path} is no tensor of a plain LoRA adapter: merge the "
                "adapter into the full-precision model (PEFT's merge_and_unload) and quantize that"
            ) from None
        _check_module(module, model, f"{where}: {name} in {path}")
        if (other := first.setdefault((module, is_a), name)) != name:
            raise UserError(
                f"{where}: {path} has one tensor by two names, {other} and {name}: leave one out"
            )
        wanted = model.linears.get(module)
        if wanted is None and module in model.tables:
            wanted = model.tables[module].shape
        if wanted is not None:
            _check_shape(shape, wanted, is_a, f"{where}: {name} in {path}")
        rank = shape[0] if is_a else shape[-1]
        if rank != rank_of(name):
            raise UserError(
                f"{where}: {name} in {path} has rank {rank}, and {ADAPTER_FILE} says "
                f"{rank_of(name)}: give tensors and configuration of one adapter"
            )
    for (module, is_a), name in first.items():
        if (module, not is_a) not in first:
            raise UserError(
                f"{where}: {name} in {path} has no {'B' if is_a else 'A'} beside it: save the "
                "adapter again"
            )


def _finite_shapes(path: Path, where: str) -> dict[str, tuple[int, ...]]:
    import torch
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    check_pointers(path.parent, [path.name])
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor: Any = file.get_tensor(name)
                shapes[name] = tuple(tensor.shape)
                if not tensor.is_floating_point() or tensor.element_size() < 2:
                    raise UserError(
                        f"{where}: {name} in {path} is {str(tensor.dtype).removeprefix('torch.')}, "
                        "and adapters are floating point of 16 or 32 bits: save it again so"
                    )
                if not torch.isfinite(tensor.float()).all():
                    raise UserError(
                        f"{where}: {name} in {path} holds NaN or infinity: its training failed; "
                        "take an earlier state of it"
                    )
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{where}: {path} is damaged ({str(error).rstrip('.')}): copy it again"
        ) from None
    return shapes


def _check_saved_table(path: Path, name: str, model: Adaptable, names: Names, where: str) -> None:
    """UserError for a table, saved beside its adapter, that is not the checkpoint's."""
    from safetensors import safe_open

    module, _ = names(name.replace("base_layer", "lora_A"))
    if module not in model.tables:
        return  # nor may its adapter be: that has the sentence
    table = model.tables[module]
    with safe_open(table.path, framework="pt") as file:
        ours: Any = file.get_tensor(table.tensor)
    with safe_open(path, framework="pt") as file:
        saved: Any = file.get_tensor(name)
    if saved.shape != ours.shape or not bool((saved.to(ours.dtype) == ours).all()):
        raise UserError(
            f"{where}: {name} in {path} is not the one of this checkpoint, and vLLM would leave it "
            "out: merge the adapter into the full-precision model (PEFT's merge_and_unload) and "
            "quantize that"
        )


def _check_module(module: str, model: Adaptable, tensor: str) -> None:
    if module in model.linears or (module in model.others and model.tower):
        return
    if module in model.eight_bit:
        reason = "is of a table that this checkpoint stores in 8 bits: quantize with --head 16"
        raise UserError(f"{tensor} {reason} --embeddings 16, or train the decoder's linears only")
    if module in model.tables:
        return
    if module in model.others:
        raise UserError(
            f"{tensor} changes {module}, which is no linear of the decoder, and vLLM would leave "
            "it out: train the decoder's linears only, or merge the adapter into the "
            "full-precision model (PEFT's merge_and_unload) and quantize that; "
            "--enable-tower-connector-lora lets vLLM adapt the vision tower of some models"
        )
    raise UserError(
        f"{tensor} is for {module}, which this checkpoint does not have, and vLLM would leave it "
        "out: give an adapter that was trained on this model"
    )


def _check_shape(shape: tuple[int, ...], linear: tuple[int, int], is_a: bool, tensor: str) -> None:
    n, k = linear
    if len(shape) == 2 and (shape[1] if is_a else shape[0]) == (k if is_a else n):
        return
    wanted = f"[rank, {k}]" if is_a else f"[{n}, rank]"
    raise UserError(
        f"{tensor} is {list(shape)}, and the linear needs {wanted}: give an adapter that was "
        "trained on this model"
    )
