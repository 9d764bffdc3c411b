"""Every vLLM name that moved is found in the vLLM that is installed."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from qig_serve.vllm_plugin import compat

NAMES = [
    name
    for name, member in vars(compat).items()
    if inspect.isfunction(member) and member.__module__ == compat.__name__
    if not any(p.default is p.empty for p in inspect.signature(member).parameters.values())
]


@pytest.mark.parametrize("name", NAMES)
def test_name_is_found(name: str) -> None:
    assert getattr(compat, name)() is not None


def test_arguments_that_are_passed_are_taken() -> None:
    """Calls by position: the first parameters are those we mean."""
    wanted = {
        compat.app_builder: ["args", "supported_tasks", "model_config"],
        compat.app_state_initializer: ["engine_client", "state", "args", "supported_tasks"],
        compat.engine_client: ["args"],
        compat.parsers_check: ["args"],
        compat.tokenizer_loader: ["model_config"],
        compat.attention_backend: ["head_size", "dtype", "kv_cache_dtype"],
    }
    for place, names in wanted.items():
        parameters = list(inspect.signature(place()).parameters)
        assert parameters[: len(names)] == names


def test_name_that_is_nowhere_says_where_it_was_looked_for() -> None:
    with pytest.raises(ImportError, match=r"vLLM has no nonsense in os\.path, no\.such\.module$"):
        compat.find("nonsense", "os.path", "no.such.module")


def test_missing_dependency_is_not_taken_for_a_moved_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        compat.find("name", "needs_more", "os.path")
