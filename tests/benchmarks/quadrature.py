"""Gauss-Legendre nodes against the paper's 32 equal steps: cost, completeness, token weights.

    python tests/benchmarks/quadrature.py MODEL --scheme w3a16 --calib demo --samples 16

For every rule, over all blocks, with a round-to-nearest prefix as the quantized stream: the
CPU time, the worst completeness error, and the rank correlation (Spearman, a sample; smallest
and mean) of its token weights, before clipping, with those of 128 equal steps.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from qig_serve.offline import pipeline
from qig_serve.offline.calibration.batches import make_batches
from qig_serve.offline.calibration.sources import load_calibration
from qig_serve.offline.importance.attribution import completeness
from qig_serve.offline.importance.weights import GroupTokens, attribute_part
from qig_serve.offline.passes.parts import capture_parts
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.offline.rounding.block import round_block
from qig_serve.offline.source.loaded_model import load

RULES = [("gauss", 2), ("gauss", 6), ("gauss", 8), ("gauss", 12), ("gauss", 16), ("uniform", 32)]
REFERENCE = ("uniform", 128)


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks of a vector."""
    order = values.argsort()
    out = torch.empty(len(values))
    out[order] = torch.arange(len(values), dtype=torch.float32)
    return out


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two vectors."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--scheme", default="w3a16")
    parser.add_argument("--calib", default="demo")
    parser.add_argument("--samples", type=int, default=16)
    args = parser.parse_args()
    base = QuantRecipe(method="qig", scheme=args.scheme, calib=args.calib, samples=args.samples)
    loaded = load(args.model)
    samples = load_calibration(args.calib, args.samples, 0)
    batches = make_batches(samples, loaded.processor, loaded.image_token_id)
    streams = pipeline.first_streams(loaded, base, batches, None)
    rows: dict[tuple[str, str, int], list[tuple[float, float, float, float]]] = {}
    for index in range(loaded.num_blocks):
        original, block = loaded.block(index), loaded.block(index)
        for group in loaded.arch.groups:
            captured = capture_parts(
                block,
                group,
                streams,
                base.weighting.needs_quantized_input,
                f"layer {index}, {group.name}",
            )
            masks = [streams.mask(b) for b in range(len(streams))]
            reference: list[torch.Tensor] = []
            for rule, steps in [REFERENCE, *RULES]:
                weighting = replace(base.weighting, quadrature=rule, steps=steps)
                tokens = GroupTokens(block, group, index, streams, captured, weighting, None)
                started = time.process_time()
                with torch.no_grad():
                    parts = [attribute_part(tokens, i) for i in range(len(captured.calls))]
                seconds = time.process_time() - started
                raw = captured.to_batches([p.importance for p in parts], masks)
                vectors = [
                    u[m]
                    for us, ms in zip(raw, masks, strict=True)
                    for u, m in zip(us, ms, strict=True)
                ]
                if (rule, steps) == REFERENCE:
                    reference = vectors
                    continue
                error = completeness(
                    sum(float(p.integral.sum()) for p in parts),
                    sum(float(p.difference.sum()) for p in parts),
                )
                found = [spearman(a, b) for a, b in zip(vectors, reference, strict=True)]
                row = (seconds, error, min(found), sum(found) / len(found))
                rows.setdefault((group.name, rule, steps), []).append(row)
            captured.clear()
        where, method = f"layer {index}", base.rounding_method
        round_block(block, original, loaded.arch.groups, [], streams, method, where)
        linears = [block.get_submodule(name) for name in loaded.arch.linears]
        streams.advance(original, block, linears, where)
    print(f"{args.scheme}: {args.samples} samples, {loaded.num_blocks} blocks")
    print("module     rule           CPU s  completeness  rank corr. (min)  (mean)")
    for (name, rule, steps), measured in rows.items():
        seconds, worst = sum(m[0] for m in measured), max(m[1] for m in measured)
        low, mean = min(m[2] for m in measured), sum(m[3] for m in measured) / len(measured)
        label = f"{rule} {steps}"
        print(f"{name:10} {label:12} {seconds:7.2f} {worst:13.2%} {low:17.4f} {mean:7.4f}")


if __name__ == "__main__":
    main()
