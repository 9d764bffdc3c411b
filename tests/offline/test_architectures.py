"""Every family's row, on a tiny random model of its real architecture."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers.tiny_models import (
    FAMILIES,
    make_tokenizer,
    one_sample,
    published_name,
    row_of,
    tiny_model,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from qig_serve.architectures import ARCHITECTURES, get_architecture
from qig_serve.cli import main
from qig_serve.demo.families import FAMILIES as DEMO_FAMILIES
from qig_serve.errors import UserError
from qig_serve.experts import unfuse
from qig_serve.family_row import PictureLayout, SmoothingGroup, any_expert
from qig_serve.offline.calibration.batches import make_batches
from qig_serve.offline.equalization.smoothing import fold, outputs
from qig_serve.offline.report.token_map import LAYOUTS
from qig_serve.offline.source import loaded_model
from qig_serve.samples import Sample, sample_from_parts

pytestmark = pytest.mark.filterwarnings("ignore")


def _sample(images: int = 1) -> Sample:
    generator = torch.Generator().manual_seed(3)
    parts: list[dict[str, Any]] = []
    for _ in range(images):
        small = torch.randint(0, 256, (4, 7, 3), generator=generator, dtype=torch.uint8)
        parts.append({"type": "image", "image": Image.fromarray(small.numpy()).resize((112, 64))})
    parts.append({"type": "text", "text": "What color is the star?"})
    return Sample("one", "all", ({"role": "user", "content": parts},), "a large red star")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: Any) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def directory(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(family, tmp_path_factory.mktemp("tiny") / family)


@pytest.fixture(scope="module")
def loaded(directory: Path) -> loaded_model.LoadedModel:
    return loaded_model.load(directory)


def _reference(directory: Path) -> Any:
    """The whole model in transformers; blocks behind the last one alone may be left unread."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    behind = f".layers.{model.config.get_text_config().num_hidden_layers}."
    assert not info["missing_keys"], info
    assert all(behind in name for name in info["unexpected_keys"]), info
    unfuse(model)
    return model.eval()


def test_tables_agree_with_the_families() -> None:
    """Tiny models, demonstration models, and the layouts of pictures."""
    assert {row_of(family) for family in FAMILIES} == set(ARCHITECTURES)
    assert set(DEMO_FAMILIES) <= set(ARCHITECTURES)
    assert {row.pictures for row in ARCHITECTURES.values()} == set(LAYOUTS)
    assert set(get_args(PictureLayout)) == set(LAYOUTS)


def _numberless(groups: tuple[SmoothingGroup, ...]) -> frozenset[tuple[str, ...]]:
    """The linears of groups, without the numbers of experts."""
    return frozenset(tuple(dict.fromkeys(map(any_expert, g.linears))) for g in groups)


def test_paths_resolve_and_every_linear_is_covered(loaded: loaded_model.LoadedModel) -> None:
    arch = loaded.arch
    seen = set()
    for index in range(loaded.num_blocks):
        block = loaded.block(index)
        groups = arch.groups_of(block)
        seen.add(_numberless(groups))
        covered = {name for group in groups for name in group.linears}
        linears = {n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        assert covered == linears - set(arch.kept)
        modules = {n for n, m in block.named_modules() if hasattr(m, "weight")}
        for group in groups:
            assert bool(group.previous) == (group.kind != "none")
            block.get_submodule(group.previous)
            block.get_submodule(group.loss_module)
            assert set(group.readers) <= set(arch.kept) & modules
        assert all(loaded.source_name(index, f"{n}.weight") in loaded.source for n in covered)
    assert seen <= {_numberless(groups) for groups in arch.kinds}


def test_every_kind_of_block_is_in_a_tiny_model() -> None:
    from transformers import AutoModelForImageTextToText

    seen: dict[str, set[Any]] = {}
    for family, tiny in FAMILIES.items():
        arch = get_architecture(row_of(family))
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(tiny.config(make_tokenizer(tiny)))
        unfuse(model)
        blocks = model.get_submodule(arch.decoder).layers
        seen.setdefault(arch.name, set()).update(_numberless(arch.groups_of(b)) for b in blocks)
    for row in ARCHITECTURES.values():
        assert seen[row.name] == {_numberless(groups) for groups in row.kinds}, row.name


def test_left_alone_covers_the_rest_and_nothing_else(loaded: loaded_model.LoadedModel) -> None:
    alone = loaded.left_alone()

    def is_alone(name: str) -> bool:
        return any(name == a or name.startswith(a + ".") for a in alone)

    kept = [f".{name}." for name in loaded.arch.kept]
    blocks = tuple(loaded.source_name(index, "") for index in range(loaded.num_blocks))
    for name in loaded.source:
        inside = name.startswith(blocks)
        assert is_alone(name) != (inside and not any(k in name for k in kept)), name


@pytest.mark.parametrize("images", [1, 2])
def test_blocks_one_at_a_time_compute_the_model(
    directory: Path, loaded: loaded_model.LoadedModel, images: int
) -> None:
    """Masks, M-RoPE positions, deepstack: as the model itself makes them."""
    (batch,) = make_batches([_sample(images)], loaded.processor, loaded.image_token_id)
    assert int((batch.modality == 2).sum()) > 0
    with torch.no_grad():
        expected = _reference(directory)(**batch.inputs).logits
        inputs = loaded.block_inputs(batch.inputs)
        hidden = inputs.hidden
        for index in range(loaded.num_blocks):
            out = loaded.block(index)(hidden, **inputs.kwargs(index))
            hidden = out[0] if isinstance(out, tuple) else out
        got = loaded.logits(hidden[0])
    torch.testing.assert_close(got, expected[0], rtol=1e-4, atol=1e-4)


def test_folding_changes_logits_by_less_than_rounding(
    directory: Path, loaded: loaded_model.LoadedModel
) -> None:
    (batch,) = make_batches([_sample()], loaded.processor, loaded.image_token_id)
    reference = _reference(directory)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = reference(**batch.inputs).logits
        rounded = (
            copy.deepcopy(reference)
            .to(torch.bfloat16)(  # rounds buffers for good
                **{
                    k: v.to(torch.bfloat16) if v.is_floating_point() else v
                    for k, v in batch.inputs.items()
                }
            )
            .logits.float()
        )
        for block in reference.get_submodule(loaded.arch.decoder).layers:
            for group in loaded.groups(block):
                if group.kind == "none":
                    continue
                read = outputs(block, group)
                size = read.stop - read.start
                scales = torch.exp(torch.randn(size, generator=generator) * 0.7)
                fold(block, group, scales, torch.float32)
        after = reference(**batch.inputs).logits
    assert (after - before).abs().max() < 0.2 * (rounded - before).abs().max()


def test_published_names_load_as_the_same_model(directory: Path, family: str) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)

    tensors = load_file(directory / "model.safetensors")
    for name, parameter in model.named_parameters():
        stored = tensors.get(published_name(family, name))
        if stored is not None:  # a tied lm_head is not stored
            parameter = FAMILIES[family].stored(name, parameter)
            assert torch.equal(parameter, stored.float()), name


def test_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(
        UserError, match=r"'bert' .* gemma3, gemma4, gemma4_unified, glm4v, glm4v_moe"
    ):
        get_architecture("bert")


REFUSED = [(row.name, *field) for row in ARCHITECTURES.values() for field in row.refused]


@pytest.mark.parametrize(("family", "field", "what"), REFUSED, ids=str)
def test_members_of_a_family_that_are_refused(
    family: str, field: str, what: str, tmp_path: Path
) -> None:
    """By config.json alone, before a tensor is read."""
    directory = tiny_model(family, tmp_path / family)
    config = json.loads((directory / "config.json").read_text())
    values: dict[str, Any] = {"mlp_only_layers": [0], "use_bidirectional_attention": True}
    config["text_config"][field] = values.get(field, 1)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").unlink()
    said = rf"is a {family} model with {what} \({field} in config.json\), which is not supported"
    with pytest.raises(UserError, match=said):
        loaded_model.load(directory)


ASSUMED = [(row.name, *field) for row in ARCHITECTURES.values() for field in row.assumed]


@pytest.mark.parametrize(("family", "path", "value"), ASSUMED, ids=str)
def test_fields_that_vllm_alone_asks_for(
    family: str, path: str, value: Any, tmp_path: Path
) -> None:
    """Written as transformers computes; where the source has them otherwise, refused."""
    directory = tiny_model(family, tmp_path / family)
    part, _, name = path.rpartition(".")
    options = ["--calib", one_sample(tmp_path), "--method", "rtn", "--quiet"]
    assert main(["quantize", str(directory), "--output", str(tmp_path / "out"), *options]) == 0
    config, written = (
        json.loads((d / "config.json").read_text()) for d in (directory, tmp_path / "out")
    )
    assert name not in (config[part] if part else config)
    assert (written[part] if part else written)[name] is value
    (config[part] if part else config)[name] = not value
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{name} in config.json is .* which vLLM obeys"):
        loaded_model.load(directory)


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_described_at_the_top(tied: bool, tmp_path: Path) -> None:
    """As published; whether the head is tied is then read as the class has it by default."""
    directory = tiny_model("paddleocr_vl", tmp_path / "model", tie_word_embeddings=tied)
    config = json.loads((directory / "config.json").read_text())
    text = config.pop("text_config")
    flat = {**text, **config, "tie_word_embeddings": tied}
    (directory / "config.json").write_text(json.dumps(flat))
    if tied:
        tensors = load_file(directory / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        assert loaded_model.load(directory).num_blocks == text["num_hidden_layers"]
        return
    with pytest.raises(UserError, match='tie_word_embeddings is false.* under "text_config"'):
        loaded_model.load(directory)


@pytest.mark.parametrize("family", ["gemma4", "gemma4_moe"])
def test_experts_for_one_of_two_libraries(family: str, tmp_path: Path) -> None:
    """transformers makes experts where its configuration says, vLLM where their number is given."""
    directory = tiny_model(family, tmp_path / family)
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["num_experts"] = 8 if family == "gemma4" else None
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="transformers goes by the one, vLLM by the other"):
        loaded_model.load(directory)


def test_a_picture_has_as_many_tokens_as_the_model_wants(loaded: loaded_model.LoadedModel) -> None:
    sample = sample_from_parts("1", "all", Image.new("RGB", (30, 90)), "What?", "a star")
    (batch,) = make_batches([sample], loaded.processor, loaded.image_token_id)
    loaded.block_inputs(batch.inputs)  # raises where the numbers differ
