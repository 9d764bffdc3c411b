"""The whole offline stage on a tiny LLaVA with a GQA decoder: what is written, and what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import Finished, made_once, tensors_of
from helpers.small_llava import small_llava
from safetensors.torch import load_file, save_file

from qig_serve.cli import main
from qig_serve.demo.questions import write_jsonl
from qig_serve.errors import UserError
from qig_serve.formats import VOCABULARY_SCHEME, get_scheme, tensor_specs
from qig_serve.hashes import HASHES_FILE, file_sha256
from qig_serve.manifest import read_quantization_config
from qig_serve.offline import pipeline
from qig_serve.offline.calibration.batches import make_batches
from qig_serve.offline.calibration.sources import load_calibration
from qig_serve.offline.equalization.group import equalize_group
from qig_serve.offline.passes.parts import capture_parts
from qig_serve.offline.passes.streams import Streams
from qig_serve.offline.placement import ACTIVATIONS
from qig_serve.offline.recipe import ROUNDINGS, QuantRecipe
from qig_serve.offline.results import QuantizationReport
from qig_serve.offline.rounding.block import round_block
from qig_serve.offline.rounding.statistics import BlockStatistics
from qig_serve.offline.source.loaded_model import load
from qig_serve.packing import fake_quantize_activation, pack_rows, unpack_linear, unpack_rows

LINEARS = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (256, 128),
    "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}
PREFIX = "language_model.model.layers."
TABLES = ["language_model.model.embed_tokens", "language_model.lm_head"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def livelier(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Than an initialization: biases, uneven norms, a few large channels."""
        if name.endswith(("norm.weight", "layernorm.weight")):
            value = 0.5 + torch.rand(value.shape, generator=generator)
            value[:4] *= 16
        elif name.endswith("proj.bias"):
            value = 0.3 * torch.randn(value.shape, generator=generator)
        return value

    return small_llava(tmp_path_factory.mktemp("tiny") / "model", livelier)


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_jsonl("calibration", 8, tmp_path_factory.mktemp("calib")))


def recipe(calib: str, **fields: Any) -> QuantRecipe:
    return QuantRecipe(
        **{"calib": calib, "samples": 8, "grid": 5, "device": "cpu", "method": "qig", **fields}
    )


@pytest.fixture(scope="module")
def finished(model_dir: Path, calib: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Of a scheme and a method."""

    def run(out: Path, scheme: str, method: str) -> QuantizationReport:
        fields = {"scheme": scheme, "method": method}
        return pipeline.quantize(model_dir, out, recipe(calib, **fields), quiet=True)

    return made_once(run, tmp_path_factory)


def shards_of(directory: Path) -> dict[str, str]:
    return {p.name: file_sha256(p) for p in sorted(directory.glob("*.safetensors"))}


def streams_of(model_dir: Path, calib: str, **fields: Any) -> tuple[Any, Streams, QuantRecipe]:
    r = recipe(calib, **fields)
    loaded = load(model_dir)
    batches = make_batches(
        load_calibration(calib, 8, 0),
        loaded.processor,
        loaded.image_token_id,
        batch_tokens=r.batch_tokens,
    )
    return loaded, pipeline.first_streams(loaded, r, batches, None), r


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("w3a16", "qig"),
        ("w4a8", "qig"),
        ("w3a16", "rtn"),
        ("w4a8", "awq"),
        ("w3a16", "mbq"),
        ("w4a8", "smoothquant"),
        ("w3a16", "gptq"),
        ("w4a8", "gptq-qig"),
        ("w4a8", "qig+"),
    ],
)
def test_checkpoint(model_dir: Path, finished: Finished, scheme: str, method: str) -> None:
    output, report = finished(scheme, method)
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    qc = read_quantization_config(config, "test")
    assert (qc.scheme, qc.method) == (scheme, method)
    tensors, source = tensors_of(output), tensors_of(model_dir)
    for index in range(2):
        for name, (n, k) in LINEARS.items():
            stem = f"{PREFIX}{index}.{name}"
            assert f"{stem}.weight" not in tensors
            for suffix, spec in tensor_specs(get_scheme(scheme), n, k).items():
                assert tensors[f"{stem}.{suffix}"].shape == spec.shape
    assert qc.eight_bit == TABLES
    for table in TABLES:
        for suffix, tensor in pack_rows(source[f"{table}.weight"], VOCABULARY_SCHEME).items():
            assert torch.equal(tensors[f"{table}.{suffix}"], tensor)
    tables = {f"{table}.weight" for table in TABLES}
    left = [n for n in source if not n.startswith(PREFIX) and n not in tables]
    assert all(torch.equal(tensors[n], source[n]) for n in left)
    assert all(t.dtype == source[n].dtype for n, t in tensors.items() if n in source)
    hashes = json.loads((output / HASHES_FILE).read_text())["files"]
    assert all(file_sha256(output / n) == h for n, h in hashes.items())
    stored = QuantizationReport.model_validate_json((output / "report.json").read_text())
    assert stored == report and len(stored.blocks) == 2
    assert all(0 < b.output_error < 1 for b in stored.blocks)
    assert not list(output.parent.glob(".*"))
    for module in [m for b in stored.blocks for m in b.modules]:
        if method in ("awq", "mbq", "qig"):
            assert module.loss <= module.loss_rtn
        if method in ("awq", "mbq", "qig", "qig+"):
            assert len(module.losses) == (2 if method == "qig+" else 5)
        if method in ("qig", "qig+") and scheme == "w3a16":
            assert module.completeness is not None and module.completeness < 0.02


def test_gauss_takes_more_nodes_where_few_miss_completeness(
    model_dir: Path, calib: str, tmp_path: Path
) -> None:
    def errors(**fields: Any) -> list[float]:
        """Of modules with several linears: of a single one any node is exact."""
        run = recipe(calib, method="qig+", rounding="nearest", **fields)
        report = pipeline.quantize(model_dir, tmp_path / f"out-{len(fields)}", run, quiet=True)
        modules = [m for b in report.blocks for m in b.modules if m.name in ("qkv", "gate_up")]
        return [m.completeness or 0.0 for m in modules]

    assert max(errors(steps=1, quadrature="uniform")) > 0.1
    one, six = errors(steps=1), errors()
    assert len(one) == 4 and max(one) < 0.02 and max(six) < 0.02


def dequantized_model(model_dir: Path, output: Path, scheme: str) -> Any:
    """The Hugging Face model with a checkpoint's weights, put together by hand."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
    tensors = tensors_of(output)
    for table, module in zip(
        TABLES, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True
    ):
        parts = {s: tensors[f"{table}.{s}"] for s in VOCABULARY_SCHEME.suffixes}
        module.weight.data = unpack_rows(parts, VOCABULARY_SCHEME, torch.float32)
    for index, layer in enumerate(model.model.language_model.layers):
        for name, parameter in layer.named_parameters():
            stem = f"{PREFIX}{index}.{name.removesuffix('.weight')}"
            if f"{stem}.weight_packed" in tensors and name.endswith(".weight"):
                parts = {
                    n.removeprefix(f"{stem}."): t
                    for n, t in tensors.items()
                    if n.startswith(f"{stem}.weight_")
                }
                parameter.data = unpack_linear(parts, get_scheme(scheme))
            else:
                parameter.data = tensors[f"{PREFIX}{index}.{name}"].float()
    return model


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_quantized_stream_is_the_checkpoint(
    model_dir: Path, calib: str, finished: Finished, scheme: str
) -> None:
    """What the loop believes it wrote is what the files hold, run by plain transformers."""
    output, report = finished(scheme, "qig")
    full = dequantized_model(model_dir, output, scheme)
    from transformers import AutoModelForImageTextToText

    reference = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
    if scheme == "w4a8":
        for layer in full.model.language_model.layers:
            for name in LINEARS:
                layer.get_submodule(name).register_forward_pre_hook(
                    lambda _, args: (fake_quantize_activation(args[0]),)
                )
    last: dict[str, torch.Tensor] = {}

    def hook(key: str) -> Callable[..., None]:
        def keep(module: Any, args: Any, output: torch.Tensor) -> None:
            last[key] = output

        return keep

    full.model.language_model.layers[-1].register_forward_hook(hook("quantized"))
    reference.model.language_model.layers[-1].register_forward_hook(hook("full"))
    loaded = load(model_dir)
    error = energy = 0.0
    for batch in make_batches(
        load_calibration(calib, 8, 0), loaded.processor, loaded.image_token_id
    ):
        with torch.no_grad():
            full(**batch.inputs)
            reference(**batch.inputs)
        mask = batch.token_mask
        error += float((last["full"] - last["quantized"])[mask].square().sum())
        energy += float(last["full"][mask].square().sum())
    assert report.blocks[-1].output_error == pytest.approx(error / energy, rel=1e-3)


def test_same_seed_same_bytes(
    model_dir: Path, calib: str, finished: Finished, tmp_path: Path
) -> None:
    """And nothing survives from one run into the next, in the same process."""
    first, _ = finished("w3a16", "qig")
    pipeline.quantize(model_dir, tmp_path / "again", recipe(calib), quiet=True)
    pipeline.quantize(model_dir, tmp_path / "disk", recipe(calib, offload="disk"), quiet=True)
    assert shards_of(first) == shards_of(tmp_path / "again") == shards_of(tmp_path / "disk")
    assert not [p for p in (tmp_path / "disk").iterdir() if p.is_dir()]


@pytest.mark.parametrize(
    "fields",
    [
        {"scheme": "w3a16"},
        {"scheme": "w4a8"},
        {"method": "qig+", "rounding": "qronos-outputs", "offload": "disk"}
        | {"samples": 4, "grid": 2, "steps": 1},
    ],
    ids=["w3a16", "w4a8", "outputs"],
)
def test_resume_ends_with_the_same_bytes(
    model_dir: Path,
    calib: str,
    finished: Finished,
    tmp_path: Path,
    fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    end_at_block: Callable[[int], None],
) -> None:
    r = recipe(calib, **fields)
    if fields.keys() == {"scheme"}:
        undisturbed, whole = finished(fields["scheme"], "qig")
    else:
        undisturbed = tmp_path / "whole"
        whole = pipeline.quantize(model_dir, undisturbed, r, quiet=True)
    end_at_block(2)
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(model_dir, tmp_path / "part", r, quiet=True)
    monkeypatch.undo()
    assert not (tmp_path / "part").exists()
    with pytest.raises(UserError, match="seed"):
        other = recipe(calib, **fields, seed=1)
        pipeline.quantize(model_dir, tmp_path / "part", other, resume=True, quiet=True)
    another = Path(shutil.copytree(model_dir, tmp_path / "another"))
    (another / "tokenizer").mkdir()  # as some publish beside the files
    with (another / "chat_template.jinja").open("a") as template:
        template.write("{# corrected #}")
    with pytest.raises(UserError, match="the processor is another"):
        pipeline.quantize(another, tmp_path / "part", r, resume=True, quiet=True)
    resumed = pipeline.quantize(model_dir, tmp_path / "part", r, resume=True, quiet=True)
    assert shards_of(tmp_path / "part") == shards_of(undisturbed)
    assert [b.output_error for b in resumed.blocks] == [b.output_error for b in whole.blocks]


def test_qig_never_runs_the_whole_model_backward(
    model_dir: Path,
    calib: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only mbq does, and says so."""

    def forbidden(*args: Any) -> Any:
        raise AssertionError("a full-model backward pass")

    monkeypatch.setattr(pipeline, "model_gradients", forbidden)
    pipeline.quantize(model_dir, tmp_path / "qig", recipe(calib))
    assert "backward" not in capsys.readouterr().err
    with pytest.raises(AssertionError, match="full-model"):
        pipeline.quantize(model_dir, tmp_path / "mbq", recipe(calib, method="mbq"))
    assert "need a backward pass of the whole model" in capsys.readouterr().err


def test_batches_bound_what_passes_a_block(
    model_dir: Path,
    calib: str,
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Never the whole calibration set at once; and the result does not depend on the cut."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    _, large = finished("w3a16", "qig")
    seen: list[int] = []
    forward = Qwen2MLP.forward

    def watched(self: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[0] * x.shape[1])
        return forward(self, x)

    monkeypatch.setattr(Qwen2MLP, "forward", watched)
    small = pipeline.quantize(
        model_dir, tmp_path / "a", recipe(calib, batch_tokens=150), quiet=True
    )
    assert max(seen) <= 150
    for a, b in zip(small.blocks, large.blocks, strict=True):
        for m, n in zip(a.modules, b.modules, strict=True):
            assert m.losses == pytest.approx(n.losses, rel=1e-3)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_first_search_has_real_token_weights(model_dir: Path, calib: str, scheme: str) -> None:
    """In the released code W3A16's first five searches are uniform (a call counter), and W4A8's
    first path has length zero (both prefixes are the same there)."""
    loaded, streams, r = streams_of(model_dir, calib, scheme=scheme)
    block = loaded.block(0)
    for group in loaded.arch.groups:
        result = equalize_group(block, group, streams, r.equalization, None, 0)
        assert not result.fallbacks
        for b, weights in enumerate(result.token_weights):
            mask = streams.mask(b)
            assert float(weights[~mask].abs().max()) == 0
            torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
            for row, real in zip(weights, mask, strict=True):
                assert float(row[real].std()) > 1e-4


def test_token_weights_change_the_loss(model_dir: Path, calib: str) -> None:
    """Clipping and the source of the weights are read from the recipe."""
    losses = {}
    for name, fields in {
        "qig": {},
        "no iqr": {"iqr": False},
        "uniform": {"token_weights": "uniform"},
        "perturbation": {"token_weights": "perturbation"},
        "attention": {"token_weights": "attention"},
    }.items():
        loaded, streams, r = streams_of(model_dir, calib, **fields)
        # The second block, where the streams differ.
        original, block = loaded.block(0), loaded.block(0)
        groups = loaded.arch.groups
        round_block(block, original, groups, [], streams, r.rounding_method, "layer 0")
        streams.advance(original, block, [], "layer 0")
        result = equalize_group(loaded.block(1), groups[2], streams, r.equalization, None, 1)
        losses[name] = result.report.losses[1]
    assert len({round(v, 9) for v in losses.values()}) == len(losses)


def test_template_tokens_do_not_enter_activation_means(model_dir: Path, calib: str) -> None:
    loaded, streams, _ = streams_of(model_dir, calib)
    block, group = loaded.block(0), loaded.arch.groups[2]  # the MLP: token by token
    clean = capture_parts(block, group, streams, False, "x")
    for b in range(len(streams)):
        hidden = streams.fp.get(b, "cpu").clone()
        # Later than any real token, so that attention cannot carry it into one.
        assert not streams.mask(b)[:, -1].any()
        hidden[:, -1] *= 1e4
        streams.fp.put(b, hidden)
    dirty = capture_parts(block, group, streams, False, "x")
    torch.testing.assert_close(clean.act_mean, dirty.act_mean)
    torch.testing.assert_close(clean.act_max, dirty.act_max)
    qkv = capture_parts(block, loaded.arch.groups[0], streams, False, "x")
    total = sum(
        float(qkv.inputs.get(b, "cpu")[streams.mask(b)].abs().sum()) for b in range(len(streams))
    )
    tokens = sum(int(streams.mask(b).sum()) for b in range(len(streams)))
    assert float(qkv.act_mean.sum()) == pytest.approx(total / tokens, rel=1e-4)


def test_rounding_is_calibrated_on_all_tokens(model_dir: Path, calib: str) -> None:
    """Those of the template too: what attends to the first token feels its error everywhere."""
    loaded, streams, _ = streams_of(model_dir, calib)
    block = loaded.block(0)
    count = range(len(streams))
    hidden = [block.input_layernorm(streams.fp.get(b, "cpu")).flatten(0, 1) for b in count]
    inputs = torch.cat(hidden)
    assert len(inputs) == sum(batch.inputs["input_ids"].numel() for batch in streams.batches)
    assert len(inputs) > sum(int(streams.mask(b).sum()) for b in count)
    for method in ("gptq", "qronos-outputs"):
        statistics = BlockStatistics(block, block, [], streams, ROUNDINGS[method], "x")
        found = statistics.of("self_attn.q_proj", None)
        assert found.tokens == len(inputs)
        torch.testing.assert_close(found.hessian, inputs.T @ inputs / len(inputs))


def test_w4a8_baseline_is_the_quantized_input(model_dir: Path, calib: str) -> None:
    """X0 = int8 of the quantized prefix's input: not X even where the prefixes are the same."""
    _, streams, _ = streams_of(model_dir, calib, scheme="w4a8")
    x = streams.fp.get(0, "cpu")
    assert torch.equal(x, streams.quantized.get(0, "cpu"))
    assert float((fake_quantize_activation(x) - x).abs().max()) > 0


def test_silent_fallbacks_fail_the_run(model_dir: Path, calib: str, tmp_path: Path) -> None:
    lines = Path(calib).read_text().splitlines()
    without = json.loads(lines[1])
    del without["answer"]
    data = Path(calib).with_name("half.jsonl")
    data.write_text(f"{lines[0]}\n{json.dumps(without)}\n")
    r = recipe(str(data), token_weights="gradient")
    with pytest.raises(UserError, match="allow-fallbacks"):
        pipeline.quantize(model_dir, tmp_path / "a", r, quiet=True)
    assert not list(tmp_path.iterdir())
    allowed = recipe(str(data), token_weights="gradient", allow_fallbacks=True)
    report = pipeline.quantize(model_dir, tmp_path / "b", allowed, quiet=True)
    assert len(report.fallbacks) == 8 and "layer 0" in report.fallbacks[0]


def test_fallbacks_are_printed_and_can_be_allowed_later(
    model_dir: Path,
    calib: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At the block that has them, with the blocks before it kept."""
    from qig_serve.offline.passes import hessian

    factorize, calls = hessian.factorize, []

    def hard(*args: Any) -> Any:
        calls.append(1)
        return replace(factorize(*args), raised=2 if len(calls) == 12 else 0)

    monkeypatch.setattr(hessian, "factorize", hard)
    fields = {"method": "gptq", "offload": "disk"}
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"1 steps fell .* layer 1, mlp.down_proj: 100 times"):
        pipeline.quantize(model_dir, out, recipe(calib, **fields), quiet=True)
    assert not out.exists() and (tmp_path / ".out.partial").is_dir()
    log = (tmp_path / ".out.partial" / pipeline.LOG_FILE).read_text()
    assert "fallback 1: layer 1, mlp.down_proj" in log and "stopped: 1 steps fell back" in log
    assert not (tmp_path / ".out.partial" / ACTIVATIONS / "0").exists()

    calls[:] = [1] * 8  # neither the dry run nor layer 0 is done again
    allowed = recipe(calib, allow_fallbacks=True, **fields)
    capsys.readouterr()
    report = pipeline.quantize(model_dir, out, allowed, resume=True)
    printed = capsys.readouterr().err
    assert "going on after block 1/2" in printed and "dry run" not in printed
    assert printed.count("fallback 1: layer 1") == 1
    assert "all blocks done, with 1 fallbacks" in printed
    assert (
        report.fallbacks
        == QuantizationReport.model_validate_json((out / "report.json").read_text()).fallbacks
    )
    assert len(report.fallbacks) == 1
    log = (out / pipeline.LOG_FILE).read_text()  # of both runs
    assert log.count("calibration: 8 samples") == 2 and log.count("block 1/2  output error") == 1


def copy_of(model_dir: Path, target: Path) -> Path:
    target.mkdir()
    for path in model_dir.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_damaged_weight_names_the_layer(model_dir: Path, calib: str, tmp_path: Path) -> None:
    broken = copy_of(model_dir, tmp_path / "model")
    tensors = load_file(broken / "model.safetensors")
    tensors[f"{PREFIX}1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="layer 1"):
        pipeline.quantize(broken, tmp_path / "out", recipe(calib), quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_bad_activations_name_the_layer(
    model_dir: Path, calib: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copy_of(model_dir, tmp_path / "model")
    tensors = load_file(broken / "model.safetensors")
    tensors[f"{PREFIX}1.mlp.up_proj.weight"][:] = 3e38
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layer 1.*NaN or infinity"):
        pipeline.quantize(broken, tmp_path / "out", recipe(calib), quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def _no_config(model: Path, data: Path) -> None:
    (model / "config.json").unlink()


def _unknown_family(model: Path, data: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "fuyu"}))


def _empty(model: Path, data: Path) -> None:
    data.write_text("")


def _no_images(model: Path, data: Path) -> None:
    line = {"id": "1", "messages": [{"role": "user", "content": "Hello?"}], "answer": "Yes"}
    data.write_text(json.dumps(line) + "\n")


def _missing_image(model: Path, data: Path) -> None:
    data.write_text(data.read_text().replace("images/0.png", "images/gone.png"))


def _odd_size(model: Path, data: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    for i in range(2):
        for name in ("gate_proj", "up_proj"):
            stem = f"{PREFIX}{i}.mlp.{name}.weight"
            tensors[stem] = tensors[stem][:200].clone()
        stem = f"{PREFIX}{i}.mlp.down_proj.weight"
        tensors[stem] = tensors[stem][:, :200].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 200
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_config, "config.json"),
        (_unknown_family, "llava"),
        (_empty, "no samples"),
        (_no_images, "image"),
        (_missing_image, "gone.png"),
        (_odd_size, "down_proj"),
    ],
    ids=lambda f: f.__name__.lstrip("_") if callable(f) else "",
)
def test_wrong_input_is_one_sentence_and_status_2(
    model_dir: Path,
    calib: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path, Path], None],
    message: str,
) -> None:
    model = copy_of(model_dir, tmp_path / "model")
    data = tmp_path / "data" / "c.jsonl"
    copy_of(Path(calib).parent / "images", tmp_path / "images")
    data.parent.mkdir()
    (tmp_path / "images").rename(data.parent / "images")
    data.write_text(Path(calib).read_text())
    spoil(model, data)
    output = tmp_path / "deep" / "out"
    words = ["quantize", str(model), "--scheme", "w3a16", "--calib", str(data), "--samples", "8"]
    assert main([*words, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert error.startswith("qig-serve quantize: ") and len(error.splitlines()) == 1
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_output_that_exists(model_dir: Path, calib: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(UserError, match="exists already"):
        pipeline.quantize(model_dir, output, recipe(calib), quiet=True)
    assert list(tmp_path.iterdir()) == [output] and not list(output.iterdir())


def test_stress_schemes_are_not_published(model_dir: Path, calib: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="comparisons only"):
        pipeline.quantize(model_dir, tmp_path / "o", recipe(calib, scheme="w2a16"), quiet=True)
