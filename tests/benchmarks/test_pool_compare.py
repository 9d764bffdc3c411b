"""Runs of compare, added up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pool_compare
import pytest

SUMMARY = {"exact_match": 0.9, "agreement": 0.95, "seconds": 3.0}


def write(path: Path, worse: int, better: int) -> str:
    test = {"n": 100, "right_to_wrong": worse, "wrong_to_right": better, "p_value": 0.5}
    run = {
        "full_precision": {"0": {"exact_match": 0.92}},
        "summary": [
            SUMMARY | {"scheme": "w3a16", "method": "rtn", "kl_mean": 0.1},
            SUMMARY | {"scheme": "w3a16", "method": "qig+", "kl_mean": 0.02},
        ],
        "pairwise": [{"scheme": "w3a16", "first": "rtn", "second": "qig+"} | test],
    }
    path.write_text(json.dumps(run))
    return str(path)


def test_discordant_questions_are_added_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write(tmp_path / "a.json", 1, 4), write(tmp_path / "b.json", 0, 5)]
    monkeypatch.setattr(sys, "argv", ["pool_compare.py", *files])
    assert pool_compare.main() == 0
    out = capsys.readouterr().out
    assert "qig+: 0.20 of the best other method's KL; 80.0% of RTN's is gone" in out
    # 1 of 10 discordant against us: 2 * (1 + 10) / 2^10
    assert "| `rtn` | 200 | +4.00 |" in out and out.rstrip().endswith("| 0.021 |")
