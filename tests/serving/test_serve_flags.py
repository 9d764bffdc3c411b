"""What `qig-serve serve` makes of vLLM's flags."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from qig_serve import serve


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "1"),
        (["--kv-cache-memory-bytes", "1G"], None),
        (["--kv-cache-memory-b", "1G"], None),
        (["--gpu-memory-utilization=0.5"], None),
        (["--config", "options.yaml"], None),
    ],
    ids=["default", "bytes", "abbreviated", "share", "config-file"],
)
def test_cpu_cache_is_small_unless_asked_for(
    flags: list[str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serve, "CPU_CACHE_GIB", 1)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "")  # so that it is taken away afterwards
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    (tmp_path / "options.yaml").write_text("gpu-memory-utilization: 0.4\n")
    args = serve.parse_flags(Path("model"), flags)
    assert args.served_model_name == ["model"]  # once, where the folder and its path are called so
    assert os.environ.get("VLLM_CPU_KVCACHE_SPACE") == expected


@pytest.mark.parametrize(
    ("host", "encrypted", "wanted"),
    [
        (None, False, "http://localhost:8000/"),
        ("0.0.0.0", True, "https://localhost:8000/"),
        ("::1", False, "http://[::1]:8000/"),
        ("gpu-box", False, "http://gpu-box:8000/"),
    ],
    ids=["default", "all", "six", "named"],
)
def test_the_address_of_the_web_page(host: str | None, encrypted: bool, wanted: str) -> None:
    assert serve.page_address(host, 8000, encrypted) == wanted
