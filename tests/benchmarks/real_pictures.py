"""Pictures for the real decoder: trains a vision tower beside Gemma 3 270M until it answers.

    python tests/benchmarks/real_decoder.py --out real
    python tests/benchmarks/real_pictures.py --decoder real --out real-pictures
    qig-serve compare real-pictures/model --methods rtn,gptq,qig+ --calib demo --samples 64 \\
        --data demo --n 400 --kl-samples 400 --engine none

The pictures and questions are the demonstration models', the template is Gemma's own. By time: the
tower and the projector learn what stands in each cell, as the sum of embeddings of words that say
it; then to answer, before a decoder that is frozen; then all learns but the embedding, with
documentation texts in between, so that the decoder stays what it was trained to be. Two processes
of one thread share a step (see demo/train.py). Every five minutes the state is kept (1.2 GB): what
was killed goes on from there with the same --out. As with the decoder: use the directory, do not
pass it on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from qig_serve.demo.batches import Batch, Encoder, make_batch, one_axis, to_pixels
from qig_serve.demo.family_row import IMAGE_TOKENS
from qig_serve.demo.measure import by_type
from qig_serve.demo.model import to_bfloat16
from qig_serve.demo.pictures import (
    CELL,
    COLORS,
    GRID,
    IMAGE_SIZE,
    LABEL_CLASSES,
    LETTERS,
    SHAPES,
    SIZES,
    cell_labels,
)
from qig_serve.demo.questions import Question, make_lesson, samples
from qig_serve.demo.train import (
    CHECKPOINT,
    LESSON_SEED,
    VISION_SEED,
    MasterAdamW,
    loss_of_cells,
    save_whole,
)

sys.path.insert(0, str(Path(__file__).parent))
from real_decoder import configuration

END = "<end_of_turn>"
TURN = END + "\n<start_of_turn>model\n"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] in ['image', 'image_url'] %}{{ '<start_of_image>' }}"
    "{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TOWER_SHARE, FROZEN_SHARE = 0.1, 0.2  # of the time, behind one another
TOWER_RATE, JOINT_RATE, DECODER_RATE = 1.5e-3, 5e-4, 3e-4
TOWER_PICTURES, PICTURES = 32, 4  # of a step and process
CELL_WEIGHT, WORD_WEIGHT, TEXT_EVERY = 0.2, 3.0, 4
DEV = 160
SAVE_SECONDS = 300.0
OTHERS = 4096  # tokens of the vocabulary, drawn anew, beside those that answers have


@dataclass(frozen=True)
class Settings:
    """What a run is made of."""

    decoder: Path
    out: Path
    minutes: float
    report_seconds: float
    processes: int
    port: int


class GemmaEncoder(Encoder):
    """The demonstration models' encoder with Gemma's own template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._cache = {}
        soft = "<image_soft_token>" * IMAGE_TOKENS
        before = "<bos><start_of_turn>user\n\n\n<start_of_image>"
        self.before_image = len(self._encode(before))
        self.prefix = self._encode(f"{before}{soft}<end_of_image>\n\n")
        self.positions = one_axis(0, len(self.prefix))
        self.next_position = len(self.prefix)
        self.pad = int(tokenizer.pad_token_id)

    def question(self, text: str) -> list[int]:
        """What follows the image up to the answer."""
        return self._cached(text + TURN)

    def answer(self, text: str) -> list[int]:
        """The answer with the token that ends it."""
        return self._cached(text + END)


def make_model(decoder: Path) -> tuple[Any, Any]:
    """(model with an untrained tower, processor)."""
    from safetensors.torch import load_file
    from transformers import (
        AutoTokenizer,
        Gemma3ForConditionalGeneration,
        Gemma3Processor,
        SiglipVisionConfig,
    )
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(decoder / "model", eos_token=END)
    state = load_file(decoder / "model" / "model.safetensors")
    prefix = next(n for n in state if n.endswith("embed_tokens.weight")).removesuffix(
        "embed_tokens.weight"
    )
    state = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    config = configuration(tokenizer, len(state["embed_tokens.weight"]))
    config.vision_config = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=CELL,
        vision_use_head=False,
    )
    config.mm_tokens_per_image = IMAGE_TOKENS
    config.dtype = "bfloat16"
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(state)
    embedding = model.get_input_embeddings().weight
    # As large as the words beside it, whose embedding is multiplied by the root of its width.
    size = float(embedding[: 1 << 15].detach().square().mean().sqrt()) * embedding.shape[1] ** 0.5
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projection, std=size / projection.shape[0] ** 0.5)
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids(END)]
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = Gemma3ImageProcessorPil(size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = Gemma3Processor(
        images, tokenizer, chat_template=TEMPLATE, image_seq_length=IMAGE_TOKENS
    )
    to_bfloat16(model)
    return model, processor


def image_tokens(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, 144, 144] -> [B, 36, hidden]."""
    inner = model.model
    return inner.multi_modal_projector(inner.vision_tower(pixel_values=pixels).last_hidden_state)


def word_table(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """For each column of `cell_labels`, embeddings [classes, hidden] of the words for it."""
    numbers = [" one", " two", " three", " four", " five", " six"]
    words = [
        [".", *(f" {s}" for s in SIZES)],
        ["", *(f" {c}" for c in COLORS)],
        ["", *(f" {s}" for s in SHAPES)],
        ["", *map(str, range(10))],
        ["", *LETTERS],
        [str(i + 1) for i in range(GRID)],  # the row
        numbers[:GRID],  # the column
    ]
    embed = model.get_input_embeddings()

    def states(word: str) -> torch.Tensor:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"] if word else []
        return embed(torch.tensor(ids)).sum(0) if ids else torch.zeros(embed.weight.shape[1])

    return [torch.stack([states(w).float() for w in column]).detach() for column in words]


def word_loss(image: torch.Tensor, labels: torch.Tensor, table: list[torch.Tensor]) -> torch.Tensor:
    """Squared error of image tokens [B, 36, hidden] to the words for their cells, to their size."""
    wanted = sum(t[labels[..., i]] for i, t in enumerate(table))
    assert isinstance(wanted, torch.Tensor)
    error = (image.float() - wanted / 2).square().sum(-1) / (wanted / 2).square().sum(-1)
    weight = torch.where(labels[..., :5].any(-1), 1.0, 0.1)
    return (error * weight).sum() / weight.sum()


def decode(model: Any, batch: Batch, image: torch.Tensor, before_image: int) -> torch.Tensor:
    """Final states [T, hidden] where answer tokens are predicted; a picture sees all of itself."""
    text = model.get_input_embeddings()(batch.ids)
    after = before_image + IMAGE_TOKENS
    embeds = torch.cat([text[:, :before_image], image, text[:, after:]], dim=1)
    mask = batch.mask.clone()
    mask[:, :, before_image:after, before_image:after] = 0
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask={"full_attention": mask, "sliding_attention": mask},
        position_ids=batch.positions[0],
        use_cache=False,
    ).last_hidden_state
    return hidden.flatten(0, 1)[batch.where]


@torch.no_grad()
def answers_right(model: Any, encoder: Encoder, asked: list[Question]) -> list[bool]:
    """Whether greedy decoding would answer each sample exactly (teacher-forced)."""
    right: list[bool] = []
    for start in range(0, len(asked), 20):
        part = asked[start : start + 20]
        batch = make_batch(
            encoder,
            [np.asarray(s.image) for s in part],
            [[(s.type, s.question, s.answer)] for s in part],
            model.dtype,
        )
        states = decode(model, batch, image_tokens(model, batch.pixels), encoder.before_image)
        missed = set(batch.question[model.lm_head(states).argmax(-1) != batch.target].tolist())
        right += [i not in missed for i in range(len(part))]
    return right


def text_pieces(path: Path, tokenizer: Any) -> list[torch.Tensor]:
    """Token ids [T] of documentation texts."""
    pieces = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        text = record["messages"][0]["content"][0]["text"] + record["answer"]
        pieces.append(torch.tensor([tokenizer.bos_token_id, *tokenizer(text).input_ids[1:256]]))
    return pieces


def text_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a text's tokens."""
    hidden = model.model.language_model(input_ids=ids[None], use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden[0, :-1]).float(), ids[1:])


def candidates(answers: torch.Tensor, target: torch.Tensor, rows: int) -> torch.Tensor:
    """Sorted token ids that a step's answers are told from: those of answers, and some others."""
    return torch.cat([answers, target, torch.randint(0, rows, (OTHERS,))]).unique()


def rates(settings: Settings, elapsed: float) -> tuple[str, float, float]:
    """(phase, rate of tower and projector, rate of the decoder) after so many seconds."""
    share = elapsed / (settings.minutes * 60)
    if share < TOWER_SHARE:
        return "tower", TOWER_RATE * min(1.0, share / TOWER_SHARE * 5), 0.0
    if share < FROZEN_SHARE:
        return "frozen", TOWER_RATE * min(1.0, (share - TOWER_SHARE) / FROZEN_SHARE * 10), 0.0
    left = max(1 - share, 0.0) / (1 - FROZEN_SHARE)
    warm = min(1.0, (share - FROZEN_SHARE) * 20)
    return "all", JOINT_RATE * left, DECODER_RATE * min(warm, left)


def save_state(
    settings: Settings, step: int, elapsed: float, tower: MasterAdamW, language: MasterAdamW
) -> None:
    """By all processes: what `load_state` goes on from. Data are drawn by the step's number."""
    drawn: list[Any] = [None] * settings.processes
    dist.all_gather_object(drawn, torch.get_rng_state())
    if dist.get_rank() == 0:
        state = {"step": step, "elapsed": elapsed, "drawn": drawn, "minutes": settings.minutes}
        state |= {"tower": tower.state(), "language": language.state()}
        save_whole(state, settings.out / CHECKPOINT)


def load_state(
    settings: Settings, rank: int, tower: MasterAdamW, language: MasterAdamW
) -> tuple[int, float]:
    """(step, seconds used) of the state in `settings.out`, into the optimizers and their weights;
    zeros where there is none."""
    path = settings.out / CHECKPOINT
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    tower.load(state["tower"])
    language.load(state["language"])
    torch.set_rng_state(state["drawn"][rank])
    return state["step"], state["elapsed"]


def check_state(settings: Settings) -> None:
    """SystemExit for a folder that holds a training of other minutes or processes."""
    path = settings.out / CHECKPOINT
    if not path.exists():
        return
    state = torch.load(path, weights_only=True, mmap=True)
    minutes, processes = state["minutes"], len(state["drawn"])
    if (minutes, processes) != (settings.minutes, settings.processes):
        raise SystemExit(
            f"{settings.out} holds a training of --minutes {minutes:g} --processes {processes}: "
            "go on with these, or name another --out"
        )


def worker(rank: int, settings: Settings) -> None:
    torch.set_num_threads(1)
    world = settings.processes
    address = f"tcp://127.0.0.1:{settings.port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    model, processor = make_model(settings.decoder)
    model.set_attn_implementation("eager")
    encoder = GemmaEncoder(processor.tokenizer)
    texts = text_pieces(settings.decoder / "calibration.jsonl", processor.tokenizer)
    random.Random(rank).shuffle(texts)
    torch.manual_seed(rank)
    lessons = (make_lesson(i, LESSON_SEED + 1) for i in range(1000))
    words = [i for x in lessons for _, _, reply in x.questions for i in encoder.answer(reply)]
    answers = torch.tensor(words).unique()
    table = word_table(model, processor.tokenizer)
    cells = torch.nn.Linear(model.config.text_config.hidden_size, sum(LABEL_CLASSES))
    to_bfloat16(cells)
    embedding = model.get_input_embeddings().weight.requires_grad_(False)
    decoder = [(n, p) for n, p in model.named_parameters() if ".language_model.layers." in n]
    decoder += [(n, p) for n, p in model.named_parameters() if "language_model.norm" in n]
    names = {n for n, _ in decoder}
    others = [(n, p) for n, p in model.named_parameters() if n not in names and p.requires_grad]
    tower = MasterAdamW([*others, *cells.named_parameters(prefix="cells")], 0.05)
    language = MasterAdamW(decoder, 0.0)
    dev = list(samples("dev", DEV))[rank::world]
    step, before = load_state(settings, rank, tower, language)
    start, reported, saved = time.monotonic() - before, before, before
    sums, text_sum = torch.zeros(3), torch.zeros(2)
    while True:
        clock = torch.tensor([time.monotonic() - start])
        dist.broadcast(clock, 0)
        elapsed = float(clock)
        done = elapsed >= settings.minutes * 60
        phase, tower_rate, decoder_rate = rates(settings, elapsed)
        if done or elapsed - saved > SAVE_SECONDS:
            saved = elapsed
            save_state(settings, step, elapsed, tower, language)
        if done or elapsed - reported > settings.report_seconds:
            reported = elapsed
            right = answers_right(model, encoder, dev)
            both: list[Any] = [None] * world
            dist.all_gather_object(both, right)
            if rank == 0:
                order = [q for r in range(world) for q in list(samples("dev", DEV))[r::world]]
                scores = by_type(order, [hit for part in both for hit in part])
                mean = (sums[:2] / sums[2].clamp(min=1)).tolist()
                text = float(text_sum[0] / text_sum[1].clamp(min=1))
                print(
                    f"{elapsed / 60:5.1f} min  {phase} step {step}  answer {mean[0]:.4f}  "
                    f"cell {mean[1]:.4f}  text {text:.3f}  exact match "
                    + " ".join(f"{kind} {100 * s:.1f}" for kind, s in scores.items()),
                    flush=True,
                )
                model.save_pretrained(settings.out / "model")
                processor.save_pretrained(settings.out / "model")
            sums.zero_()
            text_sum.zero_()
            if done:
                break
        for _, parameter in decoder:
            parameter.requires_grad_(phase == "all")
        plain = phase == "tower"
        each = TOWER_PICTURES if plain else PICTURES
        first = (step * world + rank) * each
        seed = VISION_SEED if plain else LESSON_SEED
        lessons_now = [make_lesson(first + i, seed, plain=plain) for i in range(each)]
        labels = torch.from_numpy(np.stack([cell_labels(x.scene) for x in lessons_now]))
        if plain:
            pixels = to_pixels(x.pixels for x in lessons_now).to(model.dtype)
            answer_loss = torch.zeros(())
            image = image_tokens(model, pixels)
            cell_loss = loss_of_cells(cells(image), labels)
            loss = cell_loss + WORD_WEIGHT * word_loss(image, labels, table)
        else:
            batch = make_batch(
                encoder,
                [x.pixels for x in lessons_now],
                [x.questions for x in lessons_now],
                model.dtype,
            )
            image = image_tokens(model, batch.pixels)
            states = decode(model, batch, image, encoder.before_image)
            chosen = candidates(answers, batch.target, len(embedding) - 64)
            logits = states @ embedding[chosen].t()
            losses = F.cross_entropy(
                logits.float(), torch.searchsorted(chosen, batch.target), reduction="none"
            )
            answer_loss = (losses * batch.weight).sum() / batch.weight.sum()
            cell_loss = loss_of_cells(cells(image), labels)
            loss = answer_loss + CELL_WEIGHT * cell_loss
        loss.backward()
        if phase == "all" and step % TEXT_EVERY == 0:
            said = text_loss(model, texts[step // TEXT_EVERY % len(texts)])
            (0.3 * said).backward()
            text_sum += torch.tensor([float(said.detach()), 1.0])
        tower.step(tower_rate, world)
        if phase == "all":
            language.step(decoder_rate, world)
        step += 1
        sums += torch.tensor([float(answer_loss.detach()), float(cell_loss.detach()), 1.0])
        if rank == 0 and step % 20 == 0:
            loss_now = float(loss.detach())
            print(f"{elapsed:.0f} s  {phase} step {step}  loss {loss_now:.4f}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decoder", type=Path, required=True, help="folder of real_decoder.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--report-seconds", type=float, default=600.0)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = Settings(
        args.decoder, args.out, args.minutes, args.report_seconds, args.processes, port
    )
    check_state(settings)
    torch.multiprocessing.spawn(worker, (settings,), nprocs=args.processes)
    print(f"model written to {args.out / 'model'}")


if __name__ == "__main__":
    main()
