"""Models of published widths, cut to two decoder blocks: quantized, served, asked about a picture.

    python tests/benchmarks/real_width.py [--models Qwen3.5-4B ...] [--scheme w3a16 --method rtn]

Weights are random and nothing is downloaded: the decoder's sizes are those of the published
config.json, one block of each kind; the vision tower has two layers of a like width; vocabulary and
pictures are the tiny models'. Each model goes the way of a user's: `qig-serve quantize`, then
`qig-serve serve` on this machine, and over HTTP

    a question about a picture, greedily; the tokens must be as likely to plain transformers, with
        the dequantized weights in bfloat16, as its own choice but for rounding (helpers)
    the same of another picture: the first token's log-probabilities must be others

Exit status 1 where they are not. --json adds sizes, seconds and peak memory to a file. Methods that
compensate (gptq, qig+) factor a Hessian of 32768 x 32768 for Mistral Small's MLP, so models are
rounded to nearest unless another method is given.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_block import machine
from helpers import tiny_models
from helpers.family_answers import (
    QUESTION,
    TOKENS,
    as_vllm_computes_it,
    hugging_face_tokens,
    messages,
)
from helpers.server_process import Server, start_server


@dataclass(frozen=True)
class RealModel:
    """A published model: what its configuration has otherwise than the tiny one of its family."""

    family: str
    text: dict[str, Any]
    vision: dict[str, Any] = field(default_factory=dict)

    def config(self, tokenizer: Any) -> Any:
        """The configuration, with the special tokens of a tokenizer."""
        from transformers import CONFIG_MAPPING

        fields = tiny_models.FAMILIES[self.family].config(tokenizer).to_dict()
        text, vision = fields.pop("text_config"), fields.pop("vision_config")
        for derived in ("per_layer_config", "layer_types"):
            text.pop(derived, None)
        return CONFIG_MAPPING[tiny_models.row_of(self.family)](
            text_config={**text, "num_hidden_layers": 2, **self.text},
            vision_config={**vision, **self.vision},
            **fields,
        )


_DELTA_NET = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
    "initializer_range": 0.02,
}
"""Of Qwen3.5 and 3.6: a block of each kind."""
_GEMMA4_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
}

MODELS = {
    "Qwen3.5-4B": RealModel(
        "qwen3_5",
        {
            "hidden_size": 2560,
            "intermediate_size": 9216,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 256,
            **_DELTA_NET,
        },
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2560,
        },
    ),
    "Gemma-4-31B": RealModel(
        "gemma4",
        {
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "global_head_dim": 512,
            "num_global_key_value_heads": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 1024,
        },
        _GEMMA4_VISION,
    ),
    "Gemma-4-E2B": RealModel(
        "gemma4_e2b",
        {
            "num_hidden_layers": 4,  # of which the last two read the keys of the first
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "hidden_size_per_layer_input": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "global_head_dim": 512,
            "sliding_window": 512,
        },
        _GEMMA4_VISION,
    ),
    "Gemma-4-26B-A4B": RealModel(
        "gemma4_moe",
        {
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "moe_intermediate_size": 704,
            "num_experts": 128,
            "top_k_experts": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "global_head_dim": 512,
            "num_global_key_value_heads": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 1024,
        },
        _GEMMA4_VISION,
    ),
    "Mistral-Small-3.2-24B": RealModel(
        "mistral3",
        {
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "initializer_range": 0.02,
        },
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "head_dim": 64,
        },
    ),
    "Qwen3-VL-30B-A3B": RealModel(
        "qwen3_vl_moe",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_local_experts": 128,  # in published files `num_experts`
            "num_experts_per_tok": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            "initializer_range": 0.02,
        },
        {
            "depth": 2,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "deepstack_visual_indexes": [0],  # fewer than blocks, as in every published model
        },
    ),
    "Qwen3.5-35B-A3B": RealModel(
        "qwen3_5_moe",
        {
            "hidden_size": 2048,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            **_DELTA_NET,
        },
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 2048,
        },
    ),
}


def build(model: RealModel, directory: Path) -> Path:
    """Writes the model, in bf16."""
    tokenizer = tiny_models.make_tokenizer(tiny_models.FAMILIES[model.family])
    config = model.config(tokenizer)
    tiny_models.write_random(model.family, config, tokenizer, directory)
    return as_vllm_computes_it(directory, model.family)


def in_a_process(*arguments: str) -> tuple[float, float]:
    """Runs `python -m ...`; seconds, and peak resident memory in GB. RuntimeError if it fails."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", *arguments], env=os.environ)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments[:2])} ended with status {process.returncode}")
    return time.monotonic() - began, usage.ru_maxrss * 1024 / 1e9


def size(directory: Path) -> float:
    """GB of tensors."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e9


def ask(server: Server, question: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer of the chat route, with token ids and log-probabilities."""
    body = {
        "model": "tiny",
        "messages": question,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 5,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=600)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def about_another_picture() -> list[dict[str, Any]]:
    """The same question about a picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (112, 64), "red").save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTION},
    ]
    return [{"role": "user", "content": parts}]


def first_logprobs(answer: dict[str, Any]) -> dict[str, float]:
    """Of the first token of an answer: the best five, nats."""
    first = answer["choices"][0]["logprobs"]["content"][0]
    return {entry["token"]: entry["logprob"] for entry in first["top_logprobs"]}


def go_through(name: str, scheme: str, method: str, folder: Path) -> dict[str, Any]:
    """Everything of one model; what came of it. AssertionError where an answer is wrong."""
    began = time.monotonic()
    source = build(MODELS[name], folder / "source")
    built = time.monotonic() - began
    calib = folder / "calib.jsonl"
    lines = [json.dumps({"messages": messages(), "answer": "a large red star"})] * 2
    calib.write_text("\n".join(lines) + "\n")
    options = ["--scheme", scheme, "--method", method, "--calib", str(calib), "--samples", "2"]
    checkpoint = folder / scheme
    seconds, memory = in_a_process(
        "qig_serve", "quantize", str(source), "--output", str(checkpoint), *options, "--quiet"
    )
    source_size = size(source)
    shutil.rmtree(source)

    began = time.monotonic()
    server = start_server(checkpoint, folder, "--dtype", "bfloat16")
    started = time.monotonic() - began
    try:
        began = time.monotonic()
        answer = ask(server, messages())
        answered = time.monotonic() - began
        other = ask(server, about_another_picture())
    finally:
        server.stop()
    tokens = answer["choices"][0]["token_ids"]
    assert len(tokens) == TOKENS
    assert first_logprobs(answer) != first_logprobs(other), "the picture does not reach the decoder"
    assert hugging_face_tokens(checkpoint, "bfloat16", tokens) == tokens
    return {
        "family": MODELS[name].family,
        "scheme": scheme,
        "method": method,
        "source_gb": round(source_size, 2),
        "checkpoint_gb": round(size(checkpoint), 2),
        "build_seconds": round(built, 1),
        "quantize_seconds": round(seconds, 1),
        "quantize_peak_gb": round(memory, 1),
        "server_start_seconds": round(started, 1),
        "answer_seconds": round(answered, 2),
        "prompt_tokens": answer["usage"]["prompt_tokens"],
        "tokens": tokens,
    }


def main() -> int:
    """Prints a line per model; exit status 1 if an answer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--scheme", nargs="+", default=["w3a16"], choices=["w3a16", "w4a8"])
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--json", type=Path, help="add what came out to this file")
    args = parser.parse_args()
    wrong = 0
    for name in args.models:
        for scheme in args.scheme:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    row = go_through(name, scheme, args.method, Path(folder))
                except AssertionError as error:
                    row, wrong = {"wrong": str(error)}, wrong + 1
            row["machine"] = machine(torch.device("cpu"))
            print(name, json.dumps(row), flush=True)
            if args.json:
                found = json.loads(args.json.read_text()) if args.json.exists() else {}
                found[f"{name} {scheme} {args.method}"] = row
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
