"""report.json, report.html and the model card, from a report with every kind of figure."""

from __future__ import annotations

import copy
import dataclasses
import errno
import itertools
import json
import os
import re
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.reports import CONFIG, EVALUATION, make_picture, make_report
from matplotlib.figure import Figure
from PIL import Image

from qig_serve.inspection import verify
from qig_serve.offline.disk import ResumableError, write_hashes
from qig_serve.offline.report import plots
from qig_serve.offline.report.card import public_name
from qig_serve.offline.report.drawing import overlay, picture_png
from qig_serve.offline.report.write import add_evaluation, write_reports
from qig_serve.offline.results import (
    BlockReport,
    QuantizationReport,
)

WRITES = os.O_WRONLY | os.O_RDWR


class _Page(HTMLParser):
    """Collects what a page loads and which pictures have no text alternative."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.silent: list[str] = []
        self.pictures = 0
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        assert tag != "script"
        if "id" in named:
            self.ids.append(str(named["id"]))
        for name in ("src", "href", "xlink:href"):
            if (value := named.get(name)) and not value.startswith(("data:", "#")):
                self.loads.append(value)
        if tag in ("img", "svg"):
            self.pictures += 1
            if not (named.get("alt") or named.get("aria-label")):
                self.silent.append(tag)


def evaluate(directory: Path, evaluation: Mapping[str, Any] = EVALUATION) -> None:
    """Makes the reports those of a finished checkpoint, and adds an evaluation."""
    (directory / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))
    write_hashes(directory)
    add_evaluation(directory, evaluation)


@pytest.mark.usefixtures("drawn_plots")
def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    write_reports(make_report(), tmp_path, CONFIG, None, [make_picture()])
    evaluate(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.loads == [] and page.silent == []
    assert page.pictures == 7 + 2  # seven plots, the image and its overlay
    assert len(page.ids) == len(set(page.ids)) > 100
    assert "#010203" not in text and "url(http" not in text and "@import" not in text
    for said in ("acme/tiny-vlm", "vision_tower", "ab" * 32, "after clipping", "90.0%"):
        assert said in text
    assert "<td class=n>0.830</td><td class=n>1.25%</td>" in text  # clip ratio, weights clipped
    assert "25.0% of the image tokens, 0.0% of the text tokens" in text  # on the quartile fences
    assert "(77 in these samples) take no part" in text
    assert "<td class=n>0.625</td><td class=n>0.03</td>" in text  # the target shift
    assert "Estimated by the dry run: 17 s, 1.50 GiB host memory" in text


@pytest.mark.usefixtures("drawn_plots")
def test_references_inside_a_plot_resolve_and_it_is_always_the_same() -> None:
    text = str(plots.loss_plot(make_report()))
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    used = re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text)
    assert used and set(used) <= ids
    assert plots.loss_plot(make_report()) == text


def test_warnings_come_first(tmp_path: Path) -> None:
    report = make_report(warnings=["layer 2 <odd>"], fallbacks=["layer 3: damped"])
    write_reports(report, tmp_path, CONFIG)
    text = (tmp_path / "report.html").read_text()
    body = text[text.index("<h1>") :]
    assert body.index("layer 2 &lt;odd&gt;") < body.index("<svg")
    assert body.index("Fallback: layer 3: damped") < body.index("<dl>")
    card = (tmp_path / "README.md").read_text()
    assert "layer 2 <odd>" in card and "layer 3: damped" in card
    assert "misses completeness" not in card


def test_an_incomplete_attribution_is_a_warning(tmp_path: Path) -> None:
    """Block 5's error is 2.4%; with int8 activations it is approximate anyway."""
    write_reports(make_report(6), tmp_path, CONFIG)
    warning = "Block 5, qkv: the attribution misses completeness by 2.4%"
    assert warning in (tmp_path / "README.md").read_text()
    assert warning in (tmp_path / "report.html").read_text()
    write_reports(make_report(6, scheme="w4a8"), tmp_path, CONFIG)
    assert "misses completeness" not in (tmp_path / "README.md").read_text()


def test_card_metadata_and_recovery(tmp_path: Path) -> None:
    old = tmp_path / "old.md"
    old.write_text("---\nlicense: apache-2.0\ntags: [x]\n---\nold text\n")
    write_reports(make_report(), tmp_path, CONFIG, old)
    old.unlink()
    evaluate(tmp_path)
    card = (tmp_path / "README.md").read_text()
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["base_model"] == "acme/tiny-vlm" and data["license"] == "apache-2.0"
    quantization = data["quantization"]
    assert (quantization["scheme"], quantization["method"]) == ("w3a16", "qig")
    assert quantization["calibration_sha256"] == "ab" * 32 and quantization["seed"] == 3
    assert quantization["tensor_parallel_sizes"] == [1, 2] and "torch" in quantization["versions"]
    assert quantization["evaluation"]["exact_match"] == 0.81
    assert "| exact match (200 questions) | 90.0% | 81.0% | 90.0% |" in card
    assert "-9.0 (-12.0 to -5.0)" in card and "20, 2, 0.0001" in card
    assert "qig-serve serve" in card and "old text" not in card


def test_without_evaluation_it_says_so(tmp_path: Path) -> None:
    write_reports(make_report(), tmp_path, CONFIG)
    card, page = (tmp_path / "README.md").read_text(), (tmp_path / "report.html").read_text()
    assert "No evaluation was run" in card and "No evaluation was run" in page
    assert "0.500" in card  # the calibration's own loss ratio
    data = json.loads((tmp_path / "report.json").read_text())
    assert QuantizationReport.model_validate(data) == make_report()


def test_an_evaluation_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    """The finished checkpoint says the same as if there had been one alone."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    for folder in (once, twice):
        folder.mkdir()
        write_reports(make_report(), folder, CONFIG, None, [make_picture()])
    evaluate(once)
    evaluate(twice, {**EVALUATION, "data": "others.jsonl"})
    assert "others.jsonl" in (twice / "report.html").read_text()
    evaluate(twice)
    for name in ("report.json", "report.html", "README.md"):
        assert (once / name).read_text() == (twice / name).read_text()
    assert verify(twice) == [] and {p.name for p in tmp_path.iterdir()} == {"once", "twice"}


def test_a_kill_while_an_evaluation_is_added_leaves_an_intact_checkpoint(tmp_path: Path) -> None:
    """kill -9 before each change on disk: the old files or the new ones, never some of each."""
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))
    (folder / "sub" / "weights.bin").write_bytes(b"w" * 1000)
    write_reports(make_report(blocks=1), folder, CONFIG)
    write_hashes(folder)
    before, seen = (folder / "report.json").read_text(), []
    for number in itertools.count():
        child = os.fork()
        if child == 0:
            left = number

            def die(event: str, args: tuple[Any, ...]) -> None:
                nonlocal left
                writes = event == "open" and isinstance(args[2], int) and args[2] & WRITES
                if writes or event in ("os.rename", "os.link", "os.mkdir", "os.remove"):
                    left -= 1
                    if left < 0:
                        os._exit(9)

            sys.addaudithook(die)
            add_evaluation(folder, EVALUATION)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert verify(folder) == []
        seen.append((folder / "report.json").read_text() != before)
        if status == 0:
            break
        assert status == 9
    assert seen == sorted(seen) and not seen[0] and seen[-1] and len(seen) > 10
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_full_disk_leaves_the_checkpoint_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))
    write_reports(make_report(blocks=1), folder, CONFIG)
    write_hashes(folder)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ResumableError, match="the disk is full"):
        add_evaluation(folder, EVALUATION)
    assert verify(folder) == [] and [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_every_module_left_alone_has_a_reason(tmp_path: Path) -> None:
    write_reports(make_report(), tmp_path, CONFIG)
    text = (tmp_path / "report.html").read_text()
    for module, reason in (
        ("vision_tower", "small beside the decoder, and its errors reach every image"),
        ("lm_head", "its errors go straight into the probabilities of the tokens"),
        ("model.visual.merger", "small, and whatever is seen passes through it"),
        ("mystery", "no linear of a decoder block"),
    ):
        assert f"<td>{module}</td><td>{reason}</td>" in text


def test_min_max_ranges_are_said_to_clip_nothing(tmp_path: Path) -> None:
    report = make_report()
    for block in report.blocks:
        block.linears.clear()
    write_reports(report, tmp_path, CONFIG)
    assert "Clip ratio 1 everywhere" in (tmp_path / "report.html").read_text()


def test_a_hub_snapshot_is_called_by_its_name(tmp_path: Path) -> None:
    snapshot = "/data/hub/models--acme--tiny-vlm/snapshots/0123"
    write_reports(make_report(model=snapshot), tmp_path, CONFIG)
    assert "base_model: acme/tiny-vlm\n" in (tmp_path / "README.md").read_text()


def test_a_local_path_stays_out_of_the_card(tmp_path: Path) -> None:
    report = make_report(model="/home/me/models/secret-place")
    report.recipe["calib"] = report.calibration["source"] = "/home/me/data.jsonl"
    write_reports(report, tmp_path, CONFIG)
    card = (tmp_path / "README.md").read_text()
    assert "/home/me" not in card and "base_model: secret-place" in card
    assert "/home/me" not in (tmp_path / "report.html").read_text()


def test_a_folder_that_hf_download_filled_is_called_by_the_hubs_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hf download acme/tiny --local-dir acme/tiny` leaves .cache/huggingface in it."""
    (tmp_path / "acme" / "tiny" / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "mine" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("acme/tiny") == "acme/tiny"
    assert public_name("mine/tiny") == public_name(str(tmp_path / "acme" / "tiny")) == "tiny"


def test_a_data_set_is_called_without_its_folder() -> None:
    assert public_name("hf:/home/me/set?image=picture") == "hf:set?image=picture"
    assert public_name("hf:acme/set?image=picture") == "hf:acme/set?image=picture"


def test_an_evaluation_leaves_the_machines_folders_out(tmp_path: Path) -> None:
    write_reports(make_report(), tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))
    write_hashes(tmp_path)
    found = copy.deepcopy(EVALUATION)
    found["data"] = "/home/me/questions.jsonl"
    for result in found["results"].values():
        result["model"] = "/home/me/model"
    add_evaluation(tmp_path, found)
    for path in tmp_path.iterdir():
        assert "/home/me" not in path.read_text(), path


def test_card_says_how_large_the_checkpoint_is_and_how_to_ask_it(tmp_path: Path) -> None:
    report = make_report(stored_bytes=6 << 30, source_bytes=16 << 30)
    write_reports(report, tmp_path, CONFIG)
    size = "6.0 GiB of weights, 16.0 GiB before"
    assert size in (tmp_path / "report.html").read_text()
    card = (tmp_path / "README.md").read_text()
    assert f"\n\nSize: {size}.\n\n## Serve" in card
    assert card.count("tiny-vlm-w3a16\n```") == 1
    assert "inspect --verify tiny-vlm-w3a16" in card and "doctor tiny-vlm-w3a16" in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'model="tiny-vlm-w3a16"' in code and "transformers_plugin" in card
    report.recipe["format"] = "compressed-tensors"
    write_reports(report, tmp_path, CONFIG)
    card = (tmp_path / "README.md").read_text()
    assert "\nvllm serve tiny-vlm-w3a16\n" in card and "qig-serve serve" not in card
    assert "transformers_plugin" not in card and "evaluate --server" in card
    assert "qig-serve inspect" not in card and "qig-serve doctor" not in card


def test_a_run_without_search_has_no_empty_plots(tmp_path: Path) -> None:
    """RTN: no modules, no rounding steps."""
    blocks = [BlockReport(index=0, output_error=0.1, seconds=1.0)]
    report = make_report(blocks=0, method="rtn", recipe={}).model_copy(update={"blocks": blocks})
    write_reports(report, tmp_path, CONFIG)
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 1 and "Token weights" not in text


@pytest.mark.parametrize("hot", [0, 5, 15])
def test_overlay_is_brightest_where_the_weight_lies(hot: int) -> None:
    shown = torch.tensor(list(overlay(make_picture(hot), "layer 0").convert("L").tobytes()))
    side = int(len(shown) ** 0.5)
    cells = shown.view(4, side // 4, 4, side // 4).float().mean((1, 3)).reshape(-1)
    assert int(cells.argmax()) == hot
    assert cells[hot] > cells.sort().values[-2] + 40


def test_words_are_joined_and_weighed() -> None:
    picture = make_picture()
    words = picture.words("layer 0")
    assert [w[0] for w in words] == ["<user>", "What", " is", " <b>?", "\n", "A", " square"]
    assert dict((w[0], w[1]) for w in words)[" <b>?"] == 0.25
    assert [w[3] for w in words] == [False] * 5 + [True] * 2 and words[0][2] is False
    assert picture.image_share("layer 0") == pytest.approx(0.75)


def test_words_in_the_page_are_escaped_and_shaded(tmp_path: Path) -> None:
    write_reports(make_report(), tmp_path, CONFIG, None, [make_picture()])
    text = (tmp_path / "report.html").read_text()
    assert "<small>&lt;user&gt;</small>" in text and "<u> square</u>" in text
    assert 'rgba(var(--mark), 0.75)" title="weight 25.00%"> &lt;b&gt;?' in text
    assert "most in the middle centre ninth" in text or "most in the upper left ninth" in text


def test_the_page_says_what_its_colours_mean(tmp_path: Path) -> None:
    """75% of the weight on a 16th of the picture, the rest on a word."""
    write_reports(make_report(), tmp_path, CONFIG, None, [make_picture()])
    scales = (tmp_path / "report.html").read_text().split('<div class="scale">')[1:]
    numbers = "<span>0</span><span>{}</span><span>{}</span><b>{}</b>"
    area, word = (scale.partition("</i>")[2].partition("</div>")[0] for scale in scales)
    assert area == numbers.format(6, 12, "% of the weight per 1% of the picture's area")
    assert word == numbers.format(12.5, 25, "% of the weight on a word")
    assert scales[0].count("rgb(") == 9 and "rgba(var(--mark), 0.75))" in scales[1]


def test_picture_as_png(tmp_path: Path) -> None:
    picture_png(make_picture(), tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        assert image.width > 1000


def test_the_png_says_what_its_colours_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """75% of the weight on a 16th of the picture, the rest on a word that is no formula."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    picture = make_picture()
    tokens = tuple(t.replace("<b>", "$\\frac$") for t in picture.tokens)
    tokens += tuple(f" word{i}" for i in range(400))
    more = torch.zeros(400)
    picture = dataclasses.replace(
        picture,
        tokens=tokens,
        counted=torch.cat([picture.counted, more.bool()]),
        weights={"layer 0": torch.cat([picture.weights["layer 0"], more])},
    )
    picture_png(picture, tmp_path / "p.png")
    drawn[0].canvas.draw()
    scales = {axes.get_xlabel(): axes.get_xlim() for axes in drawn[0].axes if axes.get_xlabel()}
    assert scales == {
        "% of the weight per 1% of the picture's area": (0, 12),
        "% of the weight on a word": (0, 25),
    }
    words = drawn[0].axes[2]
    assert words.texts[-1].get_text() == "(and more words)"
    assert words.texts[-1].get_position()[1] >= words.get_ylim()[0]
