"""The quantizer on a pretended GPU: collected by test_on_a_gpu.py, in a process of its own.

Every tensor is where the others are, whatever the method and the family. Numbers are a CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers.pretended_gpu import Memory, OnGpu, pretended_gpu
from helpers.tiny_models import FAMILIES, one_sample, tiny_model

from qig_serve.evaluate import evaluate_many, load_samples
from qig_serve.offline.explain import explain_sample
from qig_serve.offline.pipeline import quantize
from qig_serve.offline.recipe import make_recipe

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def source(request: Any, tmp_path: Path) -> Path:
    one_sample(tmp_path)
    return tiny_model(getattr(request, "param", "llava"), tmp_path / "source")


def quantized_on_a_gpu(source: Path, **options: Any) -> None:
    calib = str(source.parent / "calib.jsonl")
    rest = {"calib": calib, "samples": 1, "device": "cuda", "allow_fallbacks": True}
    recipe = make_recipe({**rest, **options})
    with pretended_gpu():
        report = quantize(source, source.parent / "out", recipe, quiet=True)
    assert report.estimate["device_bytes"] > 0


def test_what_cuda_refuses_is_refused() -> None:
    with pretended_gpu():
        x = torch.ones(2, 2, device="cuda")
        assert isinstance(x, OnGpu) and (x @ x).device == torch.device("cuda:0")
        with pytest.raises(RuntimeError, match="same device"):
            x @ torch.ones(2, 2)
        with pytest.raises(RuntimeError, match="numpy"):
            x.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, device="cuda", generator=torch.Generator())
        assert (x.cpu() @ torch.ones(2, 2)).tolist() == [[2, 2], [2, 2]]


def test_what_tensors_take_is_counted() -> None:
    with pretended_gpu():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        x = torch.ones(256, device="cuda")
        view, y = x[:8], x.double()
        del x, y
        assert torch.cuda.memory_allocated() - before == 1024  # a view's
        assert Memory.peak - before == 1024 + 2048
        del view
        assert torch.cuda.memory_allocated() == before


METHODS = {
    "the default": dict(scheme="w3a16"),
    "tuned, in 8 bits": dict(
        scheme="w4a8", method="gptq", tuning_passes=1, head=8, embeddings=8, samples=2
    ),
    "of the paper": dict(scheme="w4a8", method="qig", grid=2, steps=2),
    "by the answers' gradient": dict(scheme="w3a16", method="mbq", grid=2),
}
SLOW = {
    name: dict(scheme="w3a16", method=name, grid=2)
    for name in ("rtn", "awq", "awq-clip", "smoothquant", "gptq-qig")
}


@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param(options, id=name) for name, options in METHODS.items()),
        *(pytest.param(options, id=name, marks=pytest.mark.slow) for name, options in SLOW.items()),
    ],
)
def test_a_method(source: Path, options: dict[str, Any]) -> None:
    quantized_on_a_gpu(source, **options)


@pytest.mark.parametrize("engine", ["forced", "transformers"])
def test_evaluation(source: Path, engine: Literal["forced", "transformers"]) -> None:
    out = source.parent / "out"
    calib = str(source.parent / "calib.jsonl")
    options = {"scheme": "w4a8", "method": "rtn", "calib": calib, "samples": 1, "device": "cpu"}
    quantize(source, out, make_recipe(options), quiet=True)
    samples = load_samples(calib, 1)
    before = OnGpu.made
    with pretended_gpu():
        found = evaluate_many([("rtn", out)], source, samples, engine=engine, max_tokens=4)
    divergence = found["rtn"].divergence
    assert divergence is not None and divergence.kl_mean > 0
    assert OnGpu.made > before + 1000


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_attribution(source: Path, scheme: str) -> None:
    before = OnGpu.made
    with pretended_gpu():
        picture = source.parent / "red.png"
        _, errors = explain_sample(source, [picture], "What?", "red", lambda n: range(n), scheme)
    assert len(errors) == 2
    assert OnGpu.made > before + 1000


def slow_families() -> Iterator[Any]:
    for index, family in enumerate(sorted(FAMILIES)):
        scheme = ("w3a16", "w4a8")[index % 2]
        yield pytest.param(family, scheme, id=f"{family}-{scheme}", marks=pytest.mark.slow)


@pytest.mark.parametrize(("source", "scheme"), list(slow_families()), indirect=["source"])
def test_a_family(source: Path, scheme: str) -> None:
    quantized_on_a_gpu(source, scheme=scheme, method="gptq", head=8, embeddings=8)
