"""Samples through a model's own chat template and processor, which may raise anything.

The one place where other people's code is called on a sample: whatever escapes it becomes one
sentence that names the sample, the cause and the way out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from typing import Any

from qig_serve.errors import UserError
from qig_serve.samples import Sample

_TEMPLATE_FAULTS = ("TemplateSyntaxError", "SecurityError", "RecursionError")
_MARKS = (
    "image_token",
    "boi_token",
    "eoi_token",
    "start_image_token",
    "end_image_token",
    "fake_image_token",
    "video_token",
    "vision_start_token",
    "vision_end_token",
)
"""Attributes of processors and tokenizers that hold what stands for a picture in a prompt."""
_USUAL_MARKS = ("<image>", "<video>", "<audio>")
"""Those of data sets, which other programs replace."""
_MEDIA_TOKEN = re.compile(
    r"[<\[]\W*(start_of_|end_of_)?(image|img|vision|video|audio)", re.IGNORECASE
)
"""Special tokens by their names."""
_OTHER_MARKS = re.compile(
    r"<\|?(image|img|video|audio)[ _-]?(\d+|here|pad|start|end|context|soft_token|placeholder)?\|?>"
    r"|<\|vision_(start|end|pad)\|>|<(start|end)_of_image>",
    re.IGNORECASE,
)
"""Those of other models and data sets: `<image 1>`, `<|image_1|>`, `<ImageHere>`, `<img>`."""
_CLOCK = "strftime_now"
"""By which a template asks for today's date, as Mistral Small's do."""
_ALWAYS = date(2026, 1, 1)


def render(
    processor: Any,
    messages: Sequence[Mapping[str, Any]],
    name: str,
    add_generation_prompt: bool = False,
    today: bool = True,
) -> str:
    """A conversation through the chat template. `name` is the sample's, for the message.

    today: whether a template that asks for the date gets it, as every request does; otherwise the
    text is the same on every day.
    """
    named = [{"role": m["role"], "content": [_part(p) for p in m["content"]]} for m in messages]
    template = processor.chat_template
    whole = template.get("default") if isinstance(template, Mapping) else template
    fixed = {} if today or _CLOCK not in str(whole) else {_CLOCK: _ALWAYS.strftime}
    with guarded(name, "the chat template refuses it"):
        return str(
            processor.apply_chat_template(
                named, add_generation_prompt=add_generation_prompt, tokenize=False, **fixed
            )
        )


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """As chat templates want it: pictures named, not held."""
    if part["type"] == "image":
        return {"type": "image"}
    return {"type": "text", "text": part["text"]}


def process(processor: Any, name: str, **inputs: Any) -> Any:
    """What the processor makes of rendered conversations and their pictures."""
    with guarded(name, "the processor cannot process it"):
        return processor(add_special_tokens=False, return_tensors="pt", **inputs)


@contextmanager
def guarded(name: str, what: str) -> Iterator[None]:
    """Inside, any exception of other people's code becomes a UserError about sample `name`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        kind, cause = type(error).__name__, " ".join(str(error).split()).rstrip(".")
        way_out = (
            "leave it out, or correct its turns, texts and images, or the model's own settings "
            "of tokenizer and processor"
        )
        if isinstance(error, ImportError):
            way_out = "install the package that is missing"
        elif kind in _TEMPLATE_FAULTS:
            way_out = "correct the model's chat template"
        raise UserError(
            f"{name}: {what} ({kind}{': ' if cause else ''}{cause[:400]}); {way_out}"
        ) from None


def check_marks(sample: Sample, processor: Any, name: str) -> None:
    """UserError when a text holds what stands for a picture, beside pictures or without any."""
    texts = [p["text"] for m in sample.messages for p in m["content"] if p["type"] == "text"]
    texts.append(sample.answer or "")
    marks = "|".join(map(re.escape, image_marks(processor)))
    for text in texts:
        if found := re.search(marks, text) or _OTHER_MARKS.search(text):
            raise UserError(
                f"{name}: its text holds the mark {found[0]!r} ({text[:40]!r}), which stands for a "
                "picture, here or in other models: remove it, and give pictures as parts of the "
                'message or in "images"'
            )


def image_marks(processor: Any) -> list[str]:
    """What stands for a picture or a video in a prompt of this model, and in data sets."""
    marks = set(_USUAL_MARKS)
    for holder in (processor, getattr(processor, "tokenizer", None)):
        for attribute in _MARKS:
            value = getattr(holder, attribute, None)
            if isinstance(value := getattr(value, "content", value), str) and value.strip():
                marks.add(value)
    added = getattr(getattr(processor, "tokenizer", None), "all_special_tokens", None) or ()
    return sorted(marks.union(token for token in added if _MEDIA_TOKEN.match(token)))


def check_samples(processor: Any, samples: Sequence[Sample]) -> None:
    """UserError for the first sample that cannot be rendered; before a model is loaded."""
    for sample in samples:
        name = f"sample {sample.id}"
        check_marks(sample, processor, name)
        render(processor, sample.messages, name, add_generation_prompt=True)
