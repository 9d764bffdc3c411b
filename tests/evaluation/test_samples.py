"""Reading samples: the one JSON line, and what is said about lines that are not."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qig_serve.errors import UserError
from qig_serve.json_output import write_json
from qig_serve.records import read_samples
from qig_serve.samples import (
    Sample,
    load_image,
    overlap,
    sample_from_parts,
    sample_sha256,
    set_sha256,
)


def _line(url: str, question: str = "What?", **rest: Any) -> str:
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question},
    ]
    return json.dumps({"messages": [{"role": "user", "content": content}], **rest})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "images" / "red.png")
    return tmp_path


def test_paths_data_urls_and_text(folder: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "BMP")
    url = "data:image/bmp;base64," + base64.b64encode(buffer.getvalue()).decode()
    (folder / "q.jsonl").write_text(
        "\n".join(
            [
                _line("images/red.png", "What?", id="7", type="color", answer="red"),
                "",
                _line(url, "What?", answer="red"),
                json.dumps({"messages": [{"role": "user", "content": "Hi"}], "answer": "hello"}),
            ]
        )
    )
    first, second, third = read_samples(folder / "q.jsonl", scored=True)
    assert (first.id, first.type, first.question, first.answer) == ("7", "color", "What?", "red")
    assert (second.id, second.type) == ("3", "all")
    assert third.images == [] and third.question == "Hi"
    # The same pixels in another file format are the same sample.
    assert sample_sha256(first) == sample_sha256(second) != sample_sha256(third)
    assert overlap([first, third], [sample_sha256(second)]) == ["7"]


def test_lines_without_answer_calibrate_but_are_not_scored(folder: Path) -> None:
    lines = [_line("images/red.png"), _line("images/red.png", answer="red")]
    (folder / "q.jsonl").write_text("\n".join(lines))
    assert len(read_samples(folder / "q.jsonl")) == 2
    assert [s.answer for s in read_samples(folder / "q.jsonl", scored=True)] == ["red"]
    (folder / "q.jsonl").write_text(lines[0])
    with pytest.raises(UserError, match="no line has an answer"):
        read_samples(folder / "q.jsonl", scored=True)


def test_a_conversation_that_ends_with_the_answer(folder: Path) -> None:
    record = json.loads(_line("images/red.png"))
    record["messages"].append({"role": "assistant", "content": "red"})
    (folder / "q.jsonl").write_text(json.dumps(record))
    (sample,) = read_samples(folder / "q.jsonl", scored=True)
    assert sample.answer == "red" and [m["role"] for m in sample.messages] == ["user"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a sample needs a"),
        ('{"messages": []}', "line 2: the conversation has no user turn"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "line 2: every message needs a role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "line 2: the content"),
        ('{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}', "line 2: a part must"),
        (_line("images/none.png"), "line 2: the image .*none.png does not exist"),
        (_line("https://example.org/x.png"), "line 2: .* is on a network"),
        (_line("data:image/png;base64,***"), "line 2: the data URL is not valid base64"),
        (_line("images/red.png", answer=3), 'line 2: "answer" must be text, not int'),
    ],
    ids=[
        "cut-short",
        "list",
        "no-turn",
        "role",
        "content",
        "part",
        "absent-image",
        "network",
        "base64",
        "answer",
    ],
)
def test_a_bad_line_is_named(folder: Path, line: str, says: str) -> None:
    (folder / "q.jsonl").write_text(_line("images/red.png", answer="red") + "\n" + line)
    with pytest.raises(UserError, match=says):
        read_samples(folder / "q.jsonl")


def test_missing_empty_and_binary_files(folder: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_samples(folder / "none.jsonl")
    with pytest.raises(UserError, match="images is no file"):
        read_samples(folder / "images")
    with pytest.raises(UserError, match="datasets are for calibration: write the questions as"):
        read_samples(Path("hf:lmms-lab/x"))
    (folder / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no samples"):
        read_samples(folder / "empty.jsonl")
    with pytest.raises(UserError, match=r"red\.png is a picture, not text: .*give a text file"):
        read_samples(folder / "images" / "red.png")


def test_an_unreadable_picture_is_named(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken.png cannot be read"):
        load_image(folder / "broken.png")


def test_set_hash_ignores_order() -> None:
    assert set_sha256(["a", "b"]) == set_sha256(["b", "a"]) != set_sha256(["a"])


def test_pixels_and_questions_change_the_hash() -> None:
    def sample(color: str, question: str, answer: str) -> Sample:
        return sample_from_parts("1", "t", Image.new("RGB", (2, 2), color), question, answer)

    base = sample_sha256(sample("red", "What?", "red"))
    assert base == sample_sha256(sample("red", "What?", "another answer"))
    assert base != sample_sha256(sample("blue", "What?", "red"))
    assert base != sample_sha256(sample("red", "Which?", "red"))


def _factory(content: Any, **rest: Any) -> str:
    """LLaMA-Factory's form, and TRL's: pictures beside the messages."""
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a star"}]
    return json.dumps({"messages": turns, **rest})


IMAGE = {"type": "image"}
WHAT = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("content", "kinds"),
    [
        ("<image>What?", ["image", "text"]),
        ("What? <image>", ["text", "image"]),
        ([IMAGE, WHAT], ["image", "text"]),
        ([{"type": "text", "text": "<image>\nWhat?"}], ["image", "text"]),
    ],
)
def test_images_beside_messages(folder: Path, content: Any, kinds: list[str]) -> None:
    line = _factory(content, images=["images/red.png"], videos=[], audios=None)
    (folder / "q.jsonl").write_text(line)
    (sample,) = read_samples(folder / "q.jsonl", scored=True)
    assert [p["type"] for p in sample.messages[0]["content"]] == kinds
    assert sample.images == [folder / "images" / "red.png"]
    assert (sample.question, sample.answer) == ("What?", "a star")


RED = "images/red.png"


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("<image>What?", "a star"),
        ([{"role": "user", "content": [IMAGE, WHAT]}], "a star"),
        (
            [{"role": "user", "content": [IMAGE, WHAT]}],
            [{"role": "assistant", "content": "a star"}],
        ),
    ],
)
def test_a_prompt_and_its_completion(folder: Path, prompt: Any, completion: Any) -> None:
    line = {"prompt": prompt, "completion": completion, "images": [RED]}
    (folder / "q.jsonl").write_text(json.dumps(line))
    (sample,) = read_samples(folder / "q.jsonl", scored=True)
    assert sample.images == [folder / "images" / "red.png"]
    assert (sample.question, sample.answer) == ("What?", "a star")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (_factory("What?", images=[RED]), "1 images, and 0 marks <image> in the messages"),
        (_factory("<image>", images=[RED, RED]), "2 images, and 1 marks <image>"),
        (_factory("<image><image>", images=[RED]), "more <image> marks than images"),
        (_factory("<image>", images=["gone.png"]), "the image .*gone.png does not exist"),
        (_factory("<image>", images=[{"path": RED}]), '"images" must be a list of paths'),
        (_factory("What?", image=RED), 'the key "image" is not read: give pictures as'),
        (_factory("What?", image=[RED]), 'the key "image" is not read'),
        (_factory("What?", video="a.mp4"), 'the key "video" is not read'),
        (_factory("<image>", images=[RED], videos=["a.mp4"]), 'the key "videos" is not read'),
        (_factory("What?", audio="a.wav"), 'the key "audio" is not read'),
        (_factory("What?", audios=["a.wav"]), 'the key "audios" is not read'),
        (_factory("What?", image_path=RED), 'the key "image_path" is not read'),
        (
            json.dumps({"messages": [{"role": "user", "content": "Hi", "images": [RED]}]}),
            'the key "images" is not read',
        ),
        (_factory([{"type": "video", "video": "a.mp4"}]), "a part must be"),
    ],
)
def test_media_that_is_not_read(folder: Path, line: str, message: str) -> None:
    (folder / "q.jsonl").write_text(_line(RED) + "\n" + line)
    with pytest.raises(UserError, match=r"q\.jsonl, line 2: " + message) as caught:
        read_samples(folder / "q.jsonl")
    assert "\n" not in str(caught.value)


def test_json_into_what_is_no_file(tmp_path: Path) -> None:
    """/dev/stdout is a link, and would be replaced by a file where the user may."""
    (tmp_path / "link.json").symlink_to("real.json")
    read, write = os.pipe()
    for name in (tmp_path / "link.json", Path(f"/proc/self/fd/{write}")):
        write_json(name, {"a": 1})
        assert name.is_symlink()
    os.close(write)
    with os.fdopen(read) as pipe:
        assert json.load(pipe) == json.loads((tmp_path / "real.json").read_text()) == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "real.json"]


QUESTION = {"role": "user", "content": "<image>What?"}
STAR, HEART = ({"role": "assistant", "content": x} for x in ("a star", "a heart"))
HUMAN = {"from": "human", "value": "<image>What?"}


@pytest.mark.parametrize(
    "turns",
    [
        {"prompt": "<image>What?", "chosen": "a star", "rejected": "a heart"},
        {"prompt": [QUESTION], "chosen": [STAR], "rejected": [HEART]},
        {"prompt": [QUESTION], "chosen": "a star", "rejected": "a heart"},
        {"chosen": [QUESTION, STAR], "rejected": [QUESTION, HEART]},
        {"prompt": "<image>What?", "chosen": [QUESTION, STAR], "rejected": [QUESTION, HEART]},
        {"messages": [QUESTION], "chosen": STAR, "rejected": HEART},
        {"messages": [QUESTION, STAR], "chosen": [QUESTION, STAR], "rejected": [QUESTION, HEART]},
        {
            "conversations": [HUMAN],
            "chosen": {"from": "gpt", "value": "a star"},
            "rejected": {"from": "gpt", "value": "a heart"},
        },
        {"prompt": "<image>What?", "completion": "a star", "label": True},
        {"texts": [{"user": "What?", "assistant": "a star", "source": "VQAv2"}]},
        {"texts": [{"user": "<image>What?", "assistant": "a star"}]},
    ],
)
def test_preferences_and_the_cauldron(folder: Path, turns: dict[str, Any]) -> None:
    """Of a pair the chosen answer counts."""
    (folder / "q.jsonl").write_text(json.dumps({"images": [RED], **turns}))
    (sample,) = read_samples(folder / "q.jsonl", scored=True)
    (message,) = sample.messages
    assert [p["type"] for p in message["content"]] == ["image", "text"]
    assert sample.images == [folder / RED]
    assert (sample.question, sample.answer) == ("What?", "a star")


def test_the_cauldron_s_questions_are_one_conversation(folder: Path) -> None:
    texts = [{"user": f"{i}?", "assistant": str(i), "source": "AI2D"} for i in range(3)]
    (folder / "q.json").write_text(json.dumps([{"images": [RED, RED], "texts": texts}]))
    (sample,) = read_samples(folder / "q.json")
    said = [[p.get("text", "picture") for p in m["content"]] for m in sample.messages]
    assert said == [["picture", "picture", "0?"], ["0"], ["1?"], ["1"], ["2?"]]
    assert sample.answer == "2"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (
            {"chosen": "a: b", "rejected": "a: c"},
            '"chosen" and "rejected" without a "prompt"',
        ),
        ({"chosen": [STAR], "rejected": [HEART]}, '"chosen" and "rejected" without a "prompt"'),
        ({"prompt": "What?", "chosen": [QUESTION], "rejected": ""}, '"chosen" must be a text, or'),
        ({"prompt": "?", "chosen": [QUESTION, STAR]}, '"prompt" and another question in "chosen"'),
        ({"prompt": "?", "completion": "a", "chosen": "b"}, '"completion" and "chosen": give the'),
        ({"messages": [QUESTION], "chosen": "a", "answer": "b"}, '"answer" and "chosen": give the'),
        ({"messages": [QUESTION, STAR], "chosen": HEART}, '"messages" ends with an answer, and'),
        ({"conversations": [HUMAN, STAR], "chosen": "b"}, '"conversations" ends with an answer'),
        ({"prompt": [QUESTION, STAR], "chosen": "a heart"}, "the turn before the answer must be"),
        ({"prompt": "What?", "completion": "b", "label": False}, "its answer is marked as one th"),
        ({"texts": ["a caption", "another"]}, 'a sample needs a "messages" list .* Cauldron'),
        ({"texts": [{"user": "What?"}]}, 'each of "texts" must have the texts "user" and "assist'),
    ],
)
def test_pairs_and_texts_that_are_ambiguous(
    folder: Path, turns: dict[str, Any], message: str
) -> None:
    (folder / "q.jsonl").write_text(_line(RED) + "\n" + json.dumps({"images": [RED], **turns}))
    with pytest.raises(UserError, match=r"q\.jsonl, line 2: " + message):
        read_samples(folder / "q.jsonl")
