"""A vLLM engine in this process: what it is asked, the clock, the profiler and its memory.

It runs here, with no worker processes, so that the model it runs can be looked at: kernels are read
from its layers, and from the profiler, never assumed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from gpu_vllm_groups import grouped, layer_kernels, longest

MANY = 128
"""Batches from here on decode half as many tokens: their steps are long."""
KV_BLOCK = 128
"""Tokens that a KV cache's sizes are rounded up to: the largest block of any backend."""
POLL = 0.2
PARENT = os.getppid()


def idle(spans: Iterable[tuple[float, float]]) -> float:
    """Time between the first start and the last end in which no span was going on."""
    unused, until = 0.0, None
    for start, end in sorted(spans):
        if until is not None and start > until:
            unused += start - until
        until = end if until is None else max(until, end)
    return unused


class Engine:
    """An LLM, what it is asked, and the clock."""

    def __init__(self, job: dict[str, Any]) -> None:
        """job: checkpoint (directory), and engine, the options of vLLM's LLM."""
        begun = job.get("begun", time.monotonic())
        from vllm import LLM

        self.job, self.device = job, job["device"]
        imported = time.monotonic()
        wait_for(Path(job.get("wait_for", job["checkpoint"])))
        started = time.monotonic()
        options = {
            "enable_prefix_caching": False, "seed": 0, "use_tqdm_on_load": False, **job["engine"],
        }  # fmt: skip
        if "sequences" in job:
            config = json.loads((Path(job["checkpoint"]) / "config.json").read_text())
            options["kv_cache_memory_bytes"] = kv_cache_bytes(config, job["sequences"])
        self.llm: Any = LLM(job["checkpoint"], **options)
        self.start_up = {
            "import_seconds": imported - begun,
            "engine_seconds": time.monotonic() - started,
        }
        self.waited = started - imported
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

    @contextlib.contextmanager
    def decoding(self, batch: int, steps: int) -> Iterator[Callable[[int], tuple[float, int]]]:
        """A batch of texts past their first token: a function that decodes so many steps of all.

        It returns (seconds, tokens), and may be asked for `steps` in all. Tokens are counted where
        vLLM keeps them: outputs of every step would cost time that a user's do not.
        """
        from vllm import SamplingParams

        prompt, engine = self.job["decode_prompt"], self.llm.llm_engine
        scheduler = engine.engine_core.engine_core.scheduler
        # who is prefilled first decodes while the others are; one or two steps are under way
        ahead = batch * prompt // scheduler.scheduler_config.max_num_batched_tokens + 6
        parameters = SamplingParams(
            temperature=0, max_tokens=steps + ahead, ignore_eos=True, detokenize=False
        )
        prompts = [self.text(prompt) for _ in range(batch)]
        self.llm.enqueue(prompts, parameters, use_tqdm=False)

        def counts() -> list[int]:
            return [request.num_output_tokens for request in scheduler.running]

        while len(scheduler.running) < batch or min(counts()) < 2:
            engine.step()
            if not engine.has_unfinished_requests():
                raise RuntimeError(
                    f"{batch} requests never decoded together: raise max_num_seqs or the KV cache"
                )

        def advance(count: int) -> tuple[float, int]:
            before, started = sum(counts()), time.monotonic()
            for _ in range(count):
                engine.step()
            seconds = time.monotonic() - started
            if len(scheduler.running) < batch:
                raise RuntimeError(f"some of {batch} requests ended before they were measured")
            return seconds, sum(counts()) - before

        yield advance
        while engine.has_unfinished_requests():
            engine.step()

    def recovers(self, seconds: float = 5.0) -> bool:
        """After a failure: whether the engine drops what it was at, and then answers in time."""
        from vllm import SamplingParams

        engine, until = self.llm.llm_engine, time.monotonic() + seconds
        try:
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            self.llm.enqueue([self.text(8)], SamplingParams(max_tokens=1), use_tqdm=False)
            while engine.has_unfinished_requests() and time.monotonic() < until:
                engine.step()
            self._wait()
            return not engine.has_unfinished_requests()
        except Exception:  # whatever it is, this engine is of no more use
            return False

    def decode(self, batch: int) -> dict[str, Any]:
        """Tokens per second of a batch, all of which decode: the median of several stretches."""
        repeats = self.job["repeats"]
        steps = self.job["decode_tokens"] // (2 if batch >= MANY else 1)
        with self.decoding(batch, steps // 4 + repeats * steps) as advance:
            advance(steps // 4)
            took = [advance(steps) for _ in range(repeats)]
        rates = [tokens / seconds for seconds, tokens in took]
        rate = statistics.median(rates)
        return {
            "tokens_per_second": rate, "step_ms": 1e3 * batch / rate,
            "spread": (max(rates) - min(rates)) / rate,
            "prompt": self.job["decode_prompt"], "steps": steps, "repeats": repeats,
        }  # fmt: skip

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

    def profiled(self, call: Callable[[], Any]) -> tuple[dict[str, float], float]:
        """Kernel -> microseconds of a call, and those between its first and last in which none ran.

        Kernels that start early overlap, so their sum may exceed the time. On a CPU: torch operator
        -> microseconds, and none idle.
        """
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device == "cuda"
        self._wait()
        with profile(
            activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
        ) as profiler:
            call()
            self._wait()
        times: Counter[str] = Counter()
        for event in profiler.key_averages():
            if getattr(event, "is_user_annotation", False):  # a span of others, counted already
                continue
            on_gpu = str(event.device_type).endswith("CUDA")
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            if spent > 0 and on_gpu == cuda:
                times[event.key[:160]] += spent
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if str(event.device_type).endswith("CUDA")
        ]
        return dict(times), idle(spans)

    def profile_decode(self, batch: int) -> dict[str, Any]:
        """A decode step of a batch, as groups and longest kernels."""
        steps = self.job["profile_steps"]
        with self.decoding(batch, 2 + steps) as advance:
            advance(2)
            times, unused = self.profiled(lambda: advance(steps))
        step = {name: spent / steps for name, spent in times.items()}
        return {
            "decode_us": grouped(step), "decode_kernels": longest(step), "steps": steps,
            "idle_us": unused / steps, "lm_head_us": self.lm_head_microseconds(batch),
        }  # fmt: skip

    def profile_prefill(self) -> dict[str, Any]:
        """A prefill of text, as groups and longest kernels."""
        text = [self.text(self.job["profile_prompt"])]
        self.generate(text, 1)
        times, unused = self.profiled(lambda: self.generate(text, 1))
        return {
            "tokens": self.job["profile_prompt"], "prefill_us": grouped(times),
            "prefill_kernels": longest(times), "idle_us": unused,
        }  # fmt: skip

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


def _flat(caches: Any) -> list[torch.Tensor]:
    if isinstance(caches, torch.Tensor):
        return [caches]
    return [tensor for cache in caches for tensor in _flat(cache)]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that tensors lie in, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def kv_cache_bytes(config: dict[str, Any], sequences: Iterable[tuple[int, int]]) -> int:
    """Bytes of a 16-bit KV cache that holds all of these: (how many, tokens each)."""
    text = config.get("text_config", config)
    heads = text["num_attention_heads"]
    size = text.get("head_dim") or text["hidden_size"] // heads
    a_token = text["num_hidden_layers"] * 2 * text.get("num_key_value_heads", heads) * size * 2
    tokens = sum(count * -(-length // KV_BLOCK) * KV_BLOCK for count, length in sequences)
    return (tokens + 8 * KV_BLOCK) * a_token


def wait_for(path: Path | None) -> None:
    """Until it is there (None: for ever); ends this process if the one that started it does."""
    while path is None or not path.exists():
        if os.getppid() != PARENT:
            sys.exit(1)
        time.sleep(POLL)
