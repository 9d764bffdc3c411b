"""Where vLLM, or what it stands on, is changed rather than asked, and for which versions.

compat.py finds names that moved. Here are the few things for which there is no opening: each is a
function marked with the versions it was read and tested with, and the rest of the package changes
nothing of other people's. `PATCHES` lists them; tests hold the installed versions against it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from qig_serve.vllm_plugin import OLDEST_VLLM, TOO_NEW_VLLM

_MOST_UNSENT = 4096
_DEAD_GRAMMAR = (
    "the schema or grammar of the request came to a point where nothing may follow: a schema or "
    "rule that is only a reference to itself, or that begins with itself and has no other form, "
    "permits no answer"
)
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Patch:
    """One dependence on the inside of a package."""

    package: str
    oldest: str
    too_new: str
    """The first version that has not been looked at."""


PATCHES: dict[str, Patch] = {}
"""Name of a function here -> what it depends on."""


def _depends_on(package: str, oldest: str, too_new: str) -> Callable[[_Function], _Function]:
    def mark(function: _Function) -> _Function:
        PATCHES[function.__name__] = Patch(package, oldest, too_new)
        return function

    return mark


@_depends_on("vllm", OLDEST_VLLM, TOO_NEW_VLLM)
def call_before_shutdown(client: Any, note: Callable[[], None]) -> None:
    """Have an engine client call `note` before it shuts down.

    vLLM's server calls `shutdown` when it is asked to stop and not when its engine dies; either
    way it then stops the HTTP server, and exits with 0. That the outputs end with the engine, which
    it logs as an error with a traceback, is not said of an engine that was asked to stop.
    """
    shutdown = client.shutdown

    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        logging.getLogger("vllm.v1.engine.async_llm").addFilter(
            lambda record: not record.getMessage().startswith("AsyncLLM output_handler failed")
        )
        return shutdown(*args, **kwargs)

    client.shutdown = noted


@_depends_on("vllm", OLDEST_VLLM, TOO_NEW_VLLM)
def keep_handler(number: int) -> None:
    """Have vLLM not replace this process's handler of a signal; whoever else does still can.

    While it starts vLLM puts in one for SIGTERM that raises KeyboardInterrupt, which is lost where
    it waits for its engine (0.32): the server then comes up, stopped or not.
    """
    put, process = signal.signal, os.getpid()

    def keep(asked: int, handler: Any) -> Any:
        theirs = getattr(handler, "__module__", None) or ""
        if asked == number and os.getpid() == process and theirs.split(".")[0] == "vllm":
            return signal.getsignal(asked)
        return put(asked, handler)

    signal.signal = cast(Any, keep)


@_depends_on("vllm", OLDEST_VLLM, TOO_NEW_VLLM)
def wrap_load_bytes(
    media_io: Any, wrap: Callable[[Callable[[bytes], Any]], Callable[[bytes], Any]]
) -> None:
    """Put `wrap(load_bytes)` in the place of a media reader's own `load_bytes`.

    Every picture passes it, from a data URL, a file or a network, before it is decoded.
    """
    media_io.load_bytes = wrap(media_io.load_bytes)


@_depends_on("starlette", "0.40", "2")
def drop_middlewares(app: Any) -> None:
    """Take all middlewares off an application: logs, CORS and HTTP metrics need a connection."""
    app.user_middleware.clear()
    app.middleware_stack = None  # built already; starlette builds it again at the first request


@_depends_on("fastapi", "0.100", "1")
def failed_in_validation(error: BaseException) -> bool:
    """Whether an error came up while a request's body was being validated.

    Then the body is at fault and not the server: vLLM's validators look into fields before their
    types are checked, and fail in any way.
    """
    return any(
        frame.f_code.co_name == "request_body_to_args"
        and frame.f_globals["__name__"] == "fastapi.dependencies.utils"
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


@_depends_on("vllm", OLDEST_VLLM, TOO_NEW_VLLM)
def failed_in_rendering(error: BaseException) -> bool:
    """Whether an error came up while vLLM made a prompt of a request, before the engine had it.

    Parts of messages are no more checked than that a field is there: what they hold is at fault.
    """
    if isinstance(error, (MemoryError, OSError)):
        return False
    return any(
        frame.f_globals.get("__name__", "").startswith(("vllm.renderers.", "vllm.entrypoints.chat"))
        or frame.f_code.co_name == "_get_message_types"
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


@_depends_on("vllm", OLDEST_VLLM, TOO_NEW_VLLM)
def engine_did_not_start(error: BaseException) -> bool:
    """Whether it is what vLLM raises when the engine's process, which has said why, is gone."""
    return str(error).startswith("Engine core initialization failed")


@_depends_on("vllm", OLDEST_VLLM, TOO_NEW_VLLM)
@contextlib.contextmanager
def settings_made_once(engine_args: Any, headless: bool = False) -> Iterator[Any]:
    """The engine's settings of `engine_args`, as vLLM's server makes them.

    Inside, the next who asks in this process for those of the same arguments gets these, once, and
    vLLM does not say again what it has to say of them.
    """
    from vllm.usage.usage_lib import UsageContext

    kind, given = type(engine_args), copy.deepcopy(engine_args)  # which the making changes
    asked: dict[str, Any] = {"usage_context": UsageContext.OPENAI_API_SERVER}
    asked |= {"headless": True} if headless else {}
    config = engine_args.create_engine_config(**asked)

    def put_back() -> None:
        if vars(kind).get("create_engine_config") is taken:
            del kind.create_engine_config  # the inherited one is there again

    def taken(self: Any, *args: Any, **kwargs: Any) -> Any:
        put_back()
        same = not args and kwargs == asked and self == given
        return config if same else self.create_engine_config(*args, **kwargs)

    kind.create_engine_config = taken
    try:
        yield config
    finally:
        put_back()


@_depends_on("vllm", OLDEST_VLLM, TOO_NEW_VLLM)
def remember_only_sent_pictures(client: Any) -> None:
    """Have an engine client count a picture as known to the engine when it has been sent there.

    vLLM's front end notes it when it has been prepared. If the request is refused after that, for
    a setting, the next one about the picture comes without it, and gets a 500. Caches that the
    engine does not mirror are left as they are.
    """
    cache: Any = getattr(getattr(client, "renderer", None), "mm_processor_cache", None)
    if "invalidate" not in vars(type(cache)):
        return
    known, update, send = (
        cache.is_cached_item,
        cache.get_and_update_item,
        client.engine_core.add_request_async,
    )
    unsent: set[str] = set()

    def is_cached_item(name: str) -> bool:
        return name not in unsent and bool(known(name))

    def get_and_update_item(item: Any, name: str) -> Any:
        if name in unsent and item is not None:
            cache.invalidate(name)
        found = update(item, name)
        if found[0] is not None:
            unsent.add(name)
            if len(unsent) > _MOST_UNSENT:  # of refused requests, and long gone from the cache
                unsent.intersection_update([n for n in list(unsent) if known(n)])
        return found

    async def add_request_async(request: Any) -> Any:
        sent = await send(request)
        for feature in request.mm_features or ():
            unsent.difference_update((feature.mm_hash, feature.identifier))
        return sent

    cache.is_cached_item, cache.get_and_update_item = is_cached_item, get_and_update_item
    client.engine_core.add_request_async = add_request_async


@_depends_on("vllm", OLDEST_VLLM, TOO_NEW_VLLM)
def blame_dead_grammars(client: Any) -> None:
    """Have an engine client raise ValueError, a 400, where a schema or grammar let nothing follow.

    xgrammar takes {"$ref": "#"} and rules without an end, which permit no token. The engine then
    draws one that is refused and finishes the request with "error", which vLLM's front end
    answers with 500.
    """
    generate = client.generate

    async def watched(outputs: Any) -> Any:
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                if any(choice.finish_reason == "error" for choice in output.outputs):
                    raise ValueError(_DEAD_GRAMMAR)
                yield output

    def generate_watched(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = generate(prompt, sampling_params, *args, **kwargs)
        return watched(outputs) if sampling_params.structured_outputs else outputs

    client.generate = generate_watched


@_depends_on("vllm", OLDEST_VLLM, TOO_NEW_VLLM)
def overridable(base: type, *methods: str) -> type:
    """`base`; ImportError if it has not all these methods, private ones that we override.

    Without the check a method that vLLM renames would be ours alone, and never called.
    """
    for method in methods:
        if not callable(getattr(base, method, None)):
            raise ImportError(f"vLLM's {base.__name__} has no {method}, which qig-serve overrides")
    return base


@_depends_on("vllm", OLDEST_VLLM, TOO_NEW_VLLM)
def do_without_a_compiler(vllm_config: Any) -> None:
    """On a CPU without a C++ compiler, have vLLM trace this model but not compile it.

    vLLM compiles the model and parts of its sampler with Inductor, which calls the compiler and
    ends with an error if there is none. To be called while the model's layers are made: vLLM
    reads the backend when they all are. It registers plugins in all of its processes; those that
    hold no model of ours are left as they are.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or shutil.which(os.environ.get("CXX", "g++")):
        return
    import torch

    if vllm_config.compilation_config.backend == "inductor":
        vllm_config.compilation_config.backend = "eager"
    torch.compiler.set_stance("force_eager")  # the sampler, of which no configuration speaks


@_depends_on("torch", "2.9", "3")
def ask_for_amx() -> None:
    """Ask the operating system for the CPU's tile registers, where it has them; repeated at will.

    vLLM's attention uses them in bf16 without asking, which ends the process with an illegal
    instruction. With 16-bit weights oneDNN has always asked before; with ours, and a first
    request without a picture, nothing has.
    """
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


@_depends_on("vllm", OLDEST_VLLM, TOO_NEW_VLLM)
def lay_heads_flat() -> None:
    """Have a CPU's rotary embedding take heads laid end to end; repeated at will.

    Its kernel reads [tokens, heads * size]; of [tokens, heads, size], which LFM2 gives it, it makes
    something else than on a GPU, without an error.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.platforms import current_platform

    forward = RotaryEmbedding.forward_cpu
    if not current_platform.is_cpu() or hasattr(forward, "qig_flat"):
        return

    def flat(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        if query.dim() != 3:
            return forward(self, positions, query, key)
        laid = [None if x is None else x.reshape(len(x), -1) for x in (query, key)]
        done = forward(self, positions, *laid)
        return tuple(
            None if x is None else y.view_as(x) for x, y in zip((query, key), done, strict=True)
        )

    flat.qig_flat = True  # type: ignore[attr-defined]
    RotaryEmbedding.forward_cpu = flat


@_depends_on("vllm", OLDEST_VLLM, TOO_NEW_VLLM)
def normalize_pictures() -> None:
    """Have EXAONE 4.5's tower normalize pictures; repeated at will.

    vLLM leaves that to towers like the one it derives from, and builds this one without: pixels
    from 0 to 255 would go in. To be called while the model's layers are made.
    """
    exaone = sys.modules.get("vllm.model_executor.models.exaone4_5")
    if exaone is None:  # another model
        return
    from vllm.config import set_current_vllm_config

    try:
        from vllm.model_executor.layers.fusion import mm_input_norm
    except ImportError:  # an older vLLM, whose processor does it
        return
    model = exaone.Exaone4_5_ForConditionalGeneration
    embed = model.embed_multimodal
    if hasattr(embed, "qig_normalizes"):
        return

    def normalizing(self: Any, **kwargs: Any) -> Any:
        tower = self.visual
        if isinstance(tower.input_norm, mm_input_norm.IdentityInputNorm):
            with set_current_vllm_config(self.vllm_config):
                norm = mm_input_norm.build_mm_input_norm(self.vllm_config.model_config)
            tower.input_norm = norm.to(tower.device)
        return embed(self, **kwargs)

    normalizing.qig_normalizes = True  # type: ignore[attr-defined]
    model.embed_multimodal = normalizing


@_depends_on("vllm", OLDEST_VLLM, TOO_NEW_VLLM)
def keep_adapters_apart() -> None:
    """Have a CPU's LoRA operators add nothing to tokens without an adapter; repeated at will.

    Their index is -1, which a GPU's kernels pass over, and a CPU's take for the last adapter
    loaded: a request without an adapter beside one with, and the output head's logits always.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    if hasattr(lora_ops, "qig_apart"):
        return
    lora_ops.qig_apart = True

    def apart(operator: Callable[..., Any]) -> Callable[..., Any]:
        def masked(
            inputs: Any, weights: Any, output: Any, indices: Any, *rest: Any, **kw: Any
        ) -> Any:
            inputs = inputs.masked_fill(indices[:, None] < 0, 0)
            return operator(inputs, weights, output, indices, *rest, **kw)

        return masked

    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        masked = apart(getattr(lora_ops, name))
        for module in (lora_ops, punica_cpu):
            setattr(module, name, masked)
