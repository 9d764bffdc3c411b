"""hf: datasets with the package itself: what a cell may hold, on disk and in parquet."""

from __future__ import annotations

import base64
import io
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.offline.calibration.sources import load_calibration

datasets = pytest.importorskip("datasets", reason="pip install 'qig-serve[datasets]'")
pytestmark = pytest.mark.filterwarnings("ignore")

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (20, 30), "blue")


def png(image: Image.Image = RED) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = datasets.Image()
STORED = datasets.Image(decode=False)
STRUCT = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
TEXT = datasets.Value("string")

# Name: (type of the column, its cells, how many pictures each sample then has).
CELLS: dict[str, tuple[Any, list[Any], list[int]]] = {
    "pictures": (PICTURES, [RED, BLUE], [1, 1]),
    "pictures-and-none": (PICTURES, [RED, None], [1]),
    "lists": (datasets.List(PICTURES), [[RED, BLUE], [BLUE]], [2, 1]),
    "lists-empty-or-none": (datasets.List(PICTURES), [[RED], [], None], [1]),
    "lists-with-none": (datasets.List(PICTURES), [[None, RED], [None]], [1]),
    "not-decoded": (STORED, [{"bytes": png(), "path": None}, None], [1]),
    "lists-not-decoded": (datasets.List(STORED), [[{"bytes": png(), "path": None}] * 3], [3]),
    "bytes": (datasets.Value("binary"), [png(), png(BLUE), b"", None], [1, 1]),
    "lists-of-bytes": (datasets.List(datasets.Value("binary")), [[png(), png()]], [2]),
    "structs": (STRUCT, [{"bytes": png(), "path": "a.png"}, {"bytes": None, "path": None}], [1]),
    "paths": (TEXT, ["red.png", "file://red.png", "", None], [1, 1]),
    "base64": (TEXT, [base64.b64encode(png()).decode()], [1]),
    "data-urls": (TEXT, ["data:image/png;base64," + base64.b64encode(png()).decode()], [1]),
    "structs-of-paths": (STRUCT, [{"bytes": None, "path": "red.png"}], [1]),
}
CAPTIONS: dict[str, tuple[Any, list[Any], list[str]]] = {
    "texts": (TEXT, ["a", "b"], ["a", "b"]),
    "none-or-empty": (TEXT, ["a", None, "", "  "], ["a"]),
    "lists": (datasets.List(TEXT), [["a", "x"], ["b"]], ["a", "b"]),
    "lists-with-nothing": (datasets.List(TEXT), [["a"], [], None, [None], ["", "b"]], ["a", "b"]),
    "numbers": (datasets.Value("int64"), [3, 0, None], ["3", "0"]),
    "lists-of-lists": (datasets.List(datasets.List(TEXT)), [[["a"]], [[]]], ["a"]),
}


def write(folder: Path, form: str, columns: dict[str, tuple[Any, list[Any]]]) -> str:
    """A dataset on disk: saved, saved as a split, a parquet file, or a folder of them; its name."""
    features = datasets.Features({name: kind for name, (kind, _) in columns.items()})
    rows = {name: cells for name, (_, cells) in columns.items()}
    made = datasets.Dataset.from_dict(rows, features=features)
    target = folder / "data"
    if form == "saved":
        made.save_to_disk(target)
    elif form == "split":
        datasets.DatasetDict({"train": made}).save_to_disk(target)
    else:
        target.mkdir()
        made.to_parquet(target / "train.parquet")
    RED.save(target / "red.png")
    return f"hf:{target / 'train.parquet' if form == 'parquet' else target}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # After each shuffle it sleeps five seconds, for threads of a process that is about to end.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    datasets.disable_progress_bars()


def ordered(samples: Any) -> list[Any]:
    return sorted(samples, key=lambda s: s.answer)


@pytest.mark.parametrize(
    ("cells", "form"),
    [*product(CELLS, ("saved", "parquet")), *product(("lists-with-none",), ("split", "folder"))],
)
def test_pictures(cells: str, form: str, tmp_path: Path) -> None:
    kind, values, counts = CELLS[cells]
    captions = [f"caption {i}" for i in range(len(values))]
    source = write(tmp_path, form, {"image": (kind, values), "caption": (TEXT, captions)})
    notes: list[str] = []
    samples = ordered(load_calibration(source, 8, notes=notes))
    assert [len(s.images) for s in samples] == counts
    assert samples[0].images[-1].convert("RGB").getpixel((0, 0)) in ((255, 0, 0), (0, 0, 255))
    left_out = len(values) - len(counts)
    assert notes == (
        [f"rows of {source} were left out: {left_out} without a picture"] if left_out else []
    )


@pytest.mark.parametrize("form", ["saved", "parquet"])
@pytest.mark.parametrize("cells", CAPTIONS)
def test_captions(cells: str, form: str, tmp_path: Path) -> None:
    kind, values, answers = CAPTIONS[cells]
    columns = {"image": (PICTURES, [RED] * len(values)), "caption": (kind, values)}
    notes: list[str] = []
    samples = load_calibration(write(tmp_path, form, columns), 8, notes=notes)
    assert sorted(s.answer or "" for s in samples) == sorted(answers)
    assert len(notes) == (len(answers) < len(values))


def test_questions_and_answers_need_no_options(tmp_path: Path) -> None:
    columns = {
        "image": (PICTURES, [RED, RED]),
        "question": (TEXT, ["Which colour?"] * 2),
        "answer": (TEXT, ["red", "reddish"]),
    }
    source = write(tmp_path, "parquet", columns).removeprefix("hf:")
    samples = ordered(load_calibration(source, 8))
    assert [s.answer for s in samples] == ["red", "reddish"]
    assert {s.question for s in samples} == {"Which colour?"}
    with pytest.raises(UserError, match="--image-folder is for files that name pictures, not for"):
        load_calibration(source, 8, image_folder=tmp_path)


FLOATS = datasets.Value("float64")
CONVERSATION = {"from": TEXT, "value": TEXT}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": (PICTURES, [None, None])}, r"no row can be used \(2 without a picture\)"),
        ({"caption": (TEXT, [None, ""])}, r"no row can be used \(2 without a caption\)"),
        ({"caption": (CONVERSATION, [{"from": "a", "value": "b"}] * 2)}, "column caption: a text"),
        ({"image": (TEXT, ["gone.png"] * 2)}, "row 0 .* column image: 'gone.png' is no picture"),
        ({"image": (TEXT, ["https://a.b/c.png"] * 2)}, "'https://a.b/c.png' is no picture"),
        ({"image": (datasets.Value("int64"), [1, 2])}, "a picture is wanted, .* not int"),
        ({"image": (datasets.Array3D((1, 1, 3), "uint8"), [[[[0, 0, 0]]]] * 2)}, "of arrays with"),
        ({"image": (datasets.Value("binary"), [b"no"] * 2)}, "column image: .* cannot be read"),
        ({"image": (PICTURES, [{"bytes": b"no", "path": None}] * 2)}, "cannot be read .cannot"),
    ],
)
def test_what_cannot_be_used(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    usual = {"image": (PICTURES, [RED, RED]), "caption": (TEXT, ["a", "b"])}
    source = write(tmp_path, "saved", usual | columns)
    with pytest.raises(UserError, match=message) as raised:
        load_calibration(source, 4)
    assert source in str(raised.value) and "\n" not in str(raised.value)


def test_text_only_keeps_rows_without_a_picture(tmp_path: Path) -> None:
    columns = {"image": (PICTURES, [RED, None]), "caption": (TEXT, ["a", "b"])}
    samples = ordered(load_calibration(write(tmp_path, "saved", columns), 4, text_only=True))
    assert [len(s.images) for s in samples] == [1, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data?split=test", "no split 'test'; it has train"),
        ("data/gone", "cannot be read .*: give a dataset"),
    ],
)
def test_datasets_that_are_not_there(name: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, "split", {"image": (PICTURES, [RED]), "caption": (TEXT, ["a"])})
    with pytest.raises(UserError, match=message):
        load_calibration(f"hf:{tmp_path / name}", 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "hf: names no dataset: give a dataset"),
        ("gone.parquet", r"the file .*gone\.parquet does not exist: give a dataset"),
        ("rows.csv", "of single files only parquet is read: give a parquet"),
        ("rows.csv?image=", "the option 'image' is empty: name a column"),
    ],
)
def test_what_is_no_dataset(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("image,caption\n")
    with pytest.raises(UserError, match=message):
        load_calibration(f"hf:{tmp_path / name}" if name else "hf:", 4)


def test_an_empty_cell_of_pandas_is_no_caption(tmp_path: Path) -> None:
    columns = {"image": (PICTURES, [RED] * 2), "caption": (FLOATS, [float("nan"), 7.0])}
    notes: list[str] = []
    (sample,) = load_calibration(write(tmp_path, "parquet", columns), 4, notes=notes)
    assert sample.answer == "7.0" and "1 without a caption" in notes[0]


def test_damaged_parquet(tmp_path: Path) -> None:
    source = write(tmp_path, "parquet", {"image": (PICTURES, [RED]), "caption": (TEXT, ["a"])})
    path = Path(source.removeprefix("hf:"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        UserError, match=r"train\.parquet cannot be read \(.*\): give a dataset"
    ) as raised:
        load_calibration(source, 4)
    assert "\n" not in str(raised.value)


def test_the_whole_command_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from helpers.tiny_models import tiny_model

    columns = {
        "image": (datasets.List(PICTURES), [[RED], [RED, BLUE], None]),
        "caption": (datasets.List(TEXT), [["a red star"], ["a star", "b"], ["c"]]),
    }
    source = write(tmp_path, "saved", columns)
    model, out = tiny_model("llava", tmp_path / "llava"), tmp_path / "out"
    words = ["quantize", str(model), "--calib", source, "--method", "rtn", "--output", str(out)]
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr()
    assert "2 samples with 3 images" in said.out + said.err
    assert "1 without a picture" in said.out + said.err
    assert "1 without a picture" in (out / "report.html").read_text()


SAID = datasets.List({"from": TEXT, "value": TEXT})
CHAT = datasets.List({"role": TEXT, "content": TEXT})
URL = {"url": TEXT}
PARTS = {"index": datasets.Value("int64"), "text": TEXT, "type": TEXT}


def said(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


def chat(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def chat_of(**keys: Any) -> Any:
    return datasets.List({"role": TEXT, "content": datasets.List(PARTS | keys)})


def part(**keys: Any) -> dict[str, Any]:
    return {"index": None, "text": None, "image": None, "image_url": None} | keys


COUPLES = datasets.List({"user": TEXT, "assistant": TEXT, "source": TEXT})


def couple(user: str, assistant: str) -> dict[str, str]:
    return {"user": user, "assistant": assistant, "source": "VQAv2"}


RED_ONE, BLUE_ONE = (40, 30), (20, 30)
TEXT_PART = {"index": None, "text": "What?", "type": "text"}
ANSWER = [TEXT_PART | {"text": "a star"}]
MARKED = [TEXT_PART, {"index": 0, "text": None, "type": "image"}]
TWO_OF_PATHS = [{"bytes": png(BLUE), "path": None}, {"bytes": None, "path": "red.png"}]

# Name: (columns, options, what the parts of the turns before the answer then are).
TURNS: dict[str, tuple[dict[str, tuple[Any, Any]], str, list[Any]]] = {
    "vsft": (
        {"messages": (chat_of(), chat(MARKED, ANSWER)), "images": (datasets.List(PICTURES), [RED])},
        "",
        ["What?", RED_ONE],
    ),
    "llava": (
        {"conversations": (SAID, said("<image>\nWhat?", "a", "And?", "a star"))}
        | {"image": (PICTURES, RED), "image_path": (TEXT, "a.png")},
        "",
        [RED_ONE, "What?", "a", "And?"],
    ),
    "fields-of-lists": (
        {
            "conversations": (
                {"from": datasets.List(TEXT), "value": datasets.List(TEXT)},
                {"from": ["human", "gpt"], "value": ["What?", "a star"]},
            ),
            "image": (TEXT, "red.png"),
        },
        "",
        [RED_ONE, "What?"],
    ),
    "llama-factory": (
        {"messages": (CHAT, chat("<image>A<image>B", "a star"))}
        | {"images": (datasets.List(STRUCT), TWO_OF_PATHS)},
        "",
        [BLUE_ONE, "A", RED_ONE, "B"],
    ),
    "trl-unmarked": (
        {"messages": (CHAT, chat("What?", "a star"))}
        | {"images": (datasets.List(PICTURES), [RED, BLUE])},
        "",
        [RED_ONE, BLUE_ONE, "What?"],
    ),
    "trl-prompt": (
        {"prompt": (TEXT, "What?"), "completion": (TEXT, "a star")}
        | {"images": (datasets.List(PICTURES), [BLUE])},
        "",
        [BLUE_ONE, "What?"],
    ),
    "trl-prompt-of-turns": (
        {"prompt": (chat_of(), chat(MARKED, ANSWER)[:1]), "image": (PICTURES, RED)}
        | {"completion": (CHAT, chat("What?", "a star")[1:]), "messages": (CHAT, None)},
        "",
        ["What?", RED_ONE],
    ),
    "pair": (
        {"prompt": (TEXT, "What?"), "chosen": (TEXT, "a star"), "rejected": (TEXT, "a heart")}
        | {"image": (PICTURES, BLUE)},
        "",
        [BLUE_ONE, "What?"],
    ),
    "pair-of-turns": (
        {
            "prompt": (chat_of(), chat(MARKED, ANSWER)[:1]),
            "images": (datasets.List(PICTURES), [RED]),
        }
        | {"chosen": (chat_of(), chat(MARKED, ANSWER)[1:])}
        | {"rejected": (chat_of(), chat(MARKED, [TEXT_PART])[1:])},
        "",
        ["What?", RED_ONE],
    ),
    "pair-with-the-question-in-each": (
        {"chosen": (CHAT, chat("What?", "a star")), "rejected": (CHAT, chat("What?", "a heart"))}
        | {"image": (PICTURES, RED)},
        "",
        [RED_ONE, "What?"],
    ),
    "question-and-pair": (
        {"question": (TEXT, "What?"), "chosen": (TEXT, "a star"), "rejected": (TEXT, "a heart")}
        | {"image": (PICTURES, RED)},
        "",
        [RED_ONE, "What?"],
    ),
    "cauldron": (
        {"images": (datasets.List(PICTURES), [RED, BLUE])}
        | {"texts": (COUPLES, [couple("A?", "a"), couple("B?", "a star")])},
        "",
        [RED_ONE, BLUE_ONE, "A?", "a", "B?"],
    ),
    "cauldron-of-lists": (
        {
            "texts": (
                {"user": datasets.List(TEXT), "assistant": datasets.List(TEXT)},
                {"user": ["What?"], "assistant": ["a star"]},
            ),
            "images": (datasets.List(PICTURES), [RED]),
        },
        "",
        [RED_ONE, "What?"],
    ),
    "named-column": (
        {"messages": (CHAT, chat("What?", "a star")), "img": (PICTURES, BLUE)}
        | {"image": (PICTURES, RED)},
        "?image=img",
        [BLUE_ONE, "What?"],
    ),
    "in-parts": (
        {
            "messages": (
                chat_of(image=STORED, image_url=URL),
                chat(
                    [
                        part(type="image", image={"bytes": png(), "path": None}),
                        part(type="image_url", image_url={"url": "red.png"}),
                        part(type="text", text="What?"),
                    ],
                    [part(type="text", text="a star")],
                ),
            )
        },
        "",
        [RED_ONE, RED_ONE, "What?"],
    ),
    "named-answer": (
        {"messages": (CHAT, chat("What?", "b")), "image": (PICTURES, RED), "a": (TEXT, "a star")},
        "?answer=a",
        [RED_ONE, "Describe the image."],
    ),
}


@pytest.mark.parametrize("name", TURNS)
def test_turns(name: str, tmp_path: Path) -> None:
    columns, options, parts = TURNS[name]
    rows = {column: (kind, [cell]) for column, (kind, cell) in columns.items()}
    (sample,) = load_calibration(write(tmp_path, "folder", rows) + options, 4)
    found = [p for m in sample.messages for p in m["content"]]
    assert [p["text"] if p["type"] == "text" else p["image"].size for p in found] == parts
    assert sample.answer == "a star"


def test_rows_without_picture_or_turns_are_counted(tmp_path: Path) -> None:
    turns = [said("<image>A?", "a"), said("<image>B?", "b"), said("C?", "c"), [], None]
    columns = {"conversations": (SAID, turns), "image": (PICTURES, [RED, None, None, RED, RED])}
    source = write(tmp_path, "saved", columns)
    notes: list[str] = []
    (sample,) = load_calibration(source, 8, notes=notes)
    assert sample.answer == "a"
    assert notes == [f"rows of {source} were left out: 2 without a picture, 2 without turns"]


def test_rows_whose_answer_is_not_wanted_are_counted(tmp_path: Path) -> None:
    columns = {"prompt": (TEXT, ["What?"] * 3), "completion": (TEXT, ["a star", "b", "c"])}
    columns |= {
        "label": (datasets.Value("bool"), [True, False, False]),
        "image": (PICTURES, [RED] * 3),
    }
    source = write(tmp_path, "parquet", columns)
    notes: list[str] = []
    (sample,) = load_calibration(source, 8, notes=notes)
    assert sample.answer == "a star"
    assert notes == [
        f"rows of {source} were left out: 2 without a wanted answer (label or kto_tag is false)"
    ]


def test_columns_that_are_not_read_are_named(tmp_path: Path) -> None:
    columns = {"images": (datasets.List(PICTURES), [[RED]])}
    columns["texts"] = (datasets.List(TEXT), [["a star", "a red star"]])
    with pytest.raises(UserError, match=r"columns are images, texts\. Map them as .*completion"):
        load_calibration(write(tmp_path, "saved", columns), 4)


ONE_CHAT = (CHAT, [chat("What?", "a star")])
BOTH = {"image": (PICTURES, [RED]), "images": (datasets.List(PICTURES), [[RED]])}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"img": (PICTURES, [RED])}, "", "row 0 .*: the column img is not read: .*image=img"),
        (BOTH, "", "row 0 .*: pictures in the columns image and images: name one"),
        (BOTH, "?image=gone", "row 0 .*: no column 'gone'; the columns are"),
        (BOTH, "?answer=messages", "row 0 .*column messages: .* are read without answer="),
        ({"images": BOTH["images"], "video": (TEXT, ["a.mp4"])}, "", 'row 0 .*"video" is not read'),
        ({"image": (TEXT, ["gone.png"])}, "", "row 0 .*column image: 'gone.png' is no picture"),
        (
            {"messages": (CHAT, [chat("<image>", "b")])}
            | {"images": (BOTH["images"][0], [[RED] * 2])},
            "",
            "row 0 .*: 2 images, and 1 marks",
        ),
        ({"messages": (TEXT, ["[]"])}, "", 'row 0 .*: a sample needs a "messages" list'),
        (
            {
                "messages": (
                    {"role": datasets.List(TEXT)} | {"content": datasets.List(TEXT)},
                    [{"role": ["user"], "content": []}],
                )
            },
            "",
            'row 0 .*: a sample needs a "messages" list',
        ),
    ],
)
def test_turns_that_cannot_be_used(
    columns: dict[str, Any], options: str, message: str, tmp_path: Path
) -> None:
    source = write(tmp_path, "saved", {"messages": ONE_CHAT} | columns) + options
    with pytest.raises(UserError, match=message) as raised:
        load_calibration(source, 4)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("saved", "?split=test", "is one dataset without splits: leave out split=test"),
        ("saved", "?config=a", "has no configurations: leave out config=a"),
        ("parquet", "?config=a", "has no configurations: leave out config=a"),
        ("saved", "?image=a&image=b", "'image' is given twice: give it once"),
    ],
)
def test_options_without_a_meaning(form: str, options: str, message: str, tmp_path: Path) -> None:
    source = write(tmp_path, form, {"image": (PICTURES, [RED]), "caption": (TEXT, ["a"])})
    with pytest.raises(UserError, match=message):
        load_calibration(source + options, 4)


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_empty_datasets(form: str, tmp_path: Path) -> None:
    source = write(tmp_path, form, {"image": (PICTURES, []), "caption": (TEXT, [])})
    with pytest.raises(UserError, match="holds (an empty dataset|no samples)"):
        load_calibration(source, 4)


def test_names_of_labels_and_a_saved_format(tmp_path: Path) -> None:
    rows = {"image": [RED, RED], "label": [1, -1], "words": [["a"], ["b"]]}
    kinds = {"image": PICTURES, "label": datasets.ClassLabel(names=["cat", "dog"])}
    features = datasets.Features(kinds | {"words": datasets.List(TEXT)})
    made = datasets.Dataset.from_dict(rows, features=features).with_format("numpy")
    made.save_to_disk(tmp_path / "data")
    (sample,) = load_calibration(f"hf:{tmp_path / 'data'}?answer=label&split=train", 4)
    assert sample.answer == "dog"
    samples = load_calibration(f"hf:{tmp_path / 'data'}?answer=words", 4)
    assert sorted(s.answer or "" for s in samples) == ["a", "b"]


def test_a_folder_of_json_lines_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RED.save(tmp_path / "red.png")
    row = {"image": "red.png", "conversations": said("<image>What?", "a star")}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(tmp_path)
    (sample,) = load_calibration("hf:.", 4)
    assert [image.size for image in sample.images] == [RED_ONE]
    with pytest.raises(UserError, match="of single files only parquet is read"):
        load_calibration("hf:rows.jsonl", 4)
