"""A model that is named as on the hub: its snapshot in the local cache is used, or none is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.tiny_models import one_sample, tiny_model
from huggingface_hub import constants
from PIL import Image

from qig_serve import QuantRecipe, quantize
from qig_serve.batch import generate
from qig_serve.cli import main
from qig_serve.errors import UserError
from qig_serve.evaluate import evaluate_many, load_samples
from qig_serve.model_directory import find_model, model_name
from qig_serve.offline.explain import explain_sample
from qig_serve.offline.source.internvl2 import convert
from qig_serve.serve import serve
from qig_serve.serving.limits import Limits

pytestmark = pytest.mark.filterwarnings("ignore")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, name: str, directory: Path) -> Path:
    """A directory's files in the cache, as the hub's client lays them out; its snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(directory, repository / "blobs")
    snapshot.mkdir(parents=True)
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_a_snapshot_is_quantized_and_one_of_a_checkpoint_read(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(cache, "acme/tiny", tiny_model("llava", tmp_path / "made"))
    words = ["--calib", one_sample(tmp_path), "--method", "rtn", "--scheme", "w4a8", "--quiet"]
    assert main(["quantize", "acme/tiny", *words, "--output", "out"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["model"] == "acme/tiny"
    put(cache, "acme/tiny-w4a8", tmp_path / "out")
    capsys.readouterr()
    assert main(["inspect", "acme/tiny-w4a8", "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scheme"] == "w4a8"


def test_what_a_name_means(cache: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text("{}")
    snapshot = put(cache, "acme/tiny", made)
    assert find_model("acme/tiny") == snapshot and model_name(snapshot) == "tiny"
    for other in ("acme/other", "tiny", "./acme/tiny", "a--b/c", "../made", str(made)):
        assert find_model(other) == Path(other)
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    assert find_model("acme/tiny") == Path("acme/tiny")  # what is there goes first
    assert model_name(Path("acme/tiny")) == "tiny"


def test_functions_find_a_name_as_the_commands_do(cache: Path, tmp_path: Path) -> None:
    put(cache, "acme/tiny", tiny_model("llava", tmp_path / "made"))
    recipe = QuantRecipe(calib=one_sample(tmp_path), method="rtn", scheme="w4a8")
    assert quantize("acme/tiny", tmp_path / "out", recipe, quiet=True).model == "acme/tiny"
    put(cache, "acme/tiny-w4a8", tmp_path / "out")
    samples = load_samples("demo", 1)
    found = evaluate_many(
        [("w4a8", "acme/tiny-w4a8")], "acme/tiny", samples, engine="none", kl_samples=1
    )
    assert found["w4a8"].scheme == "w4a8" and found["w4a8"].divergence is not None
    assert found["w4a8"].calibration_overlap == ()


@pytest.mark.parametrize(
    "function",
    [
        lambda: explain_sample("acme/none", [], "What?", None, lambda count: [0]),
        lambda: generate("acme/none", Path("calib.jsonl"), Path("out.jsonl")),
        lambda: serve("acme/none", [], Limits()),
        lambda: convert("acme/none", "out"),
    ],
    ids=["attribute", "generate", "serve", "convert"],
)
def test_functions_read_a_name_s_snapshot(
    function: Callable[[], object], cache: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text("{}")
    put(cache, "acme/none", made)
    with pytest.raises(UserError, match=r"snapshots/|models of type"):
        function()


@pytest.mark.parametrize(
    "command",
    [
        "quantize MODEL --calib calib.jsonl --output out",
        "evaluate MODEL --data calib.jsonl",
        "evaluate made --reference MODEL --data calib.jsonl",
        "compare MODEL --calib calib.jsonl --data calib.jsonl",
        "attribute MODEL --image red.png --prompt What? -o out.png",
        "serve MODEL",
        "generate MODEL -i calib.jsonl -o out.jsonl",
        "doctor MODEL",
        "inspect MODEL",
        "inspect MODEL --verify",
        "convert MODEL out",
    ],
)
@pytest.mark.usefixtures("cache")
def test_what_is_not_there_is_not_fetched(
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Those of this process are pytest's.
    monkeypatch.setattr("qig_serve.serving.stop_signals.take_stop_signals", lambda: None)
    one_sample(tmp_path)
    Image.new("RGB", (8, 8)).save("red.png")
    Path("made").mkdir()
    Path("made", "config.json").write_text("{}")
    assert main(command.replace("MODEL", "acme/tiny").split()) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "directory acme/tiny does not exist: `hf download acme/tiny" in said
    assert not Path("out").exists() and not list(Path().glob("out*"))
