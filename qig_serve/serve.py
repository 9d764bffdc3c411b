"""The OpenAI-compatible server: vLLM's own, embedded, with safer defaults.

vLLM's `serve` command is called by import, with every flag of its own. What is added goes through
vLLM's own openings: `--middleware` (serving/safeguards.py) and VLLM_MEDIA_CONNECTOR
(serving/media.py).
"""

from __future__ import annotations

import argparse
import copy
import errno
import importlib
import inspect
import operator
import os
import socket
import ssl
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

from qig_serve.errors import UserError
from qig_serve.model_directory import (
    check_generation,
    check_texts,
    find_model,
    model_name,
    read_json,
    read_manifest,
)
from qig_serve.serving.adapter_tensors import check_adapter_tensors
from qig_serve.serving.adapters import check_adapters
from qig_serve.serving.folders import check_folders
from qig_serve.serving.limits import Limits

DRAIN_SECONDS = 30
"""How long SIGTERM waits for requests that are running, unless --shutdown-timeout is given."""

SEQUENCES_PER_REQUEST = 128
"""Answers (`n`), and prompts, that one request may ask for; vLLM's 16,384 and 1,024 let one
request keep all others waiting for minutes. VLLM_MAX_N_SEQUENCES and VLLM_MAX_COMPLETION_PROMPTS
change them."""

CPU_CACHE_GIB = 4
"""Memory for the KV cache on a CPU, or a quarter of what is free if that is less; vLLM would take
(and touch, before it answers) nine tenths of the machine. --kv-cache-memory-bytes,
--gpu-memory-utilization and VLLM_CPU_KVCACHE_SPACE change it."""

_CANNOT_LISTEN = (
    *(errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES, errno.ENOENT),
    *(socket.EAI_NONAME, socket.EAI_AGAIN, socket.EAI_ADDRFAMILY),
)
"""What binding a socket fails with, which vLLM does before its engine starts."""

_REFUSALS = (
    *(ValueError, TypeError, LookupError, OSError),
    *(NotImplementedError, AssertionError),
)
"""What vLLM's checks of flags' values raise, beside its own exception, which is none of these."""

_NO_MODULES = ("", "auto", "mp", "uni", "ray", "external_launcher")
"""Values of flags that may name a class by its module."""

_FILES = (
    *("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"),
    *("log_config_file", "tool_parser_plugin", "reasoning_parser_plugin"),
)

MIDDLEWARE = "qig_serve.serving.safeguards.Safeguards"


def parse_flags(directory: Path, flags: Sequence[str]) -> argparse.Namespace:
    """vLLM's `serve` arguments for a checkpoint: the user's flags, and our defaults.

    Registers the plugin and sets the process up as vLLM's own command line does. UserError for a
    flag that would run code from a checkpoint, sizes below 1, texts of it that are damaged, and
    folders that cannot be written; vLLM's parser exits with 2 for one it refuses.
    """
    from qig_serve.serving.describe import unsupported_version

    check_texts(directory)
    check_folders(cuda=False)  # before vLLM is imported, which writes to some of them
    if version := unsupported_version():
        raise UserError(version)

    import psutil  # vLLM brings it
    from vllm import EngineArgs
    from vllm.platforms import current_platform

    from qig_serve.vllm_plugin import compat, register

    if current_platform.is_cuda():
        check_folders(cuda=True)
    register()
    compat.cli_environment()()
    names = {flag.partition("=")[0].replace("_", "-") for flag in flags}
    words = ["serve", str(directory), *flags]
    if "--shutdown-timeout" not in names:
        words += ["--shutdown-timeout", str(DRAIN_SECONDS)]
    if "--served-model-name" not in names:
        names_of_model = dict.fromkeys((model_name(directory), str(directory)))
        words += ["--served-model-name", *names_of_model]
    command = compat.serve_command()
    parser = compat.argument_parser()(prog="qig-serve")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    with one_sentence(directory):  # of a file of flags (--config)
        args: argparse.Namespace = parser.parse_args(words)
    if args.trust_remote_code:
        raise UserError(
            "--trust-remote-code is refused: it would run Python code that comes with a "
            "checkpoint, and qig checkpoints never need it"
        )
    sizes = ["tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"]
    sizes += ["kv_cache_memory_bytes", "num_gpu_blocks_override", "h11_max_header_count"]
    sizes += ["h11_max_incomplete_event_size", *([] if args.headless else ["api_server_count"])]
    for flag in sizes:
        if (size := getattr(args, flag, None)) is not None and size < 1:
            raise UserError(f"--{flag.replace('_', '-')} is {size}: it must be at least 1")
    if args.headless and args.api_server_count:
        raise UserError("--headless starts no API server: leave --api-server-count out")
    if not 0 <= args.port < 1 << 16:
        raise UserError(f"--port is {args.port}: there are the ports 0 to 65535")
    if not 0 <= (args.seed or 0) < 1 << 32:
        raise UserError(f"--seed is {args.seed}: it must be a number from 0 to {(1 << 32) - 1}")
    if not all(args.api_key or ["none"]):
        raise UserError(  # vLLM would serve whoever asks
            "--api-key is empty, as where a variable is not set: give a key, or leave --api-key out"
        )
    args.model = args.model_tag or args.model
    with one_sentence(directory):
        command.validate(args)
    usual_share = EngineArgs.gpu_memory_utilization
    if args.kv_cache_memory_bytes is None and args.gpu_memory_utilization == usual_share:
        space = min(CPU_CACHE_GIB, psutil.virtual_memory().available // 2**30 // 4)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, space)))
    if args.pipeline_parallel_size > 1 and args.enforce_eager and current_platform.is_cpu():
        raise UserError(  # it would answer the first request with a KeyError
            "--enforce-eager and --pipeline-parallel-size do not go together on a CPU: vLLM makes "
            "the buffers between the stages when it compiles; leave --enforce-eager out"
        )
    return args


@contextmanager
def one_sentence(model: Path | str) -> Iterator[None]:
    """UserError where vLLM refuses the value of a flag, with a page of its own or a stack trace."""
    from pydantic import ValidationError  # vLLM's settings are checked by it

    from qig_serve.vllm_plugin import compat

    try:
        yield
    except ValidationError as error:
        refused = error.errors(include_url=False, include_input=False)
        places = [".".join(map(str, one["loc"])) for one in refused]
        causes = [(one.get("ctx", {}).get("error"), one["msg"]) for one in refused]
        texts = [_said(c) if isinstance(c, Exception) else message for c, message in causes]
        pairs = zip(places, texts, strict=True)
        raise _refused(
            model, "; ".join(f"{at}: {text}" if at else text for at, text in pairs)
        ) from None
    except (*_REFUSALS, compat.validation_error()) as error:
        # With its cause, should the fault be one of ours.
        raise _refused(model, _said(error)) from error


def _said(cause: Exception) -> str:
    """What vLLM says of a value; the line of code that refuses it where it says nothing."""
    quoted = isinstance(cause, KeyError) and bool(cause.args)  # by str()
    if text := str(cause.args[0] if quoted else cause).strip():
        return text
    lines = traceback.extract_tb(cause.__traceback__)
    at = f" at {lines[-1].filename}, line {lines[-1].lineno}: {lines[-1].line}" if lines else ""
    return type(cause).__name__ + at


def _refused(model: Path | str, said: str) -> UserError:
    return UserError(f"vLLM does not serve {model} with these flags: {' '.join(said.split())}")


@contextmanager
def checked_values(args: argparse.Namespace) -> Iterator[None]:
    """UserError for a flag whose value vLLM refuses, before its engine takes minutes to start.

    Makes the settings, which a start inside takes, and looks up the loader, the tokenizer, the
    backends of attention and of the compiler, files, and what is named by its module.
    """
    from vllm import AsyncEngineArgs
    from vllm.model_executor.model_loader import get_model_loader

    from qig_serve.vllm_plugin import compat, patches

    with ExitStack() as stack:
        with one_sentence(args.model):
            if not args.tool_parser_plugin and not args.reasoning_parser_plugin:
                compat.parsers_check()(args)  # or they are known only when those are imported
            known = get_args(compat.model_implementations())
            if known and args.model_impl not in known:  # which vLLM takes for its own
                raise ValueError(f"model_impl: {args.model_impl} is none of {', '.join(known)}")
            _check_named(args)
            _check_files(args)
            made_of = copy.deepcopy(args)  # or it would be changed by the making
            engine_args = AsyncEngineArgs.from_cli_args(made_of)
            made = patches.settings_made_once(engine_args, headless=args.headless)
            config = stack.enter_context(made)
            get_model_loader(config.load_config)
            if not args.skip_tokenizer_init:
                compat.tokenizer_loader()(config.model_config)
            if args.otlp_traces_endpoint is not None:
                compat.span_exporter()(args.otlp_traces_endpoint).shutdown()
            if args.block_size is not None:
                _check_block_size(config)
            _check_compiler(config)
        yield


def _check_block_size(config: Any) -> None:
    """ValueError for a --block-size that the backend of attention does not take."""
    from vllm.config import set_current_vllm_config

    from qig_serve.vllm_plugin import compat

    model, kept = config.model_config, config.cache_config
    with set_current_vllm_config(config):
        backend = compat.attention_backend()(model.get_head_size(), model.dtype, kept.cache_dtype)
    if not backend.supports_block_size(kept.block_size):
        known = backend.get_supported_kernel_block_sizes()
        raise ValueError(f"block_size: {backend.get_name()} takes {known}, not {kept.block_size}")


def _check_compiler(config: Any) -> None:
    """ValueError for a backend of the compiler that is none of torch's, and cannot be imported.

    vLLM's own compilation (mode 3) takes any name for its default backend's.
    """
    from vllm.config import CompilationMode

    chosen = config.compilation_config
    torchs = (CompilationMode.STOCK_TORCH_COMPILE, CompilationMode.DYNAMO_TRACE_ONCE)
    if chosen.mode not in torchs or chosen.backend in ("eager", "inductor"):
        return
    try:
        chosen.init_backend(config)
    except Exception as error:  # of whatever the module runs as it is imported
        raise ValueError(
            f"compilation_config.backend: {chosen.backend} is none of torch's, and cannot be "
            f"imported ({error}): write its name, or MODULE.NAME"
        ) from error


def _check_named(args: argparse.Namespace) -> None:
    """ValueError for what a flag names by its module, and that is not there."""
    named = [("middleware", ".", name) for name in args.middleware]
    named += [("logits_processors", ":", name) for name in args.logits_processors or ()]
    for flag in (
        *("worker_cls", "worker_extension_cls", "scheduler_cls"),
        "distributed_executor_backend",
    ):
        if (name := getattr(args, flag)) not in (None, *_NO_MODULES):
            named.append((flag, ".", name))
    for flag, mark, name in named:
        module, _, attribute = name.rpartition(mark)
        try:
            found = operator.attrgetter(attribute)(importlib.import_module(module))
        except Exception as error:  # of whatever the module runs as it is imported
            raise ValueError(
                f"{flag}: {name} cannot be imported ({error}): write MODULE{mark}NAME"
            ) from error
        if not inspect.isclass(found) and not inspect.iscoroutinefunction(found):
            raise ValueError(f"{flag}: {name} is no class")


def _check_files(args: argparse.Namespace) -> None:
    """ValueError for files that are not there, and for certificates of which no server can start.

    UserError for settings of generation that no request can be answered with.
    """
    from uvicorn.config import create_ssl_context  # vLLM brings it

    paths = {flag: path for flag in _FILES if (path := getattr(args, flag, None))}
    for flag, path in paths.items():
        if not os.path.isfile(path):
            raise ValueError(f"{flag}: {path} is no file")
    if os.path.isdir(args.chat_template or ""):
        raise ValueError(f"chat_template: {args.chat_template} is a folder")
    if args.allowed_local_media_path and not os.path.isdir(args.allowed_local_media_path):
        raise ValueError(f"allowed_local_media_path: {args.allowed_local_media_path} is no folder")
    if args.generation_config not in ("auto", "vllm"):
        file = Path(args.generation_config, "generation_config.json")
        check_generation(file, read_json(file))
    check_generation("--override-generation-config", args.override_generation_config)
    if not args.ssl_keyfile and not args.ssl_certfile:
        return
    if not args.ssl_certfile:
        raise ValueError("ssl_keyfile: give --ssl-certfile with it")
    version, wanted = ssl.PROTOCOL_TLS_SERVER, args.ssl_cert_reqs
    files = (args.ssl_certfile, args.ssl_keyfile)
    try:
        create_ssl_context(*files, None, version, wanted, args.ssl_ca_certs, args.ssl_ciphers)
    except (OSError, ValueError) as error:
        given = ", ".join(f"{flag} {path}" for flag, path in paths.items() if flag[:3] == "ssl")
        raise ValueError(f"no server can be started with {given}: {error}") from error


def set_environment(limits: Limits) -> None:
    """What vLLM reads from the environment, in this process and those it starts."""
    limits.to_environment()
    os.environ["VLLM_MEDIA_CONNECTOR"] = "qig"
    os.environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] = "0"
    os.environ["VLLM_MAX_IMAGE_PIXELS"] = str(limits.max_image_pixels)
    os.environ.setdefault("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", str(limits.max_body_mb))
    for name in ("VLLM_MAX_N_SEQUENCES", "VLLM_MAX_COMPLETION_PROMPTS"):
        os.environ.setdefault(name, str(SEQUENCES_PER_REQUEST))


def serve(model: Path | str, flags: Sequence[str], limits: Limits) -> int:
    """Serve until stopped; 0 if it was asked to stop, 1 if its engine died.

    model: the checkpoint's directory, or its org/name where the hub's local cache has it.
    UserError if that is no qig checkpoint, or a flag is unsafe.
    """
    from qig_serve.serving.describe import describe, serving_dtype

    directory = find_model(model)
    manifest = read_manifest(directory)
    set_environment(limits)

    args = parse_flags(directory, flags)
    args.middleware = [*args.middleware, MIDDLEWARE]
    report = describe(
        directory,
        serving_dtype(directory, args.dtype),
        args.tensor_parallel_size,
        args.pipeline_parallel_size,
        split_vision_tower=args.mm_encoder_tp_mode != "data" and not args.language_model_only,
        expert_parallel=args.enable_expert_parallel,
    )
    if report.problems:
        raise UserError(
            f"{directory} cannot be served here: {report.problems[0]} "
            f"(`qig-serve doctor {directory}` says more)"
        )
    note = check_adapters(directory, manifest, args)
    check_adapter_tensors(directory, args)

    from qig_serve.vllm_plugin import compat

    try:
        with checked_values(args):
            print("\n".join([*report.lines(), *([note] if note else [])]), flush=True)
            if not args.headless and args.uds is None:
                address = page_address(args.host, args.port, bool(args.ssl_certfile))
                print(f"{'web page':16}  {address} when it has started", flush=True)
            compat.serve_command().cmd(args)
    except OSError as error:
        if error.filename or error.errno not in _CANNOT_LISTEN:
            raise
        host = f"--host {args.host} " if args.host else ""
        asked = f"--uds {args.uds}" if args.uds else f"{host}--port {args.port}"
        raise UserError(f"cannot listen on {asked}: {error.strerror}: give another") from None

    from qig_serve.serving.engine_watch import THIS_PROCESS

    if THIS_PROCESS.died:
        print("qig-serve serve: the engine died; its own messages are above", flush=True)
        return 1
    print("qig-serve serve: stopped", flush=True)
    return 0


def page_address(host: str | None, port: int, encrypted: bool) -> str:
    """Where a browser on this machine finds the server that listens on `host`."""
    if host in (None, "", "0.0.0.0", "::"):  # noqa: S104  read, not bound
        host = "localhost"
    named = f"[{host}]" if ":" in str(host) else host
    return f"http{'s' if encrypted else ''}://{named}:{port}/"
