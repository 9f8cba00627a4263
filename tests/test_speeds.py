"""Speeds of a machine: measured once, kept, taken from a data sheet for another GPU, estimated otherwise."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longrun.machine import measure, speeds
from longrun.machine.measure import first_speeds, measure_cpu, measure_gpu
from longrun.machine.speeds import DATA_SHEETS, Speeds, gpu_name, keep_speeds, kept_speeds, known_speeds, num_cores
from longrun.plan.command import plan_command
from longrun.plan.shapes import SHAPES

FIGURES = Speeds("NVIDIA H100 80GB HBM3", 700.0, 600.0, 3000.0, 50.0, measured=True)
CPUINFO = "".join(
    f"processor\t: {n}\nmodel name\t: A Processor\ncpu MHz\t\t: 2000.0\nphysical id\t: 0\ncore id\t\t: {n // 2}\n"
    f"flags\t\t: fpu avx avx2 fma\n\n"
    for n in range(8)
)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 4 cores without a GPU, on which nothing was measured; returns the folder of its GPUs."""
    monkeypatch.setenv("LONGRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    gpus = tmp_path / "gpus"
    for function in (speeds.num_cores, speeds.cpu_name, speeds._estimated_cpu):
        monkeypatch.setattr(function, "__defaults__", (tmp_path / "cpuinfo",))
    monkeypatch.setattr(speeds.gpu_name, "__defaults__", (gpus,))
    monkeypatch.setattr(speeds.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(measure.os, "getloadavg", lambda: (0.5, 0.0, 0.0))
    return gpus


def install(gpus: Path, name: str) -> None:
    (gpus / "0000:01:00.0").mkdir(parents=True, exist_ok=True)
    (gpus / "0000:01:00.0" / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 0\n")


def test_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_cores() == 4, "hyperthreads counted once"
    monkeypatch.setattr(speeds.os, "sched_getaffinity", lambda pid: {0, 1})
    assert num_cores() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert num_cores() == 3


def test_an_unmeasured_cpu_is_estimated() -> None:
    found = known_speeds("cpu")
    assert (found.measured, found.device) == (False, "A Processor, 4 cores")
    assert found.matmul_tflops == pytest.approx(0.75 * 4 * 32 * 2000 / 1e6)
    assert found.memory_gb_s == 48


def test_what_was_measured_is_kept(machine: Path) -> None:
    install(machine, "NVIDIA H100 80GB HBM3")
    assert (gpu_name(), kept_speeds("cuda")) == ("NVIDIA H100 80GB HBM3", None)
    keep_speeds("cuda", FIGURES)
    assert kept_speeds("cuda") == FIGURES and kept_speeds("cpu") is None
    install(machine, "NVIDIA A100-SXM4-80GB")
    assert kept_speeds("cuda") is None, "another GPU"


@pytest.mark.parametrize("damage", ["", "[]", '{"version": 2}', '{"version": 1}', "nan", "zero", "more"])
def test_a_damaged_file_is_measured_again(damage: str, machine: Path) -> None:
    install(machine, "NVIDIA H100 80GB HBM3")
    keep_speeds("cuda", FIGURES)
    (file,) = (machine.parent / "cache" / "speeds").iterdir()
    data = json.loads(file.read_text())
    change = {"nan": {"memory_gb_s": float("nan")}, "zero": {"link_gb_s": 0}, "more": {"other": 1}}.get(damage)
    file.write_text(damage if change is None else json.dumps(data | change))
    assert kept_speeds("cuda") is None


def test_a_budget_of_another_gpu_is_an_estimate(machine: Path) -> None:
    assert known_speeds("cuda", "a100-80g") == DATA_SHEETS["A100"]
    assert known_speeds("cuda", "h100-80g") == DATA_SHEETS["H100"]
    assert known_speeds("cuda", "rtx4090-24g") == DATA_SHEETS["4090"]
    assert known_speeds("cuda", "mine.toml") is None, "no GPU here, and none named"
    install(machine, "NVIDIA H100 80GB HBM3")
    assert known_speeds("cuda", "mine.toml") == DATA_SHEETS["H100"]
    keep_speeds("cuda", FIGURES)
    assert known_speeds("cuda", "h100-80g") == known_speeds("cuda", "mine.toml") == FIGURES
    assert known_speeds("cuda", "a100-80g") == DATA_SHEETS["A100"]
    install(machine, "NVIDIA L4")
    assert known_speeds("cuda", "mine.toml") is None


def test_data_sheets_are_below_what_they_promise() -> None:
    sheet = DATA_SHEETS["A100"]
    assert 200 < sheet.matmul_tflops < 312 and 150 < sheet.attention_tflops < sheet.matmul_tflops
    assert 1500 < sheet.memory_gb_s < 2039 and 20 < sheet.link_gb_s < 32 and not sheet.measured


def test_a_cpu_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = first_speeds("cpu")
    assert found.measured and found.device == "A Processor, 4 cores"
    assert 0.001 < found.matmul_tflops < 100 and 0.1 < found.memory_gb_s < 10_000 and found.link_gb_s > 0.05
    monkeypatch.setattr(measure, "measure_cpu", lambda: pytest.fail("measured again"))
    assert first_speeds("cpu") == found == known_speeds("cpu")


def test_a_busy_cpus_figures_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.os, "getloadavg", lambda: (4.5, 0.0, 0.0))
    assert first_speeds("cpu").measured and kept_speeds("cpu") is None


def test_a_gpu_is_measured_once_in_a_process_of_its_own(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(machine, FIGURES.device)
    commands, told = [], []

    def child(command: list[str], **options: object) -> SimpleNamespace:
        commands.append(command[1:])
        assert options["timeout"] and options["check"]
        return SimpleNamespace(stdout=json.dumps(asdict(FIGURES)))

    monkeypatch.setattr(measure.subprocess, "run", child)
    assert first_speeds("cuda", told.append) == FIGURES
    assert first_speeds("cuda", told.append) == FIGURES
    assert commands == [["-m", "longrun.machine.measure"]] and told == ["measuring this GPU, once"]


@pytest.mark.parametrize(
    "failure", [subprocess.TimeoutExpired("x", 1), subprocess.CalledProcessError(1, "x"), OSError(), "", "[]", "{}"]
)
def test_a_gpu_that_cannot_be_measured(failure: object, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(command: list[str], **options: object) -> SimpleNamespace:
        if isinstance(failure, Exception):
            raise failure
        return SimpleNamespace(stdout=failure)

    monkeypatch.setattr(measure.subprocess, "run", child)
    assert first_speeds("cuda") is None
    install(machine, "NVIDIA H100 80GB HBM3")
    assert first_speeds("cuda") == DATA_SHEETS["H100"]
    assert kept_speeds("cuda") is None, "an estimate is not kept"


def test_the_arithmetic_of_a_gpus_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece of work runs on the meta device and counts as a second."""
    shapes: list[tuple[int, ...]] = []
    empty = torch.empty

    def unpinned(*args: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
        return empty(*args, **{"device": "meta", **options})

    def second(work: Callable[[], torch.Tensor]) -> float:
        shapes.append(tuple(work().shape))
        return 1.0

    monkeypatch.setattr(measure.torch, "empty", unpinned)
    monkeypatch.setattr(measure.torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(measure, "_gpu_seconds", second)
    found = measure_gpu("meta")
    assert shapes == [(8192, 8192), (1, 32, 16384, 128), (2**30,), (2**28,)]
    assert found.matmul_tflops == pytest.approx(2 * 8192**3 / 1e12)
    assert found.attention_tflops == pytest.approx(4 * 128 * 32 * 16384 * 16384 / 2 / 1e12)
    assert found.memory_gb_s == pytest.approx(2 * 2**30 / 1e9) and found.link_gb_s == pytest.approx(2**28 / 1e9)
    assert found.measured and found.device == "a GPU"


def test_measuring_a_cpu_says_what_it_did() -> None:
    found = measure_cpu()
    assert found.attention_tflops == pytest.approx(speeds.CPU_ATTENTION * found.matmul_tflops)


def test_the_plan_command_never_measures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHAPES["Llama-3-8B"], "num_hidden_layers": 2}))
    asked = ["--model", "Llama-3-8B", "--ctx", "1M", "--budget", "h100-80g"]
    assert plan_command(asked) == 0
    assert "\nreading 1M tokens takes about " in (out := capsys.readouterr().out) and "(an estimate for an H100" in out
    assert plan_command([*asked, "--json"]) == 0
    times = json.loads(capsys.readouterr().out)["times"]
    assert times["read_s"] > 100 and times["speeds"]["measured"] is False
    assert plan_command(["--model", str(tmp_path), "--ctx", "1K", "--weights", "nf4"]) == 0
    assert "(an estimate for A Processor, 4 cores)" in capsys.readouterr().out
    keep_speeds("cpu", replace(FIGURES, device="A Processor, 4 cores"))
    assert plan_command(["--model", str(tmp_path), "--ctx", "1K", "--weights", "nf4"]) == 0
    assert "(by what this machine measured)" in capsys.readouterr().out
    assert plan_command([*asked, "--kv", "bf16", "--ctx", "100K", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["times"] is None
