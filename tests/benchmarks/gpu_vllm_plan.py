"""What `together` does in which order and for how long: whose turn it is, what still fits.

Standard library alone, so that the plan prints on any machine and engines start before torch is
imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

SECONDS = 390.0
START_LIMIT = 170.0
"""Seconds after which measuring begins with the engines that are up."""
USUAL_START = 120.0
"""Seconds until a 7B engine is up, with others beside it: a guess from 110 s alone."""
STALL = 30.0
"""Seconds without another piece after which an engine that measures is stopped."""
RESERVE = 4.0
"""Seconds at the end, for the last results and for processes to end."""
USUAL = {
    "decode 1": 2.0, "decode 8": 2.0, "decode 32": 2.5, "decode 128": 4.0, "decode 256": 6.0,
    "first_token": 6.0, "profile": 5.0,
}  # fmt: skip
"""Seconds of a piece at 7B before any engine has measured it: guesses, above rather than below."""
LARGEST_GB = {"bf16": 25.0}
ENGINE_GB, DEMO_GB = 15.0, 4.0
"""Of a GPU: weights of 7B, KV cache of what is measured, activations, graphs, context."""
MORE_GB = {"internvl2-8b": 6.0}
"""Models with a larger KV cache."""
DEFAULT_VARIANTS = ("bf16", "w3a16", "w4a8", "machete-w4a16", "humming-w3a16", "humming-w4a8")
DEFAULT_DEMOS = ("llava-w4a8-rtn", "llava-w3a16-rtn")
STARTING, UP, MEASURING, ENDED, FAILED = "starting", "up", "measuring", "ended", "failed"


def pieces(batches: Iterable[int], prompts: Iterable[int], profiled: Iterable[int]) -> list[str]:
    """What an engine measures, the most important first."""
    return [
        *(f"decode {batch}" for batch in batches),
        *(f"first_token {tokens}" for tokens in prompts),
        *(f"profile {batch}" for batch in profiled),
        "profile prefill",
    ]


def estimate(names: Iterable[str], measured: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Piece -> seconds: the most that engines took so far; a guess where none has measured it."""
    rows = list(measured)
    found = {}
    for name in names:
        seen = [row[name] for row in rows if name in row]
        guess = USUAL.get(name, USUAL.get(name.split()[0], USUAL["decode 256"]))
        found[name] = max(seen) if seen else guess
    return found


def worth_a_turn(usual: Mapping[str, float], left: float) -> bool:
    """Whether the decode pieces would end in time; the others are decided on one by one."""
    return sum(s for name, s in usual.items() if name.startswith("decode")) <= left


def turn_seconds(usual: Mapping[str, float], left: float) -> float:
    """Seconds that an engine may measure: twice what is usual, so that one that hangs ends."""
    return min(left, max(60.0, 2 * sum(usual.values())))


def next_turn(
    states: Mapping[str, str], others: bool, elapsed: float, start_limit: float
) -> str | None:
    """The engine that measures now; None while one does, or while it is too early.

    states: of the engines, in the order of their worth. others: something else still uses the
    machine (a demonstration, a checkpoint being made).
    """
    if MEASURING in states.values():
        return None
    if (others or STARTING in states.values()) and elapsed < start_limit:
        return None
    return next((name for name, state in states.items() if state == UP), None)


def fitting(
    model: str, kinds: Mapping[str, str], demos: int, total_gb: float | None
) -> tuple[list[str], list[str]]:
    """(variants whose engines fit on the card at once, the rest); kinds: of their checkpoints."""
    left = float("inf") if total_gb is None else total_gb - demos * DEMO_GB
    fit: list[str] = []
    rest: list[str] = []
    for name, kind in kinds.items():
        needed = LARGEST_GB.get(kind, ENGINE_GB) + MORE_GB.get(model, 0.0)
        (fit if needed <= left else rest).append(name)
        left -= needed if needed <= left else 0
    return fit, rest


def groups(kinds: Sequence[str], most: int) -> list[list[str]]:
    """Kinds of checkpoints shared out to at most so many processes; the first come first."""
    unique = list(dict.fromkeys(kinds))
    count = max(1, min(most, len(unique)))
    return [unique[i::count] for i in range(count)]


def describe(
    variants: Sequence[str], demos: Sequence[str], names: Sequence[str], seconds: float,
    start_limit: float,
) -> str:  # fmt: skip
    """The plan as a table, with when each begins at the latest if all take what they may."""
    each = sum(estimate(names, []).values())
    start, limit = min(USUAL_START, start_limit), min(start_limit, seconds)
    what = f"checkpoints and engines of {len(variants)} variants at once"
    if demos:
        what += f", beside them {', '.join(demos)}"
    lines = [f"{'':<24}{'usually':>9}{'at most':>9}{'begins by':>11}"]
    lines.append(f"{'start':<24}{start:>7.0f} s{limit:>7.0f} s{'0 s':>11}  {what}")
    usual, begin = start, limit
    for name in variants:
        left = seconds - RESERVE - begin
        at = f"{begin:.0f} s" if worth_a_turn(estimate(names, []), left) else "if quick"
        most = min(each, max(0.0, seconds - RESERVE - usual))
        lines.append(f"{'measure ' + name:<24}{each:>7.0f} s{most:>7.0f} s{at:>11}")
        usual, begin = usual + each, begin + min(each, max(0.0, left))
    lines.append(f"usually ends after {min(usual, seconds):.0f} s, at the latest {seconds:.0f} s")
    lines.append(f"an engine measures, while it has the GPU alone: {', '.join(names)}")
    return "\n".join(lines)


def tail(log: Path, lines: int = 40, most: int = 4096) -> str:
    """The last lines of a log, of at most so many bytes."""
    if not log.is_file():
        return "(no log)"
    text = log.read_bytes()[-(1 << 16) :].decode(errors="replace")
    kept = "\n".join(text.splitlines()[-lines:]).encode()[-most:]
    return kept.decode(errors="ignore")


WORTH_KEEPING = re.compile(
    r"cudagraph|CUDA graph|kernels ready|fused|torch\.compile|Loading weights", re.I
)


def reported(log: Path, most: int = 24) -> list[str]:
    """What an engine's log says of its graphs, kernels and start-up: messages alone, each once."""
    if not log.is_file():
        return []
    lines = [
        line.split("]", 1)[-1].strip()[:300]
        for line in log.read_text(errors="replace").splitlines()
        if WORTH_KEEPING.search(line) and "%|" not in line and line.startswith(("INFO", "WARNING"))
    ]
    return list(dict.fromkeys(lines))[:most]
