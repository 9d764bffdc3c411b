"""`make gpu`: check, tune and time the kernels on the GPU at hand, in six minutes.

    python tests/benchmarks/gpu_kernels.py [--seconds 360] [--out DIR]
        [--stages warm,tests,tune,time,rivals,counters] [--commit HASH]
        [--plan] [--plot RESULTS.json] [--table RESULTS.json]

--plan prints the stages with the seconds that each may take, on any machine. --plot draws results
that a machine without matplotlib left; --table prints their headline as Markdown. Each stage is a
process with a time limit; one that would not end in time is not begun; one that fails costs itself
alone, and is named in the results with its reason. Results are written as they come, into --out
(tests/benchmarks/results):

    kernels-<card>.json, .png              everything; the plot of the headline
    kernel-times-<card>-<commit>.json      every time of a tile, for fit_time_model.py
    tiles.json                             a copy of kernels/tiles.json as it is afterwards

Exit status 0 if every stage ended as it should; 1 otherwise, also without a CUDA device. Stages are
gpu_kernels_{warm,checks,tune,time,rivals,counters}.py, order and limits in gpu_kernels_plan.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_kernels_figures as figures
import gpu_kernels_plan as plan
from gpu_kernels_plan import Context, Failed, Outcome, Results

MODULES = {"tests": "gpu_kernels_checks"}
EXIT = 1.0
"""Seconds that a process takes to end."""
FAILED = 3
"""Exit status of a stage that wrote its reason."""


def run_stage(name: str, seconds: float, path: Path, out: Path) -> int:
    """In a process of its own: run a stage; its reason, if it fails, goes to the error stream."""
    context = Context(Results(path), time.monotonic() + seconds - EXIT, out)
    module = importlib.import_module(MODULES.get(name, f"gpu_kernels_{name}"))
    try:
        module.run(context)
    except Failed as reason:
        print(reason, file=sys.stderr)
        return FAILED
    return 0


def start_stage(name: str, seconds: float, path: Path, out: Path) -> Outcome:
    """A stage as a process (and whatever it starts), ended when its time is up."""
    print(f"== {name}, at most {seconds:.0f} s", flush=True)
    begun = time.monotonic()
    command = [sys.executable, __file__, "--run-stage", name, "--seconds", f"{seconds:.1f}",
               "--results", str(path), "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=plan.ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return Outcome("stopped", _since(begun), f"its {seconds:.0f} s were up")
    finally:  # also what a stage left behind, and when this process is asked to end
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode == 0:
        return Outcome("done", _since(begun))
    last = (errors.strip().splitlines() or [f"status {process.returncode}"])[-1]
    if process.returncode != FAILED:
        print(errors[-1500:], file=sys.stderr)
    return Outcome("failed", _since(begun), last[:300])


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 1)


def draw(results: Results) -> bool:
    """The plot beside the results; a reason is printed if there is none."""
    try:
        if figures.plot(results.read(), results.path.with_suffix(".png")):
            return True
        reason = "no layer has all its times"
    except ImportError as error:
        reason = f"{error}; later, where it is installed: --plot {results.path.name}"
    print(f"no plot: {reason}", file=sys.stderr)
    return False


def main(arguments: list[str] | None = None) -> int:
    """See the head of this file."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    every = ",".join(stage.name for stage in plan.STAGES)
    parser.add_argument("--seconds", type=float, default=plan.SECONDS, help="for everything")
    parser.add_argument("--stages", default=every, help="which, separated by commas")
    parser.add_argument("--out", type=Path, default=plan.RESULTS, help="folder of the results")
    parser.add_argument("--commit", help="what is measured, where there is no checkout to ask")
    parser.add_argument("--plan", action="store_true", help="print the stages and end")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot results and end")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print results and end")
    parser.add_argument("--run-stage", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    if options.run_stage:
        return run_stage(options.run_stage, options.seconds, options.results, out)
    if options.plot:
        return 0 if draw(Results(options.plot)) else 1
    if options.table:
        for model, entry in Results(options.table).read()["time"]["models"].items():
            if entry["sums"]:
                print(figures.table(model, entry["sums"]) + "\n")
        return 0
    try:
        stages = plan.chosen(options.stages.split(","))
    except ValueError as error:
        parser.error(str(error))
    if options.plan:
        print(plan.describe(stages, options.seconds))
        return 0
    try:
        about = plan.machine(options.commit)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"kernels-{plan.slug(about['card'])}.json"
    results = Results(path)
    plan.write_json(path, {"machine": about, "stages": {}})
    outcomes: dict[str, Outcome] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    def note(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        results.write("stages", {n: plan.as_json(o) for n, o in outcomes.items()})
        print(f"   {name}: {outcome.status}, {outcome.seconds:.0f} s {outcome.reason}", flush=True)

    left = options.seconds - (time.monotonic() - begun)
    plan.run_stages(stages, left, lambda n, s: start_stage(n, s, path, out), note)
    draw(results)
    for leftover in out.glob(".rival*"):  # of a stage that was stopped
        leftover.unlink()
    bad = [name for name, outcome in outcomes.items() if outcome.status != "done"]
    print(f"wrote {path}" + (f"; not done: {', '.join(bad)}" if bad else ""), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
