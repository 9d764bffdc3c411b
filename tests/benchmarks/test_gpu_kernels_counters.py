"""What Nsight Compute prints, made up after its raw page, and what is read from it."""

from __future__ import annotations

import gpu_kernels_counters as counters
import pytest
from gpu_kernels_plan import Failed

METRICS = """
ID |  | 0 | 1 | 2
Kernel Name |  | halves_kernel | w3a16_prefill_kernel(int, int) | w4a8_shared_kernel
gpu__time_duration.sum | ns | 25,344 | 1,700,000 | 31000
dram__throughput.avg.pct_of_peak_sustained_elapsed | % | 81.5 | 12.5 | 40
dram__bytes_read.sum.per_second | Tbyte/s | 3.9 | 0.6 | 1.6
smsp__issue_active.avg.pct_of_peak_sustained_active | % | 55.2 | 31 | 43
sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active | % | 37 | 11 | n/a
sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active | % | 0 | 0 | 0
sm__pipe_tensor_op_gmma_cycles_active.avg.pct_of_peak_sustained_active | % | 20 | 58 | 9
sm__warps_active.avg.pct_of_peak_sustained_active | % | 24 | 12 | 7.0
launch__registers_per_thread | register/thread | 96 | 168 | 128
smsp__average_warps_issue_stalled_wait_per_issue_active.ratio | inst | 0.6 | 0.3 | 0.7
smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio | inst | 0.4 | 4 | 0
smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio | inst | 0.2 | 0.1 | 1.9
smsp__average_warps_issue_stalled_selected_per_issue_active.ratio | inst | 1 | 1 | 1
smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio | inst | 0 | 0.2 | 0.1
"""


def raw_page() -> list[str]:
    columns = [line.split(" | ") for line in METRICS.strip().splitlines()]
    lines = [",".join(f'"{cell}"' for cell in cells) for cells in zip(*columns, strict=True)]
    return ["==PROF== Connected to process 7", "a line of the program's own", *lines]


def test_what_limits_is_said_in_words() -> None:
    first, second, third = counters.parse(raw_page())
    assert first["kernel"] == "halves_kernel" and second["kernel"] == "w3a16_prefill_kernel"
    assert first["us"] == pytest.approx(25.344) and second["us"] == pytest.approx(1700)
    assert first["dram_bytes_per_second"] == pytest.approx(3.9e12)
    assert second["tensor_percent"] == 58, "the largest of the tensor cores' kinds"
    assert "alu_percent" not in third, "n/a is no number"
    assert first["stalls"] == {"wait": 0.6, "barrier": 0.4, "long_scoreboard": 0.2}
    assert first["limit"] == "memory's bandwidth (82% busy)"
    assert second["limit"] == (
        "waits for the other warps of the program; busiest: the tensor cores, 58%; "
        "only 12% of the warps that fit"
    )
    assert third["limit"].startswith("waits for loads from memory or L2; busiest: issue slots, 43%")


def test_the_table() -> None:
    entries = counters.parse(raw_page())
    entries[0]["launch"] = "w3a16 M=1"
    lines = counters.table(entries).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| w3a16 M=1 | halves_kernel | 25.3 | 82% | 55% | 37% | 20% | 24% |")


def test_no_table_is_a_reason() -> None:
    with pytest.raises(Failed, match="printed no table"):
        counters.parse(["==ERROR== no permission"])


@pytest.mark.parametrize(
    ("number", "unit", "us"),
    [(25, "ns", 0.025), (25, "us", 25), (2, "ms", 2000), (1, "s", 1e6), (3, "usecond", 3),
     (5, "nsecond", 0.005), (1, "second", 1e6)],
)  # fmt: skip
def test_units_of_time(number: float, unit: str, us: float) -> None:
    assert counters.in_base_units(number, unit, "us") == pytest.approx(us)


def test_twelve_launches() -> None:
    assert len(counters.LAUNCHES) == 12 and len(set(counters.LAUNCHES)) == 12
