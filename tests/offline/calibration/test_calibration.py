"""Calibration data: every source, the masks, and what is refused."""

from __future__ import annotations

import csv
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.offline.calibration.batches import (
    calibration_sha256,
    make_batches,
    token_counts,
)
from qig_serve.offline.calibration.sources import CAPTION_QUESTION, CAPTIONS, load_calibration
from qig_serve.offline.processes import Ranks
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.samples import Sample, sample_from_parts


@pytest.fixture(scope="module")
def processor() -> Any:
    from qig_serve.demo.model import get_spec, make_processor, train_tokenizer

    corpus = ["Describe the image.", "a red star", "user\n", "assistant\n"] * 20
    spec = get_spec("llava")
    return make_processor(spec, train_tokenizer(corpus, 400))


def _image(path: Path, color: str = "red") -> Path:
    Image.new("RGB", (40, 30), color).save(path)
    return path


def _batches(samples: list[Sample], processor: Any, **options: Any) -> Any:
    return make_batches(samples, processor, processor.image_token_id, **options)


def test_masks_separate_images_words_and_template(tmp_path: Path, processor: Any) -> None:
    image = _image(tmp_path / "a.png")
    sample = sample_from_parts("7", "caption", image, "What color is the star?", "a red star")
    (batch,) = _batches([sample], processor)
    ids = batch.inputs["input_ids"][0]
    decode = processor.tokenizer.decode
    assert decode(ids[batch.answer_mask[0]]) == "a red star"
    assert decode(ids[batch.modality[0] == 1]) == "What color is the star?a red star"
    assert int((batch.modality == 2).sum()) == 36
    assert torch.equal(batch.token_mask, batch.modality != 0)
    template = decode(ids[batch.modality[0] == 0])
    assert template == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"


def test_words_that_the_template_uses_too(processor: Any, tmp_path: Path) -> None:
    """A question that repeats the template's own words is still the question."""
    image = _image(tmp_path / "a.png")
    sample = sample_from_parts("7", "all", image, "user", "assistant")
    (batch,) = _batches([sample], processor)
    ids = batch.inputs["input_ids"][0]
    assert processor.tokenizer.decode(ids[batch.answer_mask[0]]) == "assistant"
    first_text = int((batch.modality[0] == 1).nonzero()[0])
    last_image = int((batch.modality[0] == 2).nonzero()[-1])
    assert first_text > last_image  # not the role name in front of the image


def test_same_length_samples_share_a_batch_without_padding(processor: Any, tmp_path: Path) -> None:
    image = _image(tmp_path / "a.png")
    samples = [sample_from_parts(str(i), "all", image, "Describe", "a red") for i in range(5)]
    samples.append(sample_from_parts("long", "all", image, "Describe", "a red star " * 5))
    length = _batches(samples[:1], processor)[0].token_mask.shape[1]
    batches = _batches(samples, processor, batch_tokens=3 * length)
    assert [len(b.ids) for b in batches] == [1, 3, 2]
    assert batches[0].ids == ("long",)
    assert all(bool(b.inputs["attention_mask"].all()) for b in batches)
    # Every other one by length is of the other half, whoever has it.
    assert [b.half.tolist() for b in batches] == [[False], [True, False, True], [False, True]]
    shared = [
        half
        for rank in (0, 1)
        for b in _batches(samples, processor, ranks=Ranks(rank, 2))
        for half in b.half.tolist()
    ]
    assert shared == [False] * 3 + [True] * 3
    assert sum(token_counts(batches).values()) == sum(b.token_mask.numel() for b in batches)


def test_too_long_is_rejected_by_name(processor: Any, tmp_path: Path) -> None:
    sample = sample_from_parts("the-long-one", "all", _image(tmp_path / "a.png"), "Describe", "a")
    with pytest.raises(UserError, match="the-long-one is .* more than 20"):
        _batches([sample], processor, max_length=20)


def test_two_images_and_text_only(processor: Any, tmp_path: Path) -> None:
    image = _image(tmp_path / "a.png")
    content = [
        {"type": "image", "image": image},
        {"type": "text", "text": "and"},
        {"type": "image", "image": image},
        {"type": "text", "text": "Describe"},
    ]
    two = Sample("two", "all", ({"role": "user", "content": content},), "a red star")
    text = Sample("text", "all", ({"role": "user", "content": [content[1]]},), "a")
    batches = _batches([two, text], processor)
    assert [int((b.modality == 2).sum()) for b in batches] == [72, 0]
    assert batches[0].inputs["pixel_values"].shape[0] == 2


def test_hash_depends_on_pictures_words_and_answers(tmp_path: Path) -> None:
    a, b = _image(tmp_path / "a.png"), _image(tmp_path / "b.png", "blue")
    base = sample_from_parts("1", "all", a, "What?", "red")
    others = [
        sample_from_parts("1", "all", b, "What?", "red"),
        sample_from_parts("1", "all", a, "Who?", "red"),
        sample_from_parts("1", "all", a, "What?", "blue"),
    ]
    hashes = {calibration_sha256([s]) for s in [base, *others]}
    assert len(hashes) == 4
    assert calibration_sha256([base]) == calibration_sha256([base])


# --- sources -------------------------------------------------------------------------------------


def test_jsonl_is_sampled_by_seed(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    content = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "?"}]
    lines = [
        json.dumps({"id": str(i), "messages": [{"role": "user", "content": content}]})
        for i in range(30)
    ]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    source = str(tmp_path / "s.jsonl")
    first = [s.id for s in load_calibration(source, 8, seed=1)]
    assert len(first) == 8 and first == [s.id for s in load_calibration(source, 8, seed=1)]
    assert first != [s.id for s in load_calibration(source, 8, seed=2)]
    assert len(load_calibration(source, 100)) == 30


def test_llava_conversations(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    _image(tmp_path / "images" / "a.png")
    record = {
        "id": "x",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "a star"},
            {"from": "human", "value": "What color?"},
            {"from": "gpt", "value": "red"},
        ],
    }
    (tmp_path / "llava.json").write_text(json.dumps([record]))
    (sample,) = load_calibration(
        str(tmp_path / "llava.json"), 4, image_folder=str(tmp_path / "images")
    )
    assert sample.id == "x" and sample.answer == "red"
    assert [m["role"] for m in sample.messages] == ["user", "assistant", "user"]
    assert [p["type"] for p in sample.messages[0]["content"]] == ["image", "text"]
    with pytest.raises(UserError, match=r"record 0: the image .*a\.png does not exist"):
        load_calibration(str(tmp_path / "llava.json"), 4)


@pytest.mark.parametrize("pictures", [{"image": ["a.png"]}, {"images": ["a.png"]}])
def test_conversations_with_lists_of_images(tmp_path: Path, pictures: dict[str, Any]) -> None:
    _image(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a star"}]
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "b"}]
    records = [{"conversations": turns, **pictures}, {"messages": messages, "images": ["a.png"]}]
    (tmp_path / "c.json").write_text(json.dumps(records))
    samples = load_calibration(str(tmp_path / "c.json"), 4)
    assert [s.answer for s in samples] == ["a star", "b"]
    assert all(s.images == [tmp_path / "a.png"] and s.question == "What?" for s in samples)


@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_answers_that_are_not_wanted_are_left_out(tmp_path: Path, key: str) -> None:
    """And counted, before samples are chosen; a label of another kind says nothing of an answer."""
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a star"}]
    records: list[dict[str, Any]] = [
        {"prompt": "What?", "completion": "a heart", key: False},
        {"messages": turns, key: False},
        {"prompt": "What?", "completion": "a star", key: True},
        {"messages": turns, key: 0},
        {"messages": turns[:1], key: False},
    ]
    path = _write(tmp_path / "kto.jsonl", "\n".join(map(json.dumps, records)))
    notes: list[str] = []
    samples = load_calibration(str(path), 3, text_only=True, notes=notes)
    assert [s.answer for s in samples] == ["a star", "a star", None]
    assert [n.partition(": ")[2] for n in notes] == [
        "2 whose answer is not wanted (label or kto_tag is false)"
    ]
    _write(path, json.dumps(records[0]))
    with pytest.raises(UserError, match=r"kto\.jsonl: the answers of all its 1 records are marked"):
        load_calibration(str(path), 3, text_only=True)


@pytest.mark.parametrize("key", ["video", "videos", "audio", "audios", "image_path"])
def test_conversations_with_other_media(tmp_path: Path, key: str) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a star"}]
    (tmp_path / "c.json").write_text(json.dumps([{"conversations": turns, key: "x"}]))
    with pytest.raises(UserError, match=rf'c\.json, record 0: the key "{key}" is not read'):
        load_calibration(str(tmp_path / "c.json"), 4)


def test_folder_with_captions_beside(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    _image(tmp_path / "no-caption.png")
    (tmp_path / "a.txt").write_text("a red field\n")
    (sample,) = load_calibration(str(tmp_path), 4)
    assert (sample.id, sample.answer, len(sample.images)) == ("a.png", "a red field", 1)


def test_folder_with_csv(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], ["a.png", "red, and flat"]])
    (sample,) = load_calibration(str(tmp_path), 4)
    assert sample.answer == "red, and flat"
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"captions\.csv, line 2: the image"):
        load_calibration(str(tmp_path), 4)


@pytest.mark.parametrize("direct", [True, False])
def test_csv_with_questions(tmp_path: Path, direct: bool) -> None:
    """Rows without a caption are left out and counted, as of `hf:`."""
    (tmp_path / "images").mkdir()
    _image(tmp_path / "images" / "a.png")
    path = _write(tmp_path / "c.CSV", "image,prompt,answer\na.png,What?,a star\na.png,Why?,\n")
    notes: list[str] = []
    source = str(path if direct else tmp_path)
    (sample,) = load_calibration(source, 4, image_folder=tmp_path / "images", notes=notes)
    assert (sample.question, sample.answer) == ("What?", "a star")
    assert [n.endswith("were left out: 1 without a caption") for n in notes] == [True]
    _write(path, "image,prompt,answer\na.png,,a star\n")
    with pytest.raises(UserError, match="line 2: the column prompt is empty"):
        load_calibration(source, 4, image_folder=tmp_path / "images")


def test_what_a_folder_has_beside_its_pictures(tmp_path: Path) -> None:
    """macOS leaves ._NAME; an empty caption is none."""
    for name in ("a", "b", "._a"):
        _image(tmp_path / f"{name}.png")
    for name, text in (("a.TXT", "red"), ("b.txt", " \n"), ("._a.txt", "\0")):
        _write(tmp_path / name, text)
    notes: list[str] = []
    assert [s.id for s in load_calibration(str(tmp_path), 4, notes=notes)] == ["a.png"]
    assert len(notes) == 1
    (tmp_path / "a.TXT").unlink()
    with pytest.raises(UserError, match="all of its 1 pictures are without a caption"):
        load_calibration(str(tmp_path), 4)
    for source in ("demo", "hf:x/y", str(tmp_path)):
        with pytest.raises(UserError, match="--image-folder is for files that name pictures"):
            load_calibration(source, 4, image_folder=tmp_path)


def test_demo_calibration_is_not_the_test_set() -> None:
    from qig_serve.demo.questions import samples as draw
    from qig_serve.samples import sample_sha256

    calibration = {sample_sha256(s) for s in load_calibration("demo", 16)}
    test = {
        sample_sha256(sample_from_parts(s.id, s.type, s.image, s.question, s.answer))
        for s in draw("test", 16)
    }
    assert len(calibration) == 16 and not calibration & test


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: "", "no calibration data"),
        (lambda d: str(d / "gone.jsonl"), "does not exist"),
        (lambda d: str(_write(d / "empty.jsonl", "")), "no samples"),
        (lambda d: str(_write(d / "broken.json", "{")), "not JSON"),
        (lambda d: str(_write(d / "object.json", "{}")), 'a list of "conversations"'),
        (lambda d: str(_write(d / "none.json", "[]")), "no samples"),
        (lambda d: str(d), "no captioned images: put NAME.txt"),
        (
            lambda d: str(_write(d / "s.jsonl", "{}").parent),
            "no captioned images: name the file itself, .*s.jsonl; or put NAME.txt",
        ),
        (
            lambda d: str(_write(d / "c.csv", "image,caption\nx.png,one, two\n").parent),
            "line 2: more fields than columns: quote",
        ),
        (
            lambda d: str(_write(d / "c.csv", "name,text\nx.png,one\n").parent),
            "needs the columns image and caption",
        ),
        (
            lambda d: str(
                _write(d / "t.jsonl", '{"messages": [{"role": "user", "content": "Hi"}]}')
            ),
            "no calibration sample .* has an image",
        ),
    ],
    ids=["none", "absent", "empty", "broken", "object", "no-record", "no-captions", "its-file"]
    + ["unquoted", "columns", "no-image"],
)
def test_refused_sources(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_calibration(make(tmp_path), 4)


def test_text_only_on_request(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.jsonl", '{"messages": [{"role": "user", "content": "Hi"}]}')
    assert len(load_calibration(str(path), 4, text_only=True)) == 1


class _Rows(list[dict[str, Any]]):
    """Enough of an iterable dataset."""

    features = None

    def shuffle(self, seed: int, buffer_size: int) -> _Rows:
        assert buffer_size >= 1000
        return _Rows(self[seed:] + self[:seed])

    def take(self, n: int) -> _Rows:
        return _Rows(self[:n])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub with one dataset; what was asked of it."""
    asked: list[tuple[Any, ...]] = []
    red = Image.new("RGB", (40, 30), "red")

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> _Rows:
        assert streaming
        asked.append((name, config, split))
        if name == "gone/gone":
            raise FileNotFoundError("Dataset 'gone/gone' doesn't exist on the Hub")
        return _Rows(
            {
                "picture": red,
                "image": red,
                "q": f"What {i}?",
                "answer": [f"a{i}", "b"],
                "caption": i,
            }
            for i in range(5)
        )

    quiet = SimpleNamespace(set_verbosity=lambda level: None, CRITICAL=50)
    spec = ModuleSpec("datasets", None)
    package = SimpleNamespace(load_dataset=load_dataset, logging=quiet, __spec__=spec)
    monkeypatch.setitem(sys.modules, "datasets", package)
    return asked


def test_hugging_face_columns_are_mapped(hub: list[tuple[Any, ...]]) -> None:
    source = "hf:some/captions?split=val&config=en&image=picture&question=q&answer=answer"
    samples = load_calibration(source, 3, seed=1)
    assert hub == [("some/captions", "en", "val")]
    assert [s.answer for s in samples] == ["a1", "a2", "a3"]  # the first of several captions
    assert [s.id for s in samples] == ["some/captions-0", "some/captions-1", "some/captions-2"]
    parts = samples[0].messages[0]["content"]
    assert [p["type"] for p in parts] == ["image", "text"] and parts[1]["text"] == "What 1?"
    assert samples[0].images[0].size == (40, 30)
    (caption,) = load_calibration("hf:some/captions", 1)  # the usual names, and our question
    assert hub[1] == ("some/captions", None, "train")
    assert caption.answer == "0" and caption.messages[0]["content"][1]["text"] == CAPTION_QUESTION


def test_image_caption_pairs_are_the_default(hub: list[tuple[Any, ...]]) -> None:
    recipe = QuantRecipe()
    assert recipe.samples == 128 and recipe.calib == CAPTIONS
    missing = "^give --calib with a .*no column 'question'; the columns are picture, image, q"
    with pytest.raises(UserError, match=missing):
        load_calibration(recipe.calib, recipe.samples)
    assert hub == [("lmms-lab/COCO-Caption2017", None, "val")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:some/captions?picture=x", "unknown option 'picture'; known: split, image"),
        ("hf:some/captions?image=photo", r"no column 'photo'; .* hf:NAME\?image=COLUMN"),
        ("hf:gone/gone", r"hf:gone/gone cannot be read \(Dataset .* doesn't exist .*\): give a"),
    ],
)
def test_wrong_hugging_face_sources(hub: list[tuple[Any, ...]], source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_calibration(source, 4)


def test_without_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs datasets, which is not installed: pip install "):
        load_calibration("hf:some/captions", 4)


# --- through the whole command -------------------------------------------------------------------


def _quantize(model: Path, data: Path, output: Path, *words: str) -> int:
    return main(
        ["quantize", str(model), "--calib", str(data), "--output", str(output), "--quiet"]
        + ["--grid", "2", "--device", "cpu", *words]
    )


def _line(name: str, images: int, words: str) -> str:
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": "a.png"}} for _ in range(images)
    ]
    content.append({"type": "text", "text": words})
    message = {"role": "user", "content": content}
    return json.dumps({"id": name, "messages": [message], "answer": "a red star"})


def test_several_images_and_none_in_one_run(tiny_llava: Path, tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    lines = [_line("one", 1, "Describe"), _line("two", 2, "Compare"), _line("none", 0, "Hello?")]
    data = _write(tmp_path / "mixed.jsonl", "\n".join(lines))
    assert _quantize(tiny_llava, data, tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["calibration"]["samples"] == 3
    assert report["calibration"]["images"] == 3
    assert report["calibration"]["tokens"]["image"] == 3 * 36
    assert len(report["blocks"]) == 2 and not report["fallbacks"]


def test_text_only_is_asked_for(
    tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _write(tmp_path / "text.jsonl", _line("none", 0, "Hello?"))
    assert _quantize(tiny_llava, data, tmp_path / "out") == 2
    assert "use --text-only" in capsys.readouterr().err
    assert _quantize(tiny_llava, data, tmp_path / "out", "--text-only") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["calibration"]["tokens"]["image"] == 0 < report["calibration"]["tokens"]["text"]


def test_a_long_sample_ends_the_command_by_name(
    tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _image(tmp_path / "a.png")
    lines = [_line("short", 1, "Describe"), _line("the-long-one", 2, "Compare")]
    data = _write(tmp_path / "mixed.jsonl", "\n".join(lines))
    assert _quantize(tiny_llava, data, tmp_path / "out", "--max-length", "70") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "calibration sample the-long-one is" in line and "more than 70" in line
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "mixed.jsonl"}


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
