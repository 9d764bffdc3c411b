"""Greedy answers to samples: vLLM in this process, transformers, or a server over HTTP."""

from __future__ import annotations

import gc
import importlib.util
import io
import logging
import os
import ssl
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, cast

from qig_serve.errors import UserError
from qig_serve.http_clients import openai_client, proxy_in_words, within, without_password
from qig_serve.model_directory import load_processor, model_dtype, read_config, text_config
from qig_serve.rendering import check_samples
from qig_serve.samples import Sample, data_url, load_image

Engine = Literal["auto", "vllm", "transformers", "forced", "none"]

_CONTEXT = 8192  # tokens of context that vLLM is asked for, where the model has more
_CPU_SEQUENCES = 32
_HTTP_AT_ONCE = 8
_BATCH = 32
_THOUGHTS = ("reasoning", "reasoning_content")
"""Where servers put what a model thinks, apart from its answer: vLLM's, and older ones."""
_FIRST_SECONDS = 30
"""How long a server may take to name its model; an answer may take minutes."""
_ANSWER_SECONDS = 600
"""How long it may take for an answer, repeated requests included."""


def choose_engine(engine: Engine) -> Literal["vllm", "transformers", "forced", "none"]:
    """vLLM where it is installed; UserError when it is asked for and missing."""
    installed = importlib.util.find_spec("vllm") is not None
    if engine == "auto":
        return "vllm" if installed else "transformers"
    if engine == "vllm" and not installed:
        raise UserError(
            "vLLM is not installed: install qig-serve[cpu] or qig-serve[cuda], or use "
            "--engine transformers"
        )
    return engine


def generate(
    directory: Path,
    samples: Sequence[Sample],
    engine: Engine,
    max_tokens: int,
    progress: Callable[[int, int], None],
) -> list[str]:
    """The greedy answer to each sample, in the model's own dtype."""
    if choose_engine(engine) == "vllm":
        return _through_vllm(directory, samples, max_tokens, progress)
    return _through_transformers(directory, samples, max_tokens, progress)


def _chat(sample: Sample, picture: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation in OpenAI form, with `picture` making the image parts."""
    return [
        {
            "role": m["role"],
            "content": [picture(p["image"]) if p["type"] == "image" else p for p in m["content"]],
        }
        for m in sample.messages
    ]


@contextmanager
def _restored_threads() -> Iterator[None]:
    """vLLM's CPU worker binds this process to its cores and sets torch's threads: undo that."""
    import torch

    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        yield
    finally:
        if cores is not None:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def _through_vllm(
    directory: Path,
    samples: Sequence[Sample],
    max_tokens: int,
    progress: Callable[[int, int], None],
) -> list[str]:
    # One process for engine and worker: models then load one after another in seconds.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from qig_serve.serving.folders import check_folders

    check_folders(cuda=False)  # before vLLM is imported, which writes to some of them
    # What vLLM says while it is imported, in the middle of a table's making.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    from tqdm import tqdm
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    from qig_serve.vllm_plugin import compat

    class Bar(tqdm):
        """What vLLM takes for its progress bar; draws nothing and reports to `progress`."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "mininterval": 3600})

        def update(self, n: float | None = 1) -> bool | None:
            super().update(n)
            progress(min(int(self.n), len(samples)), len(samples))
            return None

    if current_platform.is_cuda():
        check_folders(cuda=True)
    check_samples(load_processor(directory), samples)
    most_images = max((len(s.images) for s in samples), default=0)
    settings: dict[str, Any] = {}
    if current_platform.is_cpu():
        settings = {"enforce_eager": True, "max_num_seqs": _CPU_SEQUENCES}
    length = _context_length(directory)
    if length is not None:
        settings["max_model_len"] = min(length, _CONTEXT)
    with _restored_threads():
        llm = LLM(
            model=str(directory),
            limit_mm_per_prompt={"image": max(1, most_images), "video": 0},
            mm_processor_cache_gb=0,  # no picture is asked about twice
            use_tqdm_on_load=False,
            seed=0,
            **settings,
        )
        try:
            outputs = llm.chat(
                [
                    _chat(s, lambda i: {"type": "image_pil", "image_pil": load_image(i)})
                    for s in samples
                ],
                SamplingParams(temperature=0, max_tokens=max_tokens),
                use_tqdm=Bar,
            )
            return [output.outputs[0].text for output in outputs]
        except (ValueError, compat.validation_error()) as error:
            raise UserError(f"vLLM refuses a sample: {' '.join(str(error).split())}") from error
        finally:
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


def _context_length(directory: Path) -> int | None:
    """max_position_embeddings of the language model, None where config.json does not say."""
    length = text_config(read_config(directory)).get("max_position_embeddings")
    return int(length) if length else None


def _through_transformers(
    directory: Path,
    samples: Sequence[Sample],
    max_tokens: int,
    progress: Callable[[int, int], None],
) -> list[str]:
    from qig_serve.evaluation.models import load_model

    processor = load_processor(directory)
    check_samples(processor, samples)
    return generate_with(
        load_model(directory, model_dtype(directory)),
        processor,
        samples,
        max_tokens,
        progress,
    )


def generate_with(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    max_tokens: int,
    progress: Callable[[int, int], None],
) -> list[str]:
    """Greedy answers of a transformers model, in batches padded on the left."""
    import torch

    from qig_serve.evaluation.models import batches, model_inputs, prompt_text

    texts = [prompt_text(processor, s) for s in samples]
    answers = [""] * len(samples)
    order = sorted(range(len(samples)), key=lambda i: len(texts[i]) + len(samples[i].answer or ""))
    done = 0
    progress(0, len(samples))
    for group in batches(order, samples, _BATCH):
        inputs = model_inputs(
            processor, [texts[i] for i in group], [samples[i] for i in group], model
        )
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=max_tokens,
            )
        new = out[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(
            group, processor.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            answers[i] = text
        done += len(group)
        progress(done, len(samples))
    return answers


def _text(value: Any) -> str:
    """What should be text in a server's answer; TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"text is wanted, not {type(value).__name__}")
    return value


def _in_words(error: Exception) -> str:
    """Why a request failed; openai's client raises anything at what is no answer of this API."""
    from openai import APIConnectionError, OpenAIError

    reason = " ".join(str(error).split())[:400]
    if isinstance(error, APIConnectionError) and (cause := error.__cause__):
        return f"{reason} {type(cause).__name__}: {' '.join(str(cause).split())[:400]}"
    if isinstance(error, (OpenAIError, TimeoutError)):
        return reason or type(error).__name__
    return f"what came is no answer of OpenAI's API: {type(error).__name__}: {reason}"


def _no_model(url: str, error: Exception) -> UserError:
    """Why a server did not name its model, and what to look at where the reason does not say it."""
    from openai import APIConnectionError, APIStatusError

    status = error.status_code if isinstance(error, APIStatusError) else None
    below: list[BaseException] = [error]
    while cause := below[-1].__context__:
        below.append(cause)
    unreached = isinstance(error, (APIConnectionError, TimeoutError)) and any(
        isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError) for cause in below
    )
    if unreached:
        advice = ": is it running, at this address?"
    elif status in (401, 403):
        advice = ": is OPENAI_API_KEY its key?"
    elif status == 404 or not isinstance(error, (APIConnectionError, APIStatusError)):
        advice = ": is this the address of a server with OpenAI's API?"
    else:
        advice = ""
    does = "answers with an error" if status else "does not answer"
    return UserError(
        f"the server at {without_password(url)} {does}{proxy_in_words(url)} "
        f"({_in_words(error)}){advice}"
    )


def ask_server(
    url: str,
    samples: Sequence[Sample],
    max_tokens: int,
    progress: Callable[[int, int], None],
    model: str | None,
) -> tuple[list[str | None], list[str]]:
    """Answers from an OpenAI-compatible server, None where the request failed, and the reasons.

    A failed request is not an answer: it is counted by itself and never scored.
    """
    key = os.environ.get("OPENAI_API_KEY") or "none"
    client = openai_client(url, key, timeout=_ANSWER_SECONDS, purpose="--server")
    if not model:
        first = client.with_options(timeout=_FIRST_SECONDS, max_retries=0)
        try:
            model = within(_FIRST_SECONDS, lambda: _text(first.models.list().data[0].id))
        except Exception as error:
            raise _no_model(url, error) from None

    def ask(sample: Sample) -> tuple[str | None, str]:
        messages = _chat(sample, lambda i: {"type": "image_url", "image_url": {"url": data_url(i)}})
        try:
            reply: Any = within(
                _ANSWER_SECONDS,
                lambda: client.chat.completions.create(
                    model=str(model),
                    messages=cast(Any, messages),
                    temperature=0,
                    max_tokens=max_tokens,
                ),
            )
            message = reply.choices[0].message
            if message.content is None and any(getattr(message, key, None) for key in _THOUGHTS):
                return None, f"sample {sample.id}: thoughts and no answer: raise --max-tokens"
            return _text("" if message.content is None else message.content), ""
        except Exception as error:
            return None, f"sample {sample.id}: {_in_words(error)}"

    left = iter(enumerate(samples))
    done: SimpleQueue[tuple[int, str | None, str]] = SimpleQueue()

    def work() -> None:
        for index, sample in left:  # shared: each takes the next
            done.put((index, *ask(sample)))

    for _ in range(_HTTP_AT_ONCE):  # daemons: Ctrl-C does not wait for a server that hangs
        threading.Thread(target=work, daemon=True).start()
    answers: list[str | None] = [None] * len(samples)
    failures = [""] * len(samples)
    for count in range(1, len(samples) + 1):
        index, answers[index], failures[index] = done.get()
        progress(count, len(samples))
    return answers, [failure for failure in failures if failure]
