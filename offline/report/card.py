"""README.md of a checkpoint: a Hugging Face model card, with metadata that machines read too."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qig_serve import tensor_parallel
from qig_serve.formats import get_scheme
from qig_serve.manifest import PER_BLOCK
from qig_serve.model_directory import hub_name
from qig_serve.offline.results import COMPLETENESS_LIMIT, QuantizationReport
from qig_serve.vllm_plugin import SUPPORTED_VLLM

DEVICES = ("cpu", "cuda")
"""Where the checkpoint can be served: vLLM's CPU kernels, or Triton kernels on NVIDIA GPUs."""

NO_RECORD = (
    "There is no canary.json, by which `qig-serve doctor` would compare a copy: the processor or "
    "the chat template takes no picture of a usual size. The checkpoint was read back before it "
    "was published."
)
"""Among a report's warnings."""

# What of the source model's own card stays true of the quantized model.
_INHERITED = ("license", "license_name", "license_link", "language", "datasets")


def front_matter(path: Path) -> dict[str, Any]:
    """The YAML block that opens a model card; empty if there is no card or no valid block."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        found = yaml.safe_load(text[4 : text.index("\n---", 4) + 1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def versions() -> dict[str, str]:
    """Installed versions of what computes the result."""
    found = {}
    for name in ("qig-serve", "torch", "transformers", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def public_name(model: str) -> str:
    """What to call a model or data elsewhere: org/name of the hub, or a path's last part.

    The folders of the machine that quantized it are not published. A hub name is that of a
    snapshot, or of a folder org/name that `hf download` filled. `hf:` sources keep their options.
    """
    if model.startswith("hf:"):
        data, mark, options = model[3:].partition("?")
        return f"hf:{public_name(data)}{mark}{options}"
    path = Path(model)
    if name := hub_name(path):
        return name
    if not path.is_absolute() and len(path.parts) == 2 and (path / ".cache/huggingface").is_dir():
        return model
    return path.name if path.is_absolute() or path.exists() else model


def published(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's fields or the like, with what names a path as it is called elsewhere."""
    return {k: public_name(v) if isinstance(v, str) else v for k, v in values.items()}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def recovery_rows(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the recovery table: full precision, the checkpoint, and what is kept."""
    results: Mapping[str, Any] = evaluation["results"]
    full = results["fp"]
    ((_, own),) = ((k, v) for k, v in results.items() if k != "fp")
    head = ["", "full precision", "this checkpoint", "recovery"]

    def row(label: str, a: float | None, b: float | None) -> list[str]:
        kept = f"{b / a:.1%}" if a and b is not None else "-"
        return [label, _percent(a), _percent(b), kept]

    rows = [row(f"exact match ({own['n']} questions)", full["exact_match"], own["exact_match"])]
    counts = own.get("n_by_type", {})
    for kind, share in own["by_type"].items():
        number = f" ({counts[kind]})" if kind in counts else ""
        rows.append(row(f"- {kind}{number}", full["by_type"].get(kind), share))
    if paired := own.get("paired"):
        low, high = (100 * v for v in paired["interval"])
        rows.append(
            [
                "difference in points, 95% interval",
                "",
                f"{100 * paired['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
                "",
            ]
        )
        rows.append(
            [
                "right -> wrong, wrong -> right, McNemar p",
                "",
                f"{paired['right_to_wrong']}, {paired['wrong_to_right']}, {paired['p_value']:.2g}",
                "",
            ]
        )
    if kl := own.get("kl"):
        rows += [
            ["KL on answer tokens, mean (nats per token)", "0", f"{kl['kl_mean']:.2g}", ""],
            ["KL, 99th percentile", "0", f"{kl['kl_p99']:.2g}", ""],
            ["top-1 agreement on answer tokens", "100.0%", _percent(kl["top1"]), ""],
            ["answer perplexity ratio", "1", f"{kl['perplexity_ratio']:.4f}", ""],
        ]
    if own.get("agreement") is not None:
        rows.append(["same whole answer", "100.0%", _percent(own["agreement"]), ""])
    return head, rows


def all_warnings(report: QuantizationReport) -> list[str]:
    """What a reader must know first: the run's own warnings, fallbacks, incomplete attributions."""
    lines = [*report.warnings, *(f"Fallback: {text}" for text in report.fallbacks)]
    if get_scheme(report.scheme).activation_bits is None:
        lines += [
            f"Block {block.index}, {module.name}: the attribution misses completeness by "
            f"{module.completeness:.1%}, more than {COMPLETENESS_LIMIT:.0%}: use more steps"
            for block in report.blocks
            for module in block.modules
            if module.completeness is not None and module.completeness > COMPLETENESS_LIMIT
        ]
    return lines


def _metadata(
    report: QuantizationReport,
    quantization: Mapping[str, Any],
    inherited: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    base = report.model
    data: dict[str, Any] = {k: inherited[k] for k in _INHERITED if k in inherited}
    data |= {
        "base_model": public_name(base),
        "base_model_relation": "quantized",
        "library_name": "vllm",
        "pipeline_tag": "image-text-to-text",
        "tags": ["qig", report.scheme, report.family, "quantized", "vllm"],
        "quantization": {
            "scheme": report.scheme,
            "method": report.method,
            "seed": report.calibration.get("seed"),
            "calibration_samples": report.calibration.get("samples"),
            "calibration_sha256": report.calibration.get("sha256"),
            "tensor_parallel_sizes": quantization.get("tensor_parallel_sizes", [1]),
            "devices": list(DEVICES),
            "versions": versions(),
        },
    }
    if evaluation is not None:
        own = next(v for k, v in evaluation["results"].items() if k != "fp")
        data["quantization"]["evaluation"] = {
            "data": public_name(str(evaluation.get("data", ""))),
            "sha256": own.get("evaluation_sha256"),
            "questions": own["n"],
            "exact_match": round(own["exact_match"], 6),
            "exact_match_full_precision": round(evaluation["results"]["fp"]["exact_match"], 6),
            "kl_mean": own.get("kl_mean"),
        }
    return data


def _recovery(report: QuantizationReport, evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is not None:
        head, rows = recovery_rows(evaluation)
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        source = public_name(str(evaluation.get("data", "")))
        return (
            f"Held-out questions: `{source}`. An answer counts when the whole of it is the wanted "
            "one but for case and white space.\n\n" + table
        )
    text = ["No evaluation was run on this checkpoint. The calibration's own figures:", ""]
    text += calibration_figures(report)
    ours = report.recipe.get("format") != "compressed-tensors"
    asked = "DIR --reference MODEL" if ours else "--server http://localhost:8000"
    text += ["", f"`qig-serve evaluate {asked} --data SRC` measures the answers."]
    return "\n".join(text)


def calibration_figures(report: QuantizationReport) -> list[str]:
    """What can be said without an evaluation, one line for each figure."""
    figures, lines = report.summary(), []
    if "search_loss_over_rtn" in figures:
        share = figures["search_loss_over_rtn"]
        lines.append(f"- equalization leaves {share:.3f} of the loss of rounding to nearest")
    if "output_error_last_block" in figures:
        error = 100 * figures["output_error_last_block"]
        lines.append(f"- squared error of the last block's output: {error:.3g}% of its square")
    if report.tuning is not None and report.tuning.steps:
        lines.append(f"- {report.tuning.line()}")
    if rare := report.rare_experts():
        lines.append(f"- {rare}")
    if "completeness_worst" in figures:
        # With int8 activations rounding's jumps are in the sum, and have no gradient.
        exact = get_scheme(report.scheme).activation_bits is None
        right = f"below {COMPLETENESS_LIMIT:.0%} is right"
        lines.append(
            f"- integrated gradients miss their sum by {figures['completeness_worst']:.2%} at "
            f"most; {right if exact else 'with int8 activations they only approximate it'}"
        )
    return lines


def _serve(report: QuantizationReport, title: str) -> str:
    ask = f"""and ask it about a picture:

```python
import base64
from openai import OpenAI

picture = base64.b64encode(open("picture.jpg", "rb").read()).decode()
content = [
    {{"type": "image_url", "image_url": {{"url": f"data:image/jpeg;base64,{{picture}}"}}}},
    {{"type": "text", "text": "What is in this picture?"}},
]
client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
answer = client.chat.completions.create(
    model="{title}", messages=[{{"role": "user", "content": content}}]
)
print(answer.choices[0].message.content)
```"""
    if report.recipe.get("format") == "compressed-tensors":
        return f"""A checkpoint of compressed-tensors, which vLLM loads as it comes: start a server,

```bash
vllm serve {title}
```

{ask}"""
    return f"""Start a server,

```bash
pip install "qig-serve[cuda]"  # or qig-serve[cpu]; beside {SUPPORTED_VLLM}
qig-serve serve {title}
# or plain vLLM, which finds qig-serve by itself: vllm serve {title}
```

{ask}

In transformers, for evaluation rather than speed: `import qig_serve.transformers_plugin`, then
`from_pretrained`, which dequantizes the weights."""


def _unchanged(report: QuantizationReport) -> str:
    """What lies outside of the decoder, and in how many bits."""
    names = {"lm_head": "output head", "embed_tokens": "embedding"}
    in_8 = [text for end, text in names.items() if any(n.endswith(end) for n in report.eight_bit)]
    if any(n.endswith(PER_BLOCK) for n in report.eight_bit):
        return (
            f"Vision tower and projector are\nunchanged; in 8 bits (one scale for an entry of the "
            f"vocabulary): {', '.join(report.eight_bit)}."
        )
    tied = in_8 == ["embedding"] and not any(n.endswith("lm_head") for n in report.left_alone)
    if len(in_8) == 2 or tied:
        return (
            "Vision tower and projector are\nunchanged, output head and embedding in 8 bits (one "
            "scale for an entry of the vocabulary)."
        )
    if in_8:
        other = next(text for text in names.values() if text not in in_8)
        return (
            f"Vision tower, projector and\n{other} are unchanged, the {in_8[0]} is in 8 bits (one "
            "scale for an entry of the vocabulary)."
        )
    return "Vision tower, projector, embeddings and\noutput head are unchanged."


def _checks(report: QuantizationReport, title: str) -> str:
    """What the files are for that this package checks a checkpoint by."""
    manifest = "qig_manifest.json lists a sha256 of every file"
    if report.recipe.get("format") == "compressed-tensors":
        return f"{manifest}."
    if NO_RECORD in report.warnings:
        return f"{manifest}: `qig-serve inspect --verify {title}`."
    return (
        f"{manifest}: `qig-serve inspect --verify {title}`.\n"
        "canary.json is what the model gave for a picture and a question when it was written:\n"
        f"`qig-serve doctor {title}` compares it."
    )


def model_card(
    report: QuantizationReport,
    quantization_config: Mapping[str, Any],
    inherited: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
) -> str:
    """The card as text; `inherited` is the front matter of the source model's card."""
    scheme = get_scheme(report.scheme)
    metadata = _metadata(report, quantization_config, inherited, evaluation)
    name = Path(str(metadata["base_model"])).name
    title = f"{name}-{report.scheme}"
    activations = (
        "8-bit activations, one scale per token"
        if scheme.activation_bits is not None
        else "16-bit activations"
    )
    scales = f"a group of {scheme.group_size}" if scheme.group_size else "an output channel"
    refused = quantization_config.get("summary", {}).get("tensor_parallel_refused", {})
    parallel = tensor_parallel.in_words(metadata["quantization"]["tensor_parallel_sizes"], refused)
    calibration = report.calibration
    source = public_name(str(calibration.get("source", "nothing")))
    warnings = all_warnings(report)
    listed = "\n".join(f"- {line}" for line in warnings) if warnings else "None."
    size = f"\n\nSize: {report.size()}." if report.size() else ""
    installed = ", ".join(f"{k} {v}" for k, v in metadata["quantization"]["versions"].items())
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    padded = ""
    if report.mlp_channels and report.mlp_channels_of_source:
        padded = (
            f"\nThe MLP has {report.mlp_channels} channels: {report.mlp_channels_of_source} of the "
            "source's and zeros behind them,\nso that devices can share it. The function is the "
            "same."
        )
    return f"""---
{front}---

# {title}

`{name}` with the linears of its language model in {scheme.bits} bits ({activations}; one scale for
{scales}), quantized by the method `{report.method}`. {_unchanged(report)}{padded}{size}

## Serve

{_serve(report, title)}

Devices: {", ".join(DEVICES)}. Tensor-parallel sizes: {parallel}.

## Recovery

{_recovery(report, evaluation)}

## Warnings

{listed}

## How it was made

| | |
| --- | --- |
| base model | {metadata["base_model"]} |
| scheme | {report.scheme} |
| method | {report.method} |
| calibration | {calibration.get("samples", 0)} samples of {source} |
| calibration sha256 | {calibration.get("sha256", "-")} |
| seed | {calibration.get("seed", "-")} |
| versions | {installed} |
| time | {report.seconds:.0f} s |

report.html shows what the quantization did, layer by layer; report.json holds the same figures, and
quantize.log is the run's log. {_checks(report, title)}
"""
