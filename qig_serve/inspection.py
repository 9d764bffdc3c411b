"""What a qig checkpoint holds and whether it is intact: from headers and hashes alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from qig_serve.errors import UserError
from qig_serve.formats import QUANT_METHOD, tensor_specs
from qig_serve.manifest import HASHES_FILE, QuantizationConfig, read_quantization_config

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
        """Bits a weight: codes, scales and zero points together."""
        return 8 * self.nbytes / (self.n * self.k)


@dataclass
class Inspection:
    """What is in a checkpoint directory."""

    directory: Path
    model_type: str
    config: QuantizationConfig
    tensors: dict[str, StoredTensor]
    linears: list[QuantizedLinear]
    problems: list[str] = field(default_factory=list)
    """What is wrong with the tensors, one sentence each."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits(self) -> float:
        """Bits a quantized weight on average; 0 when there is none."""
        weights = sum(linear.n * linear.k for linear in self.linears)
        return 8 * sum(linear.nbytes for linear in self.linears) / weights if weights else 0.0

    @property
    def bytes_in_16_bits(self) -> int:
        """What the model would take with every quantized weight in 16 bits."""
        packed = sum(linear.nbytes for linear in self.linears)
        return self.nbytes - packed + sum(2 * linear.n * linear.k for linear in self.linears)

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
    path = directory / "config.json"
    if not directory.is_dir():
        raise UserError(f"the directory {directory} does not exist")
    config = _read_json(path)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise UserError(f"{path} has no quantization_config of qig: this is not a qig checkpoint")
    manifest = read_quantization_config(quantization, str(path))
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= dict(_header(shard))
    found = Inspection(directory, str(config.get("model_type")), manifest, tensors, [])
    _collect_linears(found)
    return found


def verify(directory: Path, progress: Callable[[str, int, int], None] | None = None) -> list[str]:
    """Every file against its sha256: what is wrong, a sentence a file; empty when all is well.

    `progress` is told what is done, how many files of it, and of how many.
    """
    manifest = _read_json(directory / HASHES_FILE)
    hashes = manifest.get("files")
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
        if not path.is_file():
            wrong.append(f"{name}: missing")
        elif _sha256(path) != expected:
            wrong.append(f"{name}: changed since the checkpoint was written")
    known = {*hashes, HASHES_FILE}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        if path.is_file() and name not in known and not hidden:
            wrong.append(f"{name}: not in the manifest, so nobody vouches for it")
    return wrong


def _collect_linears(found: Inspection) -> None:
    """Group the stored tensors into linears and check shapes and dtypes against the scheme."""
    scheme = found.config.quant_scheme
    for name, packed in sorted(found.tensors.items()):
        if not name.endswith(".weight_packed"):
            continue
        linear = name.removesuffix(".weight_packed")
        if len(packed.shape) != 2:
            found.problems.append(f"{name}: not a matrix")
            continue
        n, k = packed.shape[0], packed.shape[1] * 32 // scheme.bits
        try:
            specs = tensor_specs(scheme, n, k)
        except ValueError as error:
            found.problems.append(f"{name}: {error}")
            continue
        nbytes = 0
        for suffix, spec in specs.items():
            tensor = found.tensors.get(f"{linear}.{suffix}")
            dtypes = _SPEC_DTYPES.get(spec.dtype, _MODEL_DTYPES)
            if tensor is None:
                found.problems.append(f"{linear}.{suffix}: missing")
            elif tensor.shape != spec.shape or tensor.dtype not in dtypes:
                found.problems.append(
                    f"{linear}.{suffix}: {tensor.dtype} {list(tensor.shape)} in {tensor.file}, but "
                    f"{scheme.name} wants {'/'.join(dtypes)} {list(spec.shape)}"
                )
            else:
                nbytes += tensor.nbytes
        if found.config.is_ignored(linear):
            found.problems.append(f"{linear}: quantized, but listed as left in 16 bits")
        found.linears.append(QuantizedLinear(linear, n, k, nbytes))
    if not found.linears:
        found.problems.append("no quantized linear at all")


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """(name, tensor) of a safetensors file; UserError that names the file when it is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise UserError(f"{path} is damaged: its header is longer than the file")
        raw = file.read(length)
    end = 0
    try:
        for name, entry in json.loads(raw).items():
            if name == "__metadata__":
                continue
            end = max(end, int(entry["data_offsets"][1]))
            yield name, StoredTensor(path.name, str(entry["dtype"]), tuple(entry["shape"]))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path} is damaged: its header cannot be read") from None
    if 8 + length + end != size:
        raise UserError(f"{path} is damaged: {size} bytes where {8 + length + end} are described")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: this is not a qig checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object")
    return value
