"""JSON that parses and still breaks on its way from the front end to the engine."""

from __future__ import annotations

import json
import re

_SUSPECT = re.compile(rb"\\u[dD][89a-fA-F]|[0-9]{19}")


def find_fault(body: bytes) -> str | None:
    """Why a JSON text cannot be passed on; None if it can, or is no JSON (others say so).

    Half of a surrogate pair has no UTF-8, and whole numbers beyond 64 bits no msgpack: vLLM fails
    on either after it has taken the request on.
    """
    if not _SUSPECT.search(body):
        return None
    try:
        left = [json.loads(body)]
    except (ValueError, RecursionError):
        return None
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = value[error.start].encode("ascii", "backslashreplace").decode()
                return f"{half} is half of a surrogate pair"
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            return "it has a whole number beyond 64 bits"
    return None
