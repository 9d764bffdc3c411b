"""`make gpu-vllm` as far as it goes without a GPU; the slow tests run it on vLLM's CPU engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_vllm
import gpu_vllm_demo
import gpu_vllm_groups as groups
import gpu_vllm_models as models
import gpu_vllm_plan
import gpu_vllm_quantize
import gpu_vllm_run as run
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qig_serve import packing
from qig_serve.errors import UserError
from qig_serve.formats import VOCABULARY_SCHEME, get_scheme
from qig_serve.inspection import require_sound
from qig_serve.kernels.tiles import LAYER_SHAPES
from qig_serve.offline.calibration.sources import load_calibration

CARD = {"card": "Made up card", "date": "2000-01-01", "versions": {"vllm": "0.26.0"}}


# ---- command line and results


def test_the_command_line_knows_both_sizes() -> None:
    real = gpu_vllm.arguments([])
    assert real.stage == "together" and real.seconds == 390 and real.model == "qwen2-vl-7b"
    assert real.batches == [1, 8, 32, 128, 256] and real.prompts == [4096]
    assert real.variants[:3] == ["bf16", "w3a16", "w4a8"]
    assert real.demos == ["llava-w4a8-rtn", "llava-w3a16-rtn"]
    tiny = gpu_vllm.arguments(["--tiny", "together", "--variants", "w3a16", "--batches", "4"])
    assert tiny.batches == [4] and tiny.prompts == [128] and tiny.variants == ["w3a16"]
    assert gpu_vllm.arguments(["throughput"]).seconds == 570
    assert gpu_vllm.arguments(["quantize8b"]).models == ["internvl2-8b"]
    with pytest.raises(SystemExit):
        gpu_vllm.arguments(["together", "--variants", "w5a5"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("stage", gpu_vllm.ON_THE_DEVICE)
def test_without_a_gpu_one_sentence(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_vllm.main([stage]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"{stage} needs a CUDA device, and none was found: run it on a machine")


def test_entries_are_merged_and_measured_once_a_card(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    run.merge(path, ["bench", "m", "bf16"], {"a": 1, "machine": CARD})
    run.merge(path, ["bench", "m", "w3a16"], {"unavailable": "made up", "machine": CARD})
    run.merge(path, ["demo", "x"], {"machine": CARD})
    run.merge(path, ["bench", "m", "bf16"], {"a": 2, "machine": CARD})
    assert run.load(path)["bench"]["m"] == {
        "bf16": {"a": 2, "machine": CARD},
        "w3a16": {"unavailable": "made up", "machine": CARD},
    }
    assert run.done(path, ["bench", "m", "bf16"], "Made up card")
    assert not run.done(path, ["bench", "m", "bf16"], "another card")
    assert not run.done(path, ["bench", "m", "w3a16"], "Made up card")  # it is tried again
    assert not run.done(path, ["bench", "n", "bf16"], "Made up card")
    run.merge(path, ["bench", "m", "w4a8"], {"not_measured": {"decode 1": "?"}, "machine": CARD})
    assert not run.done(path, ["bench", "m", "w4a8"], "Made up card")


def test_no_variant_is_begun_that_would_not_end_in_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock goes on by 100 s a variant; of 250 s two are used, and the next run goes on."""
    now = 0.0
    monkeypatch.setattr(gpu_vllm.time, "monotonic", lambda: now)
    begun: list[str] = []

    def measure(model: str, name: str, variant: run.Variant) -> dict[str, Any]:
        nonlocal now
        now += 100
        begun.append(name)
        return {"requests_per_second": 1.0}

    words = ["--device", "cpu", "--seconds", "250", "--out", str(tmp_path), "throughput"]
    options = gpu_vllm.arguments([*words, "--models", "qwen2-vl-7b"])
    options.started = now
    assert gpu_vllm.each_variant(options, "throughput", measure) == 1
    assert begun == list(run.VARIANTS)[:2]
    assert "run the same again" in capsys.readouterr().out
    options.started = now
    gpu_vllm.each_variant(options, "throughput", measure)
    assert begun == list(run.VARIANTS)[:4]


def test_the_plugin_is_found_where_the_package_is_not_installed(tmp_path: Path) -> None:
    """As vLLM looks for it: by entry points on PYTHONPATH alone."""
    folder = run.plugin_path()
    code = (
        "import importlib.metadata as m; "
        "print([e.value for e in m.entry_points(group='vllm.general_plugins')])"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert done.stdout == "['qig_serve.vllm_plugin:register']\n", done.stderr


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    options = gpu_vllm.arguments(["--device", "cpu", "--work", str(tmp_path)])
    options.started = gpu_vllm.time.monotonic()
    code = "raise ValueError('no machete here')"
    found = run.run_child(options, "a", [sys.executable, "-c", code], tmp_path / "x.json", {})
    assert found == {"unavailable": "ValueError: no machete here", "log": "x.log"}
    options.seconds = 1
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    found = run.run_child(options, "c", sleep, tmp_path / "x.json", {})
    assert found["unavailable"].startswith("stopped after")


def test_bench_throughput_gets_the_engine(tmp_path: Path) -> None:
    options = gpu_vllm.arguments(["throughput", "--requests", "7"])
    job = {"checkpoint": "DIR", "engine": {"max_model_len": 99, "enforce_eager": True},
           "picture": 448}  # fmt: skip
    humming = run.VARIANTS["humming-w4a8"]
    words = gpu_vllm.throughput_command(options, job, humming, tmp_path / "out.json")
    reported = " ".join(words)
    assert "--linear-backend humming" in reported and "--max-model-len 99" in reported
    assert "--enforce-eager --" in reported and "--no-enable-prefix-caching" in reported
    assert "--num-prompts 7" in reported and '--limit-mm-per-prompt {"image": 1' in reported


# ---- models


@pytest.mark.parametrize("name", models.MODELS)
def test_real_shapes(name: str) -> None:
    """Parameters and layer shapes are those of the models named; nothing is allocated."""
    model = models.MODELS[name]
    tokenizer = models.make_tokenizer(model, tiny=True)
    config = model.config(tokenizer, False)
    config.text_config.vocab_size = model.vocabulary
    shapes = models.shapes(model, config)
    parameters = sum(torch.Size(s).numel() for s in shapes.values())
    published = {"qwen2-vl-7b": 8.291e9, "llava-onevision-7b": 8.030e9, "internvl2-8b": 8.076e9}
    assert parameters == pytest.approx(published[name], rel=2e-3)
    wanted = LAYER_SHAPES["InternVL2-8B" if name == "internvl2-8b" else "Qwen2-VL-7B"]
    first = {n.split(".")[-2]: s for n, s in shapes.items() if ".layers.0." in n and len(s) == 2
             and n.endswith("_proj.weight") and "v" not in n.split(".layers.")[0][:3]}  # fmt: skip
    assert first["down_proj"] == wanted["down"] and first["o_proj"] == wanted["o"]
    assert 2 * first["gate_proj"][0] == wanted["gate_up"][0]
    assert sum(first[f"{x}_proj"][0] for x in "qkv") == wanted["qkv"][0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All kinds of the tiny InternVL2."""
    folder = tmp_path_factory.mktemp("models")
    return models.make_checkpoints("internvl2-8b", list(models.CHECKPOINTS), folder, tiny=True)


def test_all_kinds_hold_the_same_weights(made: dict[str, Path]) -> None:
    name = "language_model.model.layers.1.mlp.down_proj"
    shard = "layer-001.safetensors"
    exact = load_file(made["bf16"] / shard)[f"{name}.weight"].float()
    for kind, bound in (("w3a16", 0.3), ("w4a8", 0.2)):
        require_sound(made[kind])
        stored = _of(load_file(made[kind] / shard), name)
        close = packing.unpack_linear(stored, get_scheme(kind))
        assert (close - exact).norm() / exact.norm() < bound
        other = _of(load_file(made[f"ct-{kind}"] / shard), name)
        codes = packing.unpack(stored["weight_packed"], int(kind[1]), kind == "w4a8")
        offset = 8 if kind == "w4a8" else 0
        unsigned = packing.unpack(other["weight_packed"], 4, False)
        assert torch.equal(unsigned.to(torch.int16), codes.to(torch.int16) + offset)
        assert torch.equal(other["weight_scale"], stored["weight_scale"])
    for kind, bits, bound in (("ct-w4a16", 4, 0.15), ("ct-w3a16-dense", 3, 0.3)):
        stored = _of(load_file(made[kind] / shard), name)
        codes = packing.unpack(stored["weight_packed"], bits, False).float() - (1 << (bits - 1))
        close = packing.dequantize(codes, stored["weight_scale"].float(), None)
        assert (close - exact).norm() / exact.norm() < bound
        config = json.loads((made[kind] / "config.json").read_text())["quantization_config"]
        assert config["config_groups"]["group_0"]["weights"]["num_bits"] == bits


def _of(tensors: dict[str, torch.Tensor], linear: str) -> dict[str, torch.Tensor]:
    return {
        n.removeprefix(f"{linear}."): t for n, t in tensors.items() if n.startswith(f"{linear}.")
    }


def test_what_is_shared_is_stored_once(made: dict[str, Path]) -> None:
    files = {(path / "rest.safetensors").stat().st_ino for path in made.values()}
    assert len(files) == 1
    with safe_open(made["bf16"] / "rest.safetensors", "pt") as rest:
        assert "multi_modal_projector.linear_1.weight" in set(rest.keys())
    head = "language_model.lm_head"
    exact = load_file(made["bf16"] / "tables.safetensors")[f"{head}.weight"].float()
    assert (made["w3a16-head16"] / "tables.safetensors").is_file()
    stored = _of(load_file(made["w3a16"] / "tables-8.safetensors"), head)
    close = packing.unpack_rows(stored, VOCABULARY_SCHEME, torch.float32)
    assert 0 < (close - exact).norm() / exact.norm() < 0.02


def test_made_again_only_what_is_incomplete(made: dict[str, Path]) -> None:
    folder = made["bf16"].parents[1]
    before = {k: (p / "layer-000.safetensors").stat().st_mtime_ns for k, p in made.items()}
    (made["w3a16"] / run.COMPLETE).unlink()
    models.make_checkpoints("internvl2-8b", list(models.CHECKPOINTS), folder, tiny=True)
    after = {k: (p / "layer-000.safetensors").stat().st_mtime_ns for k, p in made.items()}
    assert {k for k in made if after[k] != before[k]} == {"w3a16"}


def test_random_text_has_as_many_tokens_again() -> None:
    """`vllm bench` turns random tokens into text, and that text into tokens."""
    tokenizer = models.make_tokenizer(models.MODELS["qwen2-vl-7b"], tiny=True)
    words = [5, 77, 300, 5]
    assert tokenizer.encode(tokenizer.decode(words), add_special_tokens=False) == words
    picture = tokenizer.encode("<|vision_start|><|image_pad|><|vision_end|>")
    assert len(picture) == 3 and min(picture) >= tokenizer.vocab_size - 7


def test_calibration_samples_can_be_read(tmp_path: Path) -> None:
    path = gpu_vllm_quantize.write_samples(tmp_path, 3, 2, 56, 20, 8, 400)
    read = load_calibration(str(path), 3, 0, None, False)
    assert len(read) == 3 and all(len(s.images) == 2 for s in read)
    assert len({s.question for s in read}) == 3 and len(read[0].answer.split()) == 8


# ---- what ran


def test_kernels_are_grouped() -> None:
    times = {
        "w3a16_shared_kernel": 50.0, "void marlin::Marlin<...>": 1.0,
        "rms_norm_quantize_kernel": 5.0, "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": 20.0,
        "flash_fwd_splitkv_kernel": 7.0, "triton_red_fused_add_mean_mul_pow_rsqrt_0": 3.0,
        "triton_poi_fused_mul_silu_1": 2.0, "Memcpy DtoD (Device -> Device)": 1.0, "else": 0.5,
    }  # fmt: skip
    table = groups.grouped(times)
    assert table == {
        "activation quantization": 5.0, "quantized GEMM": 51.0, "attention": 7.0, "rotary": 0.0,
        "dequantization": 0.0, "norm": 3.0, "SiLU * mul": 2.0, "16-bit GEMM": 20.0, "copies": 1.0,
        "sampling": 0.0, "other": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("group", "kernels"),
    {
        "quantized GEMM": [
            "halves_kernel", "w3a16_shared_kernel", "w3a16_prefill_kernel", "w4a8_shared_kernel",
            "w4a8_prefill_kernel", "qig::w3a16_linear", "qig::rms_norm_w3a16_linear",
        ],
        "dequantization": ["w3a16_dequantize_kernel"],
        "activation quantization": [
            "quantize_kernel", "split_halves_kernel", "rms_norm_quantize_kernel",
            "rms_norm_halves_kernel", "silu_mul_largest_kernel", "quantize_chunk_kernel",
            "silu_mul_halves_kernel",
            "qig::quantize_activation", "qig::split_halves", "qig::rms_norm_halves",
        ],
        "norm": [
            "rms_norm_kernel", "triton_red_fused_fused_add_rms_norm_w3a16_linear_2",
            "triton_red_fused_add_mean_mul_pow_rsqrt_w4a8_linear_0",
            "triton_red_fused_fused_add_rms_norm_quantize_activation_1",
        ],
        "SiLU * mul": ["silu_mul_kernel", "triton_poi_fused_mul_silu_slice_w3a16_linear_1"],
        "rotary": ["triton_poi_fused_cat_index_select_split_split_with_sizes_3"],
        "other": ["triton_poi_fused_w3a16_linear_4", "triton_poi_fused_4"],
    }.items(),
)  # fmt: skip
def test_what_is_fused_is_grouped_by_what_it_does(group: str, kernels: list[str]) -> None:
    """Names of our kernels and ops, and of Inductor's around them (those seen in a profile)."""
    assert {kernel: groups.group_of(kernel) for kernel in kernels} == dict.fromkeys(kernels, group)


class _Linear(torch.nn.Module):
    def __init__(self, method: Any, scheme: Any = None) -> None:
        super().__init__()
        self.quant_method = method
        if scheme is not None:
            self.scheme = scheme


class HummingLinearKernel:
    """Named as vLLM's."""


class CompressedTensorsLinearMethod:
    """Named as vLLM's."""


class CompressedTensorsWNA16:
    """Named as vLLM's."""

    kernel = HummingLinearKernel()


def test_kernels_are_read_from_the_layers() -> None:
    packed = _Linear(CompressedTensorsLinearMethod(), CompressedTensorsWNA16())
    found = groups.layer_kernels(
        [
            ("language_model.model.layers.0.self_attn.qkv_proj", packed),
            ("language_model.model.layers.1.self_attn.qkv_proj", packed),
            ("visual.layers.0.mlp.up_proj", _Linear(object())),
            ("language_model.lm_head", _Linear(object())),
            ("language_model.model.norm", torch.nn.Identity()),
        ]
    )
    name = "CompressedTensorsWNA16: HummingLinearKernel"
    assert found == {"decoder": {name: 2}, "elsewhere": {"object": 2}}


def test_the_kernel_of_an_8_bit_head_is_read() -> None:
    pytest.importorskip("vllm")
    from qig_serve.vllm_plugin.embedding import QigEmbeddingMethod

    head = _Linear(QigEmbeddingMethod("lm_head"))
    head.qig_n, head.qig_dtype = 128, torch.bfloat16
    (name,) = groups.layer_kernels([("lm_head", head)])["elsewhere"]
    assert name.startswith("QigEmbeddingMethod: torch int8 weight-only GEMM")


def test_a_variant_that_ran_something_else_is_named() -> None:
    profile = {"1": {"decode_kernels": [["void marlin::Marlin<...>", 5.0]]}}
    marlin = {"layers": {"decoder": {"CompressedTensorsWNA16: MarlinLinearKernel": 8}},
              "profile": profile}  # fmt: skip
    assert run.verify(marlin, run.VARIANTS["marlin-w4a16"], "cuda") == {}
    wrong = run.verify(marlin, run.VARIANTS["humming-w4a8"], "cuda")
    assert wrong == {
        "layers": ["CompressedTensorsWNA16: MarlinLinearKernel"],
        "kernels": ["void marlin::Marlin<...>"],
    }
    nothing = {"layers": {"decoder": {}}, "profile": profile}
    assert "layers" in run.verify(nothing, run.VARIANTS["bf16"], "cuda")


def test_answers_within_the_noise_and_not() -> None:
    right = ["a"] * 100
    known = {
        "questions": 100,
        "equal_to_fp32": 95,
        "tokens": ["1 2"] * 100,
        "texts": ["a"] * 90 + ["b"] * 10,
    }
    near = {"tokens": ["1 2"] * 93 + ["2 2"] * 7, "texts": ["a"] * 89 + ["b"] * 11}
    reported = gpu_vllm_demo.verdict(near, known, right)
    assert reported["equal"] == 93 and reported["tokens_within_noise"]
    assert reported["exact"] == 0.89 and reported["exact_equal_within_interval"]
    far = {"tokens": ["1 2"] * 60 + ["1"] * 40, "texts": ["a"] * 60 + ["b"] * 40}
    reported = gpu_vllm_demo.verdict(far, known, right)
    assert not reported["tokens_within_noise"] and not reported["exact_equal_within_interval"]


def test_an_unknown_reference_is_refused(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--out", str(tmp_path), "demo", "--names", "llava-w3a16-rtn"]
    path = tmp_path / "reference.json"
    options = gpu_vllm.arguments([*words, "--reference", str(path)])
    with pytest.raises(UserError, match="has no answers: make it with `reference`"):
        gpu_vllm_demo.compare(options, CARD)
    run.merge(path, ["internvl-w3a16-rtn"], {})
    with pytest.raises(UserError, match="has no llava-w3a16-rtn: make it with `reference`"):
        gpu_vllm_demo.compare(options, CARD)


def test_time_in_which_no_kernel_ran() -> None:
    """Kernels that overlap, as early launches do, and gaps between others."""
    import gpu_vllm_llm

    assert gpu_vllm_llm.idle([]) == 0
    assert gpu_vllm_llm.idle([(0, 2), (1, 5), (7, 8), (2, 3)]) == 2


def test_what_a_log_says_of_graphs_and_kernels(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "INFO 11-27 14:25:34 [warm_up.py:62] 17 kernels ready, 9.0 s after the first\n"
        "INFO 11-27 14:25:34 [other.py:1] nothing\n"
        "Capturing CUDA graphs (FULL):  60%|---\n"
        "INFO 11-27 14:25:35 [runner.py:7] CUDA graph mode: PIECEWISE\n"
    )
    reported = gpu_vllm_plan.reported(log)
    assert reported == ["17 kernels ready, 9.0 s after the first", "CUDA graph mode: PIECEWISE"]
