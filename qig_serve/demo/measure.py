"""Exact match of a demonstration model in full precision and rounded to nearest.

`python -m qig_serve.demo.measure DIR`: shows that the bundled model is good enough, and that
plain rounding does it harm, without the offline pipeline or vLLM.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qig_serve import packing
from qig_serve.demo.batches import Encoder, answer_logits, make_batch
from qig_serve.demo.model import load_model
from qig_serve.demo.outliers import activation_spread, decoder_layers
from qig_serve.demo.questions import TYPES, Question, samples
from qig_serve.evaluation.statistics import paired
from qig_serve.formats import QuantScheme, get_scheme


@torch.no_grad()
def answers_right(
    model: Any, encoder: Encoder, asked: Sequence[Question], device: str = "cpu", chunk: int = 50
) -> list[bool]:
    """Whether greedy decoding would answer each sample exactly.

    Teacher-forced: a greedy answer is right exactly when each token is the most likely one
    after the right ones before it.
    """
    dtype = next(model.parameters()).dtype
    right: list[bool] = []
    for start in range(0, len(asked), chunk):
        part = asked[start : start + chunk]
        questions = [[(s.type, s.question, s.answer)] for s in part]
        pictures = [np.asarray(s.image) for s in part]
        batch = make_batch(encoder, pictures, questions, dtype).to(device)
        logits, _ = answer_logits(model, batch, encoder.before_image)
        missed = set(batch.question[logits.argmax(-1) != batch.target].tolist())
        right += [i not in missed for i in range(len(part))]
    return right


def by_type(asked: Sequence[Question], right: Sequence[bool]) -> dict[str, float]:
    """Share of right answers by type of question and over "all"."""
    scores = {}
    for kind in TYPES:
        hits = [hit for sample, hit in zip(asked, right, strict=True) if sample.type == kind]
        scores[kind] = sum(hits) / max(len(hits), 1)
    scores["all"] = sum(right) / max(len(right), 1)
    return scores


def rounded_to_nearest(model: Any, scheme: QuantScheme) -> Any:
    """A copy with every decoder linear rounded to nearest, its input too where a scheme says so."""
    copied = copy.deepcopy(model)
    for layer in decoder_layers(copied):
        for linear in layer.modules():
            if not isinstance(linear, torch.nn.Linear):
                continue
            with torch.no_grad():
                dtype = packing.scale_dtype(scheme, linear.weight.dtype)
                linear.weight.copy_(packing.fake_quantize(linear.weight, scheme, dtype))
            if scheme.activation_bits is not None:
                linear.register_forward_pre_hook(
                    lambda _, args: (packing.fake_quantize_activation(args[0]), *args[1:])
                )
    return copied


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--split", default="test")
    parser.add_argument("--n", type=int, default=2000)
    args = parser.parse_args()
    model, processor = load_model(args.directory)
    encoder = Encoder(processor.tokenizer, model.config.model_type)
    asked = list(samples(args.split, args.n))
    full = answers_right(model, encoder, asked)
    rows = {"fp": full}
    for name in ("w3a16", "w4a8"):
        rounded = rounded_to_nearest(model, get_scheme(name))
        rows[f"rtn {name}"] = answers_right(rounded, encoder, asked)
    print(f"{'':10s}" + "".join(f"{kind:>10s}" for kind in (*TYPES, "all")))
    for name, right in rows.items():
        scores = by_type(asked, right)
        change = paired(full, right)
        print(
            f"{name:10s}"
            + "".join(f"{100 * score:10.2f}" for score in scores.values())
            + (
                f"   -{change.right_to_wrong} +{change.wrong_to_right} p={change.p_value:.1e}"
                if name != "fp"
                else ""
            )
        )
    sample = asked[0]
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=[sample.image], text=[text], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    for i, (largest, median) in enumerate(activation_spread(model, dict(inputs))):
        print(f"hidden state {i}: largest {largest:.1f}, median {median:.3f}")


if __name__ == "__main__":
    main()
