"""What only some commands need is an extra; its absence is one sentence with the extra's name."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.extras import EXTRAS, require

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
ATTRIBUTE = ["attribute", "m", "--image", "a", "--prompt", "b"]
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where the module has another name


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[]", requirement)[0] for requirement in requirements}


@pytest.mark.parametrize("module", EXTRAS)
def test_the_extra_brings_the_module(module: str) -> None:
    extras = PROJECT["optional-dependencies"]
    assert DISTRIBUTIONS.get(module, module) in names(extras[EXTRAS[module]])
    assert DISTRIBUTIONS.get(module, module) not in names(PROJECT["dependencies"])


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Hides a module from `require`."""
    find_spec = importlib.util.find_spec

    def hide(module: str) -> None:
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: None if name == module else find_spec(name, *rest),
        )

    return hide


def test_a_module_that_is_installed_is_fine() -> None:
    require("matplotlib", "the report")


@pytest.mark.parametrize(
    ("module", "words", "extra"),
    [
        ("shtab", ["completion", "bash"], "completion"),
        ("matplotlib", [*ATTRIBUTE, "-o", "c.png"], "quantize"),
        ("matplotlib", ["quantize", "m", "--calib", "demo", "--output", "o"], "quantize"),
        ("matplotlib", ["compare", "m", "--calib", "demo", "--data", "demo"], "quantize"),
        ("openai", ["demo"], "client"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_its_absence_is_one_sentence_before_work_begins(
    without: Any,
    module: str,
    words: list[str],
    extra: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    without(module)
    assert main(words) == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert f"needs {module}, which is not installed: pip install 'qig-serve[{extra}]'" in sentence
    assert not list(tmp_path.iterdir())


def test_the_digits_need_scikit_learn(without: Any) -> None:
    from qig_serve.demo import pictures

    without("sklearn")
    with pytest.raises(UserError, match=r"digits needs sklearn.*qig-serve\[demo\]"):
        pictures.handwriting.__wrapped__()
