"""The container files, read: linters, schemas, and what the compose file promises.

test_docker_image.py executes Dockerfile.cpu.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_hadolint_finds_nothing(name: str) -> None:
    done = _run(BIN / "hadolint", "--no-color", DOCKER / name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_lint_passes() -> None:
    done = _run(BIN / "compose-lint", DOCKER / "compose.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_kubernetes_schema() -> None:
    done = _run(
        BIN / "kubernetes-validate", "--strict", "-k", "1.34", DOCKER / "k8s" / "qig-serve.yaml"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_has_both_profiles_and_prometheus() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert {p for s in services.values() for p in s["profiles"]} == {"gpu", "cpu"}
    assert services["prometheus"]["profiles"] == ["gpu", "cpu"]
    for name in ("gpu", "cpu"):
        assert "ipc" not in services[name] and services[name]["shm_size"]


def test_base_image_is_a_supported_vllm() -> None:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    match = re.search(r"^FROM vllm/vllm-openai:v(\S+)$", (DOCKER / "Dockerfile").read_text(), re.M)
    assert match and Version(match[1]) in SpecifierSet(">=0.26,<0.34")
