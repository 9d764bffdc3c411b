"""The container files: linted always; Dockerfile.cpu executed step by step (slow)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
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


# --- Dockerfile.cpu without a Docker engine ------------------------------------------------------


@dataclass
class _Instructions:
    """A Dockerfile's instructions in order, continuation lines joined and comments dropped."""

    steps: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> _Instructions:
        lines = [ln for ln in path.read_text().splitlines() if not ln.lstrip().startswith("#")]
        text = "\n".join(lines).replace("\\\n", " ")
        steps = [tuple(ln.strip().split(None, 1)) for ln in text.splitlines() if ln.strip()]
        return cls([(name.upper(), rest) for name, rest in steps])


@dataclass
class _Container:
    """A Debian root in which the steps are executed as a Docker build would."""

    root: Path
    env: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    )
    user: str = "0"
    workdir: str = "/"
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    health: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)

    def command(self, argv: list[str]) -> list[str]:
        pairs = [f"{k}={v}" for k, v in self.env.items()]
        inner = ["env", "-i", f"--chdir={self.workdir}", *pairs, *argv]
        return ["chroot", f"--userspec={self.user}:{self.user}", str(self.root), *inner]

    def run(self, argv: list[str], timeout: float = 1200) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.command(argv), capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{argv}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done

    def execute(self, name: str, rest: str) -> None:
        if name == "RUN":
            self.run([*self.shell, rest])
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                origin, into = ROOT / source, self.root / target.lstrip("/")
                if origin.is_dir():
                    shutil.copytree(
                        origin,
                        into,
                        symlinks=True,
                        dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("__pycache__"),
                    )
                else:
                    into.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(origin, into)
        elif name == "ENV":
            for key, value in re.findall(r"(\w+)=(\S+)", rest):
                self.env[key] = value.replace("$PATH", self.env["PATH"])
        elif name == "ARG":
            key, _, value = rest.partition("=")
            self.env.setdefault(key, value.strip('"'))
        elif name == "SHELL":
            self.shell = json.loads(rest)
        elif name == "USER":
            self.user = rest
        elif name == "WORKDIR":
            self.workdir = rest
        elif name == "HEALTHCHECK":
            self.health = json.loads(rest.split("CMD", 1)[1])
        elif name == "ENTRYPOINT":
            self.entrypoint = json.loads(rest)
        else:
            assert name in ("FROM", "VOLUME", "EXPOSE", "CMD"), f"unknown instruction {name}"


def _local_pip_folders() -> list[Path]:
    """Folders of this machine that pip is configured to look in."""
    done = _run(sys.executable, "-m", "pip", "config", "list")
    words = re.findall(r"(?:file://)?(/[\w./-]+)", done.stdout)
    folders = {Path(w) for w in words if Path(w).is_dir() and len(Path(w).parts) > 2}
    return sorted(folders)


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Container]:
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("needs root and debootstrap")
    root = tmp_path_factory.mktemp("debian") / "root"
    packages = "python3.11,python3.11-venv,python3-pip,ca-certificates"
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root)],
        check=True,
        timeout=1200,
    )
    # What a build host provides: name resolution, certificates, package sources, /proc and /dev.
    mounts = [Path("/proc"), Path("/dev"), Path("/etc/ssl/certs"), *_local_pip_folders()]
    mounted: list[Path] = []
    for path in mounts:
        target = root / str(path).lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--rbind", str(path), str(target)], check=True)
        mounted.append(target)
    for path in (Path("/etc/resolv.conf"), Path("/etc/apt/sources.list"), Path("/etc/hosts")):
        if path.exists():
            shutil.copy(path, root / str(path).lstrip("/"))
    for folder in (Path("/etc/apt/sources.list.d"), Path("/etc/apt/apt.conf.d"), Path("/etc/xdg")):
        if folder.is_dir():
            shutil.copytree(folder, root / str(folder).lstrip("/"), dirs_exist_ok=True)
    box = _Container(root)
    # /etc/xdg is read by pip through XDG_CONFIG_DIRS' default; PIP_* and proxies by name.
    passed = {k: v for k, v in os.environ.items() if k.upper().startswith(("PIP_", "HTTP"))}
    box.env |= passed
    try:
        for name, rest in _Instructions.read(DOCKER / "Dockerfile.cpu").steps:
            box.execute(name, rest)
        yield box
    finally:
        for target in reversed(mounted):
            subprocess.run(["umount", "-l", str(target)], check=False)


@pytest.mark.slow
def test_every_step_of_the_cpu_image_runs(container: _Container) -> None:
    assert container.user == "10001"
    assert container.run(["id", "-u"]).stdout.strip() == "10001"
    out = container.run([*container.entrypoint, "--version"]).stdout
    assert out.startswith("qig-serve ")


@pytest.mark.slow
def test_the_image_quantizes_serves_and_is_healthy(container: _Container) -> None:
    where = container.run(
        ["python", "-c", "from qig_serve.demo import MODEL_DIR; print(MODEL_DIR)"]
    ).stdout.strip()
    out = "/home/qig/demo-w4a8"
    container.run(
        [*container.entrypoint, "quantize", where, "--scheme", "w4a8", "--method", "rtn"]
        + ["--output", out]
    )
    port = "18431"
    container.env["QIG_PORT"] = port
    container.env["VLLM_CPU_KVCACHE_SPACE"] = "1"
    argv = [*container.entrypoint, "serve", out, "--port", port, "--enforce-eager"]
    server = subprocess.Popen(container.command([*argv, "--max-model-len", "512"]))
    try:
        deadline = time.monotonic() + 600
        while True:
            assert server.poll() is None, "the server ended by itself"
            health = subprocess.run(container.command(container.health), capture_output=True)
            if health.returncode == 0:
                break
            assert time.monotonic() < deadline, "not healthy after ten minutes"
            time.sleep(3)
    finally:
        server.terminate()
        server.wait(timeout=120)
