"""What the servers of a fleet are started and asked with."""

from __future__ import annotations

KEY = "secret"
FLAGS = ["--api-key", KEY, "--max-num-seqs", "16"]
HEADERS = {"Authorization": f"Bearer {KEY}"}
