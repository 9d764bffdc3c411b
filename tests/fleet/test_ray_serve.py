"""docker/ray/serve.py on CPUs: from one replica to two under load, and one of them killed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.fleet import KEY, NO_RAY, RAY_SCRIPTS, ray_environment
from helpers.load import ask, assert_none_wrong, assert_right, under_load
from helpers.server_process import START_SECONDS, free_port, kill_tree

pytest.importorskip("ray", reason=NO_RAY)
pytestmark = pytest.mark.slow


class Cluster:
    """The script with all that Ray starts below it."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        port, self.log = free_port(), folder / "ray.log"
        self.url = f"http://127.0.0.1:{port}"
        words = [str(checkpoint), "--name", "tiny", "--device", "cpu", "--max-model-len", "512"]
        words += ["--replicas", "2", "--requests", "4", "--cpus", "8", "--port", str(port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(RAY_SCRIPTS / "serve.py"), *words],
                stdout=log,
                stderr=log,
                env=ray_environment(),
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def replicas(self) -> list[int]:
        """Processes of the model's replicas."""
        import psutil

        below = psutil.Process(self.process.pid).children(recursive=True)
        return [p.pid for p in below if "ServeReplica:default:LLMServer" in "".join(p.cmdline())]

    def running(self) -> int:
        """Replicas that answer."""
        from ray import serve

        (application,) = serve.status().applications.values()
        states = [d.replica_states for n, d in application.deployments.items() if "LLMServer" in n]
        return sum(int(n) for each in states for s, n in each.items() if "RUNNING" in str(s))

    def wait(self, condition: Callable[[], Any], meanwhile: Callable[[], Any]) -> None:
        """Calls `meanwhile` until the condition holds."""
        deadline = time.monotonic() + 2 * START_SECONDS
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output[-6000:]
            meanwhile()


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(checkpoint, tmp_path_factory.mktemp("ray"))
    try:
        started.wait(lambda: "serving on http" in started.output, lambda: time.sleep(1))
        import ray

        ray.init(address="auto", namespace="serve", log_to_driver=False)
        yield started
        ray.shutdown()
    finally:
        kill_tree(started.process.pid)


def test_answers_scaling_and_a_killed_replica(
    cluster: Cluster, bodies: list[dict[str, Any]], generated: dict[str, str]
) -> None:
    """Those of `generate`; a second replica under load; kill -9 answers nothing wrongly."""
    alone = list(generated.values())
    assert cluster.running() == 1
    assert_right([ask(cluster.url, KEY, i, bodies, False) for i in range(len(bodies))], alone)

    began = time.monotonic()
    cluster.wait(
        lambda: cluster.running() == 2,
        lambda: assert_right(under_load(cluster.url, KEY, bodies)[0], alone),
    )
    print(f"\ntwo replicas after {time.monotonic() - began:.0f} s of load")
    assert_right(under_load(cluster.url, KEY, bodies)[0], alone)

    answers, _ = under_load(cluster.url, KEY, bodies, lambda: kill_tree(cluster.replicas()[0]))
    assert_none_wrong(answers, alone)
    cluster.wait(lambda: cluster.running() >= 1, lambda: time.sleep(1))
    assert_right([ask(cluster.url, KEY, i, bodies, True) for i in range(len(bodies))], alone)
