"""Held-out comparison with full precision: exact match, paired transitions, KL, agreement.

    results = evaluate_many([("rtn", rtn_dir), ("qig", qig_dir)], reference=model_dir,
                            samples=load_samples("demo", 2000))
    results["qig"].to_json()

Exact match: greedy answers, whole answer against whole answer after `statistics.normalize`
(NFC, case folded, white space collapsed; punctuation counts). KL, top-1 agreement and perplexity:
teacher-forced on the wanted answers, in fp32, through transformers (evaluation/divergence.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qig_serve.errors import UserError
from qig_serve.evaluation import Progress
from qig_serve.evaluation.generation import Engine, ask_server, choose_engine, generate
from qig_serve.evaluation.statistics import Paired, exact_match, is_repeating, normalize, paired
from qig_serve.http_clients import without_password
from qig_serve.model_directory import find_model, quantization, read_config, text_config
from qig_serve.records import read_samples
from qig_serve.samples import Sample, overlap, sample_sha256, set_sha256
from qig_serve.text_files import read_json
from qig_serve.weight_files import check_reference

if TYPE_CHECKING:
    from qig_serve.evaluation.divergence import Divergence

REFERENCE = "fp"
"""Name of the full-precision model among the results."""


@dataclass(frozen=True)
class Answer:
    """One question's outcome; `output` is None where the request failed."""

    id: str
    type: str
    wanted: str
    output: str | None

    @property
    def correct(self) -> bool:
        """Whether the output is the wanted answer (statistics.exact_match)."""
        return self.output is not None and exact_match(self.output, self.wanted)


@dataclass(frozen=True)
class EvaluationResult:
    """What one model did on the questions. Rates are fractions, KL is in nats."""

    name: str
    model: str
    engine: str
    answers: tuple[Answer, ...]
    evaluation_sha256: str
    scheme: str | None = None
    method: str | None = None
    divergence: Divergence | None = None
    is_reference: bool = False
    paired: Paired | None = None
    """Against full precision, on the questions that both answered."""
    agreement: float | None = None
    """Share of outputs that equal full precision's, in the form of `normalize`."""
    calibration_overlap: tuple[str, ...] | None = None
    """Ids of samples the checkpoint was calibrated on; None if it does not say."""
    failures: tuple[str, ...] = field(default=())

    @property
    def scored(self) -> list[Answer]:
        """The answers without the failed requests."""
        return [a for a in self.answers if a.output is not None]

    @property
    def exact_match(self) -> float:
        """Share of the scored questions answered exactly; 0 when none was."""
        return sum(a.correct for a in self.scored) / max(1, len(self.scored))

    def by_type(self) -> dict[str, tuple[int, float]]:
        """type -> (questions scored, exact match), types in alphabetical order."""
        out = {}
        for kind in sorted({a.type for a in self.scored}):
            inside = [a.correct for a in self.scored if a.type == kind]
            out[kind] = (len(inside), sum(inside) / len(inside))
        return out

    def to_json(self, answers: bool = False) -> dict[str, Any]:
        """The result as JSON-ready data; with `answers`, every output too.

        A reference is at KL 0 and top-1 agreement 1 to itself.
        """
        d, kinds = self.divergence, self.by_type()
        out: dict[str, Any] = {
            "name": self.name,
            "model": self.model,
            "scheme": self.scheme,
            "method": self.method,
            "engine": self.engine,
            "n": len(self.scored),
            "failed": len(self.failures),
            "exact_match": self.exact_match if self.scored else None,
            "by_type": {kind: share for kind, (_, share) in kinds.items()},
            "n_by_type": {kind: n for kind, (n, _) in kinds.items()},
            "empty": sum(not (a.output or "").strip() for a in self.scored),
            "repeating": sum(is_repeating(a.output or "") for a in self.scored),
            "kl_mean": d.kl_mean if d else 0.0 if self.is_reference else None,
            "top1": d.top1 if d else 1.0 if self.is_reference else None,
            "agreement": self.agreement,
            "evaluation_sha256": self.evaluation_sha256,
            "calibration_overlap": (
                None if self.calibration_overlap is None else list(self.calibration_overlap)
            ),
        }
        if d:
            out["kl"] = {**dataclasses.asdict(d), "perplexity_ratio": d.perplexity_ratio}
        if self.paired:
            out["paired"] = dataclasses.asdict(self.paired)
        if self.failures:
            out["failures"] = list(self.failures)
        if answers:
            out["answers"] = [{**dataclasses.asdict(a), "correct": a.correct} for a in self.answers]
        return out


def shown_name(name: str) -> str:
    """A result's name for people, the reference's included."""
    return "full precision" if name == REFERENCE else name


def load_samples(source: str, n: int | None = None, seed: int = 0) -> list[Sample]:
    """Samples with answers from a JSONL file, or of the demonstration set.

    `demo` is its test split, `demo:dev` another split, by name. The demonstration set is endless:
    2,000 questions when `n` is None.
    """
    if n is not None and n < 1:
        raise UserError(f"the number of samples must be at least 1, got {n}")
    if source != "demo" and not source.startswith("demo:"):
        return read_samples(Path(source), n, scored=True)
    from qig_serve.demo import questions
    from qig_serve.samples import sample_from_parts

    split = source.partition(":")[2] or "test"
    drawn = questions.samples(split, n or 2000, seed)
    return [sample_from_parts(s.id, s.type, s.image, s.question, s.answer) for s in drawn]


def _silent(_what: str, _done: int, _total: int) -> None:
    """The progress of a caller that wants none."""


def evaluate_many(
    models: Sequence[tuple[str, Path | str]],
    reference: Path | str | None,
    samples: Sequence[Sample],
    *,
    engine: Engine = "auto",
    kl_samples: int = 500,
    max_tokens: int = 160,
    progress: Progress | None = None,
) -> dict[str, EvaluationResult]:
    """Several models on the same questions; name -> result, the reference as "fp".

    A model is a directory, or org/name where the hub's local cache has it. `reference` is one in
    full precision, or a JSON file that `qig-serve evaluate` wrote on the same questions (then there
    are no logits, hence no KL), or None. KL is taken on the first `kl_samples` questions; 0 leaves
    it out. The engine "forced" finds answers by teacher forcing (evaluation/forced.py), "none" asks
    for none: KL alone. UserError when an input is wrong.
    """
    samples, say = list(samples), progress or _silent
    if not samples or any(not s.answer for s in samples):
        raise UserError("evaluation needs samples with answers")
    jobs = [(name, find_model(directory)) for name, directory in models]
    if len({name for name, _ in jobs}) < len(jobs):
        raise UserError("two models to evaluate have the same name")
    for _, directory in jobs:
        read_config(directory)  # fail now rather than after minutes
    used = choose_engine(engine)
    hashes = [sample_sha256(s) for s in samples]
    set_hash = set_sha256(hashes)

    reference_outputs: list[str | None] | None = None
    full: Path | None = None
    if reference is not None and Path(reference).is_file():
        reference_outputs = read_outputs(Path(reference), samples, set_hash)
    elif reference is not None:
        full = _full_precision(find_model(reference))
    divergences: dict[str, Divergence] = {}
    if full is not None:
        others = [(name, path) for name, path in jobs if path.resolve() != full.resolve()]
        if kl_samples > 0 or used == "forced":
            _check_alike(full, [path for _, path in others])
        if others and kl_samples > 0:
            from qig_serve.evaluation.divergence import divergences as compare

            # Before vLLM: its CPU worker rearranges this process's threads.
            divergences = dict(compare(full, others, samples[:kl_samples], say))
        if len(others) == len(jobs):
            jobs.insert(0, (REFERENCE, full))
    outputs = _answers(jobs, full, samples, used, max_tokens, say)
    results = {}
    for name, directory in jobs:
        if full is not None and directory.resolve() == full.resolve():
            reference_outputs = outputs[name]
    for name, directory in jobs:
        config = quantization(directory)
        is_full = full is not None and directory.resolve() == full.resolve()
        results[name] = _result(
            name,
            str(directory),
            used,
            samples,
            outputs[name],
            None if is_full else reference_outputs,
            evaluation_sha256=set_hash,
            scheme=config["scheme"] if config else None,
            method=config.get("method") if config else None,
            divergence=divergences.get(name),
            is_reference=is_full,
            calibration_overlap=_calibration_overlap(directory, samples),
        )
    return results


def _full_precision(directory: Path) -> Path:
    """The directory of a reference; UserError if it is none in full precision."""
    read_config(directory)
    if quantization(directory):
        raise UserError(f"the reference {directory} is quantized: give the full-precision model")
    check_reference(directory)
    return directory


def _check_alike(full: Path, others: Sequence[Path]) -> None:
    """UserError for a model that cannot be compared with the reference token by token."""

    def sizes(directory: Path) -> dict[str, Any]:
        config = read_config(directory)
        text = text_config(config)
        found = {key: text.get(key) for key in ("vocab_size", "hidden_size")}
        return {"model_type": config.get("model_type"), **found}

    wanted = sizes(full)
    for directory in others:
        for key, value in sizes(directory).items():
            if None not in (value, wanted[key]) and value != wanted[key]:
                raise UserError(
                    f"{directory} was not made of the reference {full}: {key} is {value} in one "
                    f"config.json and {wanted[key]} in the other: give the model it was made of"
                )


def _answers(
    jobs: Sequence[tuple[str, Path]],
    full: Path | None,
    samples: Sequence[Sample],
    engine: Literal["vllm", "transformers", "forced", "none"],
    max_tokens: int,
    say: Progress,
) -> dict[str, list[str | None]]:
    """Every model's answers by name; those forced need the full-precision model `full`."""
    if engine == "none":
        return {name: [None] * len(samples) for name, _ in jobs}
    forced: dict[str, list[str]] = {}
    if engine == "forced":
        if full is None:
            raise UserError("answers can be forced only against a full-precision model directory")
        from qig_serve.evaluation.forced import forced_answers

        forced = forced_answers(full, jobs, samples, max_tokens, say)
    outputs: dict[str, list[str | None]] = {}
    for name, directory in jobs:
        if name in forced:
            outputs[name] = list(forced[name])
            continue
        step = partial(say, f"{shown_name(name)}: answers ({engine})")
        step(0, len(samples))
        outputs[name] = list(generate(directory, samples, engine, max_tokens, step))
    return outputs


def evaluate_server(
    url: str,
    reference: Path | str | None,
    samples: Sequence[Sample],
    *,
    max_tokens: int = 160,
    progress: Progress | None = None,
    model: str | None = None,
) -> EvaluationResult:
    """An OpenAI-compatible server on the questions; `reference` as `read_outputs` reads it."""
    samples, say = list(samples), progress or _silent
    set_hash = set_sha256([sample_sha256(s) for s in samples])
    wanted = None if reference is None else read_outputs(Path(reference), samples, set_hash)
    outputs, failures = ask_server(
        url, samples, max_tokens, lambda a, b: say(f"asking {without_password(url)}", a, b), model
    )
    return _result(
        "server",
        without_password(url),
        "server",
        samples,
        outputs,
        wanted,
        evaluation_sha256=set_hash,
        failures=tuple(failures),
    )


def _result(
    name: str,
    model: str,
    engine: str,
    samples: Sequence[Sample],
    outputs: Sequence[str | None],
    reference: Sequence[str | None] | None,
    **rest: Any,
) -> EvaluationResult:
    answers = tuple(
        Answer(s.id, s.type, s.answer or "", o) for s, o in zip(samples, outputs, strict=True)
    )
    if reference is not None:
        both = [
            (a, r)
            for a, r in zip(answers, reference, strict=True)
            if a.output is not None and r is not None
        ]
        if both:
            rest["paired"] = paired(
                [exact_match(r, a.wanted) for a, r in both], [a.correct for a, _ in both]
            )
            same = [normalize(a.output or "") == normalize(r) for a, r in both]
            rest["agreement"] = sum(same) / len(same)
    return EvaluationResult(name, model, engine, answers, **rest)


def read_outputs(path: Path, samples: Sequence[Sample], evaluation_sha256: str) -> list[str | None]:
    """The outputs in a file of `qig-serve evaluate --json`; UserError for other questions."""
    if path.is_dir():
        raise UserError(
            f"{path} is a directory: with --server, --reference names a file that an earlier "
            f"`qig-serve evaluate {path} --json FILE` wrote on the same questions"
        )
    record = read_json(path)
    try:
        outputs = [a["output"] for a in record["answers"]]
        ids = [a["id"] for a in record["answers"]]
        if not all(output is None or isinstance(output, str) for output in outputs):
            raise TypeError
    except (LookupError, TypeError):
        raise UserError(f"{path} is not a result of qig-serve evaluate --json") from None
    same_order = ids == [s.id for s in samples]
    if record.get("evaluation_sha256") != evaluation_sha256 or not same_order:
        raise UserError(f"{path} was made on other questions: use the same --data and --n")
    return outputs


def _calibration_overlap(directory: Path, samples: Sequence[Sample]) -> tuple[str, ...] | None:
    """Ids of samples that the checkpoint's report lists among its calibration samples."""
    path = directory / "report.json"
    if not path.is_file():
        return None
    try:
        hashes = json.loads(path.read_text(encoding="utf-8"))["calibration"]["sample_sha256"]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(overlap(samples, hashes))
