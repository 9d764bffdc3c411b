"""`together` without vLLM: turns, time, results that come piece by piece; engines are stand-ins."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import gpu_vllm
import gpu_vllm_children as children
import gpu_vllm_engine as engine
import gpu_vllm_llm as llm
import gpu_vllm_plan as plan
import gpu_vllm_run as run
import gpu_vllm_together as together
import pytest

STAND_IN = """
import fcntl, json, pathlib, sys, time
name, out, lock, log = sys.argv[1], *map(pathlib.Path, sys.argv[2:])
if name == "w4a8":
    sys.exit("ValueError: made up")
def write(**more):
    entry.update(more)
    out.with_suffix(".tmp").write_text(json.dumps(entry))
    out.with_suffix(".tmp").replace(out)
entry = {"decode": {}, "first_token": {}, "profile": {}, "seconds": {}, "not_measured": {},
         "layers": {"decoder": {"UnquantizedLinearMethod": 1}}}
time.sleep({"bf16": 0.4}.get(name, 0))
write()
while not out.with_suffix(".turn").exists():
    time.sleep(0.02)
with lock.open("w") as held:
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if another measures
    for batch in "1", "8":
        entry["seconds"]["decode " + batch] = 0.1
        entry["decode"][batch] = {"tokens_per_second": 1.0}
        write()
        if name == "marlin-w4a16":
            time.sleep(60)
        if name == "w3a16" and batch == "8":
            sys.exit("RuntimeError: made up, half way")
        time.sleep(0.1)
write(ended=True)
time.sleep(60)
"""


def states(**given: str) -> dict[str, str]:
    return {name: given.get(name, plan.UP) for name in ("a", "b", "c")}


@pytest.mark.parametrize(
    ("given", "others", "elapsed", "turn"),
    [
        ({}, False, 10, "a"),
        ({"b": plan.STARTING}, False, 10, None),  # all wait for it ...
        ({"b": plan.STARTING}, False, 171, "a"),  # ... but not for ever
        ({}, True, 10, None),
        ({}, True, 171, "a"),
        ({"a": plan.MEASURING}, False, 171, None),
        ({"a": plan.ENDED, "b": plan.FAILED}, False, 10, "c"),
        ({"a": plan.STARTING, "b": plan.ENDED, "c": plan.ENDED}, False, 171, None),
    ],
)
def test_turns(given: dict[str, str], others: bool, elapsed: float, turn: str | None) -> None:
    assert plan.next_turn(states(**given), others, elapsed, 170) == turn


def test_estimates_are_those_of_the_engines_before() -> None:
    names = plan.pieces([1, 256], [4096], [1])
    assert names == ["decode 1", "decode 256", "first_token 4096", "profile 1", "profile prefill"]
    guess = plan.estimate(names, [{}])
    assert guess["decode 1"] == plan.USUAL["decode 1"]
    usual = plan.estimate(names, [{"decode 1": 1.0, "decode 256": 3.0}, {"decode 1": 1.5}])
    assert usual["decode 1"] == 1.5 and usual["decode 256"] == 3.0
    assert usual["profile 1"] == guess["profile 1"]
    assert plan.worth_a_turn(usual, 4.6) and not plan.worth_a_turn(usual, 4.4)
    assert plan.turn_seconds(usual, 30) == 30 and plan.turn_seconds(usual, 1000) == 60


def test_what_fits_on_a_card() -> None:
    kinds = {name: run.VARIANTS[name].checkpoint for name in plan.DEFAULT_VARIANTS}
    assert plan.fitting("qwen2-vl-7b", kinds, 2, 150.7) == (list(kinds), [])  # an H200
    assert plan.fitting("qwen2-vl-7b", kinds, 2, 85.5) == (
        list(kinds)[:4],
        list(kinds)[4:],
    )  # an H100
    assert len(plan.fitting("internvl2-8b", kinds, 2, 85.5)[0]) == 3
    assert plan.fitting("qwen2-vl-7b", kinds, 2, None)[1] == []
    assert plan.groups(["a", "b", "a", "c"], 2) == [["a", "c"], ["b"]]
    assert plan.groups(["a"], 0) == [["a"]] and plan.groups([], 4) == [[]]


def test_the_plan_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_vllm.main(["--plan", "--seconds", "250"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:7] == ["start", "120", "s", "170", "s", "0", "s"]
    assert "begins by" in lines[0] and lines[2].endswith("170 s") and "if quick" in lines[5]
    assert any(line.startswith("usually ends after 250 s") for line in lines)
    assert gpu_vllm.main(["--plan", "table"]) == 1
    assert "--plan is of the stage together" in capsys.readouterr().err


def test_the_kv_cache_is_as_large_as_what_is_measured() -> None:
    options = gpu_vllm.arguments([])
    job = run.measuring_job(options, "qwen2-vl-7b", run.VARIANTS["machete-w4a16"])
    text = {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "hidden_size": 3584}  # fmt: skip
    size = llm.kv_cache_bytes({"text_config": text}, job["sequences"])
    a_token = 28 * 2 * 4 * 128 * 2
    assert 256 * (128 + 1 + 3 * 32) + 4096 < size / a_token < 80_000
    settings = job["engine"]
    assert settings["max_model_len"] <= settings["max_num_batched_tokens"] == 8192
    assert settings["limit_mm_per_prompt"] == {"image": 8, "video": 0}
    assert settings["compilation_config"] == {"cudagraph_capture_sizes": [1, 8, 32, 128, 256]}
    assert settings["linear_backend"] == "machete"


class Engine:
    """Measures nothing."""

    whole = True

    def recovers(self) -> bool:
        return self.whole

    def decode(self, batch: int) -> dict[str, Any]:
        if batch == 8:
            raise ValueError("made up")
        return {"tokens_per_second": float(batch)}

    def profile_prefill(self) -> dict[str, Any]:
        return {"tokens": 1}

    def memory(self) -> dict[str, int]:
        return {"weights": 1}


def test_pieces_are_noted_one_by_one() -> None:
    """What fails, or would not end in time, is named; the rest is measured."""
    result: dict[str, Any] = {"decode": {}, "profile": {}, "seconds": {}, "not_measured": {}}
    seen: list[str] = []
    pieces = ["decode 1", "decode 8", "decode 32", "profile prefill"]
    usual = dict.fromkeys(pieces, 1.0) | {"decode 32": 1000.0}
    reported = {"usual": usual, "until": time.monotonic() + 100}
    engine.take_pieces(Engine(), pieces, reported, lambda: seen.append(json.dumps(result)), result)
    assert result["decode"] == {"1": {"tokens_per_second": 1.0}}
    assert result["not_measured"] == {
        "decode 8": "ValueError: made up",
        "decode 32": "no time was left",
    }
    assert result["profile"] == {"prefill": {"tokens": 1}} and result["memory"] == {"weights": 1}
    assert list(result["seconds"]) == ["decode 1", "profile prefill"]
    assert len(seen) == 3
    assert json.loads(seen[0])["decode"] and not json.loads(seen[0])["not_measured"]


def test_a_broken_engine_is_asked_no_more() -> None:
    result: dict[str, Any] = {"decode": {}, "seconds": {}, "not_measured": {}}
    broken = Engine()
    broken.whole = False
    reported = {"usual": {"decode 8": 1.0, "decode 1": 1.0}, "until": time.monotonic() + 100}
    engine.take_pieces(broken, ["decode 8", "decode 1"], reported, lambda: None, result)
    assert result["not_measured"] == {
        "decode 8": "ValueError: made up",
        "decode 1": "the engine did not recover from the failure before",
    }


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Of a run whose engines are stand-ins, with checkpoints that are there."""

    def start_engine(self: together.Together, name: str, beside: int) -> None:
        out = self.folder / f"{name}.json"
        out.with_suffix(".job").write_text(json.dumps({"pieces": ["decode 1", "decode 8"]}))
        places = [str(out), str(self.folder / "lock"), str(self.folder / "order")]
        command = [sys.executable, "-c", STAND_IN, name, *places]
        self.engines[name] = children.begin(name, command, self.log(name), out, {})

    monkeypatch.setattr(together.Together, "start_engine", start_engine)
    variants = ["bf16", "w4a8-unfused", "w3a16", "w4a8"]
    words = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "out"), "--seconds", "30"]
    words += ["--work", str(tmp_path / "work"), "together", "--demos", "--variants", *variants]
    found = gpu_vllm.arguments(words)
    found.started = time.monotonic()
    for name in run.VARIANTS:
        kind = run.VARIANTS[name].checkpoint
        folder = run.checkpoint_path(found, found.model, kind)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / run.COMPLETE).touch()
    return found


def test_engines_measure_in_turn(options: argparse.Namespace) -> None:
    """bf16 is up last and measures first; one breaks off half way, and one never is up."""
    assert together.measure(options) == 1
    found = run.load(options.out / run.FILE)
    names = [name for name, _ in found["together"]["qwen2-vl-7b"]["turns"]]
    assert names == ["bf16", "w4a8-unfused", "w3a16"]
    bench = found["bench"]["qwen2-vl-7b"]
    assert bench["w4a8"]["unavailable"] == "ValueError: made up"
    assert list(bench["bf16"]["decode"]) == list(bench["w3a16"]["decode"]) == ["1", "8"]
    assert bench["bf16"]["not_as_named"] == {} != bench["w4a8-unfused"]["not_as_named"]
    assert bench["w3a16"]["not_measured"] == {"the rest": "RuntimeError: made up, half way"}
    assert {p.name for p in options.out.iterdir()} == {run.FILE, together.LOGS}
    logs = (options.out / together.LOGS).read_text()
    assert "==== w4a8\nValueError: made up" in logs and "==== w3a16" in logs


def test_who_is_late_is_not_waited_for(options: argparse.Namespace) -> None:
    options.start_limit, options.variants = 0.0, ["bf16", "w4a8-unfused"]
    assert together.measure(options) == 0
    turns = run.load(options.out / run.FILE)["together"]["qwen2-vl-7b"]["turns"]
    assert [name for name, _ in turns] == ["w4a8-unfused", "bf16"]


def test_no_engine_is_begun_that_would_not_end(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "USUAL", {"decode 1": 100.0, "decode 8": 100.0, "decode 256": 1.0})
    options.variants = ["bf16"]
    assert together.measure(options) == 1
    entry = run.load(options.out / run.FILE)["bench"]["qwen2-vl-7b"]["bf16"]
    assert entry["unavailable"].startswith("no time was left to measure it")


def test_who_hangs_is_stopped(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "STALL", 0.8)
    options.variants = ["marlin-w4a16", "bf16"]
    assert together.measure(options) == 0
    bench = run.load(options.out / run.FILE)["bench"]["qwen2-vl-7b"]
    assert list(bench["marlin-w4a16"]["decode"]) == ["1"]
    assert "took too long" in bench["marlin-w4a16"]["not_measured"]["the rest"]
    assert bench["bf16"]["ended"] and not bench["bf16"]["not_measured"]


def test_time_ends_for_who_is_starting(options: argparse.Namespace) -> None:
    options.variants, options.seconds = ["bf16"], plan.RESERVE + 0.2
    assert together.measure(options) == 1
    entry = run.load(options.out / run.FILE)["bench"]["qwen2-vl-7b"]["bf16"]
    assert entry["unavailable"] == "the time ended while it was starting"


def test_a_log_is_cut(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert plan.tail(log) == "(no log)"
    log.write_text("\n".join(f"line {i} {'é' * 200}" for i in range(100)))
    kept = plan.tail(log)
    assert len(kept.encode()) <= 4096 and kept.endswith("é")
    log.write_text("\n".join(f"line {i}" for i in range(100)))
    assert plan.tail(log).splitlines() == [f"line {i}" for i in range(60, 100)]
