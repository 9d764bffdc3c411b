"""What experts that few calibration tokens reach cost, on a demonstration model with experts.

    python tests/benchmarks/rare_experts.py MODEL CHECKPOINT [--questions 400] [--json FILE]

The experts of all blocks are put into four parts by the tokens that calibration routed to them
(report.json of the checkpoint). For every part: its experts alone carry the checkpoint's
weights, all else is full precision, and KL is measured on the answers of held-out questions
(teacher forcing, fp32; nats per token), beside the share of the questions' tokens that come to it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qig_serve.demo.batches import Encoder, answer_logits, make_batch
from qig_serve.demo.model import load_model
from qig_serve.demo.outliers import decoder_layers
from qig_serve.demo.questions import samples
from qig_serve.experts import unfuse
from qig_serve.offline.results import REPORT_FILE, QuantizationReport
from qig_serve.transformers_plugin import load_dequantized

PARTS = 4
Place = tuple[int, int]
"""A block and an expert of it."""


def tokens_of(report: QuantizationReport) -> dict[Place, int]:
    """Calibration tokens that were routed to each expert of each block."""
    return {
        (block.index, expert): tokens
        for block in report.blocks
        if block.experts is not None
        for expert, tokens in enumerate(block.experts.tokens)
    }


def by_tokens(tokens: dict[Place, int]) -> list[list[Place]]:
    """The experts in PARTS parts of one size, those with the fewest tokens first."""
    order = sorted(tokens, key=lambda place: tokens[place])
    bounds = [len(order) * part // PARTS for part in range(PARTS + 1)]
    return [order[a:b] for a, b in itertools.pairwise(bounds)]


def with_experts(full: Any, quantized: Any, places: list[Place]) -> Any:
    """A copy of `full` with the dequantized weights of some experts.

    Equalization has divided what the experts read by the channels' scales and put these into their
    weights; here they are taken out of them again.
    """
    model = copy.deepcopy(full)
    ours, theirs = decoder_layers(model), decoder_layers(quantized)
    with torch.no_grad():
        for block, expert in places:
            scale = (
                theirs[block].post_attention_layernorm.weight
                / ours[block].post_attention_layernorm.weight
            )
            to, of = ours[block].mlp.experts[expert], theirs[block].mlp.experts[expert]
            to.gate_proj.weight.copy_(of.gate_proj.weight * scale)
            to.up_proj.weight.copy_(of.up_proj.weight * scale)
            to.down_proj.weight.copy_(of.down_proj.weight)
    return model


@torch.no_grad()
def log_probabilities(model: Any, encoder: Encoder, asked: list[Any]) -> Iterator[torch.Tensor]:
    """[tokens, vocabulary] of the answers, 50 questions at a time."""
    for start in range(0, len(asked), 50):
        part = asked[start : start + 50]
        batch = make_batch(
            encoder,
            [np.asarray(s.image) for s in part],
            [[(s.type, s.question, s.answer)] for s in part],
            torch.float32,
        )
        yield answer_logits(model, batch, encoder.before_image)[0].log_softmax(-1)


def routed(model: Any, encoder: Encoder, asked: list[Any]) -> tuple[list[torch.Tensor], Any]:
    """Log-probabilities of the answers, and the tokens that came to each expert, [blocks, E]."""
    layers = decoder_layers(model)
    counts = torch.zeros(len(layers), len(layers[0].mlp.experts), dtype=torch.int64)

    def count(index: int) -> Any:
        def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            counts[index] += torch.bincount(args[1].flatten(), minlength=counts.shape[1])

        return hook

    hooks = [
        layer.mlp.experts.register_forward_pre_hook(count(i)) for i, layer in enumerate(layers)
    ]
    found = list(log_probabilities(model, encoder, asked))
    for hook in hooks:
        hook.remove()
    return found, counts


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = QuantizationReport.model_validate_json((args.checkpoint / REPORT_FILE).read_text())
    full, processor = load_model(args.model, torch.float32)
    unfuse(full)
    quantized = load_dequantized(args.checkpoint).eval()
    encoder = Encoder(processor.tokenizer, full.config.model_type)
    asked = list(samples("dev", args.questions))
    reference, counts = routed(full, encoder, asked)
    rows = []
    print("part of the experts   calibration tokens   share of tokens   KL (nats per token)")
    calibrated = tokens_of(report)
    parts = by_tokens(calibrated)
    for name, places in [
        *zip(("fewest tokens", "few", "many", "most"), parts, strict=True),
        ("all", list(itertools.chain(*parts))),
    ]:
        model = with_experts(full, quantized, places)
        kl = torch.cat(
            [
                (p.exp() * (p - q)).sum(-1)
                for p, q in zip(reference, log_probabilities(model, encoder, asked), strict=True)
            ]
        )
        tokens = [calibrated[place] for place in places]
        share = sum(int(counts[place]) for place in places) / int(counts.sum())
        row = {
            "part": name,
            "experts": len(places),
            "tokens": [min(tokens), max(tokens)],
            "share": share,
            "kl": float(kl.mean()),
        }
        rows.append(row)
        print(
            f"{name:<22}{min(tokens):>8} to {max(tokens):<8}{100 * share:>16.1f}%"
            f"{row['kl']:>16.5f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
