"""The quantizer killed, out of disk, stopped, started twice: what is left and what is lost."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import quantizer_runs as runs
import torch
from helpers.checkpoints import CONFIG
from safetensors.torch import save_file

from qig_serve.errors import UserError
from qig_serve.offline.checkpoint.forms import Form
from qig_serve.offline.checkpoint.writer import CheckpointWriter
from qig_serve.offline.disk import ResumableError
from qig_serve.offline.source.tensors import SourceCheckpoint


@pytest.fixture
def small_source(tmp_path: Path) -> Path:
    """A directory that the checkpoint writer can work on, without a model behind it."""
    directory = tmp_path / "source"
    (directory / "templates").mkdir(parents=True)
    save_file({f"{n}.weight": torch.ones(4, 8) for n in "abc"}, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llava"}')
    (directory / "tokenizer.json").write_text("{}" * 5000)
    (directory / "templates" / "tool.jinja").write_text("tool" * 100)
    return directory


def write(source: Path, output: Path, resume: bool = False) -> None:
    """Two blocks, a report, and the rest, through the checkpoint writer."""
    with CheckpointWriter(SourceCheckpoint(source), output, {"seed": 0}, resume) as writer:
        for index in range(writer.finished, 2):
            packed = torch.full((4, 3), index, dtype=torch.int32)
            writer.write_block(
                index, {f"{'ab'[index]}.weight_packed": packed}, [f"{'ab'[index]}.weight"]
            )
            writer.write_text("report.json", "{}")
        writer.publish(Form({"quantization_config": CONFIG}))


def test_killed_before_every_change_on_disk(small_source: Path, tmp_path: Path) -> None:
    """Files are opened, renamed and removed some fifty times in a run; it is killed at each."""
    whole = tmp_path / "whole"
    write(small_source, whole)
    wanted = runs.tree(whole)
    number, status = 0, -9
    while status != 0:
        number += 1
        output = tmp_path / f"killed-{number}"

        def killed(output: Path = output, number: int = number) -> None:
            runs.die_at(output.parent, number)
            write(small_source, output)

        status = runs.forked(killed)
        assert status in (0, -9)
        assert not output.exists() or runs.tree(output) == wanted
        if not output.exists():
            write(small_source, output, resume=runs.partial_of(output).exists())
        assert runs.tree(output) == wanted, f"killed before change {number}"
        assert runs.vouched(output)
        assert not list(tmp_path.glob(".*"))
    assert number > 30


def test_a_file_copied_by_half_is_copied_again(small_source: Path, tmp_path: Path) -> None:
    """What a killed copy leaves has another name, so nobody takes it for the file."""
    output = tmp_path / "out"

    def killed() -> None:
        fsync = os.fsync
        os.fsync = lambda fd: _die_if_copying(fd, fsync)  # type: ignore[assignment]
        write(small_source, output)

    assert runs.forked(killed) == -signal.SIGKILL
    left = [p.name for p in runs.partial_of(output).iterdir()]
    assert "tokenizer.json.tmp" in left and "tokenizer.json" not in left
    (runs.partial_of(output) / "tokenizer.json.tmp").write_text("{")
    write(small_source, output, resume=True)
    assert runs.tree(output)["tokenizer.json"] == runs.file_sha256(small_source / "tokenizer.json")
    assert not [p for p in output.iterdir() if p.suffix == ".tmp"]


def _die_if_copying(descriptor: int, fsync: Callable[[int], None]) -> None:
    if "tokenizer.json" in os.readlink(f"/proc/self/fd/{descriptor}"):
        runs.die()
    fsync(descriptor)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The checkpoint of a run that nothing happened to, and the seconds it took."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert runs.forked(lambda: runs.quantize(source, output)) == 0  # the first of its kind is slow
    started = time.monotonic()
    again = output.with_name("again")
    assert runs.forked(lambda: runs.quantize(source, again)) == 0
    assert runs.tree(output) == runs.tree(again)
    return output, time.monotonic() - started


def blocks_of(directory: Path) -> dict[int, int]:
    """Blocks whose shard has its name -> the inode, which a rename keeps and a rewrite does not."""
    found = {}
    for path in directory.glob("*.safetensors"):
        kind, _, rest = path.name.partition("-")
        number = int(rest[:5]) - (kind == "model")
        if kind in ("block", "model") and number < runs.LAYERS:
            found[number] = path.stat().st_ino
    return found


def resumed(source: Path, output: Path, wanted: dict[str, str], reported: Counter[str]) -> None:
    """Finishes a killed run, and counts what of it had to be done again."""
    before = blocks_of(runs.partial_of(output))
    reported[f"{len(before)} blocks done"] += not output.exists()
    reported["already published"] += output.exists()
    if not output.exists():
        resume = runs.partial_of(output).exists()
        assert runs.forked(lambda: runs.quantize(source, output, resume)) == 0
    assert runs.tree(output) == wanted and runs.vouched(output)
    after = blocks_of(output)
    reported["finished blocks done again"] += sum(after[i] != inode for i, inode in before.items())
    assert not list(output.parent.glob(".*"))


@pytest.mark.slow
def test_killed_at_every_block_boundary(
    source: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    """Before and after each block is written, before and after the checkpoint is published."""
    reported: Counter[str] = Counter()
    for index in range(runs.LAYERS + 1):
        for after in (False, True):
            output = tmp_path / f"{index}-{after}"

            def killed(output: Path = output, index: int = index, after: bool = after) -> None:
                name = "write_block" if index < runs.LAYERS else "publish"
                original = getattr(CheckpointWriter, name)

                def dying(writer: CheckpointWriter, *args: Any, **kwargs: Any) -> Any:
                    here = name == "publish" or args[0] == index
                    if here and not after:
                        runs.die()
                    result = original(writer, *args, **kwargs)
                    if here:
                        runs.die()
                    return result

                setattr(CheckpointWriter, name, dying)
                runs.quantize(source, output)

            assert runs.forked(killed) == -signal.SIGKILL
            resumed(source, output, runs.tree(undisturbed[0]), reported)
    print(f"killed at {2 * (runs.LAYERS + 1)} boundaries: {dict(reported)}")
    assert reported["finished blocks done again"] == 0


@pytest.mark.slow
def test_killed_at_random_moments(
    source: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    """Fifty kills; every second time the resumed run is killed too."""
    whole, seconds = undisturbed
    rng = random.Random(0)
    reported: Counter[str] = Counter()
    trial = 0
    while reported["kills"] < 50:  # some runs end before they are killed
        trial += 1
        output = tmp_path / str(trial)
        for resume in (False, True)[: 1 + trial % 2]:
            if resume and (output.exists() or not runs.partial_of(output).exists()):
                continue
            status = runs.forked(
                lambda resume=resume, output=output: runs.quantize(source, output, resume),
                rng.uniform(0, 1.1 * seconds),
            )
            reported["kills"] += status == -signal.SIGKILL
            assert status in (0, -signal.SIGKILL)
            if output.exists():
                assert runs.tree(output) == runs.tree(whole)
        resumed(source, output, runs.tree(whole), reported)
    print(f"killed at random in runs of {seconds:.1f} s: {dict(reported)}")
    assert reported["finished blocks done again"] == 0


Resize = Callable[[int], None]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Resize]]:
    """A file system in memory, and how many kB it has."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options: str) -> bool:
        words = ["mount", "-t", "tmpfs", *options, "tmpfs", place]
        return subprocess.run(words, capture_output=True).returncode == 0

    def resize(kilobytes: int) -> None:
        deadline = time.monotonic() + 10
        while not mount("-o", f"remount,size={kilobytes}k"):  # a mapping may outlive its file
            assert time.monotonic() < deadline, os.listdir(place)
            gc.collect()
            time.sleep(0.1)

    if not mount("-o", "size=64k"):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield place, resize
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def unfinished(output: Path) -> list[str]:
    """The names left of a run that failed; nothing half-written among them."""
    assert not output.exists()
    left = sorted(p.name for p in runs.partial_of(output).rglob("*") if p.is_file())
    assert not [name for name in left if name.endswith(".tmp")]
    if left:
        state = json.loads((runs.partial_of(output) / ".state.json").read_text())
        assert state["blocks"]  # kept for the blocks that are done, and for nothing less
    return left


def test_a_full_disk_at_every_page(
    small_source: Path, tmp_path: Path, small_disk: tuple[Path, Resize]
) -> None:
    """The checkpoint writer on disks that are too small by fewer and fewer pages."""
    whole = tmp_path / "whole"
    write(small_source, whole)
    place, resize = small_disk
    reported: Counter[str] = Counter()
    for pages in range(2, 40):
        resize(4 * pages)
        output = place / "out"
        try:
            write(small_source, output)
        except ResumableError as error:
            assert "the disk is full" in str(error) and "\n" not in str(error)
            left = unfinished(output)
            reported[f"{sum('block-' in n or 'model-' in n for n in left)} blocks"] += 1
            resize(4000)
            write(small_source, output, resume=bool(left))
        else:
            break
        assert runs.tree(output) == runs.tree(whole)
        subprocess.run(["rm", "-r", output], check=True)
    assert len(reported) >= 3, reported  # nothing kept, a block kept, both kept


@pytest.mark.slow
def test_a_full_disk_at_every_stage(
    source: Path, undisturbed: tuple[Path, float], small_disk: tuple[Path, Resize]
) -> None:
    """A whole run: during cache, shard, index and publish."""
    place, resize = small_disk
    reported: Counter[str] = Counter()
    output = place / "out"
    resize(64_000)
    runs.quantize(source, output, offload="disk")
    used = sum(p.stat().st_size for p in output.rglob("*")) // 1024
    subprocess.run(["rm", "-r", output], check=True)
    sizes = [(kb, "disk") for kb in range(40, used + 900, 120)]
    sizes += [(kb, "ram") for kb in range(40, used + 300, 120)]  # no cache: shards and the rest
    for kilobytes, offload in sizes:
        resize(kilobytes)
        try:
            runs.quantize(source, output, offload=offload)
        except ResumableError as error:
            assert "the disk is full" in str(error) and "\n" not in str(error)
            left = unfinished(output)
            reported[stage(str(error), left)] += 1
            resize(64_000)
            runs.quantize(source, output, resume=bool(left), offload=offload)
        else:
            reported["enough"] += 1
        assert runs.tree(output) == runs.tree(undisturbed[0]) and runs.vouched(output)
        subprocess.run(["rm", "-r", output], check=True)
    print(f"{used} kB of checkpoint, full disk at: {dict(reported)}")
    assert {"cache", "block shard", "publish"} <= reported.keys()


def stage(message: str, left: list[str]) -> str:
    """Where the disk was full."""
    if "activations" in message:
        return "cache"
    if "block-" in message or ".state" in message:
        return "block shard"
    if any(name.endswith(".index.json") for name in left):
        return "publish after the index"
    return "publish"


def start(source: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    """`qig-serve quantize`, as a user starts it."""
    words = ["quantize", source / "model", "--calib", source / "calib.jsonl", "--output", output]
    words += ["--samples", "4", "--grid", "2", "--steps", "64", "--device", "cpu", *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "qig_serve", *map(str, words)], stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_asked_to_stop(source: Path, tmp_path: Path, number: int, status: int) -> None:
    """Once before a block is done, when nothing is kept, and once after; then it goes on."""
    output = tmp_path / "out"
    with start(source, output) as early:
        while not runs.partial_of(output).exists() and early.poll() is None:
            time.sleep(0.01)
        early.send_signal(number)
        _, reported = early.communicate(timeout=900)
    assert early.returncode == status and "Traceback" not in reported
    assert not list(tmp_path.iterdir())

    with start(source, output) as run:
        while not (runs.partial_of(output) / ".state.json").exists() and run.poll() is None:
            time.sleep(0.01)
        run.send_signal(number)
        _, reported = run.communicate(timeout=900)
    assert run.returncode == status
    assert "Traceback" not in reported and "--resume" in reported
    assert unfinished(output) and not list(runs.partial_of(output).glob("activations"))

    with start(source, output) as second:
        _, reported = second.communicate(timeout=900)
    assert second.returncode == 2 and "--resume" in reported
    with start(source, output, "--resume") as last, start(source, output, "--resume") as other:
        said = {p.communicate(timeout=900)[1].splitlines()[-1]: p.returncode for p in (last, other)}
    assert sorted(said.values()) == [0, 2]  # two runs on one directory: the second is refused
    assert [line for line, code in said.items() if code == 2 and "another run" in line]
    whole = tmp_path / "whole"
    with start(source, whole) as undisturbed:
        undisturbed.communicate(timeout=900)
    assert undisturbed.returncode == 0
    assert runs.tree(whole) == runs.tree(output)


def test_an_output_that_appears_costs_nothing(small_source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with (
        pytest.raises(ResumableError, match="appeared during the run"),
        CheckpointWriter(SourceCheckpoint(small_source), output, {"seed": 0}) as writer,
    ):
        writer.write_block(0, {"a.weight_packed": torch.zeros(4, 3)}, ["a.weight"])
        output.write_text("somebody else's")
        writer.publish(Form({"quantization_config": CONFIG}))
    assert output.read_text() == "somebody else's"
    output.unlink()
    write(small_source, output, resume=True)
    assert runs.vouched(output)


def test_other_weights_are_not_mixed_in(small_source: Path, tmp_path: Path) -> None:
    """The same names and shapes, but another model: a resumed run would be half of each."""
    with (
        pytest.raises(KeyboardInterrupt),
        CheckpointWriter(
            SourceCheckpoint(small_source),
            tmp_path / "out",
            {"model": SourceCheckpoint(small_source).fingerprint()},
        ) as writer,
    ):
        writer.write_block(0, {"a.weight_packed": torch.zeros(4, 3)}, ["a.weight"])
        raise KeyboardInterrupt
    save_file({f"{n}.weight": torch.zeros(4, 8) for n in "abc"}, small_source / "model.safetensors")
    other = SourceCheckpoint(small_source)
    with pytest.raises(UserError, match="the model is another"):
        CheckpointWriter(other, tmp_path / "out", {"model": other.fingerprint()}, resume=True)
