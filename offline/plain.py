"""Quantized weights as an ordinary Hugging Face directory, for comparing methods.

The stress schemes have no kernel and no server: their dequantized weights replace the model's
own. What is computed is what `pipeline.quantize` computes; only what is written differs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from qig_serve import __version__
from qig_serve.errors import UserError
from qig_serve.formats import QuantScheme
from qig_serve.offline import adapter, pipeline
from qig_serve.offline.baselines import model_gradients
from qig_serve.offline.calibration import calibration_sha256, load_samples, make_batches
from qig_serve.offline.checkpoint import CheckpointWriter
from qig_serve.offline.pictured import PicturedWeights
from qig_serve.offline.progress import RunProgress
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.offline.report_data import REPORT_FILE, QuantizationReport
from qig_serve.offline.source_checkpoint import SourceCheckpoint
from qig_serve.packing import unpack_linear


class PlainWriter(CheckpointWriter):
    """Writes the weights that the codes stand for, under the source's names and in its dtype."""

    def __init__(self, source: SourceCheckpoint, output: Path, scheme: QuantScheme) -> None:
        super().__init__(source, output, {})
        self._scheme = scheme

    def write_block(
        self, index: int, tensors: Mapping[str, torch.Tensor], replaced: Iterable[str]
    ) -> None:
        """One shard; `tensors` as the pipeline packs them."""
        linears: dict[str, dict[str, torch.Tensor]] = {name: {} for name in replaced}
        plain = {}
        for name, tensor in tensors.items():
            stem, _, suffix = name.rpartition(".")
            if f"{stem}.weight" in linears and suffix.startswith("weight_"):
                linears[f"{stem}.weight"][suffix] = tensor
            else:
                plain[name] = tensor
        for name, parts in linears.items():
            plain[name] = unpack_linear(parts, self._scheme).to(self.source.tensor(name).dtype)
        super().write_block(index, plain, ())

    def publish_plain(self) -> Path:
        """As `publish`, with the source's own config.json."""
        (self.directory / "config.json").write_bytes(
            (self.source.directory / "config.json").read_bytes()
        )
        shards = [self.block_file(i) for i in sorted(self._blocks)]
        self._write_index(shards + self._copy_untouched())
        self._copy_other_files()
        self.directory.rename(self.output)
        self._published = True
        return self.output


def quantize_plain(
    model: Path | str, output: Path | str, recipe: QuantRecipe, quiet: bool = False
) -> QuantizationReport:
    """As `pipeline.quantize`, for any weight-only scheme, stress schemes included.

    UserError for a scheme that quantizes activations: ordinary weights cannot express that.
    """
    started = time.monotonic()
    if recipe.quant_scheme.activation_bits is not None:
        raise UserError(f"{recipe.scheme} quantizes activations: ordinary weights cannot do that")
    torch.manual_seed(recipe.seed)
    loaded = adapter.load(model, device=pipeline.pick_device(recipe.device))
    pipeline.check_shapes(loaded, recipe.quant_scheme)
    samples = load_samples(
        recipe.calib, recipe.samples, recipe.seed, recipe.image_folder, recipe.text_only
    )
    batches = make_batches(
        samples,
        loaded.processor,
        loaded.image_token_id,
        batch_tokens=recipe.batch_tokens,
        max_length=recipe.max_length,
    )
    report = QuantizationReport(
        model=str(model),
        family=loaded.arch.name,
        scheme=recipe.scheme,
        method=recipe.method,
        recipe=recipe.recorded(),
        calibration={"source": recipe.calib, "sha256": calibration_sha256(samples)},
        producer=f"qig-serve {__version__}",
    )
    with ExitStack() as stack:
        writer = PlainWriter(loaded.source, Path(output), recipe.quant_scheme)
        stack.enter_context(writer)
        progress = stack.enter_context(RunProgress(loaded.num_blocks, loaded.device, quiet))
        gradients = None
        if recipe.token_weights in ("modality", "gradient"):
            gradients = model_gradients(loaded, batches)
        streams = pipeline.first_streams(loaded, recipe, batches, None)
        pictured = PicturedWeights.choose((), batches, loaded.num_blocks)
        pipeline.quantize_blocks(
            loaded, recipe, streams, gradients, writer, progress, report, pictured
        )
        report.seconds = time.monotonic() - started
        writer.write_text(REPORT_FILE, json.dumps(report.model_dump(mode="json"), indent=1) + "\n")
        writer.publish_plain()
    return report
