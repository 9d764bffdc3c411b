"""A training of real_pictures.py that was killed goes on as if it had not been."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import real_pictures
import torch
import torch.distributed as dist
from real_pictures import Settings, check_state, load_state, save_state

from qig_serve.demo.train import CHECKPOINT, MasterAdamW


class _Training:
    """Two optimizers, as a worker has them, on weights that are drawn anew."""

    def __init__(self) -> None:
        self.layers = [torch.nn.Linear(8, 8).bfloat16() for _ in range(2)]
        named = [list(layer.named_parameters()) for layer in self.layers]
        self.tower, self.language = (MasterAdamW(n, 0.05) for n in named)

    def step(self) -> torch.Tensor:
        """A step on drawn data; the drawn candidates and all weights."""
        chosen = real_pictures.candidates(torch.tensor([1]), torch.tensor([2]), 1 << 18)
        x = torch.randn(4, 8).bfloat16()
        sum(layer(x).float().square().mean() for layer in self.layers).backward()
        self.tower.step(1e-2, 1)
        self.language.step(1e-3, 1)
        weights = [p.detach().flatten().float() for m in self.layers for p in m.parameters()]
        return torch.cat([chosen.float(), *weights])


def test_what_was_killed_goes_on(tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path, 60.0, 600.0, 1, 0)
    check_state(settings)
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        first = _Training()
        assert load_state(settings, 0, first.tower, first.language) == (0, 0.0)
        for _ in range(3):
            first.step()
        save_state(settings, 3, 301.5, first.tower, first.language)
    finally:
        dist.destroy_process_group()
    wanted = [first.step() for _ in range(2)]
    second = _Training()
    assert load_state(settings, 0, second.tower, second.language) == (3, 301.5)
    assert all(torch.equal(second.step(), step) for step in wanted)
    assert not list(tmp_path.glob("*.tmp")) and (tmp_path / CHECKPOINT).exists()
    for other in ({"minutes": 30.0}, {"processes": 2}):
        with pytest.raises(SystemExit, match="of --minutes 60 --processes 1: go on with these"):
            check_state(dataclasses.replace(settings, **other))
