"""Odd data and odd models that public reports did not name: each read, or refused in a sentence."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file

from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.offline.calibration.sources import load_calibration
from qig_serve.offline.source import loaded_model
from qig_serve.records import read_samples

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "0.png")
    (tmp_path / "link.png").symlink_to("link.png")
    return tmp_path


def message(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "answer": "a star"} | more


def picture(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def conversation(speakers: list[str], text: str = "What?") -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": text} for speaker in speakers]}


WHAT = {"type": "text", "text": "What?"}
PICTURE = picture("0.png")
MEDIA: dict[str, Any] = {
    "input_audio": {"data": "UklGRg==", "format": "wav"},
    "img": "0.png",
    "imgs": ["0.png"],
    "pictures": ["0.png"],
    "photo": "0.png",
    "media": ["0.png"],
    "image_base64": "iVBORw0KGgo=",
    "pixel_values": [[0.1]],
    "Image": "0.png",
    "frames": ["0.png"],
    "speech": "a.wav",
    "multi_modal_data": {"image": "0.png"},
    "files": ["0.png"],
    "attachments": [{"url": "clips/1.MP4"}],
    "mm": "data:image/png;base64,AAAA",
}
RECORDS: dict[str, tuple[Any, str]] = {
    **{f"key-{key}": (message("What?", **{key: v}), f'"{key}" is not') for key, v in MEDIA.items()},
    "text-part-with-image": (message([{**picture("0.png"), **WHAT}]), '"image_url" is not read'),
    "image-part-with-text": (message([{**picture("0.png"), **{"text": "Why?"}}]), "make them two"),
    "nested-parts": (message([[WHAT]]), "a part must be"),
    "texts-as-parts": (message(["What?"]), "a part must be"),
    "object-as-content": (message(WHAT), "must be text or a list"),
    "images-nested": (message("<image>?", images=[["0.png"]]), "must be a list of paths"),
    "images-of-null": (message("<image>?", images=[None]), "must be a list of paths"),
    "images-an-object": (message("<image>?", images={"0": "0.png"}), "must be a list of paths"),
    "two-forms": (message("What?", conversations=[{"from": "human"}]), "in one of them"),
    "tool-calls": (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{"type": "function"}]}]},
        "calls of tools",
    ),
    "url": (message([picture("https://a.test/0.png?x=y"), WHAT]), "is on a network"),
    "url-blob": (message([picture("blob:https://a/1"), WHAT]), "is on a network"),
    "other-host": (message([picture("file://host/0.png"), WHAT]), "0.png does not exist"),
    "home": (message([picture("~/0.png"), WHAT]), "~/0.png does not exist"),
    "windows-path": (message([picture("C:\\0.png"), WHAT]), r"C:\\0.png does not exist"),
    "zero-in-path": (message([picture("0\0.png"), WHAT]), r"0\\x00.png' does not exist"),
    "line-end-in-path": (message([picture("0\n.png"), WHAT]), r"0\\n.png' does not exist"),
    "long-path": (message([picture("a" * 9000), WHAT]), "aaaa does not exist"),
    "folder-as-picture": (message([picture("."), WHAT]), "is no file"),
    "device-as-picture": (message([picture("/dev/zero"), WHAT]), "/dev/zero is no file"),
    "link-to-itself": (message([picture("link.png"), WHAT]), "link.png is no file"),
    "svg-data-url": (message([picture("data:image/svg+xml,<svg/>"), WHAT]), "not valid base64"),
    "number-as-url": (message([picture(5), WHAT]), "a part must be"),
    "empty-path": (message([picture(" "), WHAT]), "path of an image is empty"),
    "two-urls": (message([{"type": "image", "url": "0.png", "path": "0.png"}]), "a part must be"),
    **{
        key: (message([{**picture("0.png"), key: 56}, WHAT]), f'"{key}" of a picture is not read')
        for key in ("min_pixels", "max_pixels", "resized_height", "resized_width")
    },
    **{
        f"unlearned-{key}": (
            {
                "messages": [
                    *message("x")["messages"],
                    {"role": "assistant", "content": "a star", key: value},
                ]
            },
            "its last turn is not to be learned from",
        )
        for key, value in {"loss": False, "weight": 0}.items()
    },
    "empty-turn": (message([]), "the last user turn is empty"),
    "blank-turn": (message(" \n"), "the last user turn is empty"),
    "thoughts": (
        {"messages": [{"role": "user", "content": "x", "reasoning_content": "hm"}]},
        '"reasoning_content" of a message is not read',
    ),
    "tools": (message("What?", tools='[{"name": "f"}]'), "definitions of tools are not read"),
    "two-systems": (
        {
            "messages": [{"role": "system", "content": "a"}, *message("x")["messages"]],
            "system": "b",
        },
        '"system" and a system turn',
    ),
    **{
        f"answer-as-{key}": (message("What?", answer=None, **{key: value}), f'"{key}" is not read')
        for key, value in {
            "response": "a star",
            "answers": ["a star", "star"],
            "Solution": "a star",
            "ground_truth": "a star",
            "expected_output": "a star",
            "label": "a star",
        }.items()
    },
    "template-settings": (
        message("What?", chat_template_kwargs={"enable_thinking": False}),
        '"chat_template_kwargs" is not read',
    ),
    "marks-of-objects": (
        message("Where is <ref-object>?", objects={"ref": ["star"], "bbox": [[1, 2, 3, 4]]}),
        "the mark '<ref-object>' is not filled",
    ),
    "picture-as-answer": (
        {"messages": [*message("x")["messages"], {"role": "assistant", "content": [PICTURE]}]},
        "the answer holds a picture",
    ),
    "two-answers": (
        conversation(["human", "gpt", "gpt"]),
        "the turn before the answer must be the user's",
    ),
    "picture-in-a-turn": (
        {"conversations": [{"from": "human", "value": "What?", "image": "0.png"}]},
        'the key "image" is not read',
    ),
    "a-mark-too-few": (
        {**conversation(["human"], "<image> and what?"), "images": ["0.png", "0.png"]},
        "2 images, and 1 marks",
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records(folder: Path, name: str) -> None:
    record, wanted = RECORDS[name]
    path = folder / "c.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"c\.jsonl, line 1: .*{wanted}") as caught:
        load_calibration(str(path), 8, text_only=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


PARTS: dict[str, Any] = {
    "string": {"type": "image_url", "image_url": "0.png"},
    "detail": {"type": "image_url", "image_url": {"url": "0.png", "detail": "low"}},
    "typeless": {"image_url": {"url": "0.png"}},
    "responses": {"type": "input_image", "image_url": "0.png"},
    "qwen": {"type": "image", "image": "0.png"},
    "transformers-path": {"type": "image", "path": "0.png"},
    "transformers-url": {"type": "image", "url": "0.png", "text": None},
}


@pytest.mark.parametrize("name", PARTS)
def test_forms_of_a_picture(folder: Path, name: str) -> None:
    path = folder / "c.jsonl"
    path.write_text(json.dumps(message([PARTS[name], {"type": "input_text", "text": "What?"}])))
    (sample,) = load_calibration(str(path), 1)
    assert sample.images == [folder / "0.png"] and sample.question == "What?"


def test_data_urls_in_lines(folder: Path) -> None:
    url = "data:image/png;base64, " + base64.encodebytes((folder / "0.png").read_bytes()).decode()
    (folder / "c.jsonl").write_text(json.dumps(message([picture(url), WHAT])))
    assert load_calibration(str(folder / "c.jsonl"), 1)[0].images == [
        (folder / "0.png").read_bytes()
    ]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.JSON", "a.txt"])
@pytest.mark.parametrize("form", ["list", "lines"])
def test_files_are_what_they_hold(folder: Path, name: str, form: str) -> None:
    """Lists and lines of both forms under any name, to calibrate and to score."""
    records = [
        {**conversation(["human", "gpt"]), "image": "0.png", "system": "Be brief."},
        message([PICTURE, WHAT], system="Be brief.", tools="[]", id=None, type=None),
    ]
    lines = map(json.dumps, records)
    text = json.dumps(records, indent=1) if form == "list" else "\n".join(lines)
    (folder / "d").mkdir()
    (folder / "d" / name).write_text("\ufeff" + text)
    (folder / "d" / "0.png").symlink_to("../0.png")
    samples = load_calibration(str(folder / "d" / name), 8)
    assert samples == read_samples(folder / "d" / name, scored=True)
    assert [[m["role"] for m in s.messages] for s in samples] == [["system", "user"]] * 2
    assert [s.type for s in samples] == ["conversation", "all"]
    assert [s.id for s in samples] == (["0", "1"] if form == "list" else ["1", "2"])
    moved = load_calibration(str(folder / "d" / name), 8, image_folder=folder)
    assert [s.images for s in moved] == [[folder / "0.png"]] * 2
    with pytest.raises(UserError, match="the image folder .*gone does not exist"):
        load_calibration(str(folder / "d" / name), 8, image_folder=folder / "gone")


LINE = json.dumps(message([picture("0.png"), WHAT]))
TEXTS: dict[str, tuple[str, bytes, str]] = {
    "answer-twice": (
        "c.jsonl",
        f'{LINE[:-1]}, "answer": "b"}}'.encode(),
        "'answer' is there twice",
    ),
    "inner-key-twice": ("c.json", b'[{"image": "a", "image": "b"}]', "'image' is there twice"),
    "half-a-pair": ("c.jsonl", LINE.replace("What", "\\ud800").encode(), "half of a surrogate"),
    "gzip": ("c.jsonl", b"\x1f\x8b\x08\0", "packed by gzip, not text: unpack it, or"),
    "zip": ("c.jsonl", b"PK\x03\x04", "a zip file, not text: .*give a text file"),
    "parquet": ("c.parquet", b"PAR1\0", r"hf:.*c\.parquet cannot be read .*: give a dataset"),
    "picture": ("c.jsonl", b"\x89PNG\r\n", "a picture, not text"),
    "cr-line-ends": ("c.jsonl", f"{LINE}\r{LINE}\r".encode(), "line 1: not JSON"),
    "pretty-printed": ("c.jsonl", b'{\n"messages": []\n}', "line 1: not JSON"),
    "empty": ("c.jsonl", b"", "holds no samples"),
    "blank": ("c.jsonl", b"\xef\xbb\xbf \r\n\t\r\n", "holds no samples"),
    "column-twice": ("f.csv", b"image,caption,caption\n0.png,a,b\n", "'caption' is there twice"),
    "csv-url": ("f.csv", b"image,caption\nhttp://a/0.png,a\n", "line 2: .* is on a network"),
    "csv-semicolons": ("f.csv", b"image;caption\n0.png;a\n", "needs the columns"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_files(folder: Path, name: str) -> None:
    file, raw, wanted = TEXTS[name]
    (folder / file).write_bytes(raw)
    source = folder if file == "f.csv" else folder / file
    with pytest.raises(UserError, match=wanted):
        load_calibration(str(source), 8)


@pytest.mark.parametrize(
    "url",
    ["file://localhost{0}", "FILE://{0}", "file://{1}/%30.png", "DATA:image/png;base64,iVBORw=="],
)
def test_the_same_picture_in_all_forms(folder: Path, url: str) -> None:
    """Samples, conversations and captions; U+2028 is a character of the caption."""
    url = url.format(folder / "0.png", folder)
    forms: dict[str, Any] = {
        "a.jsonl": message([picture(url), WHAT]),
        "b.json": [{"image": url, "conversations": [{"from": "human", "value": "<image>?"}]}],
    }
    for name, value in forms.items():
        (folder / name).write_text(json.dumps(value))
        assert len(load_calibration(str(folder / name), 1)[0].images) == 1
    (folder / "c.csv").write_text(f'\ufeffimage,caption\r\n"{url}",a red\u2028star\r\n')
    (sample,) = load_calibration(str(folder), 1)
    assert sample.answer == "a red\u2028star" and len(sample.images) == 1


@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_what_is_no_file(folder: Path, kind: str) -> None:
    path = folder / "c.jsonl"
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("gone")
    with pytest.raises(UserError, match=r"c\.jsonl is no file"):
        load_calibration(str(path), 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llava", tmp_path_factory.mktemp("model") / "llava")


Spoil = Callable[[Path], Any]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(directory: Path) -> None:
        found = load_file(directory / WEIGHTS)
        save_file(change(found) or found, directory / WEIGHTS, {"format": "pt"})

    return spoil


def config(name: str = "config.json", **parts: Any) -> Spoil:
    """Changes of a file's JSON; of an inner object where there is one by that name."""

    def spoil(directory: Path) -> None:
        path = directory / name
        value = json.loads(path.read_text())
        for key, part in parts.items():
            value[key] = {**value[key], **part} if isinstance(value.get(key), dict) else part
        path.write_text(json.dumps(value))

    return spoil


def text(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(directory: Path) -> None:
        path = directory / name
        path.write_bytes(change(path.read_bytes() if path.exists() else b""))

    return spoil


def replaced(make: Spoil, name: str = WEIGHTS) -> Spoil:
    def spoil(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return spoil


def sharded(index: dict[str, Any] | None) -> Spoil:
    def spoil(directory: Path) -> None:
        shard = "model-00001-of-00001.safetensors"
        (directory / WEIGHTS).rename(directory / shard)
        names = dict.fromkeys(load_file(directory / shard), shard)
        (directory / INDEX).write_text(json.dumps(index or {"weight_map": names}))

    return spoil


def two_shards(directory: Path) -> None:
    """One has all the tensors, and the index says of one that it is in the other."""
    sharded(None)(directory)
    path, other = directory / INDEX, "model-00002-of-00002.safetensors"
    index = {"metadata": {}, **json.loads(path.read_text())}
    index["weight_map"][min(index["weight_map"])] = other
    path.write_text(json.dumps(index))
    save_file({}, directory / other)


def wrapped(prefix: str) -> Spoil:
    return tensors(lambda found: {prefix + name: value for name, value in found.items()})


def unmerged(found: dict[str, torch.Tensor]) -> None:
    name = "language_model.model.layers.0.self_attn.q_proj"
    found[f"{name}.base_layer.weight"] = found.pop(f"{name}.weight")
    found[f"{name}.lora_A.default.weight"] = torch.ones(8, 256)


def tied(directory: Path) -> None:
    config(tie_word_embeddings=True, text_config={"tie_word_embeddings": True})(directory)


def more_tokens(directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([f"<new{i}>" for i in range(320)])
    tokenizer.save_pretrained(directory)


def tokenizer_file(**parts: Any) -> Spoil:
    return config("tokenizer.json", **parts)


def second_picture_file(**parts: Any) -> Spoil:
    """As a model saved by transformers 5 into a folder that had one of transformers 4."""

    def spoil(directory: Path) -> None:
        settings = json.loads((directory / "processor_config.json").read_text())["image_processor"]
        (directory / "preprocessor_config.json").write_text(json.dumps(settings | parts))

    return spoil


TRUNCATION = {"direction": "Right", "max_length": 90, "strategy": "LongestFirst", "stride": 0}
TOWER = {"vision_config": {"quantization_config": {"quant_method": "fp8"}}}
MODELS: dict[str, tuple[Spoil, str]] = {
    "wrapped-module": (wrapped("module."), "begins with 'module.'.* save the model inside"),
    "wrapped-compile": (wrapped("_orig_mod."), "'_orig_mod' is of a wrapper"),
    "wrapped-blocks": (
        tensors(lambda found: {re.sub(r"(rs\.\d\.)", r"\1_orig_mod.", n): found[n] for n in found}),
        r"layers\.0\._orig_mod\..*'_orig_mod' is of a wrapper .*save the model inside of it",
    ),
    "wrapped-peft": (wrapped("base_model.model."), "begins with 'base_model.model.'"),
    "adapter-unmerged": (tensors(unmerged), "LoRA adapter that is not merged: .*merge_and_unload"),
    "head-not-tied": (tied, "lm_head.weight .* config.json says that they are one"),
    "mlx": (config(quantization={"group_size": 64, "bits": 4}), "quantized already .*quantization"),
    "tower-claims": (config(**TOWER), "quantized already with fp8"),
    "claim-is-text": (config(quantization_config="fp8"), "quantized already"),
    "auto-round": (
        lambda d: (d / "quantization_config.json").write_text('{"bits": 4}'),
        "quantized already .quantization_config.json says how",
    ),
    "dtype-float8": (config(dtype="float8_e4m3fn"), "'float8_e4m3fn' is not a dtype"),
    "no-architectures": (config(architectures=None), r'write \["LlavaForConditionalGeneration"\]'),
    "other-architectures": (config(architectures=["LlamaForCausalLM"]), "vLLM chooses the model"),
    "gguf": (replaced(lambda p: p.with_suffix(".gguf").touch()), "as GGUF .* quantized already"),
    "no-weights": (replaced(lambda p: None), "has no safetensors weights: download"),
    "weights-a-folder": (replaced(Path.mkdir), "safetensors is no file .*download it again"),
    "weights-a-dead-link": (replaced(lambda p: p.symlink_to("../blobs/x")), "is no file"),
    "weights-a-pointer": (
        replaced(lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n")),
        "pointer of Git LFS .* `git lfs pull`",
    ),
    "index-without-metadata": (sharded(None), 'has no "metadata", without which transformers'),
    "index-of-nothing": (sharded({"metadata": {}, "weight_map": {}}), "names no tensors"),
    "config-mark": (text("config.json", lambda b: b"\xef\xbb\xbf" + b), "byte-order mark"),
    "config-utf-16": (
        text("config.json", lambda b: b.decode().encode("utf-16")),
        "line 1, byte 1: .* UTF-16",
    ),
    "config-comma": (text("config.json", lambda b: b.rstrip()[:-1] + b",}"), "is not JSON"),
    "config-key-twice": (
        text("config.json", lambda b: b.replace(b"{", b'{"dtype": "float16",', 1)),
        "'dtype' is there twice",
    ),
    "patch-size-0": (config(vision_config={"patch_size": 0}), "ZeroDivisionError.*: give the conf"),
    "unknown-act": (config(text_config={"hidden_act": "sillu"}), "KeyError: 'sillu'.: give the"),
    "unknown-rope": (
        config(text_config={"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}),
        "cannot be loaded .KeyError: 'spiral'.",
    ),
    "tokenizer-cut": (text("tokenizer.json", lambda b: b[:500]), "tokenizer.json cannot be read: "),
    "no-tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no usable processor .*: copy"),
    "no-processor": (lambda d: (d / "processor_config.json").unlink(), "no usable processor"),
    **{
        f"{kind}-{name}": (text(name, lambda _, raw=raw: raw), wanted)
        for name in ("generation_config.json", "preprocessor_config.json", "tokenizer_config.json")
        for kind, raw, wanted in (
            ("cut", b'{"a": ', rf"{name} cannot be read: it is not JSON"),
            ("list", b"[]", rf"{name} cannot be read: it is not a JSON object"),
            ("mark", b"\xef\xbb\xbf{}", rf"{name} begins with a byte-order mark"),
        )
    },
    "tokens-beyond-the-embedding": (
        more_tokens,
        "its tokenizer has the token '<new319>' .* only 320 rows",
    ),
    "tokenizer-truncates": (
        tokenizer_file(truncation=TRUNCATION),
        "its tokenizer cuts every prompt at 90 tokens",
    ),
    "tokenizer-cuts": (config("tokenizer_config.json", max_length=90), "every prompt at 90 tokens"),
    "tokenizer-fills": (config("tokenizer_config.json", padding="max_length"), "or fills it up"),
    "two-sizes": (
        second_picture_file(size={"height": 28, "width": 56}),
        r"size is .* in processor_config\.json and .* in preprocessor_config\.json",
    ),
    "two-means": (second_picture_file(image_mean=[0.1, 0.2, 0.3]), "image_mean is .* delete the"),
    "window-0": (config(text_config={"sliding_window": 0}), "sliding_window in config.json is 0"),
    **{
        f"generation-{key}-{value!r:.8}": (
            config("generation_config.json", **{key: value}),
            rf"generation_config\.json: {key} is .*, and must be {wanted}.*: correct it, or take ",
        )
        for key, wanted, values in (
            ("temperature", "a number from 0 to 2", (-5, 2.5, "0.7", [1], math.nan, True)),
            ("top_p", "a number above 0, 1 at most", (0, 3, "x", -1)),
            ("min_p", "a number from 0 to 1", (-0.1, 2)),
            ("top_k", "a whole number, 0 for all", ("x", -2, 1.5)),
            ("repetition_penalty", "a number above 0", (0, -1, math.inf, {})),
            ("presence_penalty", "a number from -2 to 2", (3,)),
            ("frequency_penalty", "a number from -2 to 2", ("1",)),
            ("max_new_tokens", "a whole number above 0", ("256", 0, 2.5, 10**400)),
            ("eos_token_id", "a token's number, or a list", ("</s>", -1, [2, "x"], [2.0])),
        )
        for value in values
    },
    "template-mark": (
        text("chat_template.jinja", lambda b: b"\xef\xbb\xbf" + b),
        r"chat_template\.jinja begins with a byte-order mark",
    ),
    "template-windows": (
        text("chat_template.jinja", lambda b: b + b"{# \xe9 #}"),
        r"chat_template\.jinja, line \d+, byte \d+: 0xE9 is not UTF-8",
    ),
    "index-wrong-shard": (two_shards, "names the tensor .*, which is not in model-00002-of-00002"),
    "template-no-text": (
        lambda d: (
            (d / "chat_template.jinja").unlink(),
            config("tokenizer_config.json", chat_template=5)(d),
        ),
        "no chat template, .*: add the chat_template.jinja",
    ),
    "template-nameless": (
        lambda d: (
            (d / "chat_template.jinja").unlink(),
            config("tokenizer_config.json", chat_template=[{"template": "x"}])(d),
        ),
        "no usable processor|no chat template",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(model: Path, tmp_path: Path, name: str) -> None:
    spoil, wanted = MODELS[name]
    directory = Path(shutil.copytree(model, tmp_path / "model"))
    spoil(directory)
    with pytest.raises(UserError, match=wanted) as caught:
        loaded_model.load(directory)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        (f"model/{WEIGHTS}", "is a file: give the directory"),
        ("gone/model", "does not exist"),
        (
            "llava-hf/llava-1.5-7b-hf",
            "exist: `hf download llava-hf/llava-1.5-7b-hf --local-dir llava-hf/",
        ),
    ],
)
def test_no_model_directories(model: Path, path: str, wanted: str) -> None:
    given = model / WEIGHTS if path.startswith("model/") else Path(path)
    with pytest.raises(UserError, match=wanted):
        loaded_model.load(given)


def half_with_large(part: str) -> Spoil:
    """In float16, with weights that it holds and values between them that it does not."""

    def grow(found: dict[str, torch.Tensor]) -> None:
        for name, value in found.items():
            found[name] = value.half() * (2000 if part in name and name.endswith("weight") else 1)

    def spoil(directory: Path) -> None:
        config(dtype="float16")(directory)
        tensors(grow)(directory)

    return spoil


UNFIT: dict[str, tuple[Spoil, str]] = {
    "half-decoder": (half_with_large("model.layers.0.mlp"), "layer 0: values up to .* in mlp"),
    "half-projector": (half_with_large("projector"), "input of layer 0.* in model.multi_modal_pro"),
    "patches": (config("processor_config.json", patch_size=7), "cannot compute a sample"),
    "feature-layer": (config(vision_feature_layer=-9), "cannot compute a sample .IndexError"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_parts_of_two_models(
    model: Path, folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen when the first sample is computed; through the command line."""
    directory = Path(shutil.copytree(model, folder / "model"))
    UNFIT[name][0](directory)
    Image.new("RGB", (64, 64), "red").save(folder / "1.png")
    line = message([picture("1.png"), WHAT])
    (folder / "c.jsonl").write_text(json.dumps(line))
    command = ["quantize", str(directory), "--output", str(folder / "out"), "--scheme", "w4a8"]
    command += ["--method", "rtn", "--quiet", "--calib", str(folder / "c.jsonl")]
    assert main(command) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(UNFIT[name][1], said) and "\n" not in said, said


@pytest.mark.parametrize("bits", [8, 16])
def test_a_head_of_its_own_that_config_json_does_not_mention(
    folder: Path, bits: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Mistral Small 3.1, where transformers 5 and vLLM expect the embedding in its place."""
    directory = tiny_model("mistral3", folder / "model")
    path = directory / "config.json"
    whole = json.loads(path.read_text())
    del whole["tie_word_embeddings"], whole["text_config"]["tie_word_embeddings"]
    path.write_text(json.dumps(whole))
    Image.new("RGB", (64, 48), "red").save(folder / "0.png")
    (folder / "c.jsonl").write_text(json.dumps(message([PICTURE, WHAT])))
    command = ["quantize", str(directory), "--output", str(folder / "out"), "--scheme", "w4a8"]
    command += ["--method", "rtn", "--quiet", "--calib", str(folder / "c.jsonl")]
    command += ["--head", str(bits), "--embeddings", str(bits)]
    assert main(command) == 0, capsys.readouterr().err
    written = json.loads((folder / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False


ROPE = "rope_parameters"
SECTIONS = "mrope_section in config.json is .* must be three whole numbers with the sum 32"
DECODERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "one-section-too-few": ("qwen2_vl", {ROPE: {"mrope_section": [16, 16]}}, SECTIONS),
    "sections-short": ("qwen2_vl", {ROPE: {"mrope_section": [8, 12, 11]}}, SECTIONS),
    "sections-text": ("qwen2_vl", {ROPE: {"mrope_section": "8,12,12"}}, SECTIONS),
    "no-sections": ("qwen2_vl", {ROPE: {"mrope_section": None}}, SECTIONS),
    "no-sections-3": ("qwen3_vl", {ROPE: {"mrope_section": None}}, SECTIONS),
    "interleaved": ("qwen2_vl", {ROPE: {"mrope_interleaved": True}}, "models need false"),
    "not-interleaved": ("qwen3_vl", {ROPE: {"mrope_interleaved": False}}, "models need true"),
    "interleaving-unsaid": ("qwen3_vl", {ROPE: {"mrope_interleaved": None}}, "models need true"),
    "window-not-in-types": (
        "qwen2_vl",
        {"use_sliding_window": True, "sliding_window": 8},
        "use_sliding_window in config.json is true, and layer_types has",
    ),
    "sees-what-follows": (
        "gemma3",
        {"use_bidirectional_attention": True},
        "attention to the tokens that follow",
    ),
    "sections-as-they-were": ("qwen2_vl", {ROPE: {"mrope_interleaved": False}}, ""),
    "types-as-they-were": ("qwen2_vl", {"layer_types": ["full_attention"] * 2}, ""),
}
"""Family, changes of its decoder's configuration, and what is said of them."""


@pytest.mark.parametrize("name", DECODERS)
def test_what_vllm_would_compute_otherwise(tmp_path: Path, name: str) -> None:
    """transformers has a value of its own for each of these, and loads the model without a word."""
    family, changes, wanted = DECODERS[name]
    directory = tiny_model(family, tmp_path / "model")
    path = directory / "config.json"
    whole = json.loads(path.read_text())
    for key, change in changes.items():
        part = whole["text_config"].get(key)
        changed = {**part, **change} if isinstance(part, dict) else change
        if isinstance(changed, dict):
            changed = {k: v for k, v in changed.items() if v is not None}
        whole["text_config"][key] = changed
    path.write_text(json.dumps(whole))
    if not wanted:
        loaded_model.load(directory)
        return
    with pytest.raises(UserError, match=wanted):
        loaded_model.load(directory)


@pytest.mark.parametrize(("rope", "fits"), [({}, False), ({"factor": 4.0}, True)], ids=str)
def test_a_sample_longer_than_the_model_has_positions(
    model: Path, folder: Path, rope: dict[str, Any], fits: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(shutil.copytree(model, folder / "model"))
    kind = {"rope_type": "linear" if fits else "default", "rope_theta": 10000.0}
    config(text_config={"max_position_embeddings": 20, ROPE: kind | rope})(directory)
    (folder / "c.jsonl").write_text(json.dumps(message([PICTURE, WHAT])))
    command = ["quantize", str(directory), "--output", str(folder / "out"), "--scheme", "w4a8"]
    command += ["--method", "rtn", "--quiet", "--calib", str(folder / "c.jsonl")]
    assert main(command) == (0 if fits else 2)
    said = capsys.readouterr().err
    assert ("the model has 20 positions" in said) is not fits, said


def test_an_output_that_is_taken_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    from qig_serve import QuantRecipe, quantize

    with pytest.raises(UserError, match="exists already"):
        quantize(tmp_path / "no-model", tmp_path, QuantRecipe(calib="demo"))
