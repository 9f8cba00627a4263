"""What is refused at the start on cuda, with torch's answers about the GPU replaced; and progress of pinning."""

import importlib.util
import io
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console

import longrun
import longrun.runtime.load
from longrun.chat.command import chat_command
from longrun.chat.progress import PinProgress
from longrun.cli import run
from longrun.config.model_config import ModelConfig
from longrun.errors import ConfigError, InputError, LongrunError, PlanError
from longrun.machine import host_memory
from longrun.plan.budget import Budget
from longrun.plan.plan import make_plan
from longrun.runtime import gpu_checks
from longrun.runtime.memory_checks import bytes_in_use, check_free_memory

GB = 10**9
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 8192,
}


@dataclass
class Card:
    """What torch says of the GPU."""

    name: str = "NVIDIA H100 80GB HBM3"
    major: int = 9
    minor: int = 0
    total_memory: int = 85 * GB
    free: int = 84 * GB
    reserved: int = 0
    allocated: int = 0


def available(monkeypatch, free):
    """A machine with so much main memory free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": free})())


@pytest.fixture
def card(monkeypatch):
    """A machine with an H100, to be changed by a test; loading weights is an error."""
    card = Card()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (card.free, card.total_memory))
    available(monkeypatch, 200 * GB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: card.reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: card.allocated)
    monkeypatch.setattr(host_memory, "_OWN_CGROUPS", Path("/none"))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: object() if name == "triton" else find_spec(name, *rest)
    )
    # There is a config.json and nothing else.
    checked = SimpleNamespace(tokenizer=None, notices=())
    monkeypatch.setattr(longrun.runtime.load, "check_folder", lambda *args: checked)
    monkeypatch.setattr(longrun.runtime.load, "model_fingerprint", lambda *args: "")
    monkeypatch.setattr(longrun.runtime.load, "load_decoder", lambda *args: pytest.fail("a weight was read"))
    return card


@pytest.fixture
def reached(monkeypatch):
    """The plans of loads that passed all checks; `Runtime` itself is not made."""
    plans = []
    monkeypatch.setattr(longrun.runtime.load, "load_parts", lambda *args: (None, None, ()))
    monkeypatch.setattr(longrun.runtime.load, "Runtime", lambda setup: plans.append(setup.plan))
    return plans


@pytest.fixture
def folder(tmp_path):
    def make(**changes):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
        return tmp_path

    return make


def refusal(kind, call, *args, **options):
    """The message of the refusal: one sentence on one line."""
    with pytest.raises(kind) as raised:
        call(*args, **options)
    text = str(raised.value)
    assert "\n" not in text and not text.endswith(".") and ": " in text
    return text


def test_what_is_in_use_is_the_driver_s_count_and_this_process(card):
    card.free = 60 * GB
    device, host = bytes_in_use("cuda")
    own, none = bytes_in_use("cpu")
    assert (device, none) == (25 * GB, 0)
    assert host == pytest.approx(own, rel=0.1) and 10**7 < own < 10**11


def test_a_gpu_that_can_everything_passes(card, folder, reached):
    longrun.load(folder(), device="cuda", ctx=5000)
    longrun.load(folder(), ctx=5000)
    assert [plan.device_type for plan in reached] == ["cuda", "cuda"]
    assert reached[0].budget_source == Budget.load("h100-80g").source


def test_torch_without_cuda(monkeypatch, folder):
    monkeypatch.setattr(torch.version, "cuda", None)
    text = refusal(InputError, longrun.load, folder(), device="cuda")
    assert torch.__version__ in text and "install torch's CUDA build" in text and "device cpu" in text


@pytest.mark.parametrize(
    ("says", "parts"),
    [
        ("No CUDA GPUs are available", ("finds no GPU here (No CUDA GPUs are available)", "use device cpu")),
        (
            "The NVIDIA driver on your system is too old (found version 11040). Please update\nyour GPU driver.",
            ("driver is too old for torch's CUDA 13.0", "update the driver", "use device cpu"),
        ),
        (None, ("finds no GPU here: use device cpu",)),
    ],
)
def test_no_gpu_or_an_old_driver(card, monkeypatch, folder, says, parts):
    def start():
        if says is not None:
            raise RuntimeError(says)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", start)
    text = refusal(InputError, longrun.load, folder(), device="cuda")
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("major", "minor", "served"), [(7, 5, False), (7, 0, False), (8, 0, True), (8, 9, True), (12, 0, True)]
)
def test_the_oldest_gpu(card, folder, reached, major, minor, served):
    card.name, card.major, card.minor = "Tesla T4", major, minor
    if served:
        longrun.load(folder(), device="cuda")
        assert len(reached) == 1
        return
    text = refusal(InputError, longrun.load, folder(), device="cuda")
    for part in ("Tesla T4", f"sm_{major}{minor},", "sm_80 (A100, RTX 30) or newer", "use device cpu"):
        assert part in text


def test_without_triton(card, monkeypatch, folder, reached):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    text = refusal(InputError, longrun.load, folder(), device="cuda")
    assert "install triton>=3.6" in text and "device cpu" in text
    monkeypatch.setattr(gpu_checks, "check_gpu", lambda: pytest.fail("asked although the CPU is used"))
    longrun.load(folder(), device="cpu")
    assert len(reached) == 1


def test_a_budget_larger_than_the_gpu_is_refused_before_planning(card, folder, monkeypatch):
    card.name, card.total_memory = "NVIDIA A10", 23_836_000_000
    monkeypatch.setattr(longrun.runtime.load, "make_plan", lambda *args, **options: pytest.fail("planned"))
    text = refusal(PlanError, longrun.load, folder(), "h100-80g", device="cuda")
    for part in ("h100-80g", "80.0 GB", "NVIDIA A10", "23.8 GB", 'set gpu = "23.8 GB"', "[memory]"):
        assert part in text


def test_what_is_proposed_as_gpu_is_accepted(card, folder, reached):
    card.total_memory = 23_899_999_999
    text = refusal(PlanError, gpu_checks.check_budget, Budget.load("rtx4090-24g"))
    proposed = text.split('"')[1]
    longrun.load(folder(), Budget.parse(f'[memory]\ngpu = "{proposed}"', "mine"), device="cuda")
    assert len(reached) == 1
    assert gpu_checks.check_budget(Budget(device_bytes=card.total_memory)) is None
    with pytest.raises(PlanError):
        gpu_checks.check_budget(Budget(device_bytes=card.total_memory + 1))


def test_the_default_budget_is_the_largest_that_the_gpu_holds(card):
    for total, name in ((85 * GB, "h100-80g"), (47 * GB, "rtx4090-24g"), (25 * GB, "rtx4090-24g")):
        card.total_memory = total
        assert gpu_checks.default_budget("cuda") == name
    assert gpu_checks.default_budget("cpu") == "cpu"
    card.total_memory, card.name = 12 * GB, "NVIDIA RTX 3060"
    text = refusal(InputError, gpu_checks.default_budget, "cuda")
    assert "12.0 GB" in text and "RTX 3060" in text and "budget" in text


def test_gpu_memory_that_others_hold(card, folder, reached):
    plans, options = [], {"budget": Budget(device_bytes=20 * GB), "device": "cuda", "ctx": 8000}
    longrun.load(folder(), **options, on_plan=plans.append)
    card.free = plans[0].device_bytes
    longrun.load(folder(), **options)
    card.free -= 1
    card.total_memory = card.free + 33 * GB
    text = refusal(PlanError, longrun.load, folder(), **options)
    assert "33.0 GB are taken already" in text and "end what else uses the GPU" in text
    assert len(reached) == 2


def test_gpu_memory_that_is_this_runs_own_already(card):
    """What torch keeps unused counts as free; weights, other sessions and compiled kernels are not asked for twice."""
    config = ModelConfig.from_dict(LLAMA, "config.json")
    plan = make_plan(config, Budget(device_bytes=20 * GB), 8000, device_type="cuda", reserved_bytes=3 * GB)
    sizes = {item.name: item.bytes for item in plan.items}
    held = sizes["weights"] + sizes["reserved"]
    for loaded, compiled, own in (
        (False, False, 0),
        (True, False, held),
        (True, True, held + sizes["runtime base"]),
    ):
        for kept in (0, GB):
            card.reserved, card.allocated = own + kept, own
            card.free = plan.device_bytes - own - kept
            check_free_memory(plan, loaded, compiled)
            card.free -= 1
            refusal(PlanError, check_free_memory, plan, loaded, compiled)


def test_host_memory_for_the_host_pool_only(card, folder, reached, monkeypatch):
    """On cuda the machine must hold the host pool, not the weights."""
    plans = []
    budget = Budget(device_bytes=20 * GB, host_bytes=GB)
    longrun.load(folder(), budget, device="cuda", ctx=200_000, device_share=0.5, on_plan=plans.append)
    needed = plans[0].host_bytes
    assert 0 < needed < plans[0].device_bytes
    for free, fits in ((needed, True), (needed - 1, False)):
        available(monkeypatch, free)
        if fits:
            longrun.load(folder(), budget, device="cuda", ctx=200_000, device_share=0.5)
            continue
        text = refusal(PlanError, longrun.load, folder(), budget, device="cuda", ctx=200_000, device_share=0.5)
        assert "host pool" in text and "200,000 tokens" in text and "[memory]" in text
    assert len(reached) == 2


@pytest.mark.parametrize(
    ("changes", "page_size", "parts"),
    [
        ({"head_dim": 96}, 64, ("head_dim 96", "64 or 128")),
        ({"head_dim": 256}, 64, ("head_dim 256", "64 or 128")),
        ({"num_attention_heads": 18, "head_dim": 64}, 64, ("9 query heads", "at most 8")),
        ({}, 128, ("page_size 128", "serves 64", "page_size = 64")),
    ],
)
def test_shapes_without_an_int4_kernel(card, folder, reached, changes, page_size, parts):
    pytest.importorskip("triton")
    budget = Budget(device_bytes=20 * GB, page_size=page_size)
    text = refusal(ConfigError, longrun.load, folder(**changes), budget, device="cuda", ctx=1000)
    for part in (*parts, "kv_format bf16 or device cpu"):
        assert part in text
    longrun.load(folder(**changes), budget, device="cuda", ctx=1000, kv_format="bf16")
    longrun.load(folder(**changes), Budget(device_bytes=GB, page_size=page_size), device="cpu", ctx=1000)
    assert [plan.device_type for plan in reached] == ["cuda", "cpu"]


@pytest.mark.parametrize("changes", [{}, {"head_dim": 64}, {"num_attention_heads": 16, "head_dim": 128}])
def test_shapes_with_an_int4_kernel(card, folder, reached, changes):
    pytest.importorskip("triton")
    longrun.load(folder(**changes), device="cuda", ctx=1000)
    assert len(reached) == 1


def started(command, capsys):
    """Status, stdout and stderr of a command that runs in this process."""
    with pytest.raises(SystemExit) as left:
        run(command)
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda card: setattr(card, "major", 7), "sm_70"),
        (lambda card: setattr(card, "total_memory", 40 * GB), "40.0 GB"),
        (lambda card: setattr(card, "free", GB // 10), "84.9 GB are taken already"),
    ],
)
def test_the_chat_ends_with_one_sentence(card, folder, capsys, change, part):
    change(card)
    arguments = ["--model", str(folder()), "--device", "cuda", "--budget", "h100-80g", "--prompt", "Hello"]
    status, out, err = started(lambda: chat_command(arguments), capsys)
    assert status == 2 and out == ""
    assert err.splitlines()[-1].startswith("error: ") and part in err.splitlines()[-1]
    assert err.count("error") == 1 and "Traceback" not in err


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs torch without CUDA")
@pytest.mark.parametrize(
    "command",
    [["-m", "longrun.chat", "--prompt", "Hello"], ["scripts/needle_sweep.py", "--lengths", "500", "--out", "OUT"]],
)
def test_commands_on_a_machine_without_cuda(planted, tmp_path, warm_python, command):
    """In a process of its own; the sweep reads the checkpoint's files before it loads, so it gets a whole one."""
    command = [str(tmp_path / "out") if word == "OUT" else word for word in command]
    done = warm_python.run(*command, "--model", planted.path, "--device", "cuda")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: device cuda was asked for, but torch")


def test_errors_are_those_that_commands_print():
    for kind in (InputError, ConfigError, PlanError):
        assert issubclass(kind, LongrunError)


GIB = 2**30


def test_pinning_is_shown_in_place_on_a_terminal():
    out = io.StringIO()
    progress = PinProgress(Console(file=out, force_terminal=True, width=100, color_system=None))
    for done in (12 * GIB, 99 * GIB, 100 * GIB):
        progress(done, 100 * GIB)
    first, second, cleared, rest = out.getvalue().split("\r")
    assert first == "Pinning host memory 12.0 / 100.0 GiB"
    assert second == "Pinning host memory 99.0 / 100.0 GiB"
    assert cleared.strip() == "" and len(cleared) >= len(second)
    assert rest == ""


def test_pinning_is_a_line_now_and_then_elsewhere(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    out = io.StringIO()
    progress = PinProgress(Console(file=out, width=100))
    for second in range(1, 13):
        now[0] += 1.0
        progress(second * GIB, 12 * GIB)
    assert out.getvalue().splitlines() == [
        "Pinning host memory 5.0 / 12.0 GiB",
        "Pinning host memory 10.0 / 12.0 GiB",
    ]


def test_load_hands_the_progress_of_pinning_to_what_pins(card, folder, monkeypatch, reached):
    given = []
    progress = PinProgress(Console(file=io.StringIO()))

    def load_parts(checked, split, plan, compiled_kernels, on_pin):
        given.append(on_pin)
        return None, None, ()

    monkeypatch.setattr(longrun.runtime.load, "load_parts", load_parts)
    longrun.load(folder(), ctx=1000, on_pin=progress)
    assert given == [progress]
