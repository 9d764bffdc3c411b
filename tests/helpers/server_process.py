"""Starting `qig-serve serve` for a test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

START_SECONDS = float(os.environ.get("QIG_TEST_START_SECONDS", "600"))  # a busy machine needs more
ENGINE = ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]
ENGINE += ["--limit-mm-per-prompt", '{"image": 2, "video": 0}']
# A random model would fill a JSON answer with blanks for ever.
ENGINE += [
    "--structured-outputs-config",
    '{"backend": "xgrammar", "disable_any_whitespace": true}',
]


def engine_of(process: int) -> int:
    """The id of the process in which the server or batch of that id has vLLM's engine."""
    listed = subprocess.run(
        ["ps", "--ppid", str(process), "-o", "pid=,args="],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (engine,) = [int(row.split()[0]) for row in listed.splitlines() if "EngineCore" in row]
    return engine


@dataclass
class Server:
    """A `qig-serve serve` process."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    media: Path
    """Folder from which file:// pictures are allowed."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL to the server and all that it started."""
        kill_tree(self.process.pid)
        self.process.wait(timeout=120)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=120)


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all below it, as when its machine is gone."""
    psutil = pytest.importorskip("psutil")  # vLLM brings it
    try:
        own = psutil.Process(pid)
        for process in [own, *own.children(recursive=True)]:
            process.kill()
    except psutil.NoSuchProcess:
        return


def environment() -> dict[str, str]:
    """One thread, offline, a small KV cache."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(checkpoint: Path, folder: Path, *flags: str, port: int = 0) -> Server:
    """Start and wait until /health answers; on a free port unless one is given."""
    import httpx

    port = port or free_port()
    log, media = folder / "server.log", folder / "media"
    media.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "qig_serve", "serve", str(checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    command += ["--allowed-local-media-path", str(media), *ENGINE, *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment()
        )
    server = Server(process, port, log, media)
    began = time.monotonic()
    while time.monotonic() - began < START_SECONDS and process.poll() is None:
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return server
        except httpx.TransportError:
            time.sleep(0.5)
    process.kill()
    pytest.fail(f"the server did not start:\n{server.output[-4000:]}")
