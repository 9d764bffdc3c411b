"""Where figures of the report come from: clip ratios, clipped tokens, samples without a picture."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from qig_serve.demo import MODEL_DIR
from qig_serve.formats import get_scheme
from qig_serve.offline.pipeline import quantize
from qig_serve.offline.recipe import make_recipe
from qig_serve.offline.report.pictures import KeptWeights
from qig_serve.offline.rounding.linear import clipping
from qig_serve.offline.rounding.rounded import RoundedLinear
from qig_serve.packing import minmax_params
from qig_serve.samples import sample_from_parts


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_clip_ratio_and_clipped_weights(scheme: str) -> None:
    quant = get_scheme(scheme)
    torch.manual_seed(0)
    weight = torch.randn(4, 256)
    found = RoundedLinear(torch.empty(0), *minmax_params(weight, quant))
    ratio, clipped = clipping(weight, found, quant, torch.float32)
    assert ratio == pytest.approx(1, abs=1e-4)
    # A min-max range loses nothing but what rounding its zero point or its lowest code costs.
    assert clipped < 0.01
    # One outlier per row, and ranges that leave it out: one weight of each row is clipped.
    weight = weight.clamp(-2, 2)
    weight[:, 0] = 2
    found = RoundedLinear(torch.empty(0), *minmax_params(weight, quant))
    weight[:, 0] = 20
    ratio, clipped = clipping(weight, found, quant, torch.float32)
    assert clipped == pytest.approx(1 / 256)
    assert ratio < (0.7 if quant.group_size else 0.2)


@pytest.mark.usefixtures("drawn_plots")
def test_a_run_reports_clip_ratios_and_clipped_tokens(tmp_path: Path) -> None:
    recipe = make_recipe(
        {"scheme": "w3a16", "method": "qig", "rounding": "clip", "calib": "demo"}
        | {"samples": 2, "grid": 2, "steps": 1, "allow_fallbacks": True},
        "test",
    )
    quantize(MODEL_DIR, tmp_path / "out", recipe, quiet=True)
    data: dict[str, Any] = json.loads((tmp_path / "out" / "report.json").read_text())
    for block in data["blocks"]:
        for linear in block["linears"].values():
            # The search draws ranges in, 0.35 being the least that it tries.
            assert 0.3 < linear["clip_ratio"] < 1 and 0 < linear["clipped"] < 0.2
    shares = [m["token_shares"] for b in data["blocks"] for m in b["modules"]]
    assert sum(s["image"]["clipped"] for s in shares) > 0
    for both in shares:  # beyond the quartile fences lies less than a half
        assert (
            sum(s["clipped"] for s in both.values()) < sum(s["tokens"] for s in both.values()) / 2
        )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Range over min-max range by linear and block" in page
    assert "Moved onto the quartile fences" in page


def test_a_sample_without_a_picture_is_named() -> None:
    sample = sample_from_parts("7", "count", Image.new("RGB", (8, 8)), "How many?", "3")
    batch = SimpleNamespace(
        ids=["7"],
        inputs={"input_ids": torch.tensor([[1, 5, 2]])},
        answer_mask=torch.tensor([[False, False, True]]),
        token_mask=torch.ones(1, 3, dtype=torch.bool),
    )
    kept = KeptWeights((0,), [batch], {(0, 0): sample})  # type: ignore[list-item]
    kept.keep(0, "qkv", [torch.full((1, 3), 1 / 3)])
    assert kept.pictures(SimpleNamespace(model_type="mystery"), None) == []
    assert kept.unmapped[0].startswith("No picture of sample 7: models of type 'mystery' are not")
