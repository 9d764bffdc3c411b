"""--quiet and --json, for scripts; no colours where there is no terminal."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_llava

from qig_serve.cli import COMMANDS, main, make_parser
from qig_serve.offline.disk import write_hashes

# What does not work through data: it prints a text, or it is a server.
SHORT = {"doctor", "families", "completion", "serve"}


def _subparsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in make_parser(None)._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("name", [c for c in COMMANDS if c not in SHORT])
def test_every_long_command_can_be_quiet_and_give_json(name: str) -> None:
    flags = {flag for a in _subparsers()[name]._actions for flag in a.option_strings}
    assert {"--quiet", "--json"} <= flags


@pytest.mark.parametrize("name", [c for c in COMMANDS if c not in ("completion", "serve")])
def test_json_is_one_option_in_all_commands(name: str) -> None:
    (found,) = (a for a in _subparsers()[name]._actions if "--json" in a.option_strings)
    assert (found.nargs, found.const, found.metavar) == ("?", Path("-"), "FILE")
    assert str(found.help).endswith("without FILE: print the JSON instead of the text")


def test_json_into_a_file_or_instead_of_the_text(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, record = tmp_path / "d", tmp_path / "record.json"
    assert main(["demo", "questions", "--n", "2", "--output", str(data)]) == 0
    directory = tiny_llava.quantize(source, tmp_path / "w4a8", "w4a8")
    write_hashes(directory)
    asked = ["evaluate", str(source), "--data", str(data / "test.jsonl"), "--max-tokens", "1"]
    asked += ["--engine", "transformers"]
    for command in (["families"], ["inspect", str(directory), "--verify"], asked):
        capfd.readouterr()
        assert main([*command, "--json", str(record)]) == 0
        assert len(capfd.readouterr().out) > 40  # the text as ever
        for flag in ("--json", "--json=-"):
            assert main([*command, flag]) == 0
            printed, written = json.loads(capfd.readouterr().out), json.loads(record.read_text())
            assert list(printed) == list(written)
    assert main(["inspect", "--json", str(directory)]) == 0  # a folder is not taken for FILE
    assert json.loads(capfd.readouterr().out)["problems"] == []
    assert main(["inspect", str(directory), "--json", str(tmp_path / "no" / "r.json")]) == 2
    assert capfd.readouterr().err.endswith("does not exist\n")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava.build(tmp_path_factory.mktemp("tiny") / "source")


def test_quantize_writes_its_figures_and_nothing_else(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "q.json"
    command = ["quantize", str(source), "--method", "rtn", "--calib", "demo", "--samples", "2"]
    command += ["--output", str(tmp_path / "out"), "--json", str(record), "--quiet"]
    assert main(command) == 0
    assert capfd.readouterr() == ("", "")
    found = json.loads(record.read_text())
    assert (found["scheme"], found["method"], found["evaluation"]) == ("w3a16", "rtn", None)
    assert found["summary"]["blocks"] == 2 and found["warnings"] == [] and "blocks" not in found
    again = ["--output", str(tmp_path / "new"), "--json", str(tmp_path / "new")]
    assert main([*command[:-5], *again]) == 2
    assert "--json and --output are both" in capfd.readouterr().err
    # A mistake is reported all the same, before the work begins.
    assert main([*command[:-2], str(tmp_path / "no" / "q.json"), "--quiet"]) == 2
    assert "does not exist" in capfd.readouterr().err


def test_quantize_prints_the_calibration_figures_where_nothing_was_evaluated(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(source), "--method", "awq", "--calib", "demo", "--samples", "2"]
    assert main([*command, "--grid", "2", "--output", str(tmp_path / "out")]) == 0
    out, errors = capfd.readouterr()
    assert re.search(r"wrote .*out in \d+ s: [\d.]+ MiB of weights, [\d.]+ MiB before\n", errors)
    assert errors.endswith(f"serve it: qig-serve serve {tmp_path / 'out'}\n")
    assert out.startswith("no evaluation was run (--evaluate SRC); on the calibration samples:\n")
    assert "of the loss of rounding to nearest" in out
    card = (tmp_path / "out" / "README.md").read_text()
    for path in (tmp_path / "out").glob("*.json"):  # that is published: no folders of this machine
        assert str(tmp_path) not in path.read_text(), path
    assert "No evaluation was run" in card and out.splitlines()[1] in card


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        (">&-", 0, ""),
        ("--json >&-", 0, ""),
        ("> /dev/full", 2, "families: standard output: No space left on device\n"),
        ("--json > /dev/full", 2, "families: standard output: No space left on device\n"),
        ("--no-such-flag 2>&-", 2, ""),
    ],
)
def test_output_that_goes_nowhere(redirection: str, status: int, said: str) -> None:
    command = f"{sys.executable} -m qig_serve families {redirection}"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "") and done.stderr.endswith(said)
    assert len(done.stderr) < 100


def test_a_terminal_without_a_width() -> None:
    words = [sys.executable, "-m", "qig_serve", "families"]
    done = subprocess.run(words, capture_output=True, env=os.environ | {"COLUMNS": "0"})
    assert done.returncode == 0 and b"qwen2_vl" in done.stdout


def test_inspect_is_quiet_about_what_is_well(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_llava.quantize(source, tmp_path / "w4a8", "w4a8")
    write_hashes(directory)
    assert main(["inspect", str(directory), "--verify", "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    (directory / "generation_config.json").unlink()
    assert main(["inspect", str(directory), "--verify", "--quiet"]) == 1
    assert capfd.readouterr().out == "WRONG  generation_config.json: missing\n"


def test_no_colours_without_a_terminal(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_llava.quantize(source, tmp_path / "w4a8", "w4a8")
    write_hashes(directory)
    data = tmp_path / "d"
    for command in (
        ["demo", "questions", "--n", "2", "--output", str(data)],
        ["inspect", str(directory), "--verify"],
        ["families"],
        ["evaluate", str(source), "--data", str(data / "test.jsonl"), "--engine", "transformers"]
        + ["--max-tokens", "1"],
        ["quantize", str(source), "--method", "rtn", "--calib", "demo", "--samples", "1"]
        + ["--output", str(tmp_path / "out")],
    ):
        assert main(command) == 0
        shown = capfd.readouterr()
        assert (shown.out or shown.err) and "\x1b" not in shown.out + shown.err, command


def test_a_name_that_is_not_utf8_is_printed_as_it_is(tmp_path: Path) -> None:
    """In a locale of UTF-8, too, where Python would refuse it when the work is done."""
    output = os.fsencode(tmp_path) + b"/n\xff"
    done = subprocess.run(
        [sys.executable, "-m", "qig_serve", "demo", "export", "--output", output],
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, output + b"\n"), done.stderr
