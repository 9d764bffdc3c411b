"""What this process's server knows of its engine: what it serves, and why it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prometheus_client import Gauge
from starlette.types import Message, Receive, Scope

from qig_serve.serving.describe import Report, describe
from qig_serve.vllm_plugin import patches


class EngineWatch:
    """Follows the application's lifespan; one object per server process."""

    def __init__(self) -> None:
        self.stopping = False
        """Whether the server was asked to stop, and only finishes what is running."""
        self.died = False
        """Whether the engine died, rather than being stopped: the exit status depends on it."""
        self.report: dict[str, Any] | None = None
        """What /v1/quantization answers; None before the start."""

    def follow(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` of the application's lifespan, noting what begins and what ends it."""

        async def followed() -> Message:
            message = await receive()
            client: Any = scope["app"].state.engine_client
            if message["type"] == "lifespan.startup":
                report = describe_engine(client)
                publish_metrics(report)
                self.report = report.as_json()
                patches.call_before_shutdown(client, self._note_stopping)
                patches.remember_only_sent_pictures(client)
                patches.blame_dead_grammars(client)
            elif message["type"] == "lifespan.shutdown":
                self.died = bool(client.errored) and not self.stopping
            return message

        return followed

    def _note_stopping(self) -> None:
        self.stopping = True


THIS_PROCESS = EngineWatch()
"""vLLM makes the middleware that fills it, and `qig-serve serve` reads it when vLLM returns."""


def describe_engine(client: Any) -> Report:
    """The checkpoint that the engine loaded, as it was asked to serve it."""
    config = client.vllm_config
    tower = config.model_config.multimodal_config
    return describe(
        Path(config.model_config.model),
        config.model_config.dtype,
        config.parallel_config.tensor_parallel_size,
        config.parallel_config.pipeline_parallel_size,
        split_vision_tower=not (tower.language_model_only or tower.mm_encoder_tp_mode == "data"),
        expert_parallel=config.parallel_config.enable_expert_parallel,
    )


def publish_metrics(report: Report) -> None:
    """Gauges for /metrics: which kernel serves how many layers, and the weights' bytes."""
    scheme = report.manifest.scheme
    layers = Gauge(
        "qig_layers", "Quantized layers by kernel", ["scheme", "kernel"], multiprocess_mode="max"
    )
    for kernel, count in report.kernels.items():
        layers.labels(scheme, kernel).set(count)
    stored = Gauge(
        "qig_weight_bytes", "Bytes of stored weights", ["scheme", "part"], multiprocess_mode="max"
    )
    stored.labels(scheme, "quantized").set(report.quantized_bytes)
    stored.labels(scheme, "other").set(report.other_bytes)
