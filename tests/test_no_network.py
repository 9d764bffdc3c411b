"""Nothing reaches for a network on import, and nothing reports home unless it is asked to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import qig_serve

PACKAGE = Path(qig_serve.__file__).parent

# An audit hook sees what C extensions and threads do through Python's sockets as well. It records
# and refuses: a library that swallows the refusal is found all the same.
GUARD = """
import importlib, json, sys
tried = []
def guard(event, args):
    lookups = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
    sends = event in ("socket.connect", "socket.sendto", "socket.sendmsg")
    if event in lookups or (sends and isinstance(args[1], tuple)):
        tried.append([event, repr(args[1:] if sends else args)])
        raise OSError(f"network at import: {event}")
sys.addaudithook(guard)
"""
IMPORTS = """
for name in sys.argv[1:]:
    importlib.import_module(name)
"""

COMMAND = """
import contextlib, io, json, os
from qig_serve.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["families", "--help"])
"""
SETTING = COMMAND + "print(json.dumps(os.environ['VLLM_NO_USAGE_STATS']))"
BELIEVED = """
from huggingface_hub import constants
from vllm.usage.usage_lib import is_usage_stats_enabled
print(json.dumps([tried, is_usage_stats_enabled(), constants.HF_HUB_DISABLE_TELEMETRY]))
"""
UNSET = ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "VLLM_DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY")


def _last_line(code: str, *words: str, env: dict[str, str] | None = None) -> Any:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ if env is None else env,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _modules() -> list[str]:
    """Every module of the package; kernels/ and offline/ are links that pkgutil does not walk."""
    names = []
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for file in files:
            path = Path(folder, file).relative_to(PACKAGE.parent)
            if path.suffix == ".py" and file != "__main__.py":
                parts = path.with_suffix("").parts
                names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(names)


def _unset() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in UNSET}


def test_no_module_uses_a_network_when_imported_and_reports_are_off() -> None:
    names = _modules()
    assert {"qig_serve.serve", "qig_serve.offline.pipeline", "qig_serve.kernels.ops"} <= {*names}
    found = _last_line(GUARD + COMMAND + IMPORTS + BELIEVED, *names, env=_unset())
    assert found == [[], False, True]


def test_the_guard_sees_an_attempt(tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text(
        "import contextlib, urllib.request\n"
        "with contextlib.suppress(OSError):\n"
        "    urllib.request.urlopen('http://198.51.100.1/')\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    code = GUARD + IMPORTS + "print(json.dumps(tried))"
    tried = _last_line(code, "caller", env=env | {"PYTHONPATH": str(tmp_path)})
    assert tried and "198.51.100.1" in tried[0][1]


def test_usage_reports_can_be_asked_for() -> None:
    assert _last_line(SETTING, env=_unset() | {"VLLM_NO_USAGE_STATS": "0"}) == "0"
