"""What a qig checkpoint holds and whether it is intact: from headers and hashes alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from qig_serve import decoder_checks
from qig_serve.errors import UserError
from qig_serve.formats import VOCABULARY_SCHEME, WORD_INPUTS, QuantScheme, tensor_specs
from qig_serve.hashes import HASHES_FILE, file_sha256
from qig_serve.manifest import QuantizationConfig
from qig_serve.model_directory import INDEX_FILE, damaged, read_config, read_json, read_manifest

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
_SPEC_DTYPES = {"int32": ("I32",), "uint8": ("U8",), "float32": ("F32",)}
_MODEL_DTYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, from the file's header."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.count * _BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear that is stored packed."""

    name: str
    n: int
    k: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits per weight: codes, scales and zero points together."""
        return 8 * self.nbytes / (self.n * self.k)


@dataclass
class Inspection:
    """What is in a checkpoint directory."""

    directory: Path
    model_type: str
    config: QuantizationConfig
    tensors: dict[str, StoredTensor]
    linears: list[QuantizedLinear]
    vocabulary: list[QuantizedLinear] = field(default_factory=list)
    """Output head and embedding, those in 8 bits."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with index and tensors, one sentence each."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits(self) -> float:
        """Bits per quantized weight on average; 0 when there is none."""
        weights = sum(linear.n * linear.k for linear in self.linears)
        return 8 * sum(linear.nbytes for linear in self.linears) / weights if weights else 0.0

    @property
    def bytes_in_16_bits(self) -> int:
        """What the model would take with every quantized weight in 16 bits."""
        every = [*self.linears, *self.vocabulary]
        packed = sum(linear.nbytes for linear in every)
        return self.nbytes - packed + sum(2 * linear.n * linear.k for linear in every)

    @property
    def bits_of_model(self) -> float:
        """Bits per weight over all of the model, quantized or not."""
        every = [*self.linears, *self.vocabulary]
        packed = {linear.name for linear in every}
        weights = sum(linear.n * linear.k for linear in every)
        weights += sum(
            tensor.count
            for name, tensor in self.tensors.items()
            if name.rpartition(".")[0] not in packed or name.endswith(".bias")
        )
        return 8 * self.nbytes / weights if weights else 0.0

    def left_alone(self) -> dict[str, int]:
        """Modules left in 16 bits -> bytes of their tensors."""
        sizes = dict.fromkeys(self.config.ignore, 0)
        for name, tensor in self.tensors.items():
            for module in sizes:
                if name == module or name.startswith(module + "."):
                    sizes[module] += tensor.nbytes
                    break
        return sizes


def inspect(directory: Path) -> Inspection:
    """Read the configuration and the headers; UserError when it is no qig checkpoint."""
    config, manifest = read_config(directory), read_manifest(directory)
    tensors: dict[str, StoredTensor] = {}
    twice: list[str] = []
    shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        raise UserError(f"{directory}: no .safetensors files there")
    for shard in shards:
        for name, tensor in _header(shard):
            if name in tensors:
                twice.append(f"{name}: in two shards, {tensors[name].file} and {tensor.file}")
            tensors[name] = tensor
    found = Inspection(
        directory, str(config.get("model_type")), manifest, tensors, [], problems=twice
    )
    _check_index(found)
    _collect_linears(found)
    linears = {linear.name: (linear.n, linear.k) for linear in found.linears}
    vocabulary = {table.name: (table.n, table.k) for table in found.vocabulary}
    suffixes = tensor_specs(manifest.quant_scheme, 1, WORD_INPUTS)
    found.problems += decoder_checks.problems(
        config, manifest, tensors, linears, suffixes, vocabulary
    )
    return found


def require_sound(directory: Path) -> Inspection:
    """What is in a checkpoint that can be loaded; UserError, one sentence, where it cannot.

    From headers only, no hashes.
    """
    found = inspect(directory)
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise UserError(
            f"{directory} cannot be loaded: {found.problems[0]}{more}; see `qig-serve inspect "
            f"--verify {directory}`"
        )
    return found


def verify(directory: Path, progress: Callable[[str, int, int], None] | None = None) -> list[str]:
    """Every file against its sha256: what is wrong, one sentence per file; empty when all is well.

    `progress` is called with what is done, how many files so far, and how many in all.
    """
    if not (directory / HASHES_FILE).is_file():
        raise UserError(
            f"{directory} has no {HASHES_FILE}, so there are no hashes to compare: it is not a qig "
            "checkpoint, or not all of one"
        )
    hashes = read_json(directory / HASHES_FILE).get("files")
    if not isinstance(hashes, dict) or not hashes:
        raise UserError(f"{directory / HASHES_FILE} lists no files")
    wrong = []
    for done, (name, expected) in enumerate(sorted(hashes.items()), start=1):
        if progress is not None:
            progress("hashing", done, len(hashes))
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            wrong.append(f"{name}: the manifest names a file outside of the directory")
            continue
        path = directory / relative
        if not os.path.isfile(path):  # False, where pathlib raises, for names no file can have
            wrong.append(f"{name}: missing")
        elif file_sha256(path) != expected:
            wrong.append(f"{name}: changed since the checkpoint was written")
    known = {*hashes, HASHES_FILE}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        if path.is_file() and name not in known and not hidden:
            wrong.append(f"{name}: not in the manifest, so it cannot be checked")
    return wrong


def _collect_linears(found: Inspection) -> None:
    """Group the stored tensors into linears and check shapes and dtypes against the scheme."""
    for name, packed in sorted(found.tensors.items()):
        if not name.endswith(".weight_packed"):
            continue
        linear = name.removesuffix(".weight_packed")
        if len(packed.shape) != 2:
            found.problems.append(f"{name}: not a matrix")
            continue
        of_vocabulary = linear in found.config.eight_bit
        scheme = VOCABULARY_SCHEME if of_vocabulary else found.config.quant_scheme
        n, k = packed.shape[0], packed.shape[1] * 32 // scheme.bits
        try:
            stored = QuantizedLinear(linear, n, k, _stored_bytes(found, linear, scheme, n, k))
        except ValueError as error:
            found.problems.append(f"{name}: {error}")
            continue
        if found.config.is_ignored(linear):
            found.problems.append(f"{linear}: quantized, but listed as left in 16 bits")
        (found.vocabulary if of_vocabulary else found.linears).append(stored)
    if not found.linears:
        found.problems.append("no quantized linear at all")


def _stored_bytes(found: Inspection, linear: str, scheme: QuantScheme, n: int, k: int) -> int:
    """Of the tensors of a linear [N, K] that are as the scheme has them; the others are problems.

    ValueError if the scheme cannot store it.
    """
    nbytes = 0
    for suffix, spec in tensor_specs(scheme, n, k).items():
        tensor = found.tensors.get(f"{linear}.{suffix}")
        dtypes = _SPEC_DTYPES.get(spec.dtype, _MODEL_DTYPES)
        if tensor is None:
            found.problems.append(f"{linear}.{suffix}: missing")
        elif tensor.shape != spec.shape or tensor.dtype not in dtypes:
            found.problems.append(
                f"{linear}.{suffix}: {tensor.dtype} {list(tensor.shape)} in {tensor.file}, but "
                f"{scheme.name} needs {'/'.join(dtypes)} {list(spec.shape)}"
            )
        else:
            nbytes += tensor.nbytes
    return nbytes


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """(name, tensor) of a safetensors file; UserError that names the file when it is damaged.

    safetensors itself refuses headers over 100 MB, tensors that overlap or leave gaps, and files
    that are longer or shorter than described.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                tensor = shard.get_slice(name)
                yield name, StoredTensor(path.name, tensor.get_dtype(), tuple(tensor.get_shape()))
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from None


def _check_index(found: Inspection) -> None:
    """The index, from which vLLM knows what to read, against what the shards hold."""
    path = found.directory / INDEX_FILE
    if not path.is_file():
        return
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{path} has no weight_map: download it again")
    for name, file in sorted(weight_map.items()):
        if not isinstance(file, str) or PurePosixPath(file).name != file:
            found.problems.append(f"{INDEX_FILE} names {file!r}, which is not a file beside it")
        elif not os.path.isfile(found.directory / file):
            found.problems.append(f"{INDEX_FILE} names the shard {file}, which is missing")
        elif name not in found.tensors or found.tensors[name].file != file:
            found.problems.append(f"{INDEX_FILE} names the tensor {name}, which is not in {file}")
    for name in sorted(found.tensors.keys() - weight_map.keys()):
        found.problems.append(f"{name}: in {found.tensors[name].file}, but not in {INDEX_FILE}")
