"""Every vLLM name that moved between 0.26 and 0.33, and every place it has been.

Nothing else under qig_serve/ imports a vLLM path that has moved. Places are tried newest first;
a name that is nowhere is an ImportError that says what was tried. Imports happen in the calls.
"""

from __future__ import annotations

import importlib
from typing import Any


def find(name: str, *modules: str) -> Any:
    """`name` from the first of the modules that has it; ImportError if none does.

    A module that is there but lacks something it needs itself is an error of its own.
    """
    for module in modules:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            continue
        if hasattr(found, name):
            return getattr(found, name)
    raise ImportError(f"vLLM has no {name} in {', '.join(modules)}")


def validation_error() -> Any:
    """The exception that vLLM's server answers with 400."""
    return find("VLLMValidationError", "vllm.exceptions", "vllm.entrypoints.openai.protocol")


def http_connection() -> Any:
    """vLLM's HTTP client for media."""
    return find("HTTPConnection", "vllm.connections")


def media_connector() -> Any:
    """The class that loads pictures from URLs."""
    return find("MediaConnector", "vllm.multimodal.media", "vllm.multimodal.utils")


def media_connector_registry() -> Any:
    """Where VLLM_MEDIA_CONNECTOR is looked up."""
    return find(
        "MEDIA_CONNECTOR_REGISTRY",
        "vllm.multimodal.media.connector",
        "vllm.multimodal.media",
        "vllm.multimodal.utils",
    )


def argument_parser() -> Any:
    """vLLM's argparse, which takes JSON and dotted options."""
    return find("FlexibleArgumentParser", "vllm.utils.argparse_utils", "vllm.utils")


def cli_environment() -> Any:
    """The function that sets the process start method as vLLM's own command line does."""
    return find(
        "cli_env_setup",
        "vllm.entrypoints.common.startup",
        "vllm.entrypoints.serve.utils.api_utils",
        "vllm.entrypoints.utils",
    )


def serve_command() -> Any:
    """vLLM's `serve` subcommand, an object with subparser_init, validate and cmd."""
    return find("ServeSubcommand", "vllm.entrypoints.cli.serve")()


_LAUNCHERS = "vllm.entrypoints.launchers"
_API_SERVER = "vllm.entrypoints.openai.api_server"


def parsers_check() -> Any:
    """Serve arguments -> None; KeyError for a parser of tool calls or thoughts that is unknown."""
    return find("validate_api_server_args", f"{_LAUNCHERS}.launcher", _API_SERVER)


def tokenizer_loader() -> Any:
    """Model config -> tokenizer, which is kept for the next who asks."""
    return find(
        "cached_tokenizer_from_config", "vllm.tokenizers", "vllm.transformers_utils.tokenizer"
    )


def attention_backend() -> Any:
    """(head size, dtype, KV cache's dtype) -> the class of attention's backend."""
    return find("get_attn_backend", "vllm.v1.attention.selector", "vllm.attention.selector")


def model_implementations() -> Any:
    """The type of what --model-impl may be."""
    return find("ModelImpl", "vllm.config.model", "vllm.config")


def span_exporter() -> Any:
    """--otlp-traces-endpoint -> what sends traces there; ValueError for no address."""
    return find("get_span_exporter", "vllm.tracing.otel", "vllm.tracing")


def engine_client() -> Any:
    """Asynchronous context manager: serve arguments -> engine client."""
    return find("build_async_engine_client", f"{_LAUNCHERS}.api_server.entry", _API_SERVER)


def app_builder() -> Any:
    """(args, supported tasks, model config) -> FastAPI application."""
    return find("build_app", f"{_LAUNCHERS}.app", _API_SERVER)


def app_state_initializer() -> Any:
    """(engine client, application state, args, supported tasks): a coroutine function."""
    return find("init_app_state", f"{_LAUNCHERS}.api_server.app_state", _API_SERVER)


_CHAT = ("vllm.entrypoints.openai.chat_completion.protocol", "vllm.entrypoints.openai.protocol")


def chat_request() -> Any:
    """The body of a chat completion, a pydantic model."""
    return find("ChatCompletionRequest", *_CHAT)


def chat_response() -> Any:
    """The answer to one that does not stream, a pydantic model."""
    return find("ChatCompletionResponse", *_CHAT)


def inductor_pass() -> Any:
    """The base class of passes that vLLM runs while Inductor compiles."""
    return find(
        "InductorPass", "vllm.compilation.passes.inductor_pass", "vllm.compilation.inductor_pass"
    )


def has_ir_norms() -> bool:
    """Whether RMSNorm is an op of vLLM's IR, `torch.ops.vllm_ir`; it is there afterwards."""
    try:
        find("fused_add_rms_norm", "vllm.ir.ops")
    except ImportError:
        return False
    return True


_MODELS = "vllm.model_executor.models"


def model_registry() -> Any:
    """Architecture -> what loads its class, in the attribute `models`."""
    return find("ModelRegistry", _MODELS)


def lora_support() -> Any:
    """Model class -> whether it takes LoRA adapters."""
    return find("supports_lora", _MODELS, f"{_MODELS}.interfaces")


def adapter_config() -> Any:
    """The class that reads and validates an adapter's configuration."""
    return find("PEFTHelper", "vllm.lora.peft_helper")


def adapter_ranks(config: dict[str, Any]) -> Any:
    """Of an adapter's configuration: an adapter's tensor -> the rank that vLLM takes for it."""
    helper = adapter_config().from_dict(config)
    of_module = getattr(helper, "get_rank_and_scaling", None)  # 0.32: a pattern's for some modules
    parse = find("parse_fine_tuned_lora_name", "vllm.lora.utils")
    return lambda name: of_module(parse(name)[0])[0] if of_module else helper.r


def adapted_tables(model: Any, decoder: str) -> frozenset[str]:
    """Which of `lm_head` and `embed_tokens` vLLM adapts of a model class.

    decoder: the decoder's model_type. vLLM asks the class of the decoder alone, which it chooses
    when it makes the model: by that type, or one that the model's own module defines.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    classes = [model]
    module = importlib.import_module(model.__module__)
    classes += [found for name, found in vars(module).items() if name.endswith("ForCausalLM")]
    registered = model_registry().models.get(NAMES.get(decoder, ""))
    if registered is not None:
        classes.append(registered.load_model_cls())
    return frozenset(name for c in classes for name in getattr(c, "embedding_modules", ()))


def adapter_names(model: Any) -> tuple[Any, Any]:
    """Of a model class: what makes vLLM's name of a tensor of a file's, and of an adapter's.

    The first returns the name, the second the module and whether the tensor is A; the second
    raises ValueError for a tensor that is none of LoRA's.
    """
    parse = find("parse_fine_tuned_lora_name", "vllm.lora.utils")
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return (lambda name: name), parse
    if hasattr(mapper, "get_rename_mapper"):
        mapper = mapper.get_rename_mapper()
    return (lambda name: mapper._map_name(name) or name), (lambda name: parse(name, mapper))
