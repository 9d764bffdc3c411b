"""Questions as a local task of lm-evaluation-harness and lmms-eval.

    python -m qig_serve.evaluation.harness_task questions.jsonl TASK
    lm_eval --include_path TASK/lm_eval --tasks qig_questions ...
    python -m lmms_eval --include_path TASK/lmms_eval --tasks qig_questions ...

No code is written, only data: pictures with a metadata.jsonl, as the `imagefolder` loader of
Hugging Face datasets reads them, and a YAML a harness. Scored by the harnesses' own `exact_match`,
asked to ignore case and surplus white space, which is what `statistics.normalize` does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qig_serve.errors import UserError
from qig_serve.samples import Sample, load_image

TASK = "qig_questions"
_SURPLUS_SPACE = r"^\s+|\s+$|(?<=\s)\s+"


def write_task(samples: Sequence[Sample], directory: Path, max_tokens: int = 160) -> None:
    """Writes data/, lm_eval/ and lmms_eval/ into a new directory.

    UserError when it exists already, and for a sample that is not one picture and one question:
    the harnesses' tasks know no other order.
    """
    rows = [(sample, _question(sample)) for sample in samples]
    try:
        data = directory.absolute() / "data"
        data.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{directory} holds a task already: remove it, or name another") from None
    with (data / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for number, (sample, question) in enumerate(rows):
            name = f"{number:06}.png"
            load_image(sample.images[0]).save(data / name)
            row: dict[str, Any] = {"file_name": name, "id": sample.id, "type": sample.type}
            file.write(json.dumps(row | {"question": question, "answer": sample.answer}) + "\n")
    # A split of a dataset without split folders is called train.
    shared: dict[str, Any] = {
        "task": TASK,
        "dataset_path": "imagefolder",
        "dataset_kwargs": {"data_dir": str(data)},
        "test_split": "train",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "regexes_to_ignore": [_SURPLUS_SPACE],
            }
        ],
    }
    greedy: dict[str, Any] = {"until": [], "do_sample": False, "temperature": 0}
    harnesses: dict[str, dict[str, Any]] = {
        "lm_eval": {
            "doc_to_image": ["image"],
            "generation_kwargs": greedy | {"max_gen_toks": max_tokens},
            "metadata": {"version": 1},
        },
        "lmms_eval": {
            "doc_to_visual": "image",
            "generation_kwargs": greedy | {"max_new_tokens": max_tokens},
            "metadata": [{"version": 1}],
        },
    }
    for harness, own in harnesses.items():
        (directory / harness).mkdir()
        text = yaml.safe_dump(shared | own, sort_keys=False)
        (directory / harness / f"{TASK}.yaml").write_text(text, encoding="utf-8")


def _question(sample: Sample) -> str:
    """The text that follows the one picture."""
    parts = [part for message in sample.messages for part in message["content"]]
    if [part["type"] for part in parts] != ["image", "text"] or not sample.answer:
        raise UserError(
            f"sample {sample.id}: a harness task needs one picture, one text after it, an answer"
        )
    return str(parts[1]["text"])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this module; returns the exit status."""
    from qig_serve.evaluate import load_samples

    parser = argparse.ArgumentParser(
        prog="python -m qig_serve.evaluation.harness_task",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="SRC", help="JSONL of samples with answers, or demo")
    parser.add_argument("directory", type=Path, metavar="TASK", help="directory to write")
    parser.add_argument("--n", type=int, help="the first N questions")
    parser.add_argument("--max-tokens", type=int, default=160, help="longest answer (default: 160)")
    args = parser.parse_args(argv)
    try:
        write_task(load_samples(args.data, args.n), args.directory, args.max_tokens)
    except UserError as error:
        print(f"harness_task: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
