"""Every family: quantize -> save -> reload in vLLM, against Hugging Face on the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.family_answers import (
    as_vllm_computes_it,
    hugging_face_tokens,
    quantize_tiny,
    vllm_tokens,
)
from helpers.saved_again import WAYS, save_again
from helpers.tiny_models import FAMILIES, tiny_model

pytest.importorskip("vllm")

# A model takes half a minute to load here; LLaVA is in the unmarked tests (test_in_vllm.py).
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tokens_equal(family: str, scheme: str, tmp_path: Path, release: None) -> None:
    source = as_vllm_computes_it(tiny_model(family, tmp_path / "source"), family)
    checkpoint = quantize_tiny(source, tmp_path / scheme, scheme)
    _assert_same(checkpoint, family)


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_saved_again(family: str, way: str, tmp_path: Path, release: None) -> None:
    published = as_vllm_computes_it(tiny_model(family, tmp_path / "published"), family)
    source = save_again(published, tmp_path / "source", way)
    checkpoint = quantize_tiny(source, tmp_path / "out", "w3a16", method="rtn")
    _assert_same(checkpoint, family)


def _assert_same(checkpoint: Path, family: str) -> None:
    dtype = FAMILIES[family].cpu_dtype
    tokens = vllm_tokens(checkpoint, dtype)
    assert hugging_face_tokens(checkpoint, dtype, tokens) == tokens
