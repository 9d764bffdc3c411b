"""The published harnesses against our server, on a local task made from the demo questions.

Each harness is installed from the package index into a virtual environment of its own, which sees
the running one's packages, so that torch is not fetched again. QIG_TEST_HARNESSES names a folder
that keeps these environments between runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from helpers.server_process import Server, environment

from qig_serve.cli import main
from qig_serve.demo.questions import write_jsonl
from qig_serve.evaluate import load_samples
from qig_serve.evaluation.harness_task import TASK, write_task

pytestmark = pytest.mark.slow

QUESTIONS = 40
PACKAGES = {"lm_eval": "lm-eval[api]==0.4.13", "lmms_eval": "lmms-eval==0.7.3"}
MODELS = {
    "lm_eval": "local-chat-completions --apply_chat_template --model_args "
    "model={name},base_url={url}/v1/chat/completions,num_concurrent=4,max_retries={tries}",
    "lmms_eval": "openai --model_args "
    "model={name},base_url={url}/v1,api_key=none,num_concurrent=4,max_retries={tries},timeout=120",
}


@pytest.fixture(scope="session")
def harness_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get("QIG_TEST_HARNESSES")
    return Path(kept) if kept else tmp_path_factory.mktemp("harnesses")


def _python(folder: Path, harness: str) -> Path:
    """The interpreter of an environment that holds the harness; made when it is not there."""
    python = folder / harness / "bin" / "python"
    done = folder / harness / "installed"
    if not done.exists():
        venv.create(folder / harness, with_pip=True, clear=True)
        here = sysconfig.get_paths(vars={"base": str(folder / harness)})["purelib"]
        running = sysconfig.get_paths()["purelib"]
        # As a site directory: its own .pth files count too (docker/torchvision_cpu.py).
        line = f"import site; site.addsitedir({running!r})\n"
        (Path(here) / "running.pth").write_text(line)
        install = [str(python), "-m", "pip", "install", "--quiet", PACKAGES[harness]]
        got = subprocess.run(install, capture_output=True, text=True, check=False)
        if got.returncode:
            pytest.skip(f"{PACKAGES[harness]} cannot be installed: {got.stderr[-300:]}")
        done.touch()
    return python


def _run(
    folder: Path, harness: str, task: Path, server: Server, name: str, tries: int, *flags: str
) -> subprocess.CompletedProcess[str]:
    """The harness on the task, its results under task/out."""
    model = MODELS[harness].format(name=name, url=server.url, tries=tries).split()
    command = [str(_python(folder, harness)), "-m", harness, "--model", *model]
    command += ["--include_path", str(task / harness), "--tasks", TASK]
    command += ["--output_path", str(task / "out"), "--log_samples", *flags]
    return subprocess.run(
        command,
        env=environment() | {"HF_HOME": str(task / "cache"), "OPENAI_API_KEY": "none"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


def _result(task: Path) -> tuple[float, list[dict[str, Any]]]:
    """Exact match, and the harness's own lines about every sample."""
    (result,) = (task / "out").rglob("*results*.json")
    (samples,) = (task / "out").rglob("*samples*.jsonl")
    score = json.loads(result.read_text())["results"][TASK]["exact_match,none"]
    return score, [json.loads(line) for line in samples.read_text().splitlines()]


@pytest.mark.parametrize("harness", PACKAGES)
def test_a_harness_finds_the_same_exact_match(
    server: Server, harness_folder: Path, tmp_path: Path, harness: str
) -> None:
    data = write_jsonl("test", QUESTIONS, tmp_path / "questions")
    record = tmp_path / "ours.json"
    asked = ["evaluate", "--server", server.url, "--data", str(data), "--json", str(record)]
    assert main([*asked, "--quiet"]) == 0
    ours = json.loads(record.read_text())

    task = tmp_path / "task"
    write_task(load_samples(str(data)), task)
    got = _run(harness_folder, harness, task, server, "tiny", 1)
    assert got.returncode == 0, got.stdout + got.stderr
    score, samples = _result(task)
    assert len(samples) == ours["n"] == QUESTIONS
    assert score == pytest.approx(ours["exact_match"], abs=1e-9)
    assert 0.3 < score < 1  # neither all right nor all wrong: the figure can differ


def test_lmms_eval_scores_failed_requests_as_answers(
    server: Server, harness_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its run ends well, with a score, though no request was answered; ours says so, and fails."""
    data = write_jsonl("test", 4, tmp_path / "questions")
    write_task(load_samples(str(data)), tmp_path / "task")
    got = _run(harness_folder, "lmms_eval", tmp_path / "task", server, "no-such-model", 1)
    assert got.returncode == 0, got.stdout + got.stderr
    score, samples = _result(tmp_path / "task")
    assert score == 0
    # What the README asks people to count.
    assert all("LMMS_EVAL_REQUEST_FAILED" in json.dumps(line) for line in samples)

    asked = ["evaluate", "--server", server.url, "--server-model", "no-such-model"]
    assert main([*asked, "--data", str(data), "--json", str(tmp_path / "ours.json")]) == 1
    assert "4 of 4 requests failed and are not scored" in capsys.readouterr().err
    ours = json.loads((tmp_path / "ours.json").read_text())
    assert (ours["n"], ours["failed"]) == (0, 4)


def test_lm_eval_stops_at_a_failed_request(
    server: Server, harness_folder: Path, tmp_path: Path
) -> None:
    data = write_jsonl("test", 4, tmp_path / "questions")
    write_task(load_samples(str(data)), tmp_path / "task")
    got = _run(harness_folder, "lm_eval", tmp_path / "task", server, "no-such-model", 1)
    assert got.returncode != 0 and "404" in got.stdout + got.stderr
