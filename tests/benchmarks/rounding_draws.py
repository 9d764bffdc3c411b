"""What chance does to the KL of round-to-nearest, beside searches for equalization scales.

    python tests/benchmarks/rounding_draws.py MODEL [--scheme w3a16] [--draws 8] [--json FILE]

A draw folds random scales, exp(0.1 z) with z normal, into every smoothing group of the model, which
changes nothing in full precision and all codes, and rounds to nearest. Beside the draws: rounding
as it is, and the search of each method with other calibration samples. KL on the answers of
held-out questions (teacher forcing, fp32; nats per token).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from qig_serve.demo.batches import Encoder
from qig_serve.demo.model import load_model
from qig_serve.demo.outliers import decoder_layers
from qig_serve.demo.questions import samples
from qig_serve.formats import QuantScheme, get_scheme
from qig_serve.offline import pipeline
from qig_serve.offline.equalization.smoothing import fold, outputs
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.offline.source import loaded_model
from qig_serve.packing import fake_quantize, scale_dtype
from qig_serve.transformers_plugin import load_dequantized

sys.path.insert(0, str(Path(__file__).resolve().parent))
from rare_experts import log_probabilities

SPREAD = 0.1
METHODS = ("awq", "mbq", "qig")


@torch.no_grad()
def rounded(directory: Path, full: Any, scheme: QuantScheme, seed: int | None) -> Any:
    """A copy of `full`, rounded to nearest; with a seed, after random scales are folded."""
    model, generator = copy.deepcopy(full), torch.Generator().manual_seed(seed or 0)
    loaded = loaded_model.load(directory, device=torch.device("cpu"))
    for index, layer in enumerate(decoder_layers(model)):
        block = loaded.block(index)
        groups = loaded.groups(block)
        for group in groups if seed is not None else ():
            if group.kind != "none":
                read = outputs(block, group)
                normal = torch.randn(read.stop - read.start, generator=generator)
                fold(block, group, (SPREAD * normal).exp(), torch.float32)
        for name in (name for group in groups for name in group.linears):
            weight = block.get_submodule(name).weight
            weight.copy_(fake_quantize(weight, scheme, scale_dtype(scheme, torch.bfloat16)))
        layer.load_state_dict(block.state_dict())
    return model


def main() -> None:
    """Measure and print, one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scheme", default="w3a16")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    scheme = get_scheme(args.scheme)
    if scheme.activation_bits is not None:
        parser.error(f"{scheme.name} quantizes activations, which these models do not")
    full, processor = load_model(args.model, torch.float32)
    encoder = Encoder(processor.tokenizer, full.config.model_type)
    asked = list(samples("dev", args.questions))
    reference = list(log_probabilities(full, encoder, asked))
    rows: list[dict[str, Any]] = []

    def judge(name: str, model: Any) -> None:
        kl, same = [], []
        for p, q in zip(reference, log_probabilities(model, encoder, asked), strict=True):
            kl.append((p.exp() * (p - q)).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
        each, top1 = torch.cat(kl), float(torch.cat(same).float().mean())
        most = float(each.topk(len(each) // 100).values.sum() / each.sum())
        rows.append({"name": name, "kl": float(each.mean()), "top1": top1, "worst_hundredth": most})
        print(
            f"{name:<16} KL {float(each.mean()):.6f}, {100 * most:.0f}% of it in 1% of "
            f"{len(each)} tokens; same first choice {100 * top1:.2f}%",
            flush=True,
        )

    judge("rtn", rounded(args.model, full, scheme, None))
    for seed in range(args.draws):
        judge(f"rtn, draw {seed}", rounded(args.model, full, scheme, seed))
    for method in METHODS:
        for seed in range(args.seeds):
            recipe = QuantRecipe(
                scheme=args.scheme, method=method, calib="demo", samples=64, seed=seed, device="cpu"
            )
            with tempfile.TemporaryDirectory() as folder:
                pipeline.quantize(args.model, Path(folder) / "out", recipe, quiet=True)
                judge(f"{method}, seed {seed}", load_dequantized(Path(folder) / "out").eval())
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
