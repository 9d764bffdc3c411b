"""What is changed of vLLM and its kin still has the inside that the changes count on."""

from __future__ import annotations

import asyncio
import base64
import importlib.metadata
import inspect
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import fastapi
import torch
from helpers import tiny_llava
from helpers.server_process import environment
from packaging.version import Version
from starlette.middleware import Middleware

from qig_serve.vllm_plugin import compat, patches, register


@pytest.mark.parametrize("name", patches.PATCHES)
def test_installed_version_is_one_that_was_looked_at(name: str) -> None:
    patch = patches.PATCHES[name]
    if patch.package == "vllm":  # whose distribution has another name on CPUs
        import vllm

        version = Version(vllm.__version__)
    else:
        version = Version(importlib.metadata.version(patch.package))
    assert Version(patch.oldest).release <= version.release < Version(patch.too_new).release


def test_every_patch_is_in_the_table() -> None:
    functions = [
        name
        for name, member in vars(patches).items()
        if inspect.isfunction(member)
        and member.__module__ == patches.__name__
        and not name.startswith("_")
    ]
    assert list(patches.PATCHES) == functions


def test_shutdown_is_noted_and_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM logs of outputs that end is said before, and not once the engine is to stop."""
    logger = logging.getLogger("vllm.v1.engine.async_llm")
    monkeypatch.setattr(logger, "filters", [])

    def says(text: str) -> bool:
        return bool(logger.filter(logging.LogRecord(logger.name, 40, "", 0, text, (), None)))

    calls: list[Any] = []
    client = SimpleNamespace(shutdown=lambda timeout: calls.append(timeout))
    patches.call_before_shutdown(client, lambda: calls.append("noted"))
    assert says("AsyncLLM output_handler failed.")
    client.shutdown(timeout=3)
    assert calls == ["noted", 3]
    assert says("another") and not says("AsyncLLM output_handler failed.")


def test_a_picture_is_known_to_the_engine_when_it_was_sent() -> None:
    """vLLM's own caches of both sides: a refused request leaves the picture to the next."""
    lru = pytest.importorskip("vllm.multimodal.cache.lru", reason="an older vLLM's caches stay")
    from vllm.multimodal.inputs import MultiModalKwargsItem

    settings: Any = SimpleNamespace(
        get_multimodal_config=lambda: SimpleNamespace(mm_processor_cache_gb=1)
    )
    front = lru.LruKeyReplicatedSenderCache(settings)
    engine = lru.LruKeyReplicatedReceiverCache(settings)

    async def send(request: Any) -> None:
        for feature in request.mm_features:
            engine.get_and_update_item(feature.data, feature.mm_hash)

    client: Any = SimpleNamespace(
        renderer=SimpleNamespace(mm_processor_cache=front),
        engine_core=SimpleNamespace(add_request_async=send),
    )
    patches.remember_only_sent_pictures(client)

    def prepare() -> Any:
        whole = None if front.is_cached(["a"])[0] else (MultiModalKwargsItem.dummy(), ())
        item, _ = front.get_and_update_item(whole, "a")
        return SimpleNamespace(data=item, mm_hash="a", identifier="a")

    assert prepare().data is not None  # and its request is refused
    for again in (True, False):
        feature = prepare()
        assert (feature.data is not None) is again
        asyncio.run(client.engine_core.add_request_async(SimpleNamespace(mm_features=[feature])))


def test_a_cache_without_another_side_is_left_alone() -> None:
    for renderer in (None, SimpleNamespace(mm_processor_cache=None)):
        client = SimpleNamespace(renderer=renderer)
        patches.remember_only_sent_pictures(client)
        assert vars(client) == {"renderer": renderer}


def test_what_is_raised_while_a_prompt_is_made_is_the_requests_fault() -> None:
    from qig_serve.serving.request_faults import request_fault

    modules = ("vllm.renderers.chat_utils", "vllm.entrypoints.chat_utils")
    parser: Any = compat.find("AsyncMultiModalContentParser", *modules)
    try:
        parser.parse_input_audio(None, 3)
    except AttributeError as error:
        caught = error
    message = request_fault(caught)
    assert message and "no prompt can be made of the request (AttributeError: " in message
    assert request_fault(AttributeError("of the engine")) is None


def test_vllm_reads_pictures_through_load_bytes(tmp_path: Path) -> None:
    """The instance's attribute is what files and data URLs come to."""
    (tmp_path / "a.png").write_bytes(b"a file")
    seen: list[bytes] = []
    media_io: Any = compat.find("ImageMediaIO", "vllm.multimodal.media", "vllm.multimodal.image")()
    patches.wrap_load_bytes(media_io, lambda load: lambda data: seen.append(data))
    media_io.load_file(tmp_path / "a.png")
    media_io.load_base64("image/png", base64.b64encode(b"a URL").decode())
    assert seen == [b"a file", b"a URL"]


def test_fastapi_validates_bodies_in_a_frame_of_this_name() -> None:
    function = fastapi.dependencies.utils.request_body_to_args
    assert inspect.iscoroutinefunction(function)


def test_middlewares_are_dropped() -> None:
    app = fastapi.FastAPI(middleware=[Middleware(object)])
    app.middleware_stack = object()  # type: ignore[assignment]
    patches.drop_middlewares(app)
    assert app.user_middleware == [] and app.middleware_stack is None


def test_a_method_that_vllm_renamed_is_noticed() -> None:
    class Base:
        def kept(self) -> None: ...

    assert patches.overridable(Base, "kept") is Base
    with pytest.raises(ImportError, match="vLLM's Base has no renamed, which qig-serve overrides"):
        patches.overridable(Base, "kept", "renamed")


@pytest.mark.parametrize(
    ("compiler", "before", "after"),
    [
        ("no-such-compiler", "inductor", "eager"),
        ("no-such-compiler", "mine.backend", "mine.backend"),
        ("sh", "inductor", "inductor"),
    ],
    ids=["no-compiler", "no-compiler-another-backend", "compiler"],
)
def test_without_a_compiler_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, compiler: str, before: str, after: str
) -> None:
    stances: list[str] = []
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)
    config = SimpleNamespace(compilation_config=SimpleNamespace(backend=before))
    patches.do_without_a_compiler(config)
    assert config.compilation_config.backend == after
    assert stances == (["force_eager"] if compiler == "no-such-compiler" else [])


@pytest.mark.parametrize(("has", "asked"), [(True, 1), (False, 0)], ids=["amx", "no-amx"])
def test_amx_is_asked_for_where_it_is(
    monkeypatch: pytest.MonkeyPatch, has: bool, asked: int
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: calls.append(True))
    patches.ask_for_amx()
    assert len(calls) == asked


@pytest.mark.parametrize("normalizes", [True, False])
def test_pictures_are_normalized_by_the_tower_they_are_left_to(
    monkeypatch: pytest.MonkeyPatch, normalizes: bool
) -> None:
    pytest.importorskip(
        "vllm.model_executor.layers.fusion.mm_input_norm",
        reason="an older processor does it",
    )
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fusion import mm_input_norm
    from vllm.model_executor.models import exaone4_5

    kind = exaone4_5.Exaone4_5_ForConditionalGeneration
    built, none = torch.nn.Identity(), mm_input_norm.IdentityInputNorm()
    monkeypatch.setattr(mm_input_norm, "build_mm_input_norm", lambda config: built)
    monkeypatch.setattr(kind, "embed_multimodal", kind.embed_multimodal)
    if not normalizes:  # a process that serves another model
        monkeypatch.delitem(sys.modules, exaone4_5.__name__)
    for _ in range(2):
        patches.normalize_pictures()
    model: Any = SimpleNamespace(
        visual=SimpleNamespace(input_norm=none, device="cpu"),
        vllm_config=VllmConfig(),
        _parse_and_validate_multimodal_inputs=lambda: {},
    )
    assert kind.embed_multimodal(model) == []
    assert model.visual.input_norm is (built if normalizes else none)


TEXT_FIRST = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=512, max_num_seqs=4, enforce_eager=True)
    message = {"role": "user", "content": "Describe it."}
    (answer,) = llm.chat([message], SamplingParams(max_tokens=4), use_tqdm=False)
    print("answered", len(answer.outputs[0].token_ids))
"""


@pytest.mark.slow
def test_a_first_request_without_a_picture_is_answered(tmp_path: Path) -> None:
    """In a process of its own: any 16-bit linear asks for AMX on its way."""
    source = tiny_llava.build(tmp_path / "source")
    checkpoint = tiny_llava.quantize(source, tmp_path / "w4a8", "w4a8")
    done = subprocess.run(
        [sys.executable, "-P", "-c", TEXT_FIRST, str(checkpoint)],
        env=environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and "answered 4" in done.stdout, done.stderr[-2000:]


def test_a_handler_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's is not put in, and others' are."""

    def ours(*_: Any) -> None: ...

    def theirs(*_: Any) -> None: ...

    theirs.__module__ = "vllm.entrypoints.launchers.api_server.entry"
    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(signal, "signal", signal.signal)
    try:
        signal.signal(signal.SIGUSR1, ours)
        patches.keep_handler(signal.SIGUSR1)
        assert signal.signal(signal.SIGUSR1, theirs) is ours
        assert signal.getsignal(signal.SIGUSR1) is ours
        assert signal.signal(signal.SIGUSR1, before) is ours
        assert signal.getsignal(signal.SIGUSR1) is before
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_registering_changes_no_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM registers the plugin in every process, whatever it serves there."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: pytest.fail(stance))
    before = dict(os.environ)
    register()
    assert dict(os.environ) == before
