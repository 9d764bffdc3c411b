"""Importance from the gradient of the answer loss: one backward pass of the whole model.

Needed by the token weights `gradient` and `modality` (MBQ, arXiv 2412.19509), and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qig_serve.errors import UserError
from qig_serve.experts import unfuse
from qig_serve.offline.calibration.batches import MODALITIES, CalibrationBatch
from qig_serve.offline.passes.capture import first_output
from qig_serve.offline.processes import ALONE, Ranks
from qig_serve.offline.source.loaded_model import LoadedModel


@dataclass
class AnswerGradients:
    """|dL/dy| of the answer loss L at the outputs y of modules: mean over channels."""

    magnitude: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    """"{block}.{module in the block}" -> batch index -> [B, T] on the host."""

    def of(self, block: int, module: str) -> dict[int, torch.Tensor]:
        """The magnitudes at one module of one block, by batch index."""
        return self.magnitude.get(f"{block}.{module}", {})


def answer_loss(logits: torch.Tensor, ids: torch.Tensor, answer_mask: torch.Tensor) -> torch.Tensor:
    """Sum over answer tokens of their negative log-likelihood.

    logits [B, T, V]; ids [B, T]; answer_mask [B, T] is True at the answers' own positions, each
    predicted from the position before.
    """
    wanted = answer_mask[:, 1:]
    return nn.functional.cross_entropy(
        logits[:, :-1][wanted].float(), ids[:, 1:][wanted], reduction="sum"
    )


def model_gradients(
    loaded: LoadedModel, batches: Sequence[CalibrationBatch], ranks: Ranks
) -> AnswerGradients:
    """Gradients at every group's loss module: loads the whole model, which nothing else does."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours shows the progress
    model = AutoModelForImageTextToText.from_pretrained(
        loaded.directory, dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
    )
    model = model.to(loaded.device).eval()

    def forward(b: int) -> torch.Tensor:
        inputs = {k: v.to(loaded.device) for k, v in batches[b].inputs.items()}
        return model(**inputs, use_cache=False).logits

    layers = list(model.get_submodule(loaded.arch.decoder).layers)
    unfuse(model)
    modules = [
        sorted({group.loss_module for group in loaded.groups(layer) if group.expert is None})
        for layer in layers
    ]
    return answer_gradients(model, forward, batches, layers, modules, ranks)


def answer_gradients(
    model: nn.Module,
    forward: Callable[[int], torch.Tensor],
    batches: Sequence[CalibrationBatch],
    layers: Sequence[nn.Module],
    modules: Sequence[Sequence[str]],
    ranks: Ranks = ALONE,
) -> AnswerGradients:
    """One backward pass of the whole model for each batch.

    `forward(b)` gives the logits [B, T, V] of batch b; `layers` are the decoder blocks and
    `modules` names inside each at whose outputs gradients are taken, kept as "{block}.{name}".
    UserError when no batch of any process has an answer.
    """
    if not any(ranks.total(sum(int(batch.answer_mask.sum()) for batch in batches))):
        raise UserError(
            "these token weights come from the gradient of the answer loss, but no calibration "
            "sample has an answer: use another method, or data with answers"
        )
    result = AnswerGradients()
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            outputs[name] = first_output(output)

        return hook

    def require_grad(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Parameters need no gradient: the graph starts at the first block's input.
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        hidden = kwargs["hidden_states"].detach().requires_grad_()
        return args, {**kwargs, "hidden_states": hidden}

    handles = [layers[0].register_forward_pre_hook(require_grad, with_kwargs=True)]
    for index, layer in enumerate(layers):
        for name in modules[index]:
            hook = keep(f"{index}.{name}")
            handles.append(layer.get_submodule(name).register_forward_hook(hook))
    model.requires_grad_(False)
    try:
        for b, batch in enumerate(batches):
            if not bool(batch.answer_mask.any()):
                continue
            outputs.clear()
            with torch.enable_grad():
                logits = forward(b)
                ids = batch.inputs["input_ids"].to(logits.device)
                loss = answer_loss(logits, ids, batch.answer_mask.to(logits.device))
                names = list(outputs)
                gradients = torch.autograd.grad(loss, [outputs[n] for n in names])
            for name, gradient in zip(names, gradients, strict=True):
                mean = gradient.float().abs().mean(-1).cpu()
                # Of tokens laid end to end too, as a shared expert gets them.
                result.magnitude.setdefault(name, {})[b] = mean.reshape(batch.token_mask.shape)
    finally:
        for handle in handles:
            handle.remove()
    return result


def modality_means(
    magnitude: dict[int, torch.Tensor],
    batches: Sequence[CalibrationBatch],
    ranks: Ranks = ALONE,
) -> dict[int, float]:
    """Mean gradient magnitude of each modality's real tokens over the samples of all processes.

    Modality code -> mean; a modality without tokens is absent.
    """
    means = {}
    for code in MODALITIES.values():
        total, count = 0.0, 0.0
        for b, values in magnitude.items():
            batch = batches[b]
            mask = (batch.token_mask & (batch.modality == code)).cpu()
            total += float(values[mask].double().sum())
            count += int(mask.sum())
        total, count = ranks.total(total, count)
        if count:
            means[code] = total / count
    return means


def modality_importance(
    means: dict[int, float], modality: torch.Tensor, token_mask: torch.Tensor
) -> torch.Tensor:
    """MBQ's weights: every real token gets the mean of its modality; [B, T]."""
    importance = torch.zeros(token_mask.shape, device=token_mask.device)
    for code, mean in means.items():
        importance = torch.where((modality == code) & token_mask, mean, importance)
    return importance
