"""Dockerfile.cpu executed step by step, without a Docker engine (slow; root and debootstrap).

Every RUN and COPY step runs in order in a Debian root, and then the image is used: as compose.yaml
runs it (read-only root, tmpfs, shared memory), without a network, as process 1. What stands in for
the base image is Debian's own Python 3.11; nothing else is different.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
BASE = "python3.11,python3.11-venv,python3.11-dev,python3-distutils,python3-lib2to3,ca-certificates"
IGNORED = [ln.removeprefix("**/") for ln in (ROOT / ".dockerignore").read_text().split()]
Done = subprocess.CompletedProcess[str]


def _steps(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile in order; comments dropped, continuation lines joined."""
    lines = [ln for ln in path.read_text().splitlines() if not ln.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    pairs = [ln.strip().split(None, 1) for ln in text.splitlines() if ln.strip()]
    return [(name.upper(), rest) for name, rest in pairs]


@dataclass
class Image:
    """A Debian root and what the instructions said about how to run it."""

    root: Path
    build_mounts: list[str] = field(default_factory=list)
    build_env: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    )
    user: str = "0"
    group: str | None = None
    """None: the one of the user's own number."""
    workdir: str = "/"
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    health: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)

    def in_root(self, argv: list[str], env: dict[str, str]) -> list[str]:
        """argv inside the root as the image's user, with HOME as Docker sets it."""
        users = [ln.split(":") for ln in (self.root / "etc/passwd").read_text().splitlines()]
        home = next((u[5] for u in users if u[2] == self.user), "/")
        pairs = [f"{k}={v}" for k, v in ({"HOME": home} | self.env | env).items()]
        inner = ["env", "-i", f"--chdir={self.workdir}", *pairs, *argv]
        return [
            "chroot",
            f"--userspec={self.user}:{self.group or self.user}",
            str(self.root),
            *inner,
        ]

    def command(
        self, argv: list[str], mounts: list[str], env: dict[str, str], flags: tuple[str, ...]
    ) -> list[str]:
        """argv as process 1 of namespaces of its own, which the mounts do not outlive."""
        script = ["set -e", *mounts, f"mount -t proc proc {self.root}/proc"]
        script.append(f"mount -t sysfs -o ro sysfs {self.root}/sys")
        if "--net" in flags:
            script.append("ip link set lo up")
        script.append("exec " + shlex.join(self.in_root(argv, env)))
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", *flags]
        return [*own, "sh", "-c", "\n".join(script)]

    def build(self, argv: list[str]) -> None:
        """Run one step of the build, with the build host's network and package sources."""
        command = self.command(argv, self.build_mounts, self.build_env, ())
        _checked(command, timeout=1200)

    def execute(self, name: str, rest: str) -> None:
        """Do what one instruction says; an unknown one fails the test."""
        if name == "RUN":
            self.build([*self.shell, rest])
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                self._copy(ROOT / source, self.root / target.lstrip("/"))
        elif name == "ENV":
            for key, value in re.findall(r"(\w+)=(\S+)", rest):
                self.env[key] = value.replace("$PATH", self.env["PATH"])
        elif name == "ARG":
            key, _, value = rest.partition("=")
            self.build_env.setdefault(key, value.strip('"'))
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
        elif name == "CMD":
            self.cmd = json.loads(rest)
        else:
            assert name in ("FROM", "VOLUME", "EXPOSE"), f"unknown instruction {name}"

    @staticmethod
    def _copy(origin: Path, target: Path) -> None:
        if origin.is_dir():
            ignore = shutil.ignore_patterns(*IGNORED)
            shutil.copytree(origin, target, symlinks=True, dirs_exist_ok=True, ignore=ignore)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(origin, target)


def _checked(command: list[str], timeout: float) -> Done:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def _pip_sources(root: Path) -> tuple[list[str], dict[str, str]]:
    """This machine's pip settings as variables, and the mounts that their local folders need."""
    done = _checked([sys.executable, "-m", "pip", "config", "list"], timeout=300)
    env, mounts = {}, []
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        value = value.strip("'\"")
        env["PIP_" + key.split(".")[-1].upper().replace("-", "_")] = value
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            # An index names its files relative to the folder above it.
            path = path.parent if path.name == "simple" else path
            if not path.is_absolute() or not path.exists():
                continue
            target = root / str(path).lstrip("/")
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()
            mounts.append(f"mount --bind -o ro {path} {target}")
    return mounts, env


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The built image; what a build host gives (name resolution, package sources) is lent to it."""
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("needs root and debootstrap")
    root = tmp_path_factory.mktemp("debian") / "root"
    bootstrap = ["debootstrap", "--variant=minbase", f"--include={BASE}", "bookworm", str(root)]
    _checked(bootstrap, timeout=1200)
    image = Image(root)
    image.build_mounts, image.build_env = _pip_sources(root)
    for name in ("resolv.conf", "hosts"):
        shutil.copy(Path("/etc", name), root / "etc" / name)
    proxies = ("http_proxy", "https_proxy", "no_proxy")
    image.build_env |= {k: v for k, v in os.environ.items() if k.lower() in proxies}
    for name, rest in _steps(ROOT / "docker" / "Dockerfile.cpu"):
        image.execute(name, rest)
    yield image
    # Gigabytes; every mount in it ended with its namespace.
    shutil.rmtree(root)


@dataclass
class Composed:
    """Runs the image as compose.yaml's service `cpu` does, with no network but loopback."""

    image: Image
    models: Path
    service: dict[str, Any]
    cache: Path

    def command(
        self, argv: list[str], writable: bool = False, env: dict[str, str] | None = None
    ) -> list[str]:
        root, service = self.image.root, self.service
        mounts = [
            f"mount --bind {root} {root}",
            f"mount -o remount,bind,ro {root}",
            f"mount -t tmpfs -o size={service['shm_size'].removesuffix('b')} tmpfs {root}/dev/shm",
        ]
        for path in service["tmpfs"]:  # Docker's own options for them
            options = "mode=1777,nosuid,nodev,noexec"
            mounts.append(f"mount -t tmpfs -o {options} tmpfs {root}{path}")
        mounts.append(f"mount --bind {self.cache} {root}/cache")
        mounts.append(f"mount --bind {self.models} {root}/mnt")
        assert service["read_only"] and "cache:/cache" in service["volumes"]
        if not writable:
            mounts.append(f"mount -o remount,bind,ro {root}/mnt")
        env = {"VLLM_CPU_KVCACHE_SPACE": "1"} | (env or {})
        return self.image.command([*self.image.entrypoint, *argv], mounts, env, ("--net",))

    def run(self, argv: list[str], timeout: float = 900) -> Done:
        return _checked(self.command(argv, writable=True), timeout)

    def beside(self, process: int, argv: list[str]) -> Done:
        """argv inside the namespaces of a running container, as `docker exec` runs it."""
        enter = ["nsenter", f"--target={process}", "--mount", "--net", "--pid"]
        command = [*enter, *self.image.in_root(argv, {})]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def composed(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Composed:
    """The image with an empty cache volume and a folder of models that the user may write."""
    folder = tmp_path_factory.mktemp("volumes")
    for name in ("models", "cache"):
        (folder / name).mkdir()
        os.chown(folder / name, int(image.user), int(image.user))
    for path in (folder, *folder.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    return Composed(image, folder / "models", services["cpu"], folder / "cache")


def _child(process: subprocess.Popen[bytes]) -> int:
    """Process 1 of the namespaces that `unshare` made, by its number out here."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while not (words := children.read_text().split()):
        assert time.monotonic() < deadline, "unshare started nothing"
        time.sleep(0.1)
    return int(words[0])


QUESTIONS = """
import json, sys
from qig_serve.demo.questions import samples
from qig_serve.samples import data_url
for s in samples("test", 8):
    image = {"type": "image_url", "image_url": {"url": data_url(s.image)}}
    content = [image, {"type": "text", "text": s.question}]
    body = {"model": "qig", "messages": [{"role": "user", "content": content}], "temperature": 0}
    print(json.dumps({"custom_id": s.id, "answer": s.answer, "body": body}))
"""

ASK = """
import json, sys
from openai import OpenAI
client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="open sesame")
for line in sys.argv[1:]:
    body = json.loads(line)
    print(client.chat.completions.create(**body, max_tokens=64).choices[0].message.content)
"""

SCRAPE = """
import sys, urllib.error, urllib.request
for key in sys.argv[1:]:
    request = urllib.request.Request("http://127.0.0.1:8000/metrics")
    request.add_header("Authorization", "Bearer " + key)
    try:
        print(urllib.request.urlopen(request).read().decode())
    except urllib.error.HTTPError as error:
        print("refused", error.code)
"""


@pytest.fixture(scope="module")
def questions(image: Image) -> list[dict[str, Any]]:
    """Eight held-out questions with their answers, made by the package in the image."""
    command = image.command(["python", "-c", QUESTIONS], [], {}, ("--net",))
    return [json.loads(ln) for ln in _checked(command, timeout=300).stdout.splitlines()]


def test_the_user_and_what_it_may_write(image: Image) -> None:
    assert image.user == "10001"
    probe = (
        "id -u; id -G; for p in / /opt/qig-serve /opt/venv /etc /cache $HOME; do "
        "test -w $p && echo writable $p; done; true"
    )
    done = _checked(image.command(["sh", "-c", probe], [], {}, ("--net",)), timeout=300)
    assert done.stdout.split("\n")[:2] == ["10001", "10001"]
    assert re.findall(r"writable (\S+)", done.stdout) == ["/cache", "/home/qig"]


def test_any_user_of_group_0_may_write_and_run(image: Image) -> None:
    """As OpenShift runs images: a user id that no file knows, and group 0."""
    other = dataclasses.replace(image, user="54321", group="0")
    probe = "id -u; id -G; for p in /cache $HOME; do touch $p/a && echo wrote $p; done; true"
    done = _checked(other.command(["sh", "-c", probe], [], {}, ("--net",)), timeout=300)
    assert done.stdout.split("\n")[:2] == ["54321", "0"]
    assert re.findall(r"wrote (\S+)", done.stdout) == ["/cache", "/home/qig"]
    doctor = "from qig_serve.serving.folders import check_folders; check_folders(cuda=False)"
    _checked(other.command(["python", "-c", doctor], [], {}, ("--net",)), timeout=300)


def test_entrypoint_and_default_command(image: Image) -> None:
    version = [*image.entrypoint, "--version"]
    done = _checked(image.command(version, [], {}, ("--net",)), timeout=300)
    assert done.stdout.startswith("qig-serve ")
    usage = [*image.entrypoint, *image.cmd]
    assert "quantize" in _checked(image.command(usage, [], {}, ("--net",)), timeout=300).stdout


def test_the_build_leaves_no_settings_of_its_host(image: Image) -> None:
    assert not image.build_env.keys() & image.env.keys()
    for name in ("etc/pip.conf", "root/.config/pip", "root/.cache/pip", "var/lib/apt/lists/lock"):
        assert not (image.root / name).exists()


@pytest.fixture(scope="module")
def checkpoint(composed: Composed) -> Path:
    """The demonstration model, quantized by the image's `quantize`; a path inside it."""
    model = composed.image.root / "opt/qig-serve/qig_serve/demo/model"
    shutil.copytree(model, composed.models / "demo")
    command = ["quantize", "/mnt/demo", "--scheme", "w4a8", "--method", "rtn", "--calib", "demo"]
    composed.run([*command, "--output", "/mnt/demo-w4a8"])
    return Path("/mnt/demo-w4a8")


def test_it_quantizes(composed: Composed, checkpoint: Path) -> None:
    done = composed.run(["inspect", "--verify", str(checkpoint)])
    assert "w4a8" in done.stdout
    assert (composed.models / "demo-w4a8" / "config.json").stat().st_uid == 10001


@contextmanager
def serving(composed: Composed, checkpoint: Path, log: Path, key: str) -> Iterator[int]:
    """compose.yaml's server, healthy and at last stopped; process 1 by its number out here."""
    argv = [str(checkpoint) if word == "/model" else word for word in composed.service["command"]]
    argv = [word.replace("${MODEL_NAME:-qig}", "qig") for word in argv]
    command = composed.command(argv, env={"VLLM_API_KEY": key})
    with log.open("w") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said)
    try:
        first = _child(server)
        assert composed.beside(first, composed.image.health).returncode != 0
        deadline = time.monotonic() + 900
        while composed.beside(first, composed.image.health).returncode != 0:
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(2)
        yield first
        # Docker's stop: SIGTERM to process 1.
        os.kill(first, signal.SIGTERM)
        assert server.wait(timeout=90) == 0, log.read_text()[-4000:]
    finally:
        server.kill()
        server.wait()


def _answers_right(composed: Composed, first: int, questions: list[dict[str, Any]]) -> None:
    bodies = [json.dumps(q["body"]) for q in questions]
    done = composed.beside(first, ["python", "-c", ASK, *bodies])
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    right = sum(a.strip() == q["answer"] for a, q in zip(answers, questions, strict=True))
    assert right >= 5, list(zip(answers, [q["answer"] for q in questions], strict=True))


def test_it_serves_is_healthy_answers_and_stops(
    composed: Composed, checkpoint: Path, questions: list[dict[str, Any]], tmp_path: Path
) -> None:
    with serving(composed, checkpoint, tmp_path / "log", "open sesame") as first:
        _answers_right(composed, first, questions)
        # As Prometheus asks, with compose.yaml's key and without.
        scraped = composed.beside(first, ["python", "-c", SCRAPE, "", "open sesame"]).stdout
        assert scraped.startswith("refused 401") and "vllm:" in scraped and "qig_" in scraped


def _as_anyone(composed: Composed, folder: Path) -> Composed:
    """The same under a user id that no file knows and group 0; the cache is new, as the image's."""
    image = dataclasses.replace(composed.image, user="12345", group="0")
    assert "12345" not in (image.root / "etc/passwd").read_text()
    cache, mode = folder / "cache", (image.root / "cache").stat()
    cache.mkdir()
    os.chown(cache, mode.st_uid, mode.st_gid)
    cache.chmod(mode.st_mode)
    for path in (folder, *folder.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)
    return Composed(image, composed.models, composed.service, cache)


def test_it_serves_under_any_user_of_group_0(
    composed: Composed, checkpoint: Path, questions: list[dict[str, Any]], tmp_path: Path
) -> None:
    """As OpenShift runs it: `--user 12345:0`, a read-only root, and questions about pictures."""
    other = _as_anyone(composed, tmp_path)
    with serving(other, checkpoint, tmp_path / "log", "open sesame") as first:
        status = Path(f"/proc/{first}/status").read_text()
        assert re.search(r"^Uid:\t12345\t12345", status, re.M)
        assert re.search(r"^Gid:\t0\t0", status, re.M)
        _answers_right(other, first, questions)
        assert {path.stat().st_uid for path in (tmp_path / "cache").iterdir()} == {12345}


def test_a_cache_that_cannot_be_written_is_named(
    composed: Composed, checkpoint: Path, tmp_path: Path
) -> None:
    other = _as_anyone(composed, tmp_path)
    (tmp_path / "cache").chmod(0o755)
    done = subprocess.run(
        other.command(["serve", str(checkpoint)]), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 1, said
    for name in ("/cache/vllm", "VLLM_CACHE_ROOT", "/cache/inductor", "TORCHINDUCTOR_CACHE_DIR"):
        assert name in said[0]


def test_it_runs_a_batch(
    composed: Composed, checkpoint: Path, questions: list[dict[str, Any]]
) -> None:
    lines = [
        {"custom_id": q["custom_id"], "method": "POST", "url": "/v1/chat/completions"}
        | {"body": q["body"] | {"model": str(checkpoint), "max_tokens": 64}}
        for q in questions
    ]
    batch = composed.models / "batch.jsonl"
    batch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    composed.run(["generate", str(checkpoint), "-i", "/mnt/batch.jsonl", "-o", "/mnt/out.jsonl"])
    rows = [json.loads(ln) for ln in (composed.models / "out.jsonl").read_text().splitlines()]
    wanted = {q["custom_id"]: q["answer"] for q in questions}
    assert {row["custom_id"] for row in rows} == wanted.keys()
    right = 0
    for row in rows:
        message = row["response"]["body"]["choices"][0]["message"]
        right += message["content"].strip() == wanted[row["custom_id"]]
    assert right >= 5, rows
