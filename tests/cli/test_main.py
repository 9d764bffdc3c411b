"""The command line as a whole: help, exit statuses, one sentence for a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qig_serve import __version__
from qig_serve.cli import COMMANDS, check_targets, main
from qig_serve.errors import UserError


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"qig-serve {__version__}"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n    {name} " in out or f"\n    {name}\n" in out  # a long name has its own line


def test_help_documents_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for status in (
        "0    done",
        "1    done, but",
        "2    the input was wrong",
        "130  interrupted",
        "141",
    ):
        assert f"\n  {status}" in out


def test_interruption_exits_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("qig_serve.cli.families.run", interrupted)
    assert main(["families"]) == 130
    assert capsys.readouterr().err == "qig-serve families: interrupted\n"


def test_an_engine_that_did_not_start_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failed(_: object) -> int:
        raise RuntimeError("Engine core initialization failed. See root cause above.")

    monkeypatch.setattr("qig_serve.cli.families.run", failed)
    assert main(["families"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("qig-serve families: vLLM's engine did not start") and "\n" in said


def test_output_that_nobody_reads_any_more_ends_the_command_in_silence() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "qig_serve", "families", "--json"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_pipe_that_breaks_elsewhere_is_no_closed_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> int:
        raise BrokenPipeError("the engine's")

    monkeypatch.setattr("qig_serve.cli.families.run", broken)
    with pytest.raises(BrokenPipeError, match="the engine's"):
        main(["families"])


def test_help_of_quantize_has_the_defaults_that_a_run_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "the same without (default: the method's; qig+ has qronos-outputs)" in text
    assert "noise (default: the method's; qig+ has channels)" in text
    assert "start of the integration path (default: zero, for w4a8 quantized) --" in text
    assert "calibration samples (default: 128)" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith(f"qig-serve {name}") for line in lines)


def test_unknown_command_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["quantise"])
    assert stop.value.code == 2
    assert "quantize" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "qig-serve: the following arguments are required: COMMAND (see `qig-serve --help`)"),
        (
            ["quantize"],
            "qig-serve quantize: the following arguments are required: MODEL "
            "(see `qig-serve quantize --help`)",
        ),
        (
            ["inspect", "DIR", "--bogus"],
            "qig-serve inspect: unknown options: --bogus (see `qig-serve inspect --help`)",
        ),
    ],
    ids=["command", "argument", "option"],
)
def test_usage_is_no_page(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and capsys.readouterr().err == f"{says}\n"


def test_a_mistake_is_one_sentence_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "train"]) == 2
    error = capsys.readouterr().err
    assert error == "qig-serve demo: demo train needs --output DIR\n"


def test_a_path_that_nothing_foresaw(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qig_serve.cli.families.run", lambda _: Path("n" * 300).read_text())
    assert main(["families"]) == 2
    assert capsys.readouterr().err == f"qig-serve families: {'n' * 300}: File name too long\n"


def test_a_home_that_the_shell_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["inspect", "~/model"]) == 2
    assert f"{tmp_path}/model does not exist" in capsys.readouterr().err


def test_targets_are_looked_at_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_targets(None, tmp_path / "new.json")
    with pytest.raises(UserError, match="is a folder: name a file in it"):
        check_targets(tmp_path)
    with pytest.raises(UserError, match=r"the folder of .*x\.json does not exist"):
        check_targets(tmp_path / "gone" / "x.json")
    with pytest.raises(UserError, match=r"new\.json is to be written twice"):
        check_targets(tmp_path / "new.json", tmp_path / "new.json")
    (tmp_path / "link.json").symlink_to("new.json")
    with pytest.raises(UserError, match=r"new\.json is to be written twice"):
        check_targets(tmp_path / "new.json", tmp_path / "link.json")
    there = tmp_path / "there.json"
    there.touch()
    check_targets(there, tmp_path / "new.json", read=[None, "demo", tmp_path / "gone"])
    check_targets(tmp_path / "new.json", read=[tmp_path])
    for read in (there, str(tmp_path), tmp_path.parent):
        with pytest.raises(UserError, match=r"there\.json is there, and among what this command r"):
            check_targets(there, read=[read])
    monkeypatch.setattr("os.access", lambda *_: False)  # of root, nothing is read-only
    with pytest.raises(UserError, match="cannot be written: its folder, or the file, is read-only"):
        check_targets(tmp_path / "new.json")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evaluate", "gone", "--data", "x", "--json", "."], "--json writes a file, and . is a f"),
        (["demo", "--json", "."], ". is a folder: name a file in it"),
        (
            ["evaluate", "gone", "--data", "x", "--server-model", "m"],
            "--server-model is for",
        ),
        (
            ["evaluate", "--server", "http://a", "--data", "x", "--engine", "vllm"],
            "--engine is",
        ),
        (["evaluate", "gone", "--data=x", "--seed=1"], "--seed draws questions of 'demo'"),
        (["evaluate", "gone", "--data=x", "--max-tokens=9999999999"], "below 2^31"),
        (
            ["quantize", "gone", "--calib=x", "--output=y", "--evaluate-n=1"],
            "is for --evaluate SRC",
        ),
        (
            ["compare", "gone", "--calib=a", "--data=b", "--engine=none", "--kl-samples=0"],
            "compares nothing",
        ),
        (["doctor", "gone", "--tensor-parallel-size=0"], "--tensor-parallel-size and --pipeline-p"),
        (["doctor", "gone", "--pipeline-parallel-size=-1"], "must be at least 1"),
        (
            ["compare", "gone", "--calib=a", "--data=b", "--methods=rtn:steps=[1"],
            "'[1' is no value",
        ),
        (
            ["compare", "gone", "--calib=a", "--data=b", "--methods=rtn", "--keep=k"],
            "file b does not",
        ),
        (
            ["compare", "gone", "--calib=a", "--data=b", "--methods=rtn:scheme=w4a8"],
            "rtn:scheme=w4a8: scheme is given twice, here or as an option",
        ),
        (["compare", "gone", "--calib=a", "--data=b", "--methods=qig:iqr=0:iqr=1"], "iqr is given"),
        (
            ["compare", "gone", "--calib=a", "--data=b", f"--keep={__file__}"],
            "test_main.py is a file: --keep takes a folder",
        ),
        (["attribute", "gone", "--image=a", "--prompt=b", "-oo.png", "--steps=257"], "at most 256"),
        (["attribute", "gone", "--image=a", "--prompt=b\udcff", "-oo.png"], "no text in UTF-8"),
    ],
)
def test_flags_that_mean_nothing(
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(words)
    except SystemExit as stop:
        status = int(str(stop.code))
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and says in line and not list(tmp_path.iterdir())
