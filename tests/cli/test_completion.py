"""`qig-serve completion`: bash is asked what it would complete; zsh and fish where installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qig_serve.cli import COMMANDS, main
from qig_serve.cli.completion import SHELLS


@pytest.fixture
def scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Path]:
    found = {}
    for shell in SHELLS:
        assert main(["completion", shell]) == 0
        found[shell] = tmp_path / f"completion.{shell}"
        found[shell].write_text(capsys.readouterr().out)
    return found


def test_every_shell_knows_every_command_and_is_valid(scripts: dict[str, Path]) -> None:
    for shell, script in scripts.items():
        text = script.read_text()
        assert all(name in text for name in COMMANDS), shell
        if program := shutil.which(shell):
            subprocess.run([program, "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_options_choices_and_directories(
    scripts: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "samples.jsonl").touch()
    lines = {
        "qig-serve ev": "evaluate",
        "qig-serve evaluate --eng": "--engine",
        "qig-serve evaluate --engine tr": "transformers",
        "qig-serve completion f": "fish",
        "qig-serve quantize --method qi": "qig qig+",
        "qig-serve quantize --scheme w3": "w3a16",
        f"qig-serve quantize --calib {tmp_path}/sam": f"{tmp_path}/samples.jsonl",
        f"qig-serve inspect {tmp_path}/check": f"{tmp_path}/checkpoint",
    }
    for line, wanted in lines.items():
        ask = f"""source {scripts["bash"]}
            COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
            _shtab_qig_serve; echo "${{COMPREPLY[@]}}" """
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == wanted, line
