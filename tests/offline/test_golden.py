"""Golden digests: the tensors that every method packs of the three bundled models, to the byte.

    OMP_NUM_THREADS=1 PYTHONPATH=tests python tests/offline/test_golden.py     # records them anew

Sums of floating-point numbers depend on a CPU's instructions, on the number of threads and on
torch's build, so the record holds a probe of them. Where this machine's probe is the recorded one,
the sha256 of all packed tensors must be equal. Elsewhere a sample of the codes must be: all but a
share of them, which rounding to nearest keeps small and error compensation, where one other code
changes those behind it, does not.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tensors_of
from safetensors.torch import load_file, save_file

from qig_serve.demo.bundled import bundled_directory
from qig_serve.demo.model import MODELS
from qig_serve.formats import get_scheme
from qig_serve.offline.pipeline import quantize
from qig_serve.offline.recipe import QuantRecipe
from qig_serve.packing import unpack

RECORD = Path(__file__).with_name("golden.json")
METHODS = ("rtn", "awq-clip", "mbq", "gptq", "qig", "qig+")
SCHEMES = ("w3a16", "w4a8")
BLOCKS, SAMPLES, GRID = 2, 8, 5
TRAINED = [name for name, spec in MODELS.items() if spec.trained]
SHARE = {"gptq": 0.7, "qig+": 0.5}
"""Codes of the sample that must be equal on a machine with another probe; 0.99 for the methods
that round to nearest. With SSE for AVX512 it was 1.0 of those and 0.82 to 0.93 of gptq's; with SSE
for AVX2 0.63 to 0.74 of qig+'s, where a row near a tie may have other ranges."""


def probe() -> str:
    """What this machine makes of the operations whose last bits differ between machines."""
    g = torch.Generator().manual_seed(0)
    digest = hashlib.sha256(f"{torch.__version__} {torch.get_num_threads()}".encode())
    for rows, inner, columns in ((257, 256, 768), (96, 768, 256), (1, 384, 256)):
        a, b = torch.randn(rows, inner, generator=g), torch.randn(columns, inner, generator=g)
        q = a.view(1, 1, rows, inner)
        attended = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        for value in (a @ b.T, a.double().T @ a.double(), a.sum(0), b.abs().mean(1), attended):
            digest.update(value.numpy().tobytes())
        for value in (a.softmax(-1), a.exp(), a.square().mean(-1).rsqrt()):
            digest.update(value.numpy().tobytes())
    h = torch.randn(256, 300, generator=g).double()
    lower = torch.linalg.cholesky(h @ h.T)
    upper = torch.linalg.solve_triangular(lower.T, torch.eye(256, dtype=h.dtype), upper=True)
    digest.update(upper.numpy().tobytes())
    return digest.hexdigest()


def shortened(name: str, target: Path, blocks: int = BLOCKS) -> Path:
    """A bundled model with its first blocks only."""
    source = bundled_directory(name)
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    kept = {f".layers.{i}." for i in range(blocks)}
    dropped = {f".layers.{i}." for i in range(blocks, text["num_hidden_layers"])}
    text["num_hidden_layers"] = blocks
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:blocks]
    (target / "config.json").write_text(json.dumps(config))
    tensors = {
        tensor: value
        for tensor, value in load_file(source / "model.safetensors").items()
        if "vision" in tensor or "visual" in tensor or not any(d in tensor for d in dropped)
    }
    assert all(any(k in tensor for tensor in tensors) for k in kept)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def run(model: Path, output: Path, scheme: str, method: str) -> dict[str, Any]:
    """{"sha256": of all packed tensors, "codes": a row of each linear of the last block}."""
    recipe = QuantRecipe(
        scheme=scheme,
        method=method,
        calib="demo",
        samples=SAMPLES,
        grid=GRID,
        head=16,
        embeddings=16,
        device="cpu",
    )
    quantize(model, output, recipe, quiet=True)
    tensors = tensors_of(output)
    packed = sorted(n for n in tensors if n.rpartition(".")[2].startswith("weight_"))
    digest, sample = hashlib.sha256(), b""
    for name in packed:
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
        if f".layers.{BLOCKS - 1}." in name and name.endswith(".weight_packed"):
            sample += tensor[len(tensor) // 2].view(torch.uint8).numpy().tobytes()
    return {"sha256": digest.hexdigest(), "codes": base64.b64encode(sample).decode()}


def codes(text: str, scheme: str) -> torch.Tensor:
    """The codes of `run`'s sample."""
    words = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.int32)
    return unpack(words[None], get_scheme(scheme).bits, get_scheme(scheme).symmetric)[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("golden")
    return {name: shortened(name, folder / name) for name in TRAINED}


def cases() -> Iterator[Any]:
    """Every method on the bundled model, on each of the others the paper's two, one a scheme."""
    for number, name in enumerate(TRAINED):
        for scheme in SCHEMES:
            others = ("qig", "qig+")[(number + SCHEMES.index(scheme)) % 2]
            for method in METHODS:
                marks = [] if name == "llava" or method == others else [pytest.mark.slow]
                yield pytest.param(name, scheme, method, marks=marks)


@pytest.mark.parametrize(("name", "scheme", "method"), list(cases()))
def test_packed_tensors(
    models: dict[str, Path], name: str, scheme: str, method: str, tmp_path: Path
) -> None:
    record = json.loads(RECORD.read_text())
    wanted = record["runs"][f"{name} {scheme} {method}"]
    found = run(models[name], tmp_path / "out", scheme, method)
    if record["probe"] == probe():
        assert found["sha256"] == wanted["sha256"]
    equal = codes(found["codes"], scheme) == codes(wanted["codes"], scheme)
    assert float(equal.float().mean()) >= SHARE.get(method, 0.99)


def main() -> None:
    """Records the digests of this machine."""
    import tempfile

    record: dict[str, Any] = {"probe": probe(), "runs": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name in TRAINED:
            model = shortened(name, Path(scratch, name))
            for scheme in SCHEMES:
                for method in METHODS:
                    key = f"{name} {scheme} {method}"
                    record["runs"][key] = run(model, Path(scratch, key), scheme, method)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
