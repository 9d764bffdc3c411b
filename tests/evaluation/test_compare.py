"""`qig-serve compare` and `attribute`: options, and one small comparison from end to end."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qig_serve.cli import attribute, compare
from qig_serve.errors import UserError


def _compare(*words: str) -> int:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return compare.run(parser.parse_args(words))


def test_methods_carry_recipe_fields() -> None:
    recipes = compare.make_recipes("w3a16,w2a16", "rtn,qig:steps=2:iqr=false", "demo", 16, 5)
    assert list(recipes) == [
        ("w3a16", "rtn"),
        ("w3a16", "qig:steps=2:iqr=false"),
        ("w2a16", "rtn"),
        ("w2a16", "qig:steps=2:iqr=false"),
    ]
    recipe = recipes["w2a16", "qig:steps=2:iqr=false"]
    assert (recipe.scheme, recipe.steps, recipe.iqr) == ("w2a16", 2, False)
    assert (recipe.samples, recipe.seed, recipe.calib) == (16, 5, "demo")


@pytest.mark.parametrize(
    ("schemes", "methods", "says"),
    [
        ("w5a16", "rtn", "unknown scheme"),
        ("w3a16", "magic", "w3a16, magic: method"),
        ("w3a16", "qig:steps", "must be FIELD=VALUE"),
        ("w3a16", "qig:stepz=1", "unknown field"),
    ],
    ids=["scheme", "method", "no-value", "field"],
)
def test_wrong_recipes_fail_before_any_work(schemes: str, methods: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        _compare(
            "no-model",
            "--schemes",
            schemes,
            "--methods",
            methods,
            "--calib",
            "demo",
            "--data",
            "demo",
        )


def test_wrong_samples_fail_before_any_work(
    twins: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a later seed, and questions that only the evaluation would have refused, too."""
    monkeypatch.setattr(compare, "_quantize_apart", None)
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    paths = {}
    for name, picture in (("good", "good.png"), ("bad", "bad.png"), ("mark", "good.png")):
        text = "<image>" if name == "mark" else "a"
        content = [{"type": "text", "text": text}, {"type": "image", "image": picture}]
        line = {"messages": [{"role": "user", "content": content}], "answer": "star"}
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text(json.dumps(line) + "\n")
    paths["some"] = tmp_path / "some.jsonl"
    good, bad = (paths[name].read_text() for name in ("good", "bad"))
    paths["some"].write_text(bad + good)  # of these seed 0 draws the second, and seed 1 the first
    gone = tmp_path / "gone.jsonl"
    for calib, data, said in (
        (gone, paths["good"], "gone.jsonl does not exist"),
        (paths["some"], paths["good"], "bad.png cannot be read as an image"),
        (paths["good"], gone, "gone.jsonl"),
        (paths["good"], paths["bad"], "bad.png cannot be read as an image"),
        (paths["good"], paths["mark"], "its text holds the mark '<image>'"),
    ):
        words = ["--calib", str(calib), "--data", str(data), "--samples", "1", "--seeds", "9"]
        with pytest.raises(UserError, match=said):
            _compare(str(twins[0]), *words, "--quiet")
    words = ["--calib", str(paths["good"]), "--data", str(paths["good"])]
    with pytest.raises(UserError, match="the model directory gone does not exist"):
        _compare("gone", *words, "--quiet")


def test_a_stress_scheme_from_end_to_end(
    twins: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stress scheme has no server: its weights are compared as an ordinary model."""
    out, kept = tmp_path / "c.json", tmp_path / "kept"
    words = ["--schemes", "w2a16-channel", "--methods", "rtn", "--calib", "demo", "--samples", "2"]
    words += ["--data", "demo:dev", "--n", "8", "--max-tokens", "2", "--quiet"]
    words += ["--json", str(out), "--keep", str(kept), "--plot", str(tmp_path / "c.png")]
    words += ["--first-seed", "2"]
    assert _compare(str(twins[0]), *words) == 0
    printed = capsys.readouterr().out
    assert "w2a16-channel" in printed and (tmp_path / "c.png").exists()
    assert "state" in printed and "…" not in printed  # nothing is cut to the terminal
    record = json.loads(out.read_text())
    assert record["settings"]["samples"] == 2 and record["settings"]["engine"] == "forced"
    (run,) = record["runs"]
    assert run["seed"] == 2 and run["kl_mean"] > 0 and run["n"] == 8 and run["peak_bytes"] > 1 << 27
    assert record["full_precision"]["2"]["kl_mean"] == 0

    from safetensors.torch import load_file

    from qig_serve.formats import get_scheme
    from qig_serve.packing import fake_quantize

    (folder,) = kept.iterdir()
    with pytest.raises(UserError, match=r"w2a16-channel-rtn-2 is there already: name another --k"):
        _compare(str(twins[0]), *words)
    plain = {}
    for shard in folder.glob("*.safetensors"):
        plain |= load_file(shard)
    source = load_file(twins[0] / "model.safetensors")
    assert plain.keys() == source.keys()
    name = next(n for n in source if n.endswith("layers.1.mlp.down_proj.weight"))
    wanted = fake_quantize(source[name], get_scheme("w2a16-channel"))
    assert torch.equal(plain[name], wanted.to(source[name].dtype))
    assert all(torch.equal(plain[n], source[n]) for n in source if "proj.weight" not in n)


def test_kl_alone(
    twins: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--engine none` asks no question, and calls no share of right answers a figure."""
    calib = tmp_path / "texts.jsonl"
    line = {"id": "1", "messages": [{"role": "user", "content": "a large red"}], "answer": "star"}
    calib.write_text(json.dumps(line) + "\n")
    words = ["--methods", "rtn", "--calib", str(calib), "--text-only", "--samples", "1"]
    words += ["--schemes", "w3a16"]
    words += ["--data", str(calib), "--engine", "none", "--quiet"]
    words += ["--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.png")]
    assert _compare(str(twins[0]), *words) == 0
    table = capsys.readouterr().out
    assert "row less column" not in table and "exact match" not in table
    rows = [line.replace("│", " ").split() for line in table.splitlines()]
    (row,) = [words for words in rows if words[:1] == ["w3a16"]]
    assert float(row[2]) > 0
    record = json.loads((tmp_path / "c.json").read_text())
    assert [run["n"] for run in record["runs"]] == [0]
    assert {s["exact_match"] for s in (*record["summary"], *record["runs"])} == {None}
    assert not record["pairwise"] and not any(s["against_full"] for s in record["summary"])
    assert record["settings"]["text_only"] and (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGKILL, -9), (signal.SIGINT, 130)],
    ids=["SIGTERM", "SIGKILL", "SIGINT"],
)
def test_ended_from_outside_nothing_goes_on(
    twins: tuple[Path, Path], tmp_path: Path, number: int, status: int
) -> None:
    """The process that quantizes ends with the command, and what it wrote goes if that may be."""
    words = ["compare", str(twins[0]), "--methods", "qig", "--calib", "demo", "--data", "demo"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "qig_serve", *words]
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, env=environment, **options) as run:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")

        def quantizing() -> list[int]:
            pids = [int(pid) for pid in children.read_text().split()]
            return [p for p in pids if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]

        while not (found := quantizing()) and run.poll() is None:
            time.sleep(0.05)
        time.sleep(3)
        if number == signal.SIGINT:
            os.killpg(run.pid, number)  # as a terminal does
        else:
            run.send_signal(number)
        _, said = run.communicate(timeout=120)
    assert run.returncode == status
    assert "Traceback" not in said
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in found):
        assert time.monotonic() < end
        time.sleep(0.1)
    if number != signal.SIGKILL:
        assert not list(tmp_path.glob("qig-compare-*"))


def test_layers_are_parsed() -> None:
    assert attribute.parse_layers(None, 9) == [0, 4, 8]
    assert attribute.parse_layers("3,-1,0,8", 9) == [0, 3, 8]
    assert attribute.parse_layers(None, 1) == [0]
    with pytest.raises(UserError, match="layers 0 to 8, not 9"):
        attribute.parse_layers("9", 9)
    with pytest.raises(UserError, match="commas"):
        attribute.parse_layers("a", 9)


def test_quantize_evaluate_fills_the_card(
    twins: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`quantize --evaluate` on the calibration questions themselves: the overlap is found."""
    from qig_serve import evaluate
    from qig_serve.cli import main
    from qig_serve.demo.questions import write_jsonl
    from qig_serve.hashes import HASHES_FILE, file_sha256

    monkeypatch.setattr(evaluate, "choose_engine", lambda _: "transformers")
    questions, out = write_jsonl("calibration", 4, tmp_path), tmp_path / "out"
    words = ["quantize", str(twins[0]), "--scheme", "w4a8", "--method", "rtn", "--quiet"]
    words += ["--calib", str(questions), "--samples", "3", "--output", str(out)]
    assert main([*words, "--evaluate", "nowhere.jsonl"]) == 2 and not out.exists()
    assert main([*words, "--evaluate", str(questions)]) == 0
    card = (out / "README.md").read_text()
    assert "| exact match (4 questions) |" in card and "No evaluation was run" not in card
    record = json.loads((out / "report.json").read_text())
    result = record["evaluation"]["results"]["quantized"]
    assert result["scheme"] == "w4a8" and result["kl_mean"] > 0
    assert len(result["calibration_overlap"]) == 3
    hashes = json.loads((out / HASHES_FILE).read_text())["files"]
    assert all(file_sha256(out / name) == digest for name, digest in hashes.items())
