"""Writes the quantized checkpoint: block by block beside the target, published by one rename.

Until `publish` nothing exists under the target's name. What is there meanwhile, in a hidden
directory beside it, is the state that a run can be resumed from: a shard and its hash for every
block that is done. The checkpoint's tensors keep the source's names where vLLM loads them by these;
a quantized `P.weight` is replaced by the tensors of formats.tensor_specs.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qig_serve.errors import UserError
from qig_serve.formats import FORMAT_VERSION
from qig_serve.hashes import HASHES_FILE, file_sha256
from qig_serve.model_directory import read_config
from qig_serve.offline.checkpoint.forms import Form
from qig_serve.offline.disk import (
    ResumableError,
    disk_errors,
    number_shards,
    save_shard,
    save_shards,
    sync,
    write_hashes,
    write_text,
)
from qig_serve.offline.source.tensors import SourceCheckpoint
from qig_serve.weight_files import PICKLE_SUFFIXES

_STATE_FILE = ".state.json"
_TUNED_FILE = "tuned.safetensors"
_LOCK_FILE = ".lock"
"""Hidden: a run killed right after it was published leaves them in the finished checkpoint."""
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".tflite", ".pt2"),
    *PICKLE_SUFFIXES,
)
_TRAINING_FILES = re.compile(
    r"adapter_config\.json|(trainer|training|train|all|eval)_(state|args|log|loss|results)\.\w+"
    r"|(optimizer|scheduler|rng_state|scaler).*\.\w+|zero_to_fp32\.py|latest|events\.out\.tfevents.*"
    r"|(checkpoint-|global_step)\d+|runs|wandb|llamaboard_config\.yaml|.*\.safetensors\..+"
    r"|(hf_quant|quantize|quant)_config\.json"
)
"""What training leaves beside a model and no server reads; and other quantizers' own words."""
_OWN_FILES = ("config.json", "README.md", HASHES_FILE, "report.json", "report.html", "canary.json")


def partial_directory(output: Path) -> Path:
    """Where an unfinished run for `output` lies, hidden beside it."""
    return output.parent / f".{output.name}.partial"


def check_target(output: Path, resume: bool) -> None:
    """UserError unless `output` is free, and an unfinished run lies beside it if `resume`."""
    directory = partial_directory(output)
    with disk_errors(output):
        taken, existed = os.path.lexists(output), directory.exists()
    if taken:
        raise UserError(f"{output} exists already: choose another --output, or remove it")
    if existed and not resume:
        raise UserError(
            f"an unfinished run lies in {directory}: continue it with --resume, or remove that "
            "directory"
        )
    if resume and not existed:
        raise UserError(f"there is no unfinished run to resume beside {output}")


class CheckpointWriter:
    """Context manager for one checkpoint in the making.

    Left by an exception, it keeps the finished blocks for `--resume`, unless the exception is a
    UserError about the input (all of them but ResumableError) or nothing is finished: then
    nothing is left behind.
    """

    def __init__(
        self,
        source: SourceCheckpoint,
        output: Path | str,
        fingerprint: Mapping[str, Any],
        resume: bool = False,
    ) -> None:
        """`fingerprint` is what must be the same for a run to be resumed: JSON-ready data."""
        self.source = source
        self.output = Path(output)
        self.directory = partial_directory(self.output)
        # Through JSON once, so that what is compared is what was stored.
        self._fingerprint = json.loads(json.dumps(dict(fingerprint)))
        self._blocks: dict[int, dict[str, Any]] = {}
        self._tuned: str | None = None  # hash of the file that has the tuned scales
        self._published = False
        check_target(self.output, resume)
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / _LOCK_FILE).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(
                f"another run is writing {self.output}: wait for it, or choose another --output"
            ) from None
        if resume:
            self._load_state()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        about_input = isinstance(error, UserError) and not isinstance(error, ResumableError)
        keep = error is not None and bool(self._blocks) and not about_input
        if not self._published and not keep:
            shutil.rmtree(self.directory, ignore_errors=True)
        elif not self._published:
            self._remove_partial_files()
        self._lock.close()

    # --- blocks ----------------------------------------------------------------------------------

    @property
    def finished(self) -> int:
        """Blocks 0 .. finished - 1 are written and intact."""
        count = 0
        while count in self._blocks:
            count += 1
        return count

    def block_file(self, index: int) -> Path:
        """The shard of a finished block: where a resumed run reads it back from."""
        path = self._block_path(index)
        if not path.exists():  # a run that was killed while it published had renamed it
            path = next(self.directory.glob(f"model-{index + 1:05d}-of-*.safetensors"), path)
        return path

    def block(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a finished block, by their names in the checkpoint; tuned, if it is."""
        tensors = load_file(self.block_file(index))
        if names := self._tuned_names() & tensors.keys():
            with safe_open(self.directory / _TUNED_FILE, "pt") as tuned:
                tensors |= {n: tuned.get_tensor(n) for n in names}
        return tensors

    @property
    def is_tuned(self) -> bool:
        """Whether `write_tuned` was called, in this run or before it was resumed."""
        return self._tuned is not None

    def _tuned_names(self) -> set[str]:
        if not self.is_tuned:
            return set()
        with safe_open(self.directory / _TUNED_FILE, "pt") as tuned:
            return set(tuned.keys())

    def write_tuned(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Tensors that take the place of those of the same names in finished blocks; maybe none.

        In one file, so that a run killed meanwhile has all of them or none.
        """
        path = self.directory / _TUNED_FILE
        save_shard(dict(tensors), path)
        self._tuned = file_sha256(path)
        self._save_state()

    def _block_path(self, index: int) -> Path:
        return self.directory / f"block-{index:05d}.safetensors"

    def write_block(
        self, index: int, tensors: Mapping[str, torch.Tensor], replaced: Iterable[str]
    ) -> None:
        """One shard: `tensors` by checkpoint name, and the source tensors that they replace.

        A tensor of a source tensor's own name (a norm's weight, a bias) replaces it as well.
        """
        path = self._block_path(index)
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_shard(ready, path)
        names = {*replaced, *(n for n in tensors if n in self.source)}
        self._blocks[index] = {"sha256": file_sha256(path), "replaced": sorted(names)}
        self._save_state()

    def _save_state(self) -> None:
        state = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self._fingerprint,
            "blocks": {str(i): self._blocks[i] for i in sorted(self._blocks)},
            "tuned": self._tuned,
        }
        write_text(self.directory / _STATE_FILE, json.dumps(state, indent=1))
        sync(self.directory)

    def _load_state(self) -> None:
        path = self.directory / _STATE_FILE
        if not path.is_file():  # killed before its first block was done
            return
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            stored, blocks = state["fingerprint"], state["blocks"]
            finished = {int(i): dict(b) for i, b in blocks.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            self._lock.close()
            raise UserError(f"{path} cannot be read: remove {self.directory}") from None
        different = [k for k in self._fingerprint if stored.get(k) != self._fingerprint[k]]
        if different:
            self._lock.close()
            raise UserError(
                f"the unfinished run in {self.directory} cannot be resumed: "
                f"{_differences(stored, self._fingerprint, different)}. Use the same settings, or "
                "remove that directory"
            )
        for index in sorted(finished):
            file = self.block_file(index)
            intact = file.is_file() and file_sha256(file) == finished[index].get("sha256")
            if not intact or index != len(self._blocks):
                break  # this block and those behind it are done again
            self._blocks[index] = finished[index]
        tuned = self.directory / _TUNED_FILE
        if len(self._blocks) == len(finished) and tuned.is_file():
            stored = state.get("tuned")
            self._tuned = stored if file_sha256(tuned) == stored else None

    # --- the rest --------------------------------------------------------------------------------

    def write_text(self, name: str, text: str) -> None:
        """A further file of the checkpoint, such as report.json."""
        write_text(self.directory / name, text)

    def publish(self, form: Form, check: Callable[[Path], object] | None = None) -> Path:
        """Copies what is untouched, writes config, index and hashes, and renames; the target.

        `check` looks at the finished directory before the rename, and raises to prevent it.
        """
        self._remove_partial_files()
        with disk_errors(self.directory):
            shards = [self.block_file(i) for i in sorted(self._blocks)]
            done_with: list[Path] = []
            if form.convert is not None or self._tuned_names():
                done_with = shards  # kept to the end: a killed run is resumed from them
                shards = [self._converted(i, form) for i in sorted(self._blocks)]
            number_shards(shards + self._copy_untouched(form))
            self._copy_other_files()
            config = {**read_config(self.source.directory), **form.config}
            write_text(self.directory / "config.json", json.dumps(config, indent=2) + "\n")
            if check is not None:
                check(self.directory)
            hidden = (_STATE_FILE, _LOCK_FILE, _TUNED_FILE)
            state = [*(self.directory / name for name in hidden), *done_with]
            write_hashes(self.directory, state)
            sync(self.directory)
            try:
                self.directory.rename(self.output)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise ResumableError(
                        f"{self.output} appeared during the run: move it away, and run again with "
                        "--resume"
                    ) from None
                raise
        self._published = True
        # Only now: until the rename they are what a killed run is resumed from.
        for path in state:
            (self.output / path.name).unlink(missing_ok=True)
        sync(self.output.parent)
        return self.output

    def _remove_partial_files(self) -> None:
        """What a write that failed, or a killed run, has left half done."""
        for path in self.directory.rglob("*.tmp"):
            path.unlink()

    def _converted(self, index: int, form: Form) -> Path:
        """A block's shard as the form has it, beside it."""
        target = self.directory / f"converted-{index:05d}.safetensors"
        tensors = self.block(index)
        save_shard(tensors if form.convert is None else form.convert(tensors), target)
        return target

    def _copy_untouched(self, form: Form) -> list[Path]:
        replaced = {name for block in self._blocks.values() for name in block["replaced"]}
        untouched = (name for name in self.source if name not in replaced)
        tensors = (
            named
            for name in untouched
            for named in form.outside(name, self.source.tensor(name)).items()
        )
        return save_shards(tensors, self.directory, "rest")

    def _copy_other_files(self) -> None:
        root = self.source.directory
        found = sorted(root.rglob("*"))
        # A folder with weights inside is another model: one saved in training, an export.
        others = {p.parent for p in found if p.suffix in _WEIGHT_SUFFIXES} - {root}
        for path in found:
            relative = path.relative_to(root)
            hidden = any(part.startswith(".") for part in relative.parts)
            weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
            target = self.directory / relative
            left_over = any(_TRAINING_FILES.fullmatch(p) for p in relative.parts)
            if hidden or weights or left_over or path.name in _OWN_FILES or not path.is_file():
                continue
            if target.exists() or not others.isdisjoint(path.parents):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".tmp")
            shutil.copyfile(path, partial)
            sync(partial)
            partial.rename(target)


def _differences(stored: Any, now: Mapping[str, Any], keys: list[str]) -> str:
    parts = []
    for key in keys:
        before, after = stored.get(key), now[key]
        if isinstance(before, dict) and isinstance(after, dict):
            fields = [f for f in after if before.get(f) != after[f]]
            parts += [f"{f} was {before.get(f)!r} and is {after[f]!r}" for f in fields]
        else:
            parts.append(f"the {key} is another")
    return "; ".join(parts)
