"""One vLLM engine in a process of its own: what gpu_vllm.py asks of it goes in and out as JSON.

    python tests/benchmarks/gpu_vllm_engine.py JOB.json

JOB.json: {"task": "bench", "profile" or "demo", "checkpoint", "engine": options of vLLM's LLM,
"out": where the result goes, and the task's own settings}. A process an engine, so that memory is
free afterwards, a rival that fails takes nothing with it, and start-ups can be compared.

The engine runs in this process (no worker processes), so that the model it runs can be looked at:
kernels are read from its layers, and from the profiler, never assumed.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch

DECODER = re.compile(r"(^|\.)layers\.\d+\.")
TOWER = re.compile(r"vision|visual|tower")

GROUPS: tuple[tuple[str, str], ...] = (
    # Inductor's names list what is fused and end with the op that takes it, which is no part of
    # it: `triton_red_fused_fused_add_rms_norm_w3a16_linear_2` is a norm.
    ("norm", r"^triton_.*(norm|rsqrt)"),
    ("rotary", r"^triton_.*(rotary|rope|cat_index_select)"),
    ("SiLU * mul", r"^triton_.*silu"),
    # what quantizes comes first: its name says what is fused with it
    ("activation quantization", r"^(?!triton_).*((?<!de)quantize(_kernel|_activation)|split_halves|"
     r"(rms_norm|silu_mul)_(quantize|halves)|scaled_int8_quant|per_token_quant|quant_input)"),
    ("dequantization", r"^(?!triton_).*dequantize"),
    ("quantized GEMM", r"^halves_kernel|^(?!triton_).*(w3a16_|w4a8_|marlin|machete|humming|_int_mm|"
     r"qig::|int4|onednn_scaled)"),
    ("attention", r"flash|attention|attn|fmha|reshape_and_cache|concat_and_cache|paged"),
    ("rotary", r"rotary|rope"),
    ("norm", r"norm|rsqrt"),
    ("SiLU * mul", r"silu|act_and_mul|gelu"),
    ("16-bit GEMM", r"gemm|nvjet|cutlass|xmma|gemv|splitk|cublas|onednn_mm|aten::(add|b)?mm"),
    ("copies", r"memcpy|memset|copy|aten::(cat|fill_|zero_)"),
    ("sampling", r"argmax|softmax|topk|sample|sort"),
)  # fmt: skip
OTHER = "other"


def group_of(kernel: str) -> str:
    """The row of the profile's table that a kernel's time is counted in."""
    for group, pattern in GROUPS:
        if re.search(pattern, kernel, re.IGNORECASE):
            return group
    return OTHER


def grouped(times: dict[str, float]) -> dict[str, float]:
    """Kernel -> microseconds becomes group -> microseconds; every group is there, in order."""
    table = dict.fromkeys([*(group for group, _ in GROUPS), OTHER], 0.0)
    for kernel, microseconds in times.items():
        table[group_of(kernel)] += microseconds
    return table


def per_step(long: dict[str, float], short: dict[str, float], steps: int) -> dict[str, float]:
    """Times a step, of two runs that differ by that many steps."""
    return {name: (long[name] - short.get(name, 0.0)) / steps for name in long}


def layer_kernels(named_modules: Iterable[tuple[str, torch.nn.Module]]) -> dict[str, Any]:
    """{"decoder" or "elsewhere": {what runs a linear, in words: how many}}, from the modules."""
    found: dict[str, Counter[str]] = {"decoder": Counter(), "elsewhere": Counter()}
    for name, module in named_modules:
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        inside = DECODER.search(name) and not TOWER.search(name) and name.endswith("_proj")
        where = "decoder" if inside else "elsewhere"
        found[where][_kernel(module, method)] += 1
    return {where: dict(counts) for where, counts in found.items()}


def _kernel(module: torch.nn.Module, method: Any) -> str:
    kind = type(method).__name__
    if hasattr(module, "qig_n"):
        from qig_serve.vllm_plugin.linear import kernel_name

        name = kernel_name(method.scheme, module.qig_n, module.qig_k, module.qig_dtype)
        return f"{kind}: {name}"
    scheme = getattr(module, "scheme", None)
    if scheme is None:
        return kind
    kernel = getattr(scheme, "kernel", None)
    return f"{type(scheme).__name__}: {type(kernel).__name__ if kernel else 'its own'}"


class Engine:
    """An LLM, what it is asked, and the clock."""

    def __init__(self, job: dict[str, Any]) -> None:
        """job: checkpoint (directory), and engine, the options of vLLM's LLM."""
        started = time.monotonic()
        from vllm import LLM

        self.job, self.device = job, job["device"]
        imported = time.monotonic()
        options = {
            "enable_prefix_caching": False, "seed": 0, "use_tqdm_on_load": False, **job["engine"],
        }  # fmt: skip
        self.llm: Any = LLM(job["checkpoint"], **options)
        self.start_up = {
            "import_seconds": imported - started,
            "engine_seconds": time.monotonic() - imported,
        }
        self.random = random.Random(0)
        self.tokenizer = self.llm.get_tokenizer()

    def words(self, count: int) -> list[int]:
        """Random tokens that are no special ones."""
        special = set(self.tokenizer.get_added_vocab().values())
        top = min(len(self.tokenizer), 100_000)
        found: list[int] = []
        while len(found) < count:
            token = self.random.randrange(1, top)
            if token not in special:
                found.append(token)
        return found

    def generate(self, prompts: list[Any], tokens: int) -> tuple[float, list[Any]]:
        """(seconds, outputs) of greedy answers of exactly so many tokens."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        self._wait()
        started = time.monotonic()
        outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        self._wait()
        return time.monotonic() - started, outputs

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def on_worker(self, call: Callable[[Any], Any]) -> Any:
        """The result of a call on the one worker."""
        return self.llm.collective_rpc(call)[0]

    def text(self, length: int) -> dict[str, Any]:
        return {"prompt_token_ids": self.words(length)}

    def decode(self, batch: int) -> dict[str, Any]:
        """Tokens a second: the time of many tokens less that of one."""
        job, rates, steps = self.job, [], []
        for _ in range(job["repeats"] + 1):  # the first warms up
            prompts = [self.text(job["decode_prompt"]) for _ in range(batch)]
            short, _ = self.generate(prompts, 1)
            long, _ = self.generate(prompts, 1 + job["decode_tokens"])
            steps.append((long - short) / job["decode_tokens"])
            rates.append(batch / steps[-1])
        return {
            "tokens_per_second": statistics.median(rates[1:]),
            "step_ms": 1e3 * statistics.median(steps[1:]),
            "spread": (max(rates[1:]) - min(rates[1:])) / statistics.median(rates[1:]),
        }

    def with_pictures(self, count: int, words: int) -> dict[str, Any]:
        """A prompt of so many pictures and words; pictures of coloured squares, all different."""
        import numpy as np
        from PIL import Image

        one = self.tokenizer.encode(self.job["image_text"], add_special_tokens=False)
        pixels = np.random.default_rng(self.random.randrange(1 << 30))
        side = self.job["picture"]
        pictures = [
            Image.fromarray(pixels.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
                (side, side), Image.Resampling.NEAREST
            )
            for _ in range(count)
        ]
        return {
            "prompt_token_ids": one * count + self.words(words),
            "multi_modal_data": {"image": pictures},
        }

    def first_token(self, target: int) -> dict[str, Any]:
        """Time to the first token of a prompt of about `target` tokens, half of them pictures.

        "ms": pictures preprocessed before (that is the CPU's work, and the same for all variants),
        vision tower and prefill run. "with_preprocessing_ms": the first time, all of it.
        """
        _, (one,) = self.generate([self.with_pictures(1, 8)], 1)
        picture = len(one.prompt_token_ids) - 8
        count = max(1, target // 2 // picture)
        words = max(1, target - count * picture)
        prompt = self.with_pictures(count, words)
        cold, (output,) = self.generate([prompt], 1)
        times = []
        for _ in range(self.job["repeats"]):
            # Or the pictures' features of the time before would be taken.
            self.llm.llm_engine.engine_core.reset_encoder_cache()
            times.append(self.generate([prompt], 1)[0])
        return {
            "tokens": len(output.prompt_token_ids), "pictures": count, "picture_tokens": picture,
            "ms": 1e3 * statistics.median(times), "with_preprocessing_ms": 1e3 * cold,
        }  # fmt: skip

    def profiled(self, prompts: list[Any], tokens: int, trace: Path | None) -> dict[str, float]:
        """Kernel -> microseconds of a generation; on a CPU, torch operator -> microseconds."""
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device == "cuda"
        activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
        if trace is not None and cuda:
            activities.append(ProfilerActivity.CPU)
        with profile(activities=activities) as profiler:
            self.generate(prompts, tokens)
        if trace is not None:
            trace.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))
        times: Counter[str] = Counter()
        for event in profiler.key_averages():
            if getattr(event, "is_user_annotation", False):  # a span of others, counted already
                continue
            on_gpu = str(event.device_type).endswith("CUDA")
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            if spent > 0 and on_gpu == cuda:
                times[event.key[:160]] += spent
        return dict(times)

    def profile(self, batch: int, traces: Path | None, name: str) -> dict[str, Any]:
        """A decode step of a batch and a prefill of text, as tables of groups and longest kernels.

        A step is the difference of two generations over its number of steps, so the prefill that
        both begin with is not in it.
        """
        job, steps = self.job, self.job["profile_steps"]
        prompts = [self.text(job["decode_prompt"]) for _ in range(batch)]
        long_text = [self.text(job["profile_prompt"])]
        for warm_up in (prompts, long_text):
            self.generate(warm_up, 2)
        trace = None if traces is None else traces / f"{name}-decode-{batch}.json.gz"
        short = self.profiled(prompts, 1, None)
        long = self.profiled(prompts, 1 + steps, trace)
        trace = None if traces is None else traces / f"{name}-prefill.json.gz"
        prefill = self.profiled(long_text, 1, trace)
        decode = per_step(long, short, steps)
        return {
            "batch": batch,
            "decode_us": grouped(decode),
            "decode_kernels": longest(decode),
            "lm_head_us": self.lm_head_microseconds(batch),
            "prefill_tokens": job["profile_prompt"],
            "prefill_us": grouped(prefill),
            "prefill_kernels": longest(prefill),
        }

    def lm_head_microseconds(self, batch: int) -> float:
        """Of the logits of a batch: its GEMM has the names of others, so it is timed apart."""
        hidden = self.llm.llm_engine.vllm_config.model_config.get_hidden_size()

        def timed(worker: Any) -> float:
            model = worker.get_model()
            some = next(p for p in model.parameters() if p.is_floating_point())
            x = torch.randn(batch, hidden, dtype=torch.bfloat16, device=some.device)
            with torch.inference_mode():
                model.compute_logits(x)
                self._wait()
                started = time.monotonic()
                for _ in range(20):
                    model.compute_logits(x)
                self._wait()
            return (time.monotonic() - started) / 20 * 1e6

        return float(self.on_worker(timed))

    def memory(self) -> dict[str, int]:
        """Bytes: weights as the engine holds them, KV cache, and the process's peak."""

        def sizes(worker: Any) -> dict[str, int]:
            model = worker.get_model()
            tensors = [*model.parameters(), *model.buffers()]
            caches = getattr(worker.model_runner, "kv_caches", [])
            return {"weights": _bytes(tensors), "kv_cache": _bytes(_flat(caches))}

        found = dict(self.on_worker(sizes))
        if self.device == "cuda":
            found["peak"] = torch.cuda.max_memory_reserved()
            found["peak_without_kv_cache"] = found["peak"] - found["kv_cache"]
        else:
            found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return found

    def kernels(self) -> dict[str, Any]:
        """What the engine's own layers say runs them."""
        return dict(self.on_worker(lambda w: layer_kernels(w.get_model().named_modules())))


def longest(times: dict[str, float], most: int = 12) -> list[list[Any]]:
    """[kernel, microseconds] of those that take longest."""
    return [[k, t] for k, t in sorted(times.items(), key=lambda item: -item[1])[:most] if t > 0]


def _flat(caches: Any) -> list[torch.Tensor]:
    if isinstance(caches, torch.Tensor):
        return [caches]
    return [tensor for cache in caches for tensor in _flat(cache)]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that tensors lie in, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def bench(job: dict[str, Any]) -> dict[str, Any]:
    """Start-up, kernels, memory, decode at each batch, first token at each length, a profile."""
    engine = Engine(job)
    result: dict[str, Any] = {"start_up": engine.start_up, "layers": engine.kernels()}
    result["decode"] = {str(batch): engine.decode(batch) for batch in job["batches"]}
    result["first_token"] = {str(n): engine.first_token(n) for n in job["prompts"]}
    result["memory"] = engine.memory()  # before the profiler takes its own
    result["profile"] = engine.profile(job["batches"][0], None, "")
    return result


def profile(job: dict[str, Any]) -> dict[str, Any]:
    """Tables of a decode step at each batch and of a prefill; traces beside the result."""
    engine, traces = Engine(job), Path(job["out"]).parent / "traces"
    name = job["name"]
    return {str(b): engine.profile(b, traces, name) for b in job["profile_batches"]}


def demo(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers to the first questions of the test split: token ids, as text, and texts."""
    from vllm import SamplingParams

    from qig_serve.demo.questions import samples

    engine = Engine(job)
    asked = list(samples("test", job["questions"]))
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_pil", "image_pil": sample.image},
                    {"type": "text", "text": sample.question},
                ],
            }
        ]
        for sample in asked
    ]
    outputs = engine.llm.chat(
        conversations, SamplingParams(temperature=0, max_tokens=160), use_tqdm=False
    )
    return {
        "tokens": [" ".join(map(str, output.outputs[0].token_ids)) for output in outputs],
        "texts": [output.outputs[0].text for output in outputs],
        "layers": engine.kernels(),
    }


TASKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "bench": bench,
    "profile": profile,
    "demo": demo,
}


def main() -> int:
    """See the head of this file."""
    job = json.loads(Path(sys.argv[1]).read_text())
    result = TASKS[job["task"]](job)
    out = Path(job["out"])
    out.with_suffix(".tmp").write_text(json.dumps(result))
    out.with_suffix(".tmp").replace(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
