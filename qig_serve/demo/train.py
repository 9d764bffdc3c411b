"""Trains a demonstration model from nothing: `python -m qig_serve.demo.train --out DIR`.

The schedule goes by time, not by steps: it decays to zero when the minutes are spent, on whatever
machine. First the vision tower learns what stands in each cell; then the whole model learns to
answer, with the cells' labels as a second loss. Weights are bf16 with float32 masters, or float32
on a processor without bf16 products (much slower there). On a CPU two single-thread processes
share a step: one process with two threads is several times slower.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from qig_serve.demo.batches import Encoder, answer_logits, make_batch, to_pixels
from qig_serve.demo.families import get_family
from qig_serve.demo.measure import answers_right, by_type
from qig_serve.demo.model import (
    MODELS,
    get_spec,
    load_model,
    make_model,
    make_processor,
    save_model,
    to_bfloat16,
    train_tokenizer,
)
from qig_serve.demo.outliers import Outliers, add_outliers
from qig_serve.demo.pictures import LABEL_CLASSES, cell_labels
from qig_serve.demo.questions import make_lesson, samples
from qig_serve.demo.warm_start import THE_BUNDLED, start_from
from qig_serve.errors import UserError
from qig_serve.kernels.cpu_w8a16 import multiplies_bf16
from qig_serve.model_directory import read_config

VISION_SEED, LESSON_SEED, CORPUS_SEED = 1, 0, 2  # draws of the training split
CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Settings:
    """How to train. The defaults made the bundled model."""

    minutes: float = 65.0
    processes: int = 2
    pictures: int = 24  # per step, over all processes
    vision_pictures: int = 64
    vision_share: float = 0.05  # of the time
    warmup_share: float = 0.015
    rate: float = 1.5e-3
    vision_rate: float = 1.5e-3
    decay: float = 0.05
    cell_loss: float = 0.2
    report_seconds: float = 180.0
    dev_samples: int = 320
    model: str = "llava"
    start_from: str | None = None  # a model directory, or warm_start.THE_BUNDLED


def corpus() -> Iterator[str]:
    """Text to train the tokenizer on: questions and answers of the training split, and roles."""
    for index in range(3000):
        for _, question, answer in make_lesson(index, CORPUS_SEED).questions:
            yield question
            yield answer
    for role in ("user", "assistant", "system"):
        yield from [f"{role}\n"] * 100


class MasterAdamW:
    """AdamW on float32 masters of bf16 (or float32) parameters, all of one dtype; parameters and
    gradients are views of flat tensors."""

    def __init__(self, named: list[tuple[str, torch.nn.Parameter]], decay: float) -> None:
        self._groups = []
        for decayed in (True, False):
            chosen = [p for name, p in named if (p.dim() > 1 and "embed" not in name) == decayed]
            flat = torch.cat([p.detach().float().flatten() for p in chosen])
            weight = flat.to(chosen[0].dtype, copy=True)
            grad = torch.zeros_like(weight)
            start = 0
            for p in chosen:
                p.data = weight[start : start + p.numel()].view_as(p)
                p.grad = grad[start : start + p.numel()].view_as(p)
                start += p.numel()
            self._groups.append((torch.nn.Parameter(flat), weight, grad))
        self._adam = torch.optim.AdamW(
            [
                {"params": [self._groups[0][0]], "weight_decay": decay},
                {"params": [self._groups[1][0]], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            fused=True,
        )

    def step(self, rate: float, processes: int) -> float:
        """Averages the gradients over the processes, clips, updates; returns their norm."""
        grads = []
        for _, _, grad in self._groups:
            summed = grad.float()
            if processes > 1:
                dist.all_reduce(summed)
            grads.append(summed.div_(processes))
        norm = float(torch.stack([g.norm() for g in grads]).norm())
        for (master, _, _), summed in zip(self._groups, grads, strict=True):
            master.grad = summed.mul_(min(1.0, 1.0 / (norm + 1e-6)))
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        for master, weight, grad in self._groups:
            weight.copy_(master.detach())
            grad.zero_()
        return norm

    def state(self) -> dict[str, Any]:
        return {"masters": [g[0].detach() for g in self._groups], "adam": self._adam.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for (master, weight, _), saved in zip(self._groups, state["masters"], strict=True):
                master.copy_(saved)
                weight.copy_(saved)
        self._adam.load_state_dict(state["adam"])


def save_whole(state: dict[str, Any], path: Path) -> None:
    """Writes a training's state, whole or not at all."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def loss_of_cells(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the cells' labels, [B, 36, sum(classes)] against [B, 36, 7]."""
    occupied = labels[..., :5].any(-1)
    weight = torch.where(occupied, 1.0, 0.1).flatten()  # most cells are empty
    total = torch.zeros((), device=scores.device)
    for part, label in zip(scores.float().split(LABEL_CLASSES, -1), labels.unbind(-1), strict=True):
        loss = F.cross_entropy(part.flatten(0, 1), label.flatten(), reduction="none")
        total = total + (loss * weight).sum() / weight.sum()
    return total


def learning_rate(settings: Settings, elapsed: float) -> tuple[float, bool]:
    """(rate, whether this is still the vision phase) after so many seconds."""
    total = settings.minutes * 60
    vision, warm = settings.vision_share * total, settings.warmup_share * total
    if elapsed < vision:
        return settings.vision_rate * min(1.0, elapsed / (0.1 * vision)), True
    since, left = elapsed - vision, max(total - elapsed, 0.0)
    return settings.rate * min(since / warm, left / (total - vision - warm), 1.0), False


def _print_progress(
    elapsed: float, step: int, sums: torch.Tensor, scores: dict[str, float]
) -> None:
    """sums [3]: answer loss, cell loss, and the steps that they are sums of."""
    answer, cell = (sums[:2] / sums[2].clamp(min=1)).tolist()
    print(
        f"{elapsed / 60:5.1f} min  step {step}  answer loss {answer:.4f}  "
        f"cell loss {cell:.4f}  exact match "
        + " ".join(f"{kind} {100 * score:.1f}" for kind, score in scores.items()),
        flush=True,
    )


def _answer_loss(
    model: Any, encoder: Encoder, lessons: list[Any], device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted loss on answer tokens, and the image tokens [B, tokens, hidden]."""
    pixels, questions = [x.pixels for x in lessons], [x.questions for x in lessons]
    batch = make_batch(encoder, pixels, questions, model.dtype).to(device)
    logits, image = answer_logits(model, batch, encoder.before_image)
    losses = F.cross_entropy(logits.float(), batch.target, reduction="none")
    return (losses * batch.weight).sum() / batch.weight.sum(), image


def _optimizer(model: Any, cells: torch.nn.Linear, settings: Settings, unused: Any) -> MasterAdamW:
    """Of everything that is trained; both modules become bf16 where products in it are fast."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(unused))
    named = [*model.named_parameters(), *cells.named_parameters(prefix="cells")]
    if cells.weight.is_cuda or multiplies_bf16():
        to_bfloat16(model)
        to_bfloat16(cells)
    return MasterAdamW([(n, p) for n, p in named if p.requires_grad], settings.decay)


def _worker(rank: int, settings: Settings, out: str, resume: bool, port: int) -> None:
    torch.set_num_threads(1)
    world = settings.processes
    if world > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(out)
    checkpoint = folder / CHECKPOINT
    spec = get_spec(settings.model)
    family = get_family(spec.family)
    # Deterministic: the same in each process.
    tokenizer = train_tokenizer(corpus(), spec.vocab_size, spec.family)
    processor = make_processor(spec, tokenizer)
    encoder = Encoder(tokenizer, spec.family)
    model = make_model(spec, tokenizer)
    if settings.start_from:
        start_from(model, tokenizer, settings.start_from, spec.sink_channel)
    model = model.to(device)
    cells = torch.nn.Linear(spec.hidden, sum(LABEL_CLASSES)).to(device)
    optimizer = _optimizer(model, cells, settings, family.unused)
    if device == "cpu":
        model.set_attn_implementation("eager")  # a fifth faster: fused attention's backward is slow
    step, seen, before = 0, [0, 0], 0.0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        optimizer.load(state["optimizer"])
        step, seen, before = state["step"], state["seen"], state["elapsed"]
    dev = list(samples("dev", settings.dev_samples))
    start = time.monotonic()
    reported = before
    sums = torch.zeros(3)  # answer loss, cell loss, steps
    while True:
        clock = torch.tensor([before + time.monotonic() - start])
        if world > 1:
            dist.broadcast(clock, 0)
        elapsed = float(clock)
        done = elapsed >= settings.minutes * 60
        if done or elapsed - reported > settings.report_seconds:
            if rank == 0:
                scores = by_type(dev, answers_right(model, encoder, dev, device))
                _print_progress(elapsed, step, sums, scores)
                state = {
                    "optimizer": optimizer.state(),
                    "step": step,
                    "seen": seen,
                    "elapsed": elapsed,
                }
                save_whole(state, checkpoint)
                save_model(model, processor, folder / "plain")
            sums.zero_()
            reported = elapsed
            if done:
                break
        rate, vision = learning_rate(settings, elapsed)
        each = (settings.vision_pictures if vision else settings.pictures) // world
        seed = VISION_SEED if vision else LESSON_SEED
        first = seen[vision]
        lessons = [make_lesson(first + rank * each + i, seed, plain=vision) for i in range(each)]
        seen[vision] += each * world
        labels = torch.from_numpy(np.stack([cell_labels(x.scene) for x in lessons])).to(device)
        if vision:
            pixels = to_pixels(x.pixels for x in lessons).to(device, model.dtype)
            answer_loss = torch.zeros(())
            loss = cell_loss = loss_of_cells(cells(family.image_tokens(model, pixels)), labels)
        else:
            answer_loss, image = _answer_loss(model, encoder, lessons, device)
            cell_loss = loss_of_cells(cells(image), labels)
            loss = answer_loss + settings.cell_loss * cell_loss
        loss.backward()
        optimizer.step(rate, world)
        step += 1
        sums += torch.tensor([float(answer_loss.detach()), float(cell_loss.detach()), 1.0])
        if step % 50 == 0 and rank == 0 and elapsed < 120:
            print(f"{elapsed:.0f} s  step {step}  loss {float(loss.detach()):.4f}", flush=True)
    if world > 1:
        dist.destroy_process_group()


def export(folder: Path | str, model_name: str, outliers: Outliers | None = None) -> Path:
    """Puts the channel outliers into the last plain model of a training folder."""
    folder = Path(folder)
    model, processor = load_model(folder / "plain")
    add_outliers(model, outliers or Outliers(), keep=(get_spec(model_name).sink_channel,))
    save_model(model, processor, folder / "model")
    return folder / "model"


def train(
    out: Path | str,
    minutes: float = Settings.minutes,
    processes: int = Settings.processes,
    resume: bool = False,
    model: str = Settings.model,
    **options: Any,
) -> Path:
    """Trains a model and returns its folder; OUT/plain is the same model without outliers.

    `options` are further fields of Settings. With `resume` it goes on from the last checkpoint, or
    begins where there is none. UserError for settings that nothing can be trained with, and for a
    folder that holds another training.
    """
    folder = Path(out)
    if not 0 < minutes < math.inf or processes < 1:
        raise UserError("a training takes more than 0 minutes and at least 1 process")
    if model not in MODELS:
        raise UserError(f"no demonstration model {model!r}: the models are {', '.join(MODELS)}")
    if options.get("start_from") not in (None, THE_BUNDLED):
        read_config(Path(options["start_from"]))
    if (folder / CHECKPOINT).exists() and not resume:
        raise UserError(f"{folder} holds a training: go on with --resume, or name a new directory")
    folder.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        processes = 1
    settings = Settings(minutes=minutes, processes=processes, model=model, **options)
    if processes == 1:
        _worker(0, settings, str(folder), resume, 0)
    else:
        # Threads that spin while they wait take the core from the other process.
        os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = (settings, str(folder), resume, port)
        torch.multiprocessing.spawn(_worker, arguments, nprocs=processes)
    return export(folder, model)


def main() -> None:
    """Command line of the training program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder for checkpoints and the model")
    parser.add_argument("--minutes", type=float, default=Settings.minutes)
    parser.add_argument("--processes", type=int, default=Settings.processes)
    parser.add_argument("--model", default=Settings.model)
    parser.add_argument("--report-seconds", type=float, default=Settings.report_seconds)
    parser.add_argument("--start-from", metavar="DIR", help="begin with this model's decoder")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument(
        "--export-only", action="store_true", help="only make the model of the last report"
    )
    args = parser.parse_args()
    if args.export_only:
        print(f"model written to {export(args.out, args.model)}")
        return
    folder = train(
        args.out,
        args.minutes,
        args.processes,
        args.resume,
        args.model,
        report_seconds=args.report_seconds,
        start_from=args.start_from,
    )
    print(f"model written to {folder}")


if __name__ == "__main__":
    main()
