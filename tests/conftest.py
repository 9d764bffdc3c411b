"""Settings that every test shares."""

from __future__ import annotations

import html
import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Two test processes on two cores: one thread each, or they fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a shell starts in the background ignores SIGINT, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, or one process would end long before the other."""
    rank = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


_LONG = ["test_vllm_range", "test_interpreted", "test_server", "test_golden", "test_in_vllm"]
_LONG += ["test_compare", "test_pipeline", "test_scales", "test_source_matrix"]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """No test leaves a signal blocked, or vLLM reading pictures as a server does, for the next."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    connector = os.environ.get("VLLM_MEDIA_CONNECTOR")
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if connector is None:
        os.environ.pop("VLLM_MEDIA_CONNECTOR", None)


class _NoAxes:
    """Takes every call and draws nothing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: ([], [])


@pytest.fixture(scope="session", autouse=True)
def undrawn_plots() -> Iterator[dict[str, Any]]:
    """The plots of report.html are empty, or they would take half of a tiny model's run."""
    if importlib.util.find_spec("pydantic") is None:  # a GPU machine that has the kernels' alone
        yield {}
        return
    from qig_serve.offline.report import plots

    drawn = {"figure": plots.figure, "svg": plots.svg}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plots, "figure", lambda **_: (None, _NoAxes()))
        patched.setattr(plots, "svg", lambda _, text: f'<svg aria-label="{html.escape(text)}"/>')
        yield drawn


@pytest.fixture
def drawn_plots(undrawn_plots: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn all the same."""
    from qig_serve.offline.report import plots

    for name, function in undrawn_plots.items():
        monkeypatch.setattr(plots, name, function)
