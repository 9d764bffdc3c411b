"""A batch in OpenAI's form, answered by engines on many machines with Ray Data LLM.

    pip install '.[cuda]' 'ray[data,llm]'                   # on every machine of the cluster
    python docker/ray/batch.py /models/m-w3a16 batch.jsonl out --engines 8

Reads the files that `qig-serve generate` reads, pictures beside them, and writes JSON lines of
custom_id, answer and error to files of the folder `out`, which all machines must see. What `out`
has answers for already is not asked again: run it once more after a failure. A line that is no
request is named before anything starts; a conversation or picture that cannot be read ends the run
with its custom_id.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or Ray reports home

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from qig_serve.errors import UserError
from qig_serve.model_directory import load_processor
from qig_serve.records import parse_record
from qig_serve.rendering import render
from qig_serve.samples import load_image
from qig_serve.serving.batch_io import read_requests

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "seed": None, "stop": None, "ignore_eos": False}
"""Fields of a request that vLLM's sampling parameters know by the same name, and what they are
where it has none; max_tokens: the rest of the context. A block's rows all have the same columns."""


def answered(folder: Path) -> set[str]:
    """The custom_ids that earlier runs have answered."""
    lines = (line for path in folder.glob("*.json") for line in path.read_text().splitlines())
    return {row["custom_id"] for row in map(json.loads, lines) if not row["error"]}


def asked(batch: Path, done: set[str]) -> list[dict[str, str]]:
    """What is still to be asked, bodies as JSON; UserError for a line that is no request."""
    rows = []
    for request in read_requests(batch, None, {}):
        if request.error:
            raise UserError(f"{batch}, line {request.line}: {request.error}")
        name = request.custom_id or str(request.line)
        if name not in done:
            rows.append({"custom_id": name, "body": json.dumps(request.body)})
    return rows


def main() -> None:
    """Read, answer, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory of a quantized checkpoint, on every machine")
    parser.add_argument("batch", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--batch-size", type=int, default=32, help="requests handed over at once")
    parser.add_argument("--cpus", type=int, help="count so many CPUs where no cluster runs")
    args = parser.parse_args()
    try:
        rows = asked(args.batch, answered(args.output))
    except UserError as error:
        sys.exit(f"batch.py: {error}")
    if not rows:
        print(f"{args.output} has all answers")
        return
    ray.init(num_cpus=args.cpus, include_dashboard=False)
    bundle = {"CPU": 1, "GPU": int(args.device == "gpu")}
    folder = args.batch.absolute().parent

    held: dict[str, Any] = {}  # a block's worker loads the processor once

    def request(row: dict[str, Any]) -> dict[str, Any]:
        name, body = row["custom_id"], json.loads(row["body"])
        sample = parse_record({"messages": body.get("messages")}, f"request {name}", folder, 0)
        processor = held.get("processor") or load_processor(Path(args.model))
        held["processor"] = processor
        prompt = render(processor, sample.messages, name, add_generation_prompt=True)
        images = [load_image(image) for image in sample.images]
        given = {"max_tokens": args.max_model_len, **SAMPLING}
        given |= {key: body[key] for key in given if body.get(key) is not None}
        return {
            "custom_id": name,
            "tokenized_prompt": processor.tokenizer(prompt, add_special_tokens=False).input_ids,
            "multimodal_data": {"image": images} if images else None,
            "sampling_params": given,
        }

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        error = row.get("__inference_error__") or ""
        text = "" if error else row["generated_text"]
        return {"custom_id": row["custom_id"], "answer": text, "error": error}

    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=args.model,
            engine_kwargs={
                "max_model_len": args.max_model_len,
                "enforce_eager": args.device == "cpu",
            },
            placement_group_config={"bundle_per_worker": bundle},
            concurrency=args.engines,
            batch_size=args.batch_size,
            should_continue_on_error=True,
            # Ray 2.60's stages know neither vLLM's plugins nor where 0.32 keeps what they import.
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
        ),
        preprocess=request,
        postprocess=answer,
    )
    blocks = ray.data.from_items(rows).repartition(target_num_rows_per_block=args.batch_size)
    processor(blocks).write_json(str(args.output.absolute()))


if __name__ == "__main__":
    main()
