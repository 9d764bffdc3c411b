"""Tuning of scales: gradients, what it changes and what not, judges, resumed runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import Finished, made_once, tensors_of
from helpers.processes import in_two_processes
from helpers.tiny_models import FAMILIES, tiny_model

from qig_serve.demo.questions import write_jsonl
from qig_serve.evaluate import load_samples
from qig_serve.evaluation.divergence import divergences
from qig_serve.offline import pipeline
from qig_serve.offline.checkpoint.writer import CheckpointWriter
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.offline.results import REPORT_FILE, QuantizationReport
from qig_serve.offline.source.loaded_model import load
from qig_serve.offline.tuning import run, scales
from qig_serve.offline.tuning.scales import Tuning, drawn, rate, split, tune


@pytest.fixture(scope="module")
def model(tiny_llava: Path) -> Path:
    return tiny_llava


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_jsonl("calibration", 40, tmp_path_factory.mktemp("calib")))


def recipe(calib: str, **fields: Any) -> QuantRecipe:
    return QuantRecipe(
        **{"calib": calib, "samples": 40, "method": "rtn", "device": "cpu", "tuning_passes": 2}
        | fields
    )


def tuned(model: Path, out: Path, wanted: QuantRecipe, **more: Any) -> QuantizationReport:
    return pipeline.quantize(model, out, wanted, quiet=True, **more)


@pytest.fixture(scope="module")
def finished(model: Path, calib: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Of a scheme and a number of passes."""

    def run(out: Path, scheme: str, passes: int) -> QuantizationReport:
        return tuned(model, out, recipe(calib, scheme=scheme, tuning_passes=passes))

    return made_once(run, tmp_path_factory)


class Kept(Exception):
    """Ends a run once a Tuning is there."""


def a_tuning(model: Path, calib: str, out: Path, monkeypatch: Any, **fields: Any) -> Tuning:
    """What a run tunes, before it does."""
    found: list[Tuning] = []

    def keep(tuning: Tuning, *_: Any) -> Any:
        found.append(tuning)
        raise Kept

    monkeypatch.setattr(run, "tune", keep)
    with pytest.raises(Kept):
        tuned(model, out, recipe(calib, **fields))
    monkeypatch.undo()
    return found[0]


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_gradient_is_that_of_the_divergence(
    model: Path, calib: str, tmp_path: Path, monkeypatch: Any, scheme: str
) -> None:
    # int8 codes jump, and their straight-through gradient is an approximation.
    within = 0.02 if scheme == "w3a16" else 0.2
    tuning = a_tuning(model, calib, tmp_path / "out", monkeypatch, scheme=scheme)
    _assert_downhill(tuning, step=0.01, within=within)


@pytest.mark.slow
def test_gradient_through_keys_of_earlier_blocks(
    calib: str, tmp_path: Path, monkeypatch: Any
) -> None:
    source = tiny_model("gemma4_e2b", tmp_path / "source")
    tuning = a_tuning(source, calib, tmp_path / "out", monkeypatch, scheme="w3a16")
    _assert_downhill(tuning, step=0.001, within=0.001)  # without those of the keys: 0.003


def _assert_downhill(tuning: Tuning, step: float, within: float) -> None:
    chosen = list(range(len(tuning.streams)))[:4]
    tuning.step({b: tuning.judged(b) for b in chosen})
    # Along the gradient of all factors together KL grows by its square.
    factors = [f for kept in tuning.blocks for f in kept.factors.values()]
    gradients = [f.grad.clone() for f in factors if f.grad is not None]
    assert len(gradients) == len(factors)
    squared = sum(float(g.double().square().sum()) for g in gradients)
    kl = []
    step /= squared**0.5
    for sign in (1, -1):
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.data = sign * step * gradient
        kl.append(tuning.kl(chosen))
    slope = (kl[0] - kl[1]) / (2 * step)
    assert slope == pytest.approx(squared, rel=within)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_scales_alone_change_and_kl_falls(
    model: Path, calib: str, finished: Finished, scheme: str
) -> None:
    (as_it_was, plain), (out, report) = finished(scheme, 0), finished(scheme, 2)
    assert plain.tuning is None and report.tuning is not None
    found = report.tuning
    assert found.kept and found.steps > 0 and found.kl_after < 0.95 * found.kl_before
    before, after = tensors_of(as_it_was), tensors_of(out)
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if n.endswith(".weight_scale") and ".layers." in n}
    assert all(before[n].dtype == after[n].dtype for n in changed)
    samples = load_samples(calib, None, 0)
    reported = divergences(model, [("plain", as_it_was), ("tuned", out)], samples, lambda *_: None)
    kl = {name: figures.kl_mean for name, figures in reported}
    assert kl["tuned"] < kl["plain"]
    assert list(out.parent.iterdir()) == [out]


def test_compressed_tensors_have_the_tuned_scales(model: Path, calib: str, tmp_path: Path) -> None:
    in_16_bits = {"scheme": "w4a8", "head": 16, "embeddings": 16}  # as the other form has them
    for form in ("qig", "compressed-tensors"):
        tuned(model, tmp_path / form, recipe(calib, format=form, **in_16_bits))
    ours, theirs = tensors_of(tmp_path / "qig"), tensors_of(tmp_path / "compressed-tensors")
    names = [n for n in ours if n.endswith(".weight_scale")]
    assert names and all(torch.equal(ours[n].flatten(), theirs[n].flatten().float()) for n in names)


@pytest.mark.slow
def test_a_padded_mlp_is_tuned_as_the_plain_one(tmp_path: Path, calib: str) -> None:
    """Of a width whose last group is not full, too."""
    source = tiny_model("llava", tmp_path / "source", intermediate_size=288)
    found = []
    for name in ("plain", "padded"):
        wanted = recipe(calib, pad_mlp=name == "padded", tuning_passes=1)
        report = tuned(source, tmp_path / name, wanted)
        assert report.tuning is not None and report.tuning.steps > 0
        found.append(report.tuning)
    assert found[0].kept == found[1].kept
    assert found[0].kl_before == pytest.approx(found[1].kl_before, rel=1e-3)
    assert found[0].kl_after == pytest.approx(found[1].kl_after, rel=1e-2)


@pytest.mark.slow
def test_two_processes_tune_the_same_scales(model: Path, calib: str, tmp_path: Path) -> None:
    wanted = recipe(calib, tuning_passes=1)
    tuned(model, tmp_path / "one", wanted)
    (tmp_path / "two").mkdir()
    in_two_processes(model, tmp_path / "two", {"run": wanted.model_dump()})
    run_of_two = tmp_path / "two" / "run"
    found = QuantizationReport.model_validate_json((run_of_two / REPORT_FILE).read_text()).tuning
    assert found is not None and found.kept and found.kl_after < found.kl_before
    one, two = tensors_of(tmp_path / "one"), tensors_of(run_of_two)
    for name in one:
        if name.endswith(".weight_scale"):
            torch.testing.assert_close(one[name], two[name], rtol=0.02, atol=0)
        else:
            assert torch.equal(one[name], two[name])


def test_too_few_samples_are_said(model: Path, calib: str, tmp_path: Path) -> None:
    report = tuned(model, tmp_path / "out", recipe(calib, samples=4))
    assert report.tuning is not None and not report.tuning.kept
    assert "too few calibration samples" in report.tuning.line()


def test_what_does_not_help_is_not_kept(
    model: Path, calib: str, finished: Finished, tmp_path: Path, monkeypatch: Any
) -> None:
    plain, _ = finished("w3a16", 0)
    downhill = scales.divergence

    def uphill(*given: Any, **named: Any) -> tuple[float, torch.Tensor]:
        kl, gradient = downhill(*given, **named)
        return kl, -gradient

    monkeypatch.setattr(scales, "divergence", uphill)
    report = tuned(model, tmp_path / "uphill", recipe(calib))
    assert report.tuning is not None and not report.tuning.kept
    assert report.tuning.kl_after > report.tuning.kl_before
    assert "not kept" in report.tuning.line()
    before, after = tensors_of(plain), tensors_of(tmp_path / "uphill")
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("place", ["tuning", pytest.param("publishing", marks=pytest.mark.slow)])
def test_resumed_runs_end_with_the_same_bytes(
    model: Path, calib: str, finished: Finished, tmp_path: Path, monkeypatch: Any, place: str
) -> None:
    wanted = recipe(calib, offload="disk" if place == "tuning" else "ram")
    undisturbed, whole = finished("w3a16", 2)

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    if place == "tuning":
        monkeypatch.setattr(CheckpointWriter, "write_tuned", killed)
    else:
        monkeypatch.setattr(pipeline, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        tuned(model, tmp_path / "part", wanted)
    monkeypatch.undo()
    if place == "publishing":
        monkeypatch.setattr(run, "tune", killed)  # it is done
    resumed = tuned(model, tmp_path / "part", wanted, resume=True)
    assert resumed.tuning is not None and whole.tuning is not None
    assert resumed.tuning.kl_after == whole.tuning.kl_after
    one, two = tensors_of(undisturbed), tensors_of(tmp_path / "part")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_schedule() -> None:
    judges, learned = split(17)
    assert judges == [7, 15] and sorted(judges + learned) == list(range(17))
    assert split(7)[0] == []
    rates = [rate(i, 20) for i in range(20)]
    assert max(rates) <= scales.RATE and rates[0] < rates[4] and rates[-1] < rates[-2]


def test_tokens_of_a_step_are_drawn() -> None:
    masks = {3: torch.rand(4, 50) < 0.5, 7: torch.rand(2, 80) < 0.2}
    count = sum(int(m.sum()) for m in masks.values())
    all_of_them = drawn(masks, count, torch.Generator())
    assert all(torch.equal(all_of_them[b], masks[b]) for b in masks)
    found = [drawn(masks, 20, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    for one in found:
        assert sum(int(m.sum()) for m in one.values()) == 20
        assert all(not bool((one[b] & ~masks[b]).any()) for b in masks)
    assert all(torch.equal(found[0][b], found[1][b]) for b in masks)
    assert any(not torch.equal(found[0][b], found[2][b]) for b in masks)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_hidden_states(family: str, tmp_path: Path) -> None:
    """What `LoadedModel.logits` makes of the last hidden states is what the model says."""
    from transformers import AutoModelForImageTextToText

    directory = tiny_model(family, tmp_path / "model")
    whole = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    loaded = load(directory)
    hidden: list[torch.Tensor] = []
    last = whole.get_submodule(loaded.arch.decoder).layers[-1]
    last.register_forward_hook(
        lambda *given: hidden.append(given[2][0] if isinstance(given[2], tuple) else given[2])
    )
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        wanted = whole(input_ids=ids, use_cache=False).logits[0]
        found = loaded.logits(hidden[0].reshape(5, -1))
    assert found.shape == wanted.shape == (5, loaded.vocabulary)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_every_step_is_logged(model: Path, calib: str, tmp_path: Path, monkeypatch: Any) -> None:
    tuning = a_tuning(model, calib, tmp_path / "out", monkeypatch)
    reported: list[tuple[int, int]] = []
    found = tune(tuning, 1, 0, lambda done, steps: reported.append((done, steps)))
    assert reported[-1][0] == reported[-1][1] == found.steps == len(reported)
