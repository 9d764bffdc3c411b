"""A Hugging Face model directory: the one reader of its config.json, and the model's dtype.

Every part of the package that asks what a directory holds, asks here, so that the quantizer, the
evaluation and the server cannot disagree about it.
"""

from __future__ import annotations

import codecs
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qig_serve import text_files
from qig_serve.errors import UserError
from qig_serve.formats import QUANT_METHOD

if TYPE_CHECKING:
    import torch

    from qig_serve.manifest import QuantizationConfig

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"

_GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILE = "tokenizer.json"
_TEXTS = (
    _GENERATION_FILE,
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""JSON objects, and a template."""
_GENERATION: dict[str, tuple[type, str, Callable[[float], bool]]] = {
    "temperature": (float, "a number from 0 to 2", lambda x: 0 <= x <= 2),
    "top_p": (float, "a number above 0, 1 at most", lambda x: 0 < x <= 1),
    "min_p": (float, "a number from 0 to 1", lambda x: 0 <= x <= 1),
    "top_k": (int, "a whole number, 0 for all tokens", lambda x: x >= -1),
    "repetition_penalty": (float, "a number above 0", lambda x: 0 < x < math.inf),
    "presence_penalty": (float, "a number from -2 to 2", lambda x: -2 <= x <= 2),
    "frequency_penalty": (float, "a number from -2 to 2", lambda x: -2 <= x <= 2),
    "max_new_tokens": (int, "a whole number above 0", lambda x: 0 < x < 2**31),
    "eos_token_id": (int, "a token's number, or a list of them", lambda x: x >= 0),
}
"""What vLLM takes from generation_config.json into every request: type and range."""
_PICTURES = (
    *("size", "crop_size", "do_resize", "do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std", "patch_size", "merge_size", "temporal_patch_size"),
    *("min_pixels", "max_pixels"),
)
"""What decides which pixels a model is given."""
_COPY_AGAIN = "copy the published model's tokenizer and processor files there again"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5's, and that of older files
_POINTER = b"version https://git-lfs"
_STORED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_BY_WIDTH = ("float16", "bfloat16", "float32", "float64")


def find_model(model: Path | str) -> Path:
    """The directory that a person names: a path, or org/name of the hub where that is no path.

    Of the latter the snapshot that is current in the hub's local cache, or the path where there is
    none. Nothing is downloaded. What was found is found again, so that the command line and the
    functions behind it may both ask.
    """
    model = str(model)
    if not _HUB_NAME.fullmatch(model) or os.path.lexists(model):
        return Path(model)

    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(model, CONFIG_FILE)
    except ValueError:  # no name that a hub takes
        config = None
    return Path(config).parent if isinstance(config, str) else Path(model)


def hub_name(directory: Path) -> str | None:
    """org/name of a snapshot in the hub's local cache; None for any other directory."""
    parts = (p for p in directory.parts if p.startswith("models--"))
    return next((p.removeprefix("models--").replace("--", "/") for p in parts), None)


def model_name(directory: Path) -> str:
    """What to call a model: the last part of its name on the hub, or of its path."""
    return (hub_name(directory) or directory.resolve().name).rpartition("/")[2]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError that names the file for anything else."""
    if is_pointer(path):
        raise pointer(path)
    value = text_files.read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read: it is not a JSON object")
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it is written; UserError if there is none or it cannot be read."""
    if os.path.exists(directory) and not directory.is_dir():
        raise UserError(f"{directory} is a file: give the directory of the model, with all of it")
    if not directory.is_dir():
        hub = _HUB_NAME.fullmatch(str(directory))
        way_out = f": `hf download {directory} --local-dir {directory}` fetches it"
        raise UserError(f"the model directory {directory} does not exist{way_out if hub else ''}")
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{directory} is not a model directory: it has no {CONFIG_FILE}")
    config = read_json(path)
    check_mark(path)
    return config


def read_model_type(directory: Path) -> str:
    """The model's family, `model_type` of config.json; UserError where it names none."""
    named = read_config(directory).get("model_type")
    if not isinstance(named, str) or not named:
        raise UserError(
            f"{directory / CONFIG_FILE} names no model_type: give the config.json that was "
            "published with these weights"
        )
    return named


def check_mark(path: Path) -> None:
    """UserError for a file that begins with a byte-order mark."""
    with path.open("rb") as file:
        if file.read(3) == codecs.BOM_UTF8:
            raise UserError(
                f"{path} begins with a byte-order mark, which transformers and vLLM do not read: "
                "save it as UTF-8 without one"
            )


def check_texts(directory: Path) -> None:
    """UserError for a text file beside config.json that is damaged, or holds no usable settings.

    transformers and vLLM pass over some of them then, read others half, and name none.
    """
    for name in _TEXTS:
        path = directory / name
        if path.is_file():
            if path.suffix != ".json":
                text_files.check_utf8(path)
            elif name == _GENERATION_FILE:
                check_generation(path, read_json(path))
            else:
                read_json(path)
            check_mark(path)


def check_generation(path: Path | str, settings: Mapping[str, Any]) -> None:
    """UserError for a default of every answer that none can be given with."""
    for key, (kind, wanted, fits) in _GENERATION.items():
        value: Any = settings.get(key)
        several = value if key == "eos_token_id" and isinstance(value, list) else [value]
        for one in several if value is not None else ():
            number = isinstance(one, (int, kind)) and not isinstance(one, bool)
            if not number or not fits(one):
                raise UserError(
                    f"{path}: {key} is {value!r:.60}, and must be {wanted}: correct it, or take "
                    f"{key} out"
                )


def _check_picture_settings(directory: Path) -> None:
    """UserError where two files say differently how pictures are made ready.

    transformers 5 goes by processor_config.json, and before it by preprocessor_config.json.
    """
    whole, alone = directory / "processor_config.json", directory / "preprocessor_config.json"
    if not (whole.is_file() and alone.is_file()):
        return
    first, second = read_json(whole).get("image_processor"), read_json(alone)
    for key in _PICTURES if isinstance(first, dict) else ():
        one, other = (first or {}).get(key), second.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            common = [k for k in one if None not in (one[k], other.get(k))]
            one, other = ({k: size[k] for k in common} for size in (one, other))
        if None not in (one, other) and one != other:
            raise UserError(
                f"{directory}: {key} is {one} in {whole.name} and {other} in {alone.name}: keep "
                "the file that belongs to the weights, and delete the other"
            )


def load_config(directory: Path) -> Any:
    """config.json as transformers' configuration class, defaults filled in.

    UserError if it cannot be read, or holds values that the class refuses.
    """
    read_model_type(directory)  # transformers' own message for a missing file is about its hub

    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # its classes raise anything about a stranger's values
        reason = " ".join(str(error).split()) or type(error).__name__
        path = directory / CONFIG_FILE
        raise UserError(f"{path} is not a usable configuration: {reason}") from None


def cannot_be_loaded(directory: Path, error: Exception) -> UserError:
    """For what transformers raises while it makes a model: a stranger's values may be anything."""
    reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
    return UserError(
        f"{directory} cannot be loaded ({reason[:400]}): give the config.json that belongs to "
        "these weights"
    )


def load_processor(directory: Path) -> Any:
    """The processor; UserError when the directory has none, or none for images and chats."""
    check_texts(directory)
    _check_picture_settings(directory)

    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # a package that is missing, a value that is none of its own
        if (directory / _TOKENIZER_FILE).is_file():
            read_json(directory / _TOKENIZER_FILE)  # its name is not in what was raised
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")[:400]
        raise UserError(
            f"{directory} has no usable processor ({reason}): {_COPY_AGAIN}, or install the "
            "package that is missing"
        ) from None
    if getattr(processor, "tokenizer", None) is None:
        raise UserError(f"{directory} has no image processor beside its tokenizer: {_COPY_AGAIN}")
    _check_cut(directory, processor.tokenizer)
    if not processor.chat_template:
        processor.chat_template = _tokenizer_template(processor.tokenizer)
    if not isinstance(processor.chat_template, (str, Mapping)) or not processor.chat_template:
        raise UserError(
            f"{directory} has no chat template, so it cannot be asked anything: add the "
            "chat_template.jinja of the model that was trained on chats"
        )
    return processor


def _check_cut(directory: Path, tokenizer: Any) -> None:
    """UserError for a tokenizer that cuts or fills up every prompt, as a training left it.

    Processors call it with what its files say, here and in vLLM, and none says that it cut.
    """
    said, text = tokenizer.init_kwargs, text_config(read_config(directory))
    cut, most = said.get("max_length") or math.inf, text.get("max_position_embeddings")
    if said.get("padding") or not isinstance(cut, (int, float)) or cut < (most or math.inf):
        raise UserError(
            f"{directory}: its tokenizer cuts every prompt at {cut} tokens, or fills it up, as a "
            "training left it: take max_length and padding out of tokenizer_config.json, and "
            "write null for truncation and padding in tokenizer.json"
        )


def _tokenizer_template(tokenizer: Any) -> Any:
    """The chat template of files that keep it with the tokenizer: one, or several by name."""
    template = tokenizer.chat_template
    if isinstance(template, (list, tuple)):
        entries = [entry for entry in template if isinstance(entry, Mapping)]
        template = {entry.get("name"): entry.get("template") for entry in entries}
    return template.get("default") if isinstance(template, Mapping) else template


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that is the decoder's; all of it in older files."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def context_length(text: Any) -> int | None:
    """How many positions a decoder is made for; None if its configuration does not say."""
    positions = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]
    factors = [float(part["factor"]) for part in parts if part.get("factor")]
    return None if positions is None else int(positions * max([1.0, *factors]))


def quantization(directory: Path) -> dict[str, Any] | None:
    """`quantization_config` of a qig checkpoint; None for any other model."""
    config = read_config(directory).get("quantization_config")
    is_ours = isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD
    return config if is_ours else None


def read_manifest(directory: Path) -> QuantizationConfig:
    """What a qig checkpoint says about itself; UserError if the directory is none."""
    from qig_serve.manifest import read_quantization_config

    config = quantization(directory)
    if config is None:
        other = read_config(directory).get("quantization_config")
        if isinstance(other, dict) and other.get("quant_method") == "compressed-tensors":
            raise UserError(
                f"{directory} is a checkpoint of compressed-tensors, which vLLM serves itself: "
                f"vllm serve {directory}"
            )
        raise UserError(
            f"{directory} is not a qig checkpoint: {CONFIG_FILE} has no quantization_config with "
            f"quant_method {QUANT_METHOD!r}; give the directory that `qig-serve quantize` wrote"
        )
    return read_quantization_config(config, str(directory / CONFIG_FILE))


def model_dtype(directory: Path) -> torch.dtype:
    """The dtype of a model's weights, found as vLLM finds it.

    The one that config.json names: for the model, else for its decoder, else for its vision
    tower. Where it names none, the widest of the stored tensors; float32 where there are none.
    UserError for a name that torch does not know.
    """
    config = read_config(directory)
    for part in (config, text_config(config), config.get("vision_config")):
        if not isinstance(part, Mapping):
            continue
        for key in _DTYPE_KEYS:
            if part.get(key):
                return dtype_named(str(part[key]), directory / CONFIG_FILE)
    stored = set(_stored_dtypes(directory))
    widest = max(stored, key=_BY_WIDTH.index, default="float32")
    return dtype_named(widest, directory)


def dtype_named(name: str, where: Path | str) -> torch.dtype:
    """torch's floating-point dtype of that name; UserError that names `where` if it has none."""
    import torch

    names = {"half": "float16", "float": "float32"}
    dtype = getattr(torch, names.get(name, name.removeprefix("torch.")), None)
    floats = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if not isinstance(dtype, torch.dtype) or not floats or dtype.itemsize < 2:
        raise UserError(f"{where}: {name!r} is not a dtype that weights can have")
    return dtype


def _stored_dtypes(directory: Path) -> Iterator[str]:
    """Of the floating-point tensors in the safetensors files, scales of codes apart."""
    for path in sorted(directory.glob("*.safetensors")):
        for name, dtype, _ in tensor_headers(path):
            if dtype in _STORED and not name.endswith(".weight_scale"):
                yield _STORED[dtype]


def tensor_headers(path: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of each tensor of a safetensors file; UserError if it is damaged.

    safetensors itself refuses headers over 100 MB, tensors that overlap or leave gaps, and files
    that are longer or shorter than described.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                tensor = shard.get_slice(name)
                yield name, tensor.get_dtype(), tuple(tensor.get_shape())
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> UserError:
    """For a safetensors file that cannot be read: damaged, or the pointer that Git fetched."""
    if is_pointer(path):
        return pointer(path)
    return UserError(f"{path} is damaged: {str(error).rstrip('.')}")


def pointer(path: Path) -> UserError:
    """For a file of which only Git LFS's pointer was fetched."""
    return UserError(
        f"{path} is a pointer of Git LFS and not the file itself: fetch it with `git lfs pull`"
    )


def is_pointer(path: Path) -> bool:
    """Whether of a file only Git LFS's pointer was fetched."""
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False
