"""The two ends of a run's record: the report that it begins with, and the published checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qig_serve import __version__, tensor_parallel
from qig_serve.formats import FORMAT_VERSION
from qig_serve.manifest import CalibrationInfo, QuantizationConfig
from qig_serve.model_directory import read_config
from qig_serve.offline.calibration.batches import (
    CalibrationBatch,
    calibration_sha256,
    token_counts,
)
from qig_serve.offline.checkpoint import forms
from qig_serve.offline.checkpoint.canary import RECORD_FILE, Canary
from qig_serve.offline.checkpoint.writer import CheckpointWriter
from qig_serve.offline.processes import Ranks
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.offline.report.card import NO_RECORD, public_name, published
from qig_serve.offline.report.pictures import KeptWeights
from qig_serve.offline.report.write import write_reports
from qig_serve.offline.results import REPORT_FILE, QuantizationReport
from qig_serve.offline.source.loaded_model import LoadedModel
from qig_serve.samples import Sample, sample_sha256

_PROCESSOR = (
    *("tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("*processor_config.json", "chat_template.*"),
)
"""Files that decide what the model is given of a sample."""


def new_report(
    loaded: LoadedModel,
    recipe: QuantRecipe,
    samples: Sequence[Sample],
    batches: Sequence[CalibrationBatch],
    ranks: Ranks,
) -> QuantizationReport:
    """The report of a run that begins: what is quantized, how, and on what."""
    info = CalibrationInfo(
        source=public_name(recipe.calib),
        samples=len(samples),
        sha256=calibration_sha256(samples),
        seed=recipe.seed,
    )
    counts = token_counts(batches)
    return QuantizationReport(
        model=public_name(str(loaded.directory)),
        family=loaded.arch.name,
        scheme=recipe.scheme,
        method=recipe.method,
        recipe=published(recipe.recorded()),
        calibration={
            **info.model_dump(),
            "images": sum(len(s.images) for s in samples),
            "tokens": dict(zip(counts, map(int, ranks.total(*counts.values())), strict=True)),
            # So that an evaluation can find which of its questions were calibrated on.
            "sample_sha256": [sample_sha256(s) for s in samples],
        },
        left_alone=loaded.left_alone(),
        eight_bit=list(loaded.eight_bit),
        mlp_channels=padding.padded if (padding := loaded.mlp_padding) else None,
        mlp_channels_of_source=padding.width if padding else None,
        producer=f"qig-serve {__version__}",
    )


def fingerprint(
    loaded: LoadedModel, report: QuantizationReport, ranks: Ranks, plain: bool
) -> dict[str, Any]:
    """What must be the same for an interrupted run to go on, and for all of its processes."""
    return {
        "version": __version__,
        "model": loaded.source.fingerprint(),
        "processor": _processor_sha256(loaded.directory),
        "data": report.calibration["sha256"],
        "recipe": report.recipe,
        # Sums depend on the number of processes in the last bits.
        "run": {"processes": ranks.size, "plain": plain},
    }


def _processor_sha256(directory: Path) -> str:
    """Hash of what makes tokens and pixels of the samples: tokenizer, processor, chat template."""
    digest = hashlib.sha256()
    found = {path for name in _PROCESSOR for path in directory.glob(name) if path.is_file()}
    for path in sorted(found):
        digest.update(f"\0{path.name}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def publish(
    loaded: LoadedModel,
    writer: CheckpointWriter,
    report: QuantizationReport,
    recipe: QuantRecipe,
    kept: KeptWeights,
    canary: Canary,
    plain: bool,
) -> None:
    """Publishes the checkpoint with its reports; a plain one with report.json alone.

    It is read back first (checkpoint/canary.py).
    """
    check = partial(canary.check, form="plain" if plain else recipe.format)
    if plain:
        writer.write_text(REPORT_FILE, report.model_dump_json(indent=1) + "\n")
        form = forms.plain(recipe.quant_scheme, loaded.source)
        writer.publish(replace(form, config=untied(loaded)), check)
        return
    config = quantization_config(loaded, report, recipe)
    card = loaded.directory / "README.md"
    pictures = kept.pictures(loaded.config, loaded.processor)
    report.warnings += kept.unmapped
    if recipe.format == "compressed-tensors":
        form = forms.compressed(config, loaded.arch, report.left_alone)
    else:
        form = forms.qig(config)
    form = replace(form, config={**config_changes(loaded), **form.config})

    def finish(directory: Path) -> None:
        check(directory)
        if recipe.format == "qig" and not (directory / RECORD_FILE).is_file():
            report.warnings.append(NO_RECORD)
        report.stored_bytes = sum(p.stat().st_size for p in directory.glob("model*.safetensors"))
        report.source_bytes = loaded.source.nbytes
        its_card = card if card.is_file() else None
        write_reports(report, directory, config.to_json(), its_card, pictures)

    writer.publish(form, finish)


def config_changes(loaded: LoadedModel) -> dict[str, Any]:
    """What config.json says of the model otherwise than the source's."""
    source = read_config(loaded.directory)
    changed = loaded.mlp_padding.entries(source) if loaded.mlp_padding else {}
    for path, value in loaded.arch.assumed:
        part, _, name = path.rpartition(".")
        if not part:
            changed.setdefault(name, source.get(name, value))
            continue
        owner = changed.get(part, source.get(part)) or {}
        changed[part] = {name: value, **owner}
    return changed | untied(loaded)


def untied(loaded: LoadedModel) -> dict[str, Any]:
    """What says that the output head is a table of its own, where config.json does not.

    Mistral Small 3.1 was published so: transformers 5 takes such a head for the embedding until it
    has read both, and so do versions of vLLM; one in 8 bits has no `weight` to find out by.
    """
    is_said = not loaded.config.tie_word_embeddings
    return {} if is_said or loaded.is_tied else {"tie_word_embeddings": False}


def quantization_config(
    loaded: LoadedModel, report: QuantizationReport, recipe: QuantRecipe
) -> QuantizationConfig:
    """What the checkpoint's config.json says about it."""
    scheme = recipe.quant_scheme
    padding = loaded.mlp_padding
    served = padding.config(loaded.config) if padding else loaded.config
    refused = tensor_parallel.refused_sizes(served, scheme.cut_multiple)
    return QuantizationConfig(
        quant_method="qig",
        format_version=FORMAT_VERSION,
        scheme=scheme.name,
        bits=scheme.bits,
        group_size=scheme.group_size,
        ignore=report.left_alone,
        eight_bit=report.eight_bit,
        model_type=loaded.config.model_type,
        architectures=loaded.config.architectures or [],
        method=recipe.method,
        produced_by=report.producer,
        calibration=CalibrationInfo(
            **{name: report.calibration[name] for name in CalibrationInfo.model_fields}
        ),
        tensor_parallel_sizes=tensor_parallel.fitting_sizes(refused),
        recipe=report.recipe,
        summary={
            **report.summary(),
            "tensor_parallel_refused": {str(size): why for size, why in refused.items()},
        },
    )
