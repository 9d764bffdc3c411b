"""What `qig-serve serve` makes of vLLM's flags."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from qig_serve import serve
from qig_serve.batch import generate
from qig_serve.errors import UserError
from qig_serve.serving.limits import Limits
from qig_serve.vllm_plugin import compat


def _check(checkpoint: Path, *flags: str) -> None:
    with serve.checked_values(serve.parse_flags(checkpoint, flags)):
        pass


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "1"),
        (["--kv-cache-memory-bytes", "1G"], None),
        (["--kv-cache-memory-b", "1G"], None),
        (["--gpu-memory-utilization=0.5"], None),
        (["--config", "options.yaml"], None),
    ],
    ids=["default", "bytes", "abbreviated", "share", "config-file"],
)
def test_cpu_cache_is_small_unless_asked_for(
    flags: list[str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serve, "CPU_CACHE_GIB", 1)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "")  # so that it is taken away afterwards
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    (tmp_path / "options.yaml").write_text("gpu-memory-utilization: 0.4\n")
    args = serve.parse_flags(Path("model"), flags)
    assert args.served_model_name == ["model"]  # once, where the folder and its path are called so
    assert os.environ.get("VLLM_CPU_KVCACHE_SPACE") == expected


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--port 65536", "--port is 65536: there are the ports 0 to 65535"),
        ("--seed -1", "--seed is -1: it must be a number from 0 to 4294967295"),
        ("--api-key=", "--api-key is empty, as where a variable is not set"),
        ("--headless --api-server-count 2", "--headless starts no API server"),
        ("--config /nowhere", "with these flags: Config file must be of a yaml"),
        ("--generation-config /nowhere", "/nowhere/generation_config.json does not exist"),
        ('--override-generation-config {"top_p":7}', "generation-config: top_p is 7, and must be"),
    ],
)
def test_flags_are_refused(checkpoint: Path, flags: str, wanted: str) -> None:
    with pytest.raises(UserError, match=re.escape(wanted)):
        _check(checkpoint, *flags.split())


@pytest.mark.parametrize(
    "flag", ["-tp", "-pp", "-dp", "--kv-cache-memory-bytes", "--api-server-count"]
)
@pytest.mark.parametrize("size", ["0", "-2"])
def test_sizes_below_one_are_refused(flag: str, size: str) -> None:
    with pytest.raises(UserError, match=rf"--[a-z-]+ is {size}: it must be at least 1"):
        serve.parse_flags(Path("model"), [flag, size])


def test_a_value_that_vllm_refuses_is_one_sentence() -> None:
    from vllm.config import CacheConfig, SchedulerConfig

    said = "vLLM does not serve DIR with these flags: "
    with (
        pytest.raises(UserError, match=f"{said}gpu_memory_utilization: "),
        serve.one_sentence("DIR"),
    ):
        CacheConfig(gpu_memory_utilization=7)
    with pytest.raises(UserError, match=f"{said}.*max_num_seqs: "), serve.one_sentence("DIR"):
        SchedulerConfig(max_model_len=64, is_encoder_decoder=False, max_num_seqs=0)


def test_a_refusal_without_a_word_says_where_it_came_from() -> None:
    """Of vLLM's many checks some are no more than `assert`, in pydantic's models too."""
    from pydantic import BaseModel, Field, Json, field_validator

    class Settings(BaseModel):
        size: int
        names: Json[list[str]] = Field(default=[])

        @field_validator("size")
        @classmethod
        def check(cls, size: int) -> int:
            if size <= 0:  # `assert` has a text in tests
                raise AssertionError
            return size

    at = rf": (size: )?AssertionError at {re.escape(__file__)}, line \d+: raise AssertionError$"
    with pytest.raises(UserError, match=at), serve.one_sentence("DIR"):
        Settings(size=0)
    with pytest.raises(UserError, match=at), serve.one_sentence("DIR"):
        Settings.check(0)
    with pytest.raises(UserError, match="names: Invalid JSON"), serve.one_sentence("DIR"):
        Settings.model_validate({"size": 1, "names": "["})
    for error in (NotImplementedError(), KeyError()):
        at = rf"{type(error).__name__} at .*: raise error$"
        with pytest.raises(UserError, match=at), serve.one_sentence("DIR"):
            raise error


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--load-format nonsense", "Load format .nonsense. is not supported"),
        ("--block-size 7", "block_size: CPU_ATTN takes .*32.*, not 7"),
        ("--block-size 0", "block_size: Input should be greater than 0"),
        ("--max-num-seqs 0", ".*; max_num_seqs: Input should be greater than or equal to 1"),
        ("--max-model-len 0", "max_model_len must be a positive integer"),
        ("--tokenizer-mode nonsense", "No tokenizer registered for tokenizer_mode='nonsense'"),
        ("--attention-backend nonsense", "Unknown attention backend: 'NONSENSE'"),
        ("--reasoning-parser nonsense", "Reasoning parser 'nonsense' not found"),
        ("--enable-auto-tool-choice", "Error: --enable-auto-tool-choice requires"),
        ("--enable-auto-tool-choice --tool-call-parser x", "invalid tool call parser: x "),
        ("--chat-template /nowhere", "The supplied chat template string ./nowhere. appears"),
        ("--middleware nonsense", "middleware: nonsense cannot be imported .*: write MODULE.NAME"),
        ("--middleware os.path", "middleware: os.path is no class"),
        ("--worker-cls os.nonsense", "worker_cls: os.nonsense cannot be imported .*no attribute"),
        ("--distributed-executor-backend x", "distributed_executor_backend: x cannot be imported"),
        ("--logits-processors os.path", "logits_processors: os.path .*: write MODULE:NAME"),
        ("--model-impl nonsense", "model_impl: nonsense is none of auto, vllm"),
        ("--otlp-traces-endpoint http://[", "Invalid IPv6 URL"),
        (
            '--compilation-config {"mode":1,"backend":"no.such"}',
            r"compilation_config.backend: no.such is none of torch's, and cannot be imported \(No",
        ),
        ("--chat-template /", "chat_template: / is a folder"),
        ("--allowed-local-media-path /nowhere", "allowed_local_media_path: /nowhere is no folder"),
        ("--tool-parser-plugin /nowhere", "tool_parser_plugin: /nowhere is no file"),
        ("--ssl-keyfile /nowhere", "ssl_keyfile: /nowhere is no file"),
        (f"--ssl-keyfile {__file__}", "ssl_keyfile: give --ssl-certfile with it"),
        (f"--ssl-certfile {__file__}", f"no server can be started with ssl_certfile {__file__}: "),
    ],
)
def test_values_are_refused_before_the_engine(checkpoint: Path, flags: str, wanted: str) -> None:
    said = f"vLLM does not serve .* with these flags: {wanted}"
    with pytest.raises(UserError, match=said) as told:
        _check(checkpoint, *flags.split())
    assert "\n" not in str(told.value)


def test_values_that_fit_are_left_as_they_are(checkpoint: Path) -> None:
    args = serve.parse_flags(checkpoint, ["--block-size", "64", "--max-model-len", "128"])
    before = repr(args)
    with serve.checked_values(args):
        assert repr(args) == before


def test_settings_are_made_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are not taken for those of other arguments."""
    from vllm import AsyncEngineArgs, EngineArgs
    from vllm.usage.usage_lib import UsageContext

    made = []
    make = EngineArgs.create_engine_config

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(EngineArgs, "create_engine_config", counted)
    args = serve.parse_flags(checkpoint, ["--max-model-len", "128"])
    for length, times in ((128, 1), (64, 2)):
        asked = argparse.Namespace(**{**vars(args), "max_model_len": length})
        engine_args = AsyncEngineArgs.from_cli_args(asked)
        context = UsageContext.OPENAI_API_SERVER
        with serve.checked_values(args):
            config = engine_args.create_engine_config(usage_context=context)
        assert config is made[-1] and config.model_config.max_model_len == length
        assert len(made) == times
        made.clear()


def test_vllm_is_left_as_it_was_where_nothing_was_started(checkpoint: Path) -> None:
    from vllm import AsyncEngineArgs

    class FailedError(Exception):
        pass

    with (
        pytest.raises(FailedError),
        serve.checked_values(serve.parse_flags(checkpoint, [])),
    ):
        assert "create_engine_config" in vars(AsyncEngineArgs)
        raise FailedError
    with pytest.raises(UserError, match="block_size"):  # which is looked at after the making
        _check(checkpoint, "--block-size", "7")
    assert "create_engine_config" not in vars(AsyncEngineArgs)


@pytest.fixture
def own_signals() -> Iterator[None]:
    """vLLM's server takes SIGTERM to itself as it starts."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
def test_an_address_that_cannot_be_listened_on(checkpoint: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {
            f"--host 127.0.0.1 --port {port}": "Address already in use",
            "--host 999.1.1.1 --port 8000": ".*",
            f"--uds {tmp_path}/none/socket": "No such file or directory",
        }
        for flags, said in cases.items():
            with pytest.raises(UserError, match=f"cannot listen on {flags}: {said}: give another"):
                serve.serve(checkpoint, flags.split(), Limits())


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_commands_refuse_them_before_the_engine(
    checkpoint: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "What?"}]}}
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(request))
    monkeypatch.setattr(compat, "engine_client", None)
    with pytest.raises(UserError, match="block_size"):
        if command == "serve":
            serve.serve(checkpoint, ["--block-size", "7"], Limits())
        else:
            generate(checkpoint, source, output, flags=["--block-size", "7"])
    assert not output.exists()


@pytest.mark.parametrize(
    ("host", "encrypted", "wanted"),
    [
        (None, False, "http://localhost:8000/"),
        ("0.0.0.0", True, "https://localhost:8000/"),
        ("::1", False, "http://[::1]:8000/"),
        ("gpu-box", False, "http://gpu-box:8000/"),
    ],
    ids=["default", "all", "six", "named"],
)
def test_the_address_of_the_web_page(host: str | None, encrypted: bool, wanted: str) -> None:
    assert serve.page_address(host, 8000, encrypted) == wanted
