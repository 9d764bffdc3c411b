"""A Hugging Face model whose decoder blocks are read one at a time.

Everything before the first block (embeddings, vision tower, projector) is loaded once by
transformers; the blocks themselves are built and filled from the files when asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qig_serve import model_directory
from qig_serve.architectures import get_architecture
from qig_serve.errors import UserError
from qig_serve.experts import unfuse
from qig_serve.family_row import Architecture, SmoothingGroup
from qig_serve.offline.source.decoder_config import (
    check_block_count,
    check_decoder,
    check_positions,
)
from qig_serve.offline.source.experts import unfuse as unfuse_files
from qig_serve.offline.source.mlp_padding import MlpPadding
from qig_serve.offline.source.stand_ins import (
    AFTER,
    CACHE,
    LARGE,
    ONE_MODEL,
    BlockInputs,
    Catcher,
    add_after,
    computing,
    with_few_blocks,
)
from qig_serve.offline.source.surplus import (
    check_block,
    check_head,
    check_number_of_blocks,
    check_other_names,
    check_outside,
    no_blocks,
    outside_blocks,
)
from qig_serve.offline.source.tensors import SourceCheckpoint, check_values
from qig_serve.weight_files import check_full_precision, check_index

_LOGIT_BYTES = 128 << 20


def image_token_id(config: Any, processor: Any) -> int | None:
    """The token that stands for a piece of an image; None if neither names one."""
    for holder in (config, processor):
        for name in ("image_token_id", "image_token_index"):
            if isinstance(value := getattr(holder, name, None), int):
                return value
    return None


class LoadedModel:
    """A model directory, its blocks still on disk."""

    def __init__(
        self,
        directory: Path,
        arch: Architecture,
        config: Any,
        processor: Any,
        source: SourceCheckpoint,
        model: nn.Module,
        device: torch.device,
    ) -> None:
        self.directory = directory
        self.arch = arch
        self.config = config
        self.processor = processor
        self.source = source
        self.model = model
        self.device = device
        self.text_config = config.get_text_config()
        self.dtype: torch.dtype = model_directory.model_dtype(directory)
        self.eight_bit: list[str] = []
        """Output head and embedding, names in the files, where they are to be stored in 8 bits."""
        self.left_out: list[str] = []
        """Tensors of the files that the family's blocks do not read: they are not written."""
        self.mlp_padding: MlpPadding | None = None
        """Where the MLP is to be stored wider than it is."""
        self._calls: list[tuple[torch.Tensor, dict[str, Any]]] = []
        decoder = model.get_submodule(arch.decoder)
        self._block_class = type(decoder.layers[0])
        self.text_config._attn_implementation = "sdpa"
        types = getattr(self.text_config, "layer_types", None) or [None] * self.num_blocks
        names = list(inspect.signature(self._block_class.forward).parameters)[2:]
        decoder.layers = nn.ModuleList(Catcher(self._calls, kind, names) for kind in types)
        # Built with fewer blocks (see `load`); the loop over them reads these.
        decoder.config.num_hidden_layers = self.num_blocks
        if getattr(self.text_config, "layer_types", None) is not None:
            decoder.config.layer_types = list(self.text_config.layer_types)
        found = [p for p in arch.source_prefixes if any(n.startswith(p + "0.") for n in source)]
        if not found:
            raise no_blocks(source, arch.source_prefixes)
        self._prefix = found[0]
        unfuse_files(source, self._prefix, self.text_config)
        self._check_tokens()
        self._check_blocks()

    def _check_blocks(self) -> None:
        """UserError unless the files have the blocks that config.json asks for, and no more."""
        others = [p for p in self.arch.source_prefixes if p != self._prefix]
        check_other_names(self.source, others)
        check_number_of_blocks(self.source, self._prefix, self.num_blocks, self.blocks_behind)
        for index in range(self.num_blocks):
            known = set(self._empty_block(index).state_dict())
            for name in self.arch.unread:
                stored = self.source_name(index, name)
                if name not in known and stored in self.source:
                    self.source.leave_out(stored)
                    self.left_out.append(stored)
            check_block(self.source, f"{self._prefix}{index}.", known)

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return int(self.text_config.num_hidden_layers)

    @property
    def blocks_behind(self) -> int:
        """Blocks behind the last one that predict further tokens, as GLM-OCR's files may have them.

        They stay as they are.
        """
        return int(getattr(self.text_config, "num_nextn_predict_layers", None) or 0)

    @property
    def image_token_id(self) -> int | None:
        """The token that stands for a piece of an image."""
        return image_token_id(self.config, self.processor)

    @property
    def left_out_line(self) -> str:
        """Which tensors of the files are not written, for people; empty if all are."""
        if not self.left_out:
            return ""
        names = f"{self.left_out[0]} to {self.left_out[-1]}"
        return f"left out, as no block reads them: {len(self.left_out)} tensors, {names}"

    @property
    def source_prefix(self) -> str:
        """What stands before a block's number in the names of the files' tensors."""
        return self._prefix

    def source_name(self, index: int, name: str) -> str:
        """The tensor in the files behind parameter `name` of block `index`."""
        return f"{self._prefix}{index}.{name}"

    def groups(self, block: nn.Module) -> tuple[SmoothingGroup, ...]:
        """The smoothing groups of a block, in the order of execution."""
        return self.arch.groups_of(block)

    @property
    def has_experts(self) -> bool:
        """Whether blocks have experts: the last, as a family may begin with some that have none."""
        groups = self.groups(self.meta_block(self.num_blocks - 1))
        return any(group.expert is not None for group in groups)

    def linears(self, block: nn.Module) -> list[nn.Module]:
        """The linears of a block that are quantized, in the order of execution."""
        names = (name for group in self.groups(block) for name in group.linears)
        return [block.get_submodule(name) for name in names]

    def left_alone(self) -> list[str]:
        """Modules that stay in 16 bits: shortest names that cover all that is not quantized.

        Of the decoder blocks the linears alone, since norms are never quantized.
        """
        inside = (
            self.source_name(index, name)
            for index in range(self.num_blocks)
            for name in self.arch.kept
        )
        kept = [name for name in inside if f"{name}.weight" in self.source]
        outside = outside_blocks(self.source, self._prefix, self.num_blocks)
        return sorted([*(name for name in outside if name not in self.eight_bit), *kept])

    def block(self, index: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Block `index` with its weights, in `dtype` on the device, in eval mode."""
        block = self._empty_block(index)
        for name, empty in block.state_dict(keep_vars=True).items():
            source_name = self.source_name(index, name)
            tensor = self._stored(index, name)
            check_values(tensor, self.dtype, f"layer {index}: {source_name} in {self.directory}")
            value = tensor.to(self.device, dtype)
            if isinstance(empty, nn.Parameter):
                value = nn.Parameter(value, requires_grad=False)
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, value)
        left = [n for n, b in block.named_buffers() if b.is_meta]
        if left:
            raise UserError(f"{self.arch.name}: block buffer {left[0]} cannot be made")
        block.register_forward_hook(add_after, with_kwargs=True)
        return block.eval()

    def _stored(self, index: int, name: str) -> torch.Tensor:
        """Parameter `name` of block `index`, from the files."""
        return self.source.tensor(self.source_name(index, name))

    def meta_block(self, index: int) -> nn.Module:
        """Block `index` as its class has it, without weights."""
        with torch.device("meta"):
            block: nn.Module = self._block_class(self.text_config, layer_idx=index)
        unfuse(block)
        return block

    def _empty_block(self, index: int) -> nn.Module:
        """Block `index` on the meta device; UserError where the files do not have its tensors."""
        block = self.meta_block(index)
        for name, parameter in block.state_dict(keep_vars=True).items():
            source_name = self.source_name(index, name)
            if source_name not in self.source:
                raise UserError(
                    f"{self.directory} has no tensor {source_name}: the checkpoint is incomplete; "
                    "download it again"
                )
            if (shape := self.source.shape(source_name)) != tuple(parameter.shape):
                raise UserError(
                    f"{source_name} is {list(shape)} in {self.directory}, but config.json asks "
                    f"for {list(parameter.shape)}"
                )
        return block

    @torch.no_grad()
    def block_inputs(self, inputs: Mapping[str, torch.Tensor]) -> BlockInputs:
        """Runs all that comes before the decoder; [B, T] token ids and pixels in."""
        self._calls.clear()
        moved = {k: v.to(self.device) for k, v in inputs.items()}
        for name, value in moved.items():
            if value.is_floating_point():
                moved[name] = value.to(next(self.model.parameters()).dtype)
        with computing(self.directory):
            self.model(**moved, use_cache=False, logits_to_keep=1)
        calls = list(self._calls)
        self._calls.clear()
        if len(calls) != self.num_blocks:
            raise UserError(
                f"{self.arch.name}: the model called {len(calls)} of {self.num_blocks} blocks"
            )
        kwargs = [{k: v for k, v in call[1].items() if k not in CACHE} for call in calls]
        for i in range(len(calls) - 1):
            before, after = calls[i][0], calls[i + 1][0]
            if before is not after:  # a stand-in passes its input on, so the model added something
                kwargs[i][AFTER] = after - before
        for named in kwargs:
            named |= {n: named[n].to("cpu") for n in LARGE if named.get(n) is not None}
        return BlockInputs(calls[0][0], tuple(kwargs)).apart()

    def _check_tokens(self) -> None:
        """UserError for a token without a row in the embedding: vLLM would read beyond it."""
        rows = len(self.model.get_input_embeddings().weight)
        tokens = self.processor.tokenizer.get_vocab()
        token = max(tokens, key=tokens.__getitem__, default="")
        if tokens.get(token, 0) >= rows:
            raise UserError(
                f"{self.directory}: its tokenizer has the token {token!r} ({tokens[token]}), and "
                f"its embedding only {rows} rows: {ONE_MODEL}"
            )

    @property
    def is_tied(self) -> bool:
        """Whether output head and embedding are one table, whatever config.json says of it."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        return head.weight is embedding.weight

    @property
    def vocabulary(self) -> int:
        """Entries of the output head."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def rows_at_once(self) -> int:
        """Tokens whose fp32 logits are there at once, of each model."""
        return max(1, min(1024, _LOGIT_BYTES // (4 * self.vocabulary)))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, C] behind the last block -> logits [n, V], in full precision.

        By the model's own norm, head and what else it does to them; gradients pass.
        """
        last = self.model.get_submodule(self.arch.decoder).layers[-1]
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        last.instead = hidden[None]
        try:
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            last.instead = None
            self._calls.clear()
        return logits


def quantizable_config(directory: Path) -> Any:
    """The Hugging Face configuration of a model that can be quantized; UserError for others."""
    raw = model_directory.read_config(directory)
    check_full_precision(directory)
    check_block_count(raw, directory / model_directory.CONFIG_FILE)
    # Before transformers, whose message is about remote code.
    get_architecture(model_directory.read_model_type(directory))
    return model_directory.load_config(directory)


def load(directory: Path | str, device: torch.device | str = "cpu") -> LoadedModel:
    """Opens a model directory; computes in fp32. UserError says what is wrong with it."""
    directory, device = Path(directory), torch.device(device)
    config = quantizable_config(directory)
    arch = get_architecture(config.model_type)
    check_decoder(directory, arch, config)
    source = SourceCheckpoint(directory)
    source.check_full_precision()
    check_index(directory)
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    source.rename(lambda name: arch.served_name(name, tower))
    processor = model_directory.load_processor(directory)

    model, info = load_front(directory, config)
    rotary = getattr(model.get_submodule(arch.decoder), "rotary_emb", None)
    check_positions(directory, rotary, config)
    model = model.to(device).eval().requires_grad_(False)
    loaded = LoadedModel(directory, arch, config, processor, source, model, device)
    _check_architecture(directory, type(model).__name__)
    check_head(source, loaded.source_prefix, model_directory.read_config(directory))
    _check_loaded(loaded, info)
    return loaded


def _check_architecture(directory: Path, class_name: str) -> None:
    """UserError unless config.json names the class, by which vLLM finds its own."""
    named = model_directory.read_config(directory).get("architectures")
    if named != [class_name]:
        raise UserError(
            f'{directory / model_directory.CONFIG_FILE}: "architectures" is {named!r}, by which '
            f'vLLM chooses the model: write ["{class_name}"] there'
        )


def load_front(directory: Path, config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """All before the decoder's blocks, and the fewest of those, in fp32; what did not fit."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the blocks left out are reported as unexpected tensors
    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            directory,
            config=with_few_blocks(config),
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:
        raise model_directory.cannot_be_loaded(directory, error) from None
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
    return model, info


def _check_loaded(loaded: LoadedModel, info: Mapping[str, Any]) -> None:
    """Refuses what transformers would have filled with random numbers, and damaged tensors.

    Of all but the decoder blocks, which have been looked at by then.
    """
    inside = (loaded.source_prefix, f"{loaded.arch.decoder}.layers.")
    mismatched = [found for found in info["mismatched_keys"] if not found[0].startswith(inside)]
    if mismatched:
        name, stored, wanted = sorted(mismatched)[0]
        raise UserError(
            f"{name} is {list(stored)} in {loaded.directory}, but config.json asks for "
            f"{list(wanted)}"
        )
    check_outside(loaded.source, (n for n in info["unexpected_keys"] if not n.startswith(inside)))
    if missing := [name for name in info["missing_keys"] if not name.startswith(inside)]:
        raise UserError(
            f"{loaded.directory} has no tensor for {sorted(missing)[0]}: the "
            "checkpoint is incomplete; download it again"
        )
    for name, parameter in loaded.model.named_parameters():
        check_values(parameter, loaded.dtype, f"{name} in {loaded.directory}")
