"""A report with every kind of figure, its evaluation, and a picture."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from qig_serve.offline.report.pictures import TokenPicture
from qig_serve.offline.report.token_map import grid_boxes
from qig_serve.offline.results import (
    BlockReport,
    LinearReport,
    ModuleReport,
    QuantizationReport,
    TokenShare,
)


def make_report(blocks: int = 4, **rest: Any) -> QuantizationReport:
    def module(index: int, name: str) -> ModuleReport:
        return ModuleReport(
            name=name,
            linears=[f"self_attn.{name}_proj"],
            loss_module="self_attn",
            exponent=0.1 * index + 0.2,
            loss=0.5 / (index + 1),
            loss_rtn=1.0 / (index + 1),
            losses=[1.0, 0.5],
            completeness=0.004 * (index + 1),
            token_shares={
                "image": TokenShare(tokens=36, before_clip=0.3, after_clip=0.6, clipped=9),
                "text": TokenShare(tokens=20, before_clip=0.7, after_clip=0.4),
            },
            seconds={"capture": 0.1, "token_weights": 0.5, "search": 1.0},
        )

    values: dict[str, Any] = {
        "model": "acme/tiny-vlm",
        "family": "llava",
        "scheme": "w3a16",
        "method": "qig",
        "recipe": {"scheme": "w3a16", "method": "qig", "seed": 3},
        "calibration": {
            "source": "demo",
            "samples": 128,
            "sha256": "ab" * 32,
            "seed": 3,
            "tokens": {"image": 4608, "text": 2000, "special": 77},
        },
        "blocks": [
            BlockReport(
                index=i,
                modules=[module(i, "qkv"), module(i, "gate_up")],
                linears={
                    "self_attn.q_proj": LinearReport(
                        error_rtn=0.1,
                        error=0.02,
                        clip_ratio=0.83,
                        clipped=0.0125,
                        damping=0.1,
                        shift=0.625,
                        shift_damp=0.03,
                    )
                },
                output_error=0.01 * (i + 1),
                seconds=4.0,
                host_bytes=1 << 30,
            )
            for i in range(blocks)
        ],
        "left_alone": ["vision_tower", "lm_head", "model.visual.merger", "mystery"],
        "seconds": 20.0,
        "estimate": {"seconds": 17.0, "host_bytes": 1.5 * 2**30},
        "producer": "qig-serve 0.1.0",
    }
    return QuantizationReport(**{**values, **rest})


def make_result(exact: float, **rest: Any) -> dict[str, Any]:
    return {
        "n": 200,
        "exact_match": exact,
        "by_type": {"color": exact, "caption": exact},
        "kl_mean": 0.01,
        "evaluation_sha256": "cd" * 32,
        **rest,
    }


EVALUATION = {
    "data": "questions.jsonl",
    "results": {
        "fp": make_result(0.9),
        "tiny": make_result(
            0.81,
            paired={
                "difference": -0.09,
                "interval": [-0.12, -0.05],
                "right_to_wrong": 20,
                "wrong_to_right": 2,
                "p_value": 0.0001,
            },
            kl={"kl_mean": 0.01, "kl_p99": 0.2, "top1": 0.97, "perplexity_ratio": 1.02},
            agreement=0.88,
        ),
    },
}


def make_picture(hot: int = 5) -> TokenPicture:
    """A 4 x 4 grid of image tokens, all weight on one of them and on one word."""
    words = ["<user>", *[""] * 16, "What", " is", " <b>?", "\n", "A", " square"]
    weights = torch.zeros(len(words))
    weights[1 + hot], weights[19] = 0.75, 0.25
    counted = torch.ones(len(words), dtype=torch.bool)
    counted[0] = False
    boxes = {1 + i: (0, box) for i, box in enumerate(grid_boxes(4, 4))}
    image = Image.new("RGB", (64, 64), (200, 200, 200))
    return TokenPicture(
        "sample 7", (image,), boxes, tuple(words), counted, 21, {"layer 0": weights}
    )


CONFIG = {"tensor_parallel_sizes": [1, 2]}
