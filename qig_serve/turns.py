"""A record's turns in the forms that datasets have beside "messages" and "conversations".

{"prompt": ..., "completion": ...}                    TRL; each a text, or turns
{"prompt": ..., "chosen": ..., "rejected": ...}       TRL's preferences: what is chosen counts
{"chosen": [...], "rejected": [...]}                  the same, with the question in each
{"messages": [...], "chosen": ..., "rejected": ...}   LLaMA-Factory's, conversations too
{"texts": [{"user": ..., "assistant": ...}, ...]}     The Cauldron's

"label": false (TRL) or "kto_tag": false (LLaMA-Factory) says of an answer that it is not wanted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qig_serve.errors import UserError

TURNS = ("messages", "conversations")
"""Keys of turns as records.py reads them."""
FORMS = ("prompt", "completion", "chosen", "rejected", "texts")
"""Keys of the other forms."""
_VERDICTS = ("label", "kto_tag")
_TEMPLATE = ("chat_template_kwargs", "enable_thinking")
_ANSWERS = re.compile(
    r"((gt|gold(en)?|ground_?truth|correct|expected|reference|target|final|assistant)_?)?"
    r"(answer|response|output|solution|reply|label|completion|caption)s?"
    r"|ground_?truth|gt|gold(en)?|targets?|references?|assistant"
)
"""Keys, in small letters, under which somebody's data have the answer."""
_FILLED = re.compile(r"<(bbox|ref-object)>")
"""Marks that ms-swift fills with what stands beside the turns."""
_USER = ("user", "human")
_ASSISTANT = ("assistant", "gpt")


def has_turns(record: Mapping[str, Any]) -> bool:
    """Whether a record is a conversation in one of the forms, by its keys."""
    keys, texts = record.keys(), record.get("texts")
    asked = keys & {"prompt", "question"}
    return (
        any(key in keys for key in TURNS)
        or keys >= {"prompt", "completion"}
        or keys >= {"prompt", "chosen"}
        or (keys >= {"chosen", "rejected"} and not asked)
        or ("texts" in keys and (not texts or _of_two(texts)))
    )


def is_rejected(record: Any) -> bool:
    """Whether a record says that its answer is one that is not wanted."""
    return (
        isinstance(record, Mapping)
        and any(record.get(key) is False for key in _VERDICTS)
        and ("completion" in record or any(_ends_with(record.get(k), _ASSISTANT) for k in TURNS))
    )


def with_turns(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The record with its turns under "messages" or "conversations"; as it is if it has no form.

    UserError, from `where` on, where more than one reading is possible.
    """
    if not has_turns(record):
        return dict(record)
    found = {key: value for key, value in record.items() if key not in FORMS}
    key = next((key for key in TURNS if record.get(key)), None)
    if key is not None:
        if not record.get("chosen"):
            return dict(record)
        if _ends_with(record[key], _ASSISTANT):
            _check_same_answer(record, key, where)
        if not _ends_with(record[key], _USER):
            return dict(record)
        if found.get("answer") is not None:
            raise UserError(f'{where}: "answer" and "chosen": give the answer in one of them')
        found[key] = [*record[key], *_chosen(record, where)]
    elif "chosen" in record:
        if record.get("completion"):
            raise UserError(f'{where}: "completion" and "chosen": give the answer in one of them')
        found["messages"] = _asked_and_chosen(record, where)
    elif "completion" in record:
        asked, answered = _turns(record["prompt"], "user"), _turns(record["completion"])
        found["messages"] = [*asked, *answered]
    elif "texts" in record:
        found["conversations"] = _question_by_question(record["texts"] or [], where)
    return found


def _turns(value: Any, role: str = "assistant") -> list[Any]:
    """A cell's turns: a text, or parts without a role, are one turn of `role`."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        return [value]
    return [{"role": role, "content": value}] if value else []


def _role(turn: Any) -> Any:
    return turn.get("role", turn.get("from")) if isinstance(turn, dict) else None


def _ends_with(turns: Any, roles: tuple[str, ...]) -> bool:
    return isinstance(turns, list) and bool(turns) and _role(turns[-1]) in roles


def _check_same_answer(record: Mapping[str, Any], key: str, where: str) -> None:
    """UserError where the turns of `key` end with another answer than the one that was chosen."""
    answer, chosen = record[key][-1], _chosen(record, where)[-1]
    if _said(answer) != _said(chosen):
        raise UserError(
            f'{where}: "{key}" ends with an answer, and "chosen" with another: give the answer in '
            "one of them"
        )


def _said(turn: Mapping[str, Any]) -> Any:
    return turn.get("content", turn.get("value"))


def _chosen(record: Mapping[str, Any], where: str) -> list[Any]:
    """The turns that were preferred, whose last is the answer."""
    chosen = _turns(record["chosen"])
    if chosen and not _ends_with(chosen, _ASSISTANT):
        raise UserError(
            f'{where}: "chosen" must be a text, or turns that end with the assistant\'s'
        )
    return chosen


def _asked_and_chosen(record: Mapping[str, Any], where: str) -> list[Any]:
    chosen, asked = _chosen(record, where), _turns(record.get("prompt"), "user")
    if not any(_role(turn) in _USER for turn in chosen):
        if chosen and "prompt" not in record:
            raise UserError(
                f'{where}: "chosen" and "rejected" without a "prompt": write the question into '
                '"prompt", so that it is known where the answer begins'
            )
        return [*asked, *chosen]
    if any(turn not in chosen for turn in asked):
        raise UserError(
            f'{where}: "prompt" and another question in "chosen": give the question in one of them'
        )
    return chosen


def _of_two(texts: Any) -> bool:
    """Whether the texts may be questions with answers, and are no captions."""
    return isinstance(texts, list) and any(isinstance(text, dict) for text in texts)


def _question_by_question(texts: list[Any], where: str) -> list[dict[str, Any]]:
    """The Cauldron's turns as LLaVA has them: the pictures come before the first question."""
    turns = []
    for text in texts:
        said = text if isinstance(text, dict) else {}
        for key, speaker in (("user", "human"), ("assistant", "gpt")):
            if not isinstance(said.get(key), str):
                raise UserError(
                    f'{where}: each of "texts" must have the texts "user" and "assistant", as in '
                    "The Cauldron"
                )
            turns.append({"from": speaker, "value": said[key]})
    return turns


def check_beside(
    record: dict[str, Any], messages: list[dict[str, Any]], answer: str | None, where: str
) -> None:
    """UserError for keys beside the turns that say what the turns do not."""
    if key := next((key for key in _TEMPLATE if record.get(key) is not None), None):
        raise UserError(
            f'{where}: the key "{key}" is not read: make what it says the default in the chat '
            "template of the model, or take it out"
        )
    turns: Any = next((record[key] for key in TURNS if record.get(key)), None)
    last = turns[-1] if _ends_with(turns, _ASSISTANT) else {}
    if last.get("loss") is False or last.get("weight") == 0:
        raise UserError(
            f'{where}: its last turn is not to be learned from ("loss": false or "weight": 0): '
            "leave the sample out, or take out the turns behind the answer"
        )
    for key in sorted(record) if not (answer or "").strip() else ():
        value = record[key]
        said = value if isinstance(value, list) else [value]
        if any(isinstance(v, str) and v.strip() for v in said) and _ANSWERS.fullmatch(key.lower()):
            raise UserError(
                f'{where}: the key "{key}" is not read, and there is no answer: write the answer '
                'under "answer", or as a last turn of the assistant'
            )
    texts = [p["text"] for m in messages for p in m["content"] if p["type"] == "text"]
    if record.get("objects") and (found := _FILLED.search("\n".join([*texts, answer or ""]))):
        raise UserError(
            f'{where}: the mark {found[0]!r} is not filled from "objects": write its words or '
            "numbers in its place"
        )
