"""InternVL2 as published -> the InternVL port: the same model, the same tokens."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.offline.calibration.batches import make_batches
from qig_serve.offline.source import loaded_model
from qig_serve.offline.source.internvl2 import convert, convert_config
from qig_serve.offline.source.internvl2_tensors import convert_tensor
from qig_serve.offline.source.sentencepiece_tokenizer import build
from qig_serve.samples import sample_from_parts

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VIT = 4, 2, 64, 256, 128
ADDED = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>")
TEXT = """what color is the star ? describe it . the quick brown fox jumps over a lazy dog
красная звезда 一颗红色的星星 answer user assistant system image picture"""
WORDS = TEXT.split()


def train_sentencepiece(directory: Path, dummy_prefix: bool = False) -> Any:
    spm = pytest.importorskip("sentencepiece")
    rng = random.Random(0)
    corpus = directory / "corpus.txt"
    lines = (" ".join(rng.choices(WORDS, k=9)) for _ in range(300))
    corpus.write_text("\n".join(lines), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]"],
        minloglevel=2,
    )
    corpus.unlink()
    (directory / "tokenizer.vocab").unlink()
    return spm.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


def published_tensors(vocab: int, qk_norm: bool) -> tuple[dict[str, torch.Tensor], Any]:
    """A random model under the published names, and its separate matrices by port module."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * 0.05).to(torch.bfloat16)

    t: dict[str, torch.Tensor] = {}
    known: dict[str, torch.Tensor] = {}
    for i in range(2):
        p = f"language_model.model.layers.{i}."
        q = rand(HEADS, HEAD_DIM, HIDDEN)
        k, v = rand(KV_HEADS, HEAD_DIM, HIDDEN), rand(KV_HEADS, HEAD_DIM, HIDDEN)
        rows = []
        for kv in range(KV_HEADS):  # the query heads of a key/value head, its key, its value
            group = HEADS // KV_HEADS
            rows += [*q[kv * group : (kv + 1) * group], k[kv], v[kv]]
        t[p + "attention.wqkv.weight"] = torch.cat(rows)
        for name, part in (("q", q), ("k", k), ("v", v)):
            known[f"layers.{i}.self_attn.{name}_proj.weight"] = part.flatten(0, 1)
        t[p + "attention.wo.weight"] = rand(HIDDEN, HEADS * HEAD_DIM)
        for name in ("w1", "w3"):
            t[p + f"feed_forward.{name}.weight"] = rand(256, HIDDEN)
        t[p + "feed_forward.w2.weight"] = rand(HIDDEN, 256)
        known[f"layers.{i}.mlp.gate_proj.weight"] = t[p + "feed_forward.w1.weight"]
        known[f"layers.{i}.mlp.up_proj.weight"] = t[p + "feed_forward.w3.weight"]
        for name in ("attention_norm", "ffn_norm"):
            t[p + f"{name}.weight"] = 1 + rand(HIDDEN)
        p = f"vision_model.encoder.layers.{i}."
        t[p + "attn.qkv.weight"] = rand(3 * VIT, VIT)
        t[p + "attn.proj.weight"], t[p + "attn.proj.bias"] = rand(VIT, VIT), rand(VIT)
        if qk_norm:
            t[p + "attn.q_norm.weight"], t[p + "attn.k_norm.weight"] = rand(VIT), rand(VIT)
        else:
            t[p + "attn.qkv.bias"] = rand(3 * VIT)
        t[p + "ls1"], t[p + "ls2"] = rand(VIT), rand(VIT)
        for name in ("fc1", "fc2"):
            t[p + f"mlp.{name}.weight"], t[p + f"mlp.{name}.bias"] = rand(VIT, VIT), rand(VIT)
        for name in ("norm1", "norm2"):
            t[p + f"{name}.weight"] = 1 + rand(VIT)
            if not qk_norm:
                t[p + f"{name}.bias"] = rand(VIT)
    t["language_model.model.tok_embeddings.weight"] = rand(vocab, HIDDEN)
    t["language_model.model.norm.weight"] = 1 + rand(HIDDEN)
    t["language_model.output.weight"] = rand(vocab, HIDDEN)
    t["vision_model.embeddings.class_embedding"] = rand(1, 1, VIT)
    t["vision_model.embeddings.position_embedding"] = rand(1, 17, VIT)
    t["vision_model.embeddings.patch_embedding.weight"] = rand(VIT, 3, 14, 14)
    t["vision_model.embeddings.patch_embedding.bias"] = rand(VIT)
    t["mlp1.0.weight"], t["mlp1.0.bias"] = rand(4 * VIT), rand(4 * VIT)
    t["mlp1.1.weight"], t["mlp1.1.bias"] = rand(HIDDEN, 4 * VIT), rand(HIDDEN)
    t["mlp1.3.weight"], t["mlp1.3.bias"] = rand(HIDDEN, HIDDEN), rand(HIDDEN)
    return t, known


def internvl2(directory: Path, qk_norm: bool = False) -> Any:
    """A tiny InternVL2 directory as published; its matrices by name in the port's decoder."""
    directory.mkdir()
    spm = train_sentencepiece(directory)
    vocab = spm.get_piece_size() + len(ADDED)
    tensors, known = published_tensors(vocab, qk_norm)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    added = {token: spm.get_piece_size() + i for i, token in enumerate(ADDED)}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    (directory / "modeling_internvl_chat.py").write_text("raise SystemExit('was run')")
    config = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "force_image_size": 56,
        "max_dynamic_patch": 4,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "torch_dtype": "bfloat16",
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "bias": False,
            "hidden_act": "silu",
            "hidden_size": HIDDEN,
            "intermediate_size": 256,
            "max_position_embeddings": 2048,
            "model_type": "internlm2",
            "num_attention_heads": HEADS,
            "num_hidden_layers": 2,
            "num_key_value_heads": KV_HEADS,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {"factor": 2.0, "type": "dynamic"},
            "rope_theta": 1000000,
            "vocab_size": vocab,
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "hidden_act": "gelu",
            "hidden_size": VIT,
            "image_size": 56,
            "intermediate_size": VIT,
            "layer_norm_eps": 1e-6,
            "model_type": "intern_vit_6b",
            "norm_type": "rms_norm" if qk_norm else "layer_norm",
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 14,
            "qk_normalization": qk_norm,
            "qkv_bias": not qk_norm,
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    return known


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("internvl2") / "published"
    return directory, internvl2(directory)


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_tokenizer_encodes_as_sentencepiece(tmp_path: Path, dummy_prefix: bool) -> None:
    spm = train_sentencepiece(tmp_path, dummy_prefix)
    tokenizer = build(tmp_path / "tokenizer.model")
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(200)]
    texts += ["  two  spaces ", "new\nline", "quick-brown?!", "Ünïcödé 😀 ξ"]
    if not dummy_prefix:
        texts.append("星星the[UNUSED_TOKEN_1]a")
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == spm.encode(text), text
        assert tokenizer.decode(ids) == spm.decode(ids), text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("qk_norm", [False, True], ids=["300M", "6B"])
def test_the_port_is_the_same_model(tmp_path: Path, qk_norm: bool) -> None:
    """Both vision towers: biases and layer norms (8B), q and k norms and RMS norms (26B)."""
    from transformers import AutoModelForImageTextToText

    known = internvl2(tmp_path / "published", qk_norm)
    output = convert(tmp_path / "published", tmp_path / "port")
    model, info = AutoModelForImageTextToText.from_pretrained(
        output, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    decoder = model.model.language_model
    assert type(decoder).__name__ == "LlamaModel"
    for name, tensor in known.items():
        assert torch.equal(decoder.get_parameter(name), tensor), name
    tensors = load_file(tmp_path / "published" / "model.safetensors")
    queries, keys, values = tensors["vision_model.encoder.layers.1.attn.qkv.weight"].split(VIT)
    attention = model.model.vision_tower.encoder.layer[1].attention
    assert torch.equal(attention.q_proj.weight, queries)
    assert torch.equal(attention.k_proj.weight, keys)
    assert torch.equal(attention.v_proj.weight, values)
    assert model.config.text_config.rope_parameters["rope_type"] == "dynamic"
    assert not list(output.glob("*.py"))


@pytest.mark.filterwarnings("ignore")
def test_the_port_takes_a_picture_and_can_be_quantized(
    published: tuple[Path, Any], tmp_path: Path
) -> None:
    output = convert(published[0], tmp_path / "port")
    loaded = loaded_model.load(output)
    sample = sample_from_parts("1", "all", Image.new("RGB", (56, 56)), "what color ?", "the star")
    (batch,) = make_batches([sample], loaded.processor, loaded.image_token_id)
    text = loaded.processor.decode(batch.inputs["input_ids"][0])
    start = "<s><|im_start|>system\n你是由上海人工智能实验室"
    assert text.startswith(start)
    turn = "<img>" + 4 * "<IMG_CONTEXT>" + "</img>\nwhat color ?<|im_end|>"
    assert f"<|im_end|><|im_start|>user\n{turn}<|im_start|>assistant\nthe star<|im_end|>" in text
    assert int((batch.modality == 2).sum()) == 4
    hidden = loaded.block_inputs(batch.inputs).hidden
    assert bool(torch.isfinite(hidden).all()) and len(loaded.left_alone()) > 3


def test_other_models_are_refused(
    published: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published[0]
    config = json.loads((source / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for change, message in (
        ({"model_type": "llava"}, "only internvl_chat"),
        ({"llm_config": {"architectures": ["Phi3ForCausalLM"]}}, "only InternLM2"),
        ({"ps_version": "v1"}, "pixel shuffle 'v1'"),
    ):
        (other / "config.json").write_text(json.dumps(config | change))
        assert main(["convert", str(other), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert main(["convert", str(source), str(source)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


def test_an_unknown_tensor_leaves_nothing(published: tuple[Path, Any], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in published[0].iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["language_model.model.layers.0.attention.lora.weight"] = torch.zeros(2, 2)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.0\.attention\.lora\.weight belongs to no"):
        convert(source, tmp_path / "port")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


Tensors = dict[str, torch.Tensor]
LAYER = "language_model.model.layers.1."
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


def text_of(name: str, text: str | bytes) -> Callable[[Path], object]:
    data = text.encode() if isinstance(text, str) else text
    return lambda directory: (directory / name).write_bytes(data)


def setting(**changes: Any) -> Callable[[Path], object]:
    """Other values in config.json; `llm_` and `vision_` before a key of theirs."""

    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        for key, value in changes.items():
            part, _, inner = key.partition("__")
            if inner:
                config[part][inner] = value
            else:
                config[key] = value
        (directory / "config.json").write_text(json.dumps(config))

    return change


def tensors(change: Callable[[Tensors], object]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        found = load_file(directory / "model.safetensors")
        change(found)
        save_file(found, directory / "model.safetensors", {"format": "pt"})

    return apply


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Path], object]:
    """Zeros of another shape or type."""
    return tensors(lambda found: found.update({name: torch.zeros(shape).to(dtype)}))


def token(name: str, number: int | None) -> Callable[[Path], object]:
    def add(directory: Path) -> None:
        path = directory / "added_tokens.json"
        added = json.loads(path.read_text())
        last = max(added.values())
        path.write_text(json.dumps(added | {name: number and last + number}))

    return add


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer-of-config": (text_of("config.json", POINTER), "config.json is a pointer of Git LFS"),
    "pointer-of-tokenizer": (text_of("tokenizer.model", POINTER), "model is a pointer of Git LFS"),
    "pointer-of-tokens": (text_of("added_tokens.json", POINTER), "json is a pointer of Git LFS"),
    "config-nested": (text_of("config.json", "[" * 100_000), "nested too deeply"),
    "config-utf16": (text_of("config.json", "{}".encode("utf-16")), "is text in UTF-16"),
    "no-tokenizer": (lambda d: (d / "tokenizer.model").unlink(), "no tokenizer.model: copy"),
    "tokens-without-ids": (token("<quad>", None), "is not a table of tokens and ids: copy"),
    "token-too-far": (token("<quad>", 9), "does not follow the others: copy"),
    "more-tokens-than-rows": (token("<more>", 1), "has 427 tokens, .* only 426 rows: copy"),
    "internvl2.5": (setting(template="internvl2_5"), "template 'internvl2_5': .* -hf"),
    "no-template": (setting(template=None), "template None: "),
    "no-thumbnail": (setting(dynamic_image_size=True, use_thumbnail=False), "use_thumbnail"),
    "awq": (setting(llm_config__quantization_config={"quant_method": "awq"}), "already with awq"),
    "quant_config": (text_of("quant_config.json", '{"bits": 4}'), "quantized already"),
    "int8": (
        tensors(lambda t: t.update({LAYER + "wo": torch.zeros(2, 2, dtype=torch.int8)})),
        "I8",
    ),
    "float8": (put(LAYER + "wo", 2, dtype=torch.float8_e4m3fn), "is stored in F8_E4M3"),
    "block-lost": (
        tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith(LAYER)]),
        "no tensor for language_model.model.layers.1.input_layernorm.weight: .* incomplete",
    ),
    "bias-lost": (tensors(lambda t: t.pop("mlp1.3.bias")), "no tensor for multi_modal_projector"),
    "head-lost": (
        tensors(lambda t: t.pop("language_model.output.weight")),
        "no tensor for .*lm_head",
    ),
    "nothing": (tensors(lambda t: t.clear()), "has no tensor for"),
    "more-blocks": (setting(llm_config__num_hidden_layers=3), "no tensor for .*layers.2"),
    "fewer-blocks": (
        setting(llm_config__num_hidden_layers=1),
        "layers.1.* not known to config.json",
    ),
    "blocks-without-end": (setting(llm_config__num_hidden_layers=10**9), "text_config.num_hidden"),
    "tower-without-end": (setting(vision_config__num_hidden_layers=10**9), "vision_config.num_hid"),
    "other-vocabulary": (setting(llm_config__vocab_size=430), r"\[426, 256\], and .* \[430, 256\]"),
    "rows-of-no-head": (
        put(LAYER + "attention.wqkv.weight", 511, 256),
        r"\[511, 256\], cannot be cut into queries, keys and values",
    ),
    "rows-of-other-heads": (
        put(LAYER + "attention.wqkv.weight", 256, 256),
        r"gives .*q_proj.weight \[128, 256\], and config.json asks for \[256, 256\]",
    ),
    "tower-of-two-rows": (
        put("vision_model.encoder.layers.0.attn.qkv.weight", 2, 128),
        "cannot be cut into queries, keys and values",
    ),
    "no-kv-heads": (setting(llm_config__num_key_value_heads=0), "ZeroDivisionError"),
    "kv-heads-null": (setting(llm_config__num_key_value_heads=None), "cannot be cut"),
    "heads-in-words": (setting(llm_config__num_attention_heads="four"), "num_attention_heads"),
    "no-ratio": (setting(downsample_ratio=0), "no whole number of tokens"),
    "size-of-no-patches": (setting(force_image_size=57), "no whole number of tokens"),
    "patch-of-nothing": (setting(vision_config__patch_size=0), "ZeroDivisionError"),
    "layer-beyond": (setting(select_layer=-4), "select_layer is -4, and .* has 2 layers"),
    "integer-dtype": (setting(torch_dtype="int8"), "'int8' is not a dtype"),
    "rope-that-nobody-has": (setting(llm_config__rope_scaling={"type": "x", "factor": 2}), "'x'"),
    "activation": (setting(llm_config__hidden_act="swish99"), "swish99"),
    "tiles-in-words": (setting(max_dynamic_patch="many"), "ValueError"),
    "no-tiles": (setting(max_dynamic_patch=0), "max_dynamic_patch 0"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_named_and_nothing_written(
    published: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    damage, message = DAMAGED[case]
    source = tmp_path / "source"
    shutil.copytree(published[0], source)
    damage(source)
    assert main(["convert", str(source), str(tmp_path / "port"), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("stop", ["disk", "tokenizer", "sigterm"])
def test_what_is_stopped_leaves_nothing(
    published: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stop: str,
) -> None:
    """SIGTERM; a disk that is full while settings are written, as a tokenizer says it, too."""
    from transformers import PreTrainedTokenizerFast

    def fail(self: object, *arguments: object, **named: object) -> None:
        if stop == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        elif stop == "disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    before = signal.getsignal(signal.SIGTERM)
    words = ["convert", str(published[0]), str(tmp_path / "port"), "--quiet"]
    try:
        if stop == "sigterm":
            with pytest.raises(SystemExit, match="143"):
                main(words)
        else:
            assert main(words) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert "the disk is full" in line and "run the command again" in line
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())


def test_a_link_to_nothing_is_there_already(published: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "port").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already"):
        convert(published[0], tmp_path / "port")


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\x0a\xff not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model"):
        build(path)


# Of the published config.json files, what the conversion looks at. The 8B sizes are InternVL2-8B's
# and InternVL2.5-8B's alike, whose index says how many bytes there are.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {
    "8B": (
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        },
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "norm_type": "layer_norm",
            "qk_normalization": False,
            "qkv_bias": True,
        },
        16_150_730_752,
    ),
    "26B": (
        {
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_attention_heads": 48,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
            "rope_scaling": {"factor": 3.0, "type": "dynamic"},
        },
        {
            "hidden_size": 3200,
            "intermediate_size": 12800,
            "num_attention_heads": 25,
            "num_hidden_layers": 45,
            "norm_type": "rms_norm",
            "qk_normalization": True,
            "qkv_bias": False,
        },
        None,
    ),
}


def published_config(size: str) -> dict[str, Any]:
    llm, vision, _ = PUBLISHED[size]
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "bias": False,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "model_type": "internlm2",
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000,
            "tie_word_embeddings": False,
            "vocab_size": 92553,
            **llm,
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "hidden_act": "gelu",
            "image_size": 448,
            "layer_norm_eps": 1e-06,
            "model_type": "intern_vit_6b",
            "patch_size": 14,
            **vision,
        },
    }


def published_index(size: str) -> dict[str, tuple[int, ...]]:
    """Names of model.safetensors.index.json -> shapes."""
    llm, vision, _ = PUBLISHED[size]
    c, m, vocab = llm["hidden_size"], llm["intermediate_size"], 92553
    kv = c // llm["num_attention_heads"] * llm["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.model.tok_embeddings.weight": (vocab, c),
        "language_model.model.norm.weight": (c,),
        "language_model.output.weight": (vocab, c),
    }
    for i in range(llm["num_hidden_layers"]):
        layer = {
            "attention.wo": (c, c),
            "attention.wqkv": (c + 2 * kv, c),
            "attention_norm": (c,),
            "feed_forward.w1": (m, c),
            "feed_forward.w2": (c, m),
            "feed_forward.w3": (m, c),
            "ffn_norm": (c,),
        }
        shapes |= {f"language_model.model.layers.{i}.{n}.weight": s for n, s in layer.items()}
    v, w = vision["hidden_size"], vision["intermediate_size"]
    shapes |= {
        "mlp1.0.weight": (4 * v,),
        "mlp1.0.bias": (4 * v,),
        "mlp1.1.weight": (c, 4 * v),
        "mlp1.1.bias": (c,),
        "mlp1.3.weight": (c, c),
        "mlp1.3.bias": (c,),
        "vision_model.embeddings.class_embedding": (1, 1, v),
        "vision_model.embeddings.patch_embedding.weight": (v, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (v,),
        "vision_model.embeddings.position_embedding": (1, 1025, v),
    }
    for i in range(vision["num_hidden_layers"]):
        layer = {
            "attn.proj.weight": (v, v),
            "attn.proj.bias": (v,),
            "attn.qkv.weight": (3 * v, v),
            "ls1": (v,),
            "ls2": (v,),
            "mlp.fc1.weight": (w, v),
            "mlp.fc1.bias": (w,),
            "mlp.fc2.weight": (v, w),
            "mlp.fc2.bias": (v,),
            "norm1.weight": (v,),
            "norm2.weight": (v,),
        }
        if vision["qk_normalization"]:
            layer |= {"attn.q_norm.weight": (v,), "attn.k_norm.weight": (v,)}
        if vision["qkv_bias"]:
            layer["attn.qkv.bias"] = (3 * v,)
        if vision["norm_type"] == "layer_norm":
            layer |= {"norm1.bias": (v,), "norm2.bias": (v,)}
        shapes |= {f"vision_model.encoder.layers.{i}.{n}": s for n, s in layer.items()}
    return shapes


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_published_tensor_has_its_place(size: str) -> None:
    """Names and shapes alone: the published ones become exactly those of transformers' port."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    index, config = published_index(size), convert_config(published_config(size), "config.json")
    if nbytes := PUBLISHED[size][2]:
        assert sum(2 * torch.Size(shape).numel() for shape in index.values()) == nbytes
    text = config["text_config"]
    converted: dict[str, tuple[int, ...]] = {}
    for name, shape in index.items():
        tensor = torch.empty(shape, device="meta")
        parts = convert_tensor(
            name, tensor, text["num_attention_heads"], text["num_key_value_heads"]
        )
        for target, part in parts:
            assert target not in converted
            converted[target] = tuple(part.shape)
    moved = (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    )
    got = {}
    for name, shape in converted.items():
        (old, new), *_ = [m for m in moved if name.startswith(m[0])]
        got[new + name.removeprefix(old)] = shape
    model_type = config.pop("model_type")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **config))
    assert got == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert config["image_seq_length"] == 256
    rope = model.config.text_config.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"]) == ("dynamic", 1000000)
