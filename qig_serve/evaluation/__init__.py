"""The parts of `qig_serve.evaluate`."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""
