"""Numbers of bytes for people, in one form everywhere: powers of 1024, as vLLM and CUDA count."""

from __future__ import annotations


def in_words(count: float) -> str:
    """Bytes, e.g. "512 B", "3.5 MiB", "5.8 GiB": one decimal above bytes."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
