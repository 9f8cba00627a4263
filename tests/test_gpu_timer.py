"""The benchmarks' timer, their ceilings and the rows of kernels, with a GPU that only writes down what it is asked."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from scripts.bench import ceilings, gpu_timer, kernel_rows
from scripts.bench.gpu_timer import Gpu, Times, gpu_times


class FakeGpu(Gpu):
    """Every run takes what `seconds` says next; the host's clock goes on by 0.1 s whenever it is asked."""

    def __init__(self, log: list[str], seconds: list[float]) -> None:
        self.log, self.seconds, self.clock = log, iter(seconds), 0.0

    def synchronize(self) -> None:
        self.log.append("wait")

    def capture(self, works):
        self.log.append(f"capture {len(works)}")
        return lambda: self.log.append("replay")

    def elapsed(self, work) -> float:
        self.log.append("timed")
        work()
        return next(self.seconds)

    def now(self) -> float:
        self.clock += 0.1
        return self.clock


def test_a_captured_time_is_that_of_one_work_of_a_replay():
    log: list[str] = []
    works = [partial(log.append, name) for name in "ab"]
    gpu = FakeGpu(log, [6.0, 2.0, 4.0])
    found = gpu_times(*works, prepare=partial(log.append, "prepare"), repeats=3, gpu=gpu)
    assert found == Times(seconds=2.0, fastest=1.0, slowest=3.0)
    warm, timed = ["prepare", "replay", "wait"], ["prepare", "timed", "replay"]
    assert log[:4] == ["a", "b", "wait", "capture 2"] and log[-9:] == 3 * timed
    turns = len(log[4:-9]) // 3
    assert log[4:-9] == turns * warm and 2 <= turns <= 3  # WARM_SECONDS at 0.1 s a look at the clock


def test_what_is_not_captured_runs_itself():
    log: list[str] = []
    found = gpu_times(partial(log.append, "a"), captured=False, repeats=1, gpu=FakeGpu(log, [5.0]))
    assert found == Times(5.0, 5.0, 5.0)
    assert log[:2] == ["a", "wait"] and log[-2:] == ["timed", "a"] and not {"replay", "capture 1"} & set(log)


@pytest.fixture
def a_millisecond(monkeypatch):
    """On torch's meta device nothing is computed, and every call takes a millisecond."""

    def times(*works, captured=True, **more):
        assert not captured
        for work in works:
            work()
        return Times(1e-3, 1e-3, 1e-3)

    monkeypatch.setattr(ceilings, "gpu_times", times)
    return torch.device("meta")


def test_ceilings_count_their_bytes_and_operations(a_millisecond):
    found = ceilings.memory(a_millisecond)
    assert found["memory_tb_s"] == pytest.approx(2 * 4 * 2**30 / 1e-3 / 1e12)
    assert found["read_tb_s"] == pytest.approx(4 * 2**30 / 1e-3 / 1e12)
    found = ceilings.matmul(a_millisecond)
    assert found["matmul_tflops"] == pytest.approx(2 * 16384 * 14336 * 4096 / 1e-3 / 1e12)
    found = ceilings.attention(a_millisecond)
    assert found["attention_tflops"] == pytest.approx(4 * 128 * 32 * 32768**2 / 2 / 1e-3 / 1e12)
    assert "default" in found["attention_all"]


def test_ceilings_of_a_cpu():
    device = torch.device("cpu")
    found = ceilings.measure_ceilings(device, "memory", "transfer", "matmul", "attention")
    assert 1e-3 < found["memory_tb_s"] < 10 and 0.1 < found["host_to_device_gb_s"] < 1e4
    assert 1e-3 < found["matmul_tflops"] < 100 and 1e-4 < found["attention_tflops"] < 100
    assert ceilings.causal_flops(torch.empty(1, 2, 10, 4)) == 4 * 4 * 2 * 10 * 10 / 2


@pytest.fixture
def known_ceilings(monkeypatch):
    """3 TB/s and 50 GB/s; how often each kind was measured."""
    measured = []

    def fixed(kind: str, **found: float):
        return lambda device: measured.append(kind) or found

    monkeypatch.setattr(ceilings, "MEASURES", {
        "memory": (fixed("memory", memory_tb_s=3.0), "{memory_tb_s} TB/s"),
        "transfer": (fixed("transfer", host_to_device_gb_s=50.0, device_to_host_gb_s=40.0), "{host_to_device_gb_s}"),
        "matmul": (fixed("matmul", matmul_tflops=600.0), "{matmul_tflops}"),
    })  # fmt: skip
    ceilings.measured.cache_clear()
    yield measured
    ceilings.measured.cache_clear()


def test_a_ceiling_is_measured_and_printed_once_a_process(known_ceilings, capsys):
    for _ in range(2):
        assert ceilings.measure_ceilings(torch.device("cpu"), "memory", "matmul") == {
            "memory_tb_s": 3.0, "matmul_tflops": 600.0,
        }  # fmt: skip
    assert known_ceilings == ["memory", "matmul"]
    assert capsys.readouterr().out.splitlines() == ["ceiling: 3.0 TB/s", "ceiling: 600.0"]


@pytest.mark.parametrize(
    ("amount", "ceiling", "share"),
    [
        ({"num_bytes": 1_500_000}, "copy", 0.5),
        ({"num_bytes": 25_000}, "host_to_device", 0.5),
        ({"num_bytes": 10_000}, "device_to_host", 0.25),
        ({"flops": 150e6}, "matrix product", 0.25),
        ({"num_bytes": 0}, "copy", 0.0),
    ],
)
def test_a_row_has_the_share_of_its_ceiling(known_ceilings, amount, ceiling, share):
    row = kernel_rows.kernel_row("k", "s", Times(1e-6, 0.5e-6, 2e-6), ceiling=ceiling, settings={"w": 4}, **amount)
    assert row["fraction_of_ceiling"] == pytest.approx(share)
    times = [row[f"{name}microseconds"] for name in ("", "fastest_", "slowest_")]
    assert times == pytest.approx([1.0, 0.5, 2.0]) and row["details"] == {"settings": {"w": 4}}
    cells = [list(column.cells) for column in kernel_rows.table([row]).columns]
    assert ["w=4"] in cells and [f"{share:.1%}"] in cells


def test_a_wrong_result_is_no_row():
    exact = torch.ones(4)
    assert kernel_rows.error_of(exact * 1.01, exact, 0.02) == pytest.approx(0.01, rel=1e-4)
    for wrong in (exact * 1.03, exact * float("nan")):
        with pytest.raises(AssertionError, match="something else"):
            kernel_rows.error_of(wrong, exact, 0.02)


def test_no_other_script_times_a_gpu():
    scripts = Path(__file__).resolve().parents[1] / "scripts"
    assert [file.name for file in scripts.rglob("*.py") if "enable_timing" in file.read_text()] == ["gpu_timer.py"]


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [True, False])
def test_a_copy_on_a_gpu_takes_its_time(captured):
    source = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    one = gpu_times(partial(target.copy_, source), captured=captured)
    four = gpu_times(*[partial(target.copy_, source)] * 4, captured=captured)
    assert 0 < one.fastest <= one.seconds <= one.slowest and 2 * source.nbytes / one.seconds < 20e12
    assert four.seconds == pytest.approx(one.seconds, rel=0.3)
    assert gpu_timer.REPEATS >= 11
