"""What the servers of a fleet are started and asked with."""

from __future__ import annotations

from pathlib import Path

from helpers.server_process import environment

RAY_SCRIPTS = Path(__file__).resolve().parents[2] / "docker" / "ray"
NO_RAY = "no Ray here: pip install 'ray[serve,data]==2.60.0' jsonref"
KEY = "secret"
FLAGS = ["--api-key", KEY, "--max-num-seqs", "16"]
HEADERS = {"Authorization": f"Bearer {KEY}"}


def ray_environment() -> dict[str, str]:
    """That of a server, and Ray's patience for a machine of two busy cores."""
    patience = ("PROXY_READY_CHECK", "PROXY_HEALTH_CHECK", "PROXY_GRACEFUL_SHUTDOWN")
    waits = {f"RAY_SERVE_{name}_TIMEOUT_S": "300" for name in patience}
    return (
        environment() | waits | {"RAY_raylet_start_wait_time_s": "600", "RAY_worker_niceness": "0"}
    )
