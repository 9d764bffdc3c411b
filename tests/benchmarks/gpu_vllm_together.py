"""Stage together: the engines of all variants start at once, and then measure one after the other.

Beside them, from the start: processes that make the checkpoints, and demonstrations whose answers
are compared with the CPU's. An engine that is up waits; who measures has the machine alone: whoever
is still starting then is paused. Results are merged as they come; the logs' last lines of what
failed go to OUT/together-logs.txt. Order, estimates and limits are in gpu_vllm_plan.py.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import gpu_vllm_plan as plan
import gpu_vllm_report as report
import gpu_vllm_run as run
from gpu_vllm_children import Child, begin, send_signal
from gpu_vllm_run import VARIANTS

LOGS = "together-logs.txt"
POLL = 0.1


class Together:
    """One run: its processes, and the results so far."""

    def __init__(self, options: argparse.Namespace, about: dict[str, Any]) -> None:
        self.options, self.about, self.model = options, about, options.model
        self.results = options.out / run.FILE
        self.folder = options.work / "together"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.engines: dict[str, Child] = {}
        self.makers: dict[str, Child] = {}
        self.demos: dict[str, Child] = {}
        self.log_tails: dict[str, str] = {}
        self.note: dict[str, Any] = {
            "machine": about, "model": self.model, "seconds": options.seconds,
            "start_up": "of engines that started at the same time",
        }  # fmt: skip

    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - float(self.options.started)

    def left(self) -> float:
        """Seconds in which something may still be measured."""
        return float(self.options.seconds) - plan.RESERVE - self.elapsed()

    def start(self) -> None:
        """Engines, what makes their checkpoints, and demonstrations, all at once."""
        chosen, variants = self.options, []
        for name in chosen.variants:
            place = ("bench", self.model, name)
            if not chosen.again and run.done(self.results, place, self.about["card"]):
                print(f"{name}: measured before", flush=True)
            else:
                variants.append(name)
        kinds = {name: VARIANTS[name].checkpoint for name in variants}
        memory = self.about.get("memory_gb")
        fit, rest = plan.fitting(self.model, kinds, len(chosen.demos), memory)
        for name in rest:
            self.unavailable(name, "no room on the card beside the others: run it again alone")
        for name in fit:
            self.start_engine(name, len(fit))
        missing = [kinds[name] for name in fit if not self.made(name).exists()]
        for number, group in enumerate(plan.groups(missing, (os.cpu_count() or 1) // 2)):
            if group:
                words = ["make", "--models", self.model, "--checkpoints", *group]
                self.makers[f"make-{number}"] = self.start_stage(f"make-{number}", words)
        for name in chosen.demos:
            place = ("demo", name)
            if not chosen.again and run.done(self.results, place, self.about["card"]):
                print(f"demo {name}: compared before", flush=True)
                continue
            words = ["demo", "--names", name, "--questions", str(chosen.questions)]
            words += ["--reference", str(chosen.reference)]
            self.demos[name] = self.start_stage(f"demo-{name}", words)

    def made(self, name: str) -> Path:
        """The file that says that a variant's checkpoint is complete."""
        kind = VARIANTS[name].checkpoint
        return run.checkpoint_path(self.options, self.model, kind) / run.COMPLETE

    def start_engine(self, name: str, beside: int) -> None:
        """An engine's process, with compilation caches of its own that are empty."""
        variant = VARIANTS[name]
        job = run.measuring_job(self.options, self.model, variant)
        out = self.folder / f"{self.model}-{name}.json"
        for suffix in (".json", ".turn"):
            out.with_suffix(suffix).unlink(missing_ok=True)
        job |= {"out": str(out), "lock": str(self.folder / "lock"), "begun": time.monotonic(),
                "started_beside": beside - 1}  # fmt: skip
        described = out.with_suffix(".job")
        described.write_text(json.dumps(job))
        command = [sys.executable, str(run.HERE / "gpu_vllm_engine.py"), str(described)]
        threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(2, (os.cpu_count() or 1) // beside))}
        environment = run.environment(
            self.options, f"{self.model}-{name}", threads | variant.environment
        )
        self.engines[name] = begin(name, command, self.log(name), out, environment)

    def start_stage(self, name: str, words: list[str]) -> Child:
        """Another stage of gpu_vllm.py, with results of its own."""
        options, folder = self.options, self.folder / name
        (folder / run.FILE).unlink(missing_ok=True)
        command = [
            sys.executable, "-P", str(run.HERE / "gpu_vllm.py"), "--device", options.device,
            "--out", str(folder), "--work", str(options.work), "--again",
            "--seconds", f"{max(1.0, self.left()):.0f}", *(["--tiny"] if options.tiny else []),
            "--engine", json.dumps(options.engine), *words,
        ]  # fmt: skip
        return begin(name, command, self.log(name), folder / run.FILE, dict(os.environ))

    def log(self, name: str) -> Path:
        """Where a process's output goes."""
        return Path(self.options.work) / "logs" / f"together-{name}.log"

    # ---- what came of it

    def unavailable(self, name: str, reason: str) -> None:
        """A variant without figures."""
        place = ("bench", self.model, name)
        run.merge(self.results, place, {"unavailable": reason, "machine": self.about})
        print(f"{self.elapsed():.0f} s: {name}: {reason}", flush=True)

    def merge(self, engine: Child) -> None:
        """What an engine wrote since the last time, into the results."""
        if not engine.out.is_file() or engine.out.stat().st_mtime_ns == engine.seen:
            return
        engine.seen = engine.out.stat().st_mtime_ns
        engine.progressed = time.monotonic()
        entry = engine.result()
        entry["not_as_named"] = run.verify(entry, VARIANTS[engine.name], self.options.device)
        entry |= {"machine": self.about, "elapsed": round(self.elapsed(), 1)}
        if not entry["decode"]:
            why = next(iter(entry["not_measured"].values()), "nothing was measured yet")
            entry["unavailable"] = f"it was up; {why}"
        run.merge(self.results, ("bench", self.model, engine.name), entry)
        if engine.state == plan.STARTING:
            engine.state = plan.UP
            print(f"{self.elapsed():.0f} s: {engine.name} is up", flush=True)
        if entry.get("ended"):
            engine.state = plan.ENDED
            self.note.setdefault("reported", {})[engine.name] = plan.reported(engine.log)
            print(f"{self.elapsed():.0f} s: {engine.name}: {report.in_short(entry)}", flush=True)
            if entry["not_measured"]:
                self.keep_log(engine)

    def fail(self, engine: Child, reason: str) -> None:
        """Stop an engine, and say why; figures that it has stay."""
        send_signal(engine, signal.SIGKILL)
        engine.process.wait()
        self.merge(engine)
        engine.state, entry = plan.FAILED, engine.result()
        self.keep_log(engine)
        if not entry.get("decode"):
            self.unavailable(engine.name, reason)
            return
        place = ("bench", self.model, engine.name)
        entry = run.load(self.results)["bench"][self.model][engine.name]
        entry["not_measured"]["the rest"] = reason
        run.merge(self.results, place, entry)
        print(f"{self.elapsed():.0f} s: {engine.name}: {report.in_short(entry)}", flush=True)

    def keep_log(self, child: Child) -> None:
        """The last lines of a log among what is brought back."""
        self.log_tails[child.name] = plan.tail(child.log)
        text = "\n\n".join(f"==== {name}\n{log}" for name, log in self.log_tails.items())
        self.options.out.mkdir(parents=True, exist_ok=True)
        (self.options.out / LOGS).write_text(text + "\n")

    def end_of_other(self, child: Child, demo: bool) -> None:
        """A process that made checkpoints, or compared answers, has ended."""
        child.state = plan.FAILED if child.process.returncode else plan.ENDED
        took = time.monotonic() - child.begun
        self.note.setdefault("took", {})[child.name] = round(took, 1)
        if child.state == plan.FAILED:
            self.keep_log(child)
        if demo:
            name = child.name.removeprefix("demo-")
            reason = run.reason(child.log.read_text(errors="replace"))
            entry = child.result().get("demo", {}).get(name) or {"unavailable": reason}
            run.merge(self.results, ("demo", name), entry | {"machine": self.about})
            print(f"{self.elapsed():.0f} s: demo {name}: {report.in_short(entry)}", flush=True)
        else:
            print(f"{self.elapsed():.0f} s: {child.name}: {child.state}, {took:.0f} s", flush=True)

    # ---- turns

    def look(self) -> None:
        """What became of each process since the last look."""
        for child in [*self.makers.values(), *self.demos.values()]:
            if child.state == plan.STARTING and child.process.poll() is not None:
                self.end_of_other(child, child in self.demos.values())
        making = any(maker.state == plan.STARTING for maker in self.makers.values())
        for name, engine in self.engines.items():
            if engine.state in (plan.ENDED, plan.FAILED):
                continue
            ended = engine.process.poll() is not None  # before what it wrote is read
            self.merge(engine)
            if ended:
                self.fail(engine, run.reason(engine.log.read_text(errors="replace")))
            elif engine.state == plan.STARTING and not making and not self.made(name).exists():
                self.fail(engine, "its checkpoint could not be made: see the log of make")
            elif engine.state == plan.MEASURING and engine.overdue():
                self.fail(engine, "stopped, as it took too long to measure")

    def give_turn(self) -> None:
        """Let the next engine measure, if it is time and there is time."""
        others = [*self.makers.values(), *self.demos.values()]
        busy = [child for child in others if child.state == plan.STARTING]
        states = {name: engine.state for name, engine in self.engines.items()}
        name = plan.next_turn(states, bool(busy), self.elapsed(), self.options.start_limit)
        if name is None:
            if plan.MEASURING not in states.values():
                self.pause(False)
            return
        engine, job = self.engines[name], self.engines[name].out.with_suffix(".job")
        before = [e.result().get("seconds", {}) for e in self.engines.values()]
        usual = plan.estimate(run.load(job)["pieces"], before)
        if not plan.worth_a_turn(usual, self.left()):
            self.fail(engine, "no time was left to measure it: run the same again")
            return
        self.pause(True)
        engine.state, engine.progressed = plan.MEASURING, time.monotonic()
        engine.until = engine.progressed + plan.turn_seconds(usual, self.left())
        self.note.setdefault("turns", []).append([name, round(self.elapsed(), 1)])
        run.merge(self.results, ("together", self.model), self.note)
        turn = engine.out.with_suffix(".turn")
        beside = turn.with_suffix(".tmp-turn")
        beside.write_text(json.dumps({"until": engine.until, "usual": usual}))
        beside.replace(turn)

    def pause(self, pause: bool) -> None:
        """Stop whatever is starting while an engine measures; let it go on afterwards."""
        for child in [*self.makers.values(), *self.demos.values(), *self.engines.values()]:
            if child.state == plan.STARTING and child.paused != pause:
                send_signal(child, signal.SIGSTOP if pause else signal.SIGCONT)
                child.paused = pause

    def run(self) -> int:
        """0 if every variant has its figures, and the demonstrations gave the CPU's answers."""
        self.start()
        everyone = [*self.engines.values(), *self.demos.values()]
        while self.left() > 0 and any(
            child.state in (plan.STARTING, plan.UP, plan.MEASURING) for child in everyone
        ):
            self.look()
            self.give_turn()
            time.sleep(POLL)
        for engine in self.engines.values():
            if engine.state in (plan.STARTING, plan.UP, plan.MEASURING):
                self.fail(engine, f"the time ended while it was {engine.state}")
        for child in self.demos.values():
            if child.state == plan.STARTING:
                send_signal(child, signal.SIGKILL)
                child.process.wait()
                child.log.open("a").write("\nTimeoutError: the time ended before it did\n")
                self.end_of_other(child, True)
        self.note["elapsed"] = round(self.elapsed(), 1)
        run.merge(self.results, ("together", self.model), self.note)
        found = run.load(self.results)
        rows = [found["bench"][self.model][name] for name in self.options.variants]
        rows += [found["demo"][name] for name in self.options.demos]
        differs = any(child.state == plan.FAILED for child in self.demos.values())
        return int(differs or any("unavailable" in row for row in rows))

    def end(self) -> None:
        """Leave no process behind."""
        for child in [*self.engines.values(), *self.makers.values(), *self.demos.values()]:
            send_signal(child, signal.SIGKILL)
            child.process.wait()


def measure(options: argparse.Namespace) -> int:
    """Everything, within options.seconds."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    run.plugin_path()
    together = Together(options, run.machine(options))
    try:
        return together.run()
    finally:
        together.end()
