"""Other people's templates and processors on a sample: one sentence, whatever they raise."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_model
from PIL import Image

from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.evaluation.models import prompt_text
from qig_serve.model_directory import load_processor
from qig_serve.offline.calibration.batches import make_batches
from qig_serve.offline.source.loaded_model import image_token_id, quantizable_config
from qig_serve.rendering import check_samples, image_marks, process
from qig_serve.samples import Sample, sample_from_parts

pytestmark = pytest.mark.filterwarnings("ignore")

RED = Image.new("RGB", (56, 56), "red")
FAMILIES = ("llava", "llava_onevision", "qwen2_vl", "gemma3", "internvl", "smolvlm")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny_model(family, directory / family)
    return directory


def calibrate(directory: Path, sample: Sample) -> list[Any]:
    """Its batches."""
    processor = load_processor(directory)
    return make_batches(
        [sample], processor, image_token_id(quantizable_config(directory), processor)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("picture", [True, False], ids=["beside", "without"])
def test_marks_in_the_text(models: Path, family: str, picture: bool) -> None:
    directory = models / family
    marks = image_marks(load_processor(directory))
    assert "<image>" in marks
    for mark in marks:
        sample = sample_from_parts("7", "all", RED, f"{mark}\nWhat is it?", "a star")
        if not picture:
            content = sample.messages[0]["content"][1:]
            sample = Sample("7", "all", ({"role": "user", "content": content},), "a star")
        with pytest.raises(UserError, match="^calibration sample 7: its text holds the mark"):
            calibrate(directory, sample)
        with pytest.raises(UserError, match="^sample 7: its text holds the mark"):
            check_samples(load_processor(directory), [sample])


OTHER_MARKS = ["<image 1>", "<|image_1|>", "<ImageHere>", "<img>", "<IMAGE>", "<image_placeholder>"]
OTHER_MARKS += ["<|vision_start|>", "<|image_pad|>", "<IMG_CONTEXT>", "<start_of_image>"]


@pytest.mark.parametrize("mark", OTHER_MARKS)
def test_marks_of_other_models(models: Path, mark: str) -> None:
    sample = sample_from_parts("7", "all", RED, f"Compare {mark} with it.", "a star")
    with pytest.raises(UserError, match="its text holds the mark '<.* here or in other models"):
        calibrate(models / "llava", sample)
    text = "If a < image and b > image, or <img src='a'>, [image 1] or <b>?"
    calibrate(models / "llava", sample_from_parts("7", "all", RED, text, "a star"))


def test_own_marks_are_known(models: Path) -> None:
    own = {"qwen2_vl": "<|image_pad|>", "internvl": "<IMG_CONTEXT>", "gemma3": "<start_of_image>"}
    for family, mark in own.items():
        assert mark in image_marks(load_processor(models / family))


RAISERS = [
    "{{ raise_exception('turns must take turns') }}",
    "{{ messages[99]['role'] }}",
    "{{ 1 / 0 }}",
    "{% for m in messages %}",
    "{{ none() }}",
]


@pytest.mark.parametrize("template", RAISERS, ids=["refuses", "index", "zero", "syntax", "call"])
def test_a_template_that_raises(models: Path, template: str) -> None:
    processor = load_processor(models / "llava")
    processor.chat_template = template
    sample = sample_from_parts("7", "all", RED, "What?", "a star")
    with pytest.raises(UserError, match="^calibration sample 7: the chat template refuses it"):
        make_batches([sample], processor, processor.image_token_id)
    with pytest.raises(UserError, match="^sample 7: the chat template refuses it"):
        check_samples(processor, [sample])


@pytest.mark.parametrize(
    "error",
    [StopIteration(), UnboundLocalError("x"), ImportError("av"), KeyError("pixels"), TypeError()],
    ids=lambda e: type(e).__name__,
)
def test_a_processor_that_raises(error: Exception) -> None:
    def processor(**_: Any) -> None:
        raise error

    with pytest.raises(UserError, match=rf"^sample 7: .*\({type(error).__name__}.*; ") as caught:
        process(processor, "sample 7", text=["a"])
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None


def test_a_template_without_pictures(models: Path) -> None:
    processor = load_processor(models / "llava")
    processor.chat_template = "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    sample = sample_from_parts("7", "all", RED, "What?", "a star")
    with pytest.raises(UserError, match="^calibration sample 7: "):
        make_batches([sample], processor, processor.image_token_id)


def test_an_image_token_of_another_model(models: Path) -> None:
    processor = load_processor(models / "llava")
    sample = sample_from_parts("7", "all", RED, "What?", "a star")
    with pytest.raises(UserError, match="stands as '<image>' in the prompt, and config.json says"):
        make_batches([sample], processor, 5)


@pytest.mark.parametrize("form", ["text", "list"])
def test_a_template_that_only_the_tokenizer_has(models: Path, tmp_path: Path, form: str) -> None:
    sample = sample_from_parts("7", "all", RED, "What?", "a star")
    wanted = calibrate(models / "llava", sample)[0].inputs["input_ids"]
    directory = tiny_model("llava", tmp_path / "llava")
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    path = directory / "tokenizer_config.json"
    several = [{"name": "default", "template": template}, {"name": "tool_use", "template": "x"}]
    config = json.loads(path.read_text()) | {
        "chat_template": template if form == "text" else several
    }
    path.write_text(json.dumps(config))
    assert calibrate(directory, sample)[0].inputs["input_ids"].equal(wanted)


def test_the_same_words_for_attribute_and_evaluate(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RED.save(tmp_path / "a.png")
    content = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": "<image>\nWhat?"},
    ]
    line = {"id": "q", "messages": [{"role": "user", "content": content}], "answer": "x"}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    model = str(models / "llava")
    data = ["--data", str(tmp_path / "q.jsonl"), "--engine", "transformers"]
    picture = ["--image", str(tmp_path / "a.png"), "-o", str(tmp_path / "o.html")]
    assert main(["evaluate", model, "--reference", model, *data]) == 2
    assert "sample q: its text holds the mark '<image>'" in capsys.readouterr().err
    assert main(["attribute", model, "--prompt", "<image> What?", *picture]) == 2
    assert "attribute: the prompt: its text holds the mark" in capsys.readouterr().err


def test_a_template_that_asks_for_the_date(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Mistral Small's: a run can be repeated on another day, and a request says today's."""
    directory = Path(shutil.copytree(models / "llava", tmp_path / "llava"))
    path = directory / "chat_template.jinja"
    path.write_text("{{ 'Today is ' + strftime_now('%d %B %Y') + '. ' }}" + path.read_text())
    sample = sample_from_parts("7", "all", RED, "What is it?", "a star")
    found = []
    for day in (2, 30):
        clock = SimpleNamespace(now=lambda day=day: datetime(2027, 5, day))
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
        asked = prompt_text(load_processor(directory), sample)
        assert asked.startswith(f"Today is {day:02} May 2027. ")
        found.append(calibrate(directory, sample)[0].inputs["input_ids"])
    assert torch.equal(*found)
    assert found[0].shape[1] > calibrate(models / "llava", sample)[0].inputs["input_ids"].shape[1]
