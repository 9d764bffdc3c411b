"""What a quantization costs: one decoder block of real size, timed and extrapolated.

    python tests/benchmarks/bench_block.py [--scheme w3a16 --method qig --tokens 64 --json FILE]

A block with the sizes of Qwen2.5-VL-7B's decoder (or others: --hidden, --intermediate, ...; with
--experts one of Qwen3-VL's sparse blocks, --intermediate then an expert's) and random weights goes
through all that `qig-serve quantize` does to a block, on a few random tokens. What grows with the
tokens is scaled to a run of --run-samples samples of --run-tokens tokens, what does not is taken as
it is, and both are multiplied by --blocks: the arithmetic of the estimate that `quantize` prints.
The vision tower and reading from disk are not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qig_serve.architectures import get_architecture
from qig_serve.experts import unfuse
from qig_serve.offline import estimate
from qig_serve.offline.calibration.batches import IMAGE, TEXT, CalibrationBatch
from qig_serve.offline.equalization import experts as equalize_experts
from qig_serve.offline.equalization import group as equalize
from qig_serve.offline.estimate import time_block
from qig_serve.offline.passes.capture import Store
from qig_serve.offline.passes.streams import OutputGradients, Streams
from qig_serve.offline.placement import pick_device
from qig_serve.offline.progress import device_bytes, duration, gibibytes, host_bytes
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.offline.rounding import block as rounding_of_a_block
from qig_serve.offline.source.loaded_model import BlockInputs

# What is in proportion to the tokens, then what is not.
STEPS = {
    "capture": "capture inputs and targets",
    "token_weights": "token weights",
    "search": "forward passes of the grid",
    "statistics": "Hessians",
    "outputs": "gradients at outputs",
    "advance": "advance both streams",
    "candidates": "quantize weights, the grid",
    "rounding": "channel scales, round and pack",
}


def random_block(args: argparse.Namespace, device: torch.device) -> Any:
    """A Qwen2 decoder layer in fp32 and its rotary embedding."""
    from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextDecoderLayer

    config = Qwen2Config(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        num_hidden_layers=1,
        head_dim=args.head_dim or args.hidden // args.heads,
        attn_implementation="sdpa",
    )
    sparse = Qwen3VLMoeTextConfig(
        hidden_size=args.hidden,
        moe_intermediate_size=args.intermediate,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=config.head_dim,
        num_experts=args.experts,
        num_experts_per_tok=args.experts_per_token,
        num_hidden_layers=1,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        block: torch.nn.Module = (
            Qwen3VLMoeTextDecoderLayer(sparse, layer_idx=0)
            if args.experts
            else Qwen2DecoderLayer(config, layer_idx=0)
        )
        unfuse(block)
    block = block.to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in block.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return block, Qwen2RotaryEmbedding(config).to(device)


def random_streams(
    recipe: QuantRecipe, rotary: Any, args: argparse.Namespace, device: torch.device
) -> Streams:
    """One batch of --samples random samples, three quarters of their tokens an image's."""
    b, t = args.samples, args.tokens
    hidden = torch.randn(b, t, args.hidden, device=device)
    modality = torch.full((b, t), TEXT, dtype=torch.int8)
    modality[:, : 3 * t // 4] = IMAGE
    mask = torch.ones(b, t, dtype=torch.bool)
    half = torch.arange(b) % 2 == 1
    batch = CalibrationBatch({}, mask, modality, torch.zeros_like(mask), ("random",), half)
    places = torch.arange(t, device=device)[None].expand(b, -1)
    kwargs = {"position_embeddings": rotary(hidden, places), "attention_mask": None}
    full, quantized = Store(), Store()
    full.put(0, hidden)
    quantized.put(0, hidden)
    inputs = [BlockInputs(hidden[:0], (kwargs,))]
    share = b * t / (args.run_samples * args.run_tokens)
    return Streams(
        recipe.quant_scheme,
        torch.bfloat16,
        device,
        recipe.batch_tokens,
        [batch],
        inputs,
        inputs,
        full,
        quantized,
        share=share,
    )


def machine(device: torch.device) -> str:
    """What it ran on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    name = names[0] if names else platform.processor()
    return (
        f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", default="w3a16")
    parser.add_argument("--method", default="qig")
    parser.add_argument("--device", default="auto")
    for name, size in {
        "hidden": 3584,
        "intermediate": 18944,
        "heads": 28,
        "kv-heads": 4,
        "head-dim": 0,
        "experts": 0,
        "experts-per-token": 8,
        "samples": 1,
        "tokens": 64,
        "blocks": 28,
        "run-samples": 128,
        "run-tokens": 1024,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU time: for one thread on a busy machine"
    )
    args = parser.parse_args()
    if args.cpu_time:
        clock: Any = SimpleNamespace(perf_counter=time.process_time, monotonic=time.process_time)
        for module in (estimate, equalize, equalize_experts, rounding_of_a_block):
            module.time = clock  # type: ignore[attr-defined]
    torch.manual_seed(0)
    device = pick_device(args.device)
    recipe = QuantRecipe(scheme=args.scheme, method=args.method, calib="random")
    block, rotary = random_block(args, device)
    arch = get_architecture("qwen3_vl_moe" if args.experts else "qwen2_5_vl")
    groups = arch.groups_of(block)
    names = [name for group in groups for name in group.linears]
    loaded: Any = SimpleNamespace(
        device=device,
        has_experts=False,  # its block 0 is the one that stands for all
        block=lambda index: block,
        groups=lambda block: groups,
        linears=lambda block: [block.get_submodule(name) for name in names],
    )
    streams = random_streams(recipe.model_copy(update={"grid": 2}), rotary, args, device)
    if recipe.rounding_method.outputs:
        gradients = streams.new_store("gradients-0")
        gradients.put(0, torch.randn(args.samples, args.tokens, args.hidden).bfloat16())
        streams.output_gradients = OutputGradients((0,), 1, (gradients,))
    with torch.no_grad():
        seconds = time_block(loaded, streams, recipe, recipe.candidates)
    factor = args.run_samples * args.run_tokens / (args.samples * args.tokens)
    total = args.blocks * seconds.scaled(factor)

    parameters = sum(p.numel() for p in block.parameters())
    print(
        f"{args.scheme} {args.method}, block of {parameters / 1e6:.0f}M weights, {machine(device)}"
    )
    if args.cpu_time:
        print("seconds of CPU time")
    print(f"{'':28} {f'{args.samples} x {args.tokens} tokens':>16} {'a block of the run':>19}")
    for name, text in STEPS.items():
        spent = getattr(seconds, name)
        fixed = name in ("candidates", "rounding")
        print(f"{text:28} {spent:14.2f} s {duration(spent if fixed else spent * factor):>19}")
    print(
        f"{args.run_samples} samples of {args.run_tokens} tokens through {args.blocks} blocks: "
        f"about {duration(total)}; peak {gibibytes(host_bytes())} host"
        + (f", {gibibytes(device_bytes(device))} device" if device.type == "cuda" else "")
    )
    if args.json:
        result = {
            **{k: v for k, v in vars(args).items() if k != "json"},
            "machine": machine(device),
            "seconds": dataclasses.asdict(seconds),
            "run_seconds": total,
            "host_bytes": host_bytes(),
            "device_bytes": device_bytes(device),
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
