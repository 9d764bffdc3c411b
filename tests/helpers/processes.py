"""Runs of the offline stage in two processes that share the samples, and what they must equal."""

from __future__ import annotations

import multiprocessing
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.checkpoints import tensors_of
from qig_serve.errors import UserError
from qig_serve.formats import get_scheme
from qig_serve.offline.pipeline import quantize
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.offline.results import REPORT_FILE, QuantizationReport


def run_cases(
    rank: int,
    meeting: Path,
    model: Path,
    out: Path,
    cases: dict[str, Any],
    resume: bool = False,
) -> None:
    """One of two: case after case. What fails leaves its sentence in OUT/NAME.RANK.txt."""
    dist.init_process_group(
        "gloo", f"file://{meeting}", timedelta(minutes=10), world_size=2, rank=rank
    )
    for name, recipe in cases.items():
        try:
            quantize(model, out / name, QuantRecipe(**recipe), resume=resume, quiet=True)
        except UserError as error:
            (out / f"{name}.{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


def in_two_processes(model: Path, out: Path, cases: dict[str, Any], resume: bool = False) -> None:
    context = multiprocessing.get_context("fork")  # torch is imported already
    meeting = out.parent / f"{out.name}-{time.monotonic_ns()}"
    processes = [
        context.Process(target=run_cases, args=(rank, meeting, model, out, cases, resume))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        process.kill()
    assert [p.exitcode for p in processes] == [0, 0]


def fields(calib: str, **more: Any) -> dict[str, Any]:
    return {"calib": calib, "samples": 7, "grid": 5, "device": "cpu", "method": "qig", **more}


def assert_same(one: Path, two: Path) -> None:
    """The same exponents and nearly the same bytes; losses and counts of all samples.

    Error compensation passes the last bit of a sum on from column to column until a code flips,
    and from there to all that comes after: with it the first group's codes, which no code has
    come before, are compared, and for the rest how well they do. Where the scales of channels weigh
    what compensation leaves of an error (weights only), they too follow the last bits, by up to
    0.4%: then the first group's folded scales are compared, and no codes.
    """
    a, b = (
        QuantizationReport.model_validate_json((d / REPORT_FILE).read_text()) for d in (one, two)
    )
    assert a.calibration == b.calibration
    assert len(a.blocks) == len(b.blocks) == 2
    compensated = a.recipe["rounding"] not in ("nearest", "clip")
    for x, y in zip(a.blocks, b.blocks, strict=True):
        for name, linear in x.linears.items():
            assert linear.tokens == y.linears[name].tokens
            if compensated:
                assert linear.error == pytest.approx(y.linears[name].error, rel=0.5)
        assert x.output_error == pytest.approx(y.output_error, rel=0.2 if compensated else 0.01)
        if compensated and x.index:
            continue
        assert [m.exponent for m in x.modules] == [m.exponent for m in y.modules]
        for m, n in zip(x.modules, y.modules, strict=True):
            # A last bit decides now and then how a scale is rounded to 16 bits.
            assert m.losses == pytest.approx(n.losses, rel=3e-2)
            if m.completeness is not None:  # a quotient of small differences under int8
                assert m.completeness == pytest.approx(n.completeness, rel=0.2, abs=1e-3)
            for modality, share in m.token_shares.items():
                assert share.tokens == n.token_shares[modality].tokens
                assert share.after_clip == pytest.approx(
                    n.token_shares[modality].after_clip, abs=5e-3
                )
    channels = a.recipe["equalize"] == "channels" and not get_scheme(a.scheme).activation_bits
    equal = total = 0
    first, second = tensors_of(one), tensors_of(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if compensated and not any(f"layers.0.self_attn.{p}_proj" in name for p in "qkv"):
            if name.endswith("layers.0.input_layernorm.weight"):
                torch.testing.assert_close(tensor, second[name], rtol=0.01, atol=0)
            continue
        if name.endswith("weight_packed"):
            equal += int((tensor == second[name]).sum())
            total += tensor.numel()
        else:
            torch.testing.assert_close(tensor.float(), second[name].float(), rtol=0.02, atol=1e-3)
    assert total and (channels or equal > 0.99 * total), f"{equal} of {total} packed words"
