"""Free memory is checked before weights are read and before every session; what still fails gives one sentence."""

import contextlib
import resource
from types import SimpleNamespace

import psutil
import pytest
import torch

import longrun
import longrun.runtime.load
import longrun.runtime.runtime
from longrun.allocation import failed_allocations, is_failed_allocation
from longrun.cli import run
from longrun.errors import PlanError
from longrun.machine import host_memory
from longrun.runtime.memory_checks import check_free_memory, library_notice

BIG = 400_000  # tokens: 1.4 GB of fp32 pages


@pytest.fixture(scope="module")
def runtime(planted):
    return longrun.load(planted.path, device="cpu", ctx=500, kv_format="fp32")


@contextlib.contextmanager
def limited(kind, extra):
    """This process may take `extra` bytes more than it has."""
    own = psutil.Process().memory_info()
    before = resource.getrlimit(kind)
    used = own.vms if kind == resource.RLIMIT_AS else own.data
    resource.setrlimit(kind, (used + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def sentence(call, *args, **options):
    with pytest.raises(PlanError) as raised:
        call(*args, **options)
    text = str(raised.value)
    assert "\n" not in text and ": " in text
    return text


def own_memory(monkeypatch, rss, shared, machine):
    info = SimpleNamespace(rss=rss, shared=shared, vms=rss, data=rss)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: info))
    monkeypatch.setattr(host_memory, "_machine_bytes", lambda: machine)


def test_what_is_resident_is_not_asked_for_twice(runtime, monkeypatch):
    """Of libraries and weights the process's own memory counts, and never more than was planned for them."""
    plan = runtime.plan
    sizes = {item.name: item.bytes for item in plan.items}
    base, weights = sizes["runtime base"], sizes["weights"]
    for rss, shared, loaded, held in (
        (300, 100, False, 200),
        (10**12, 0, False, base),
        (10**12, 0, True, base + weights),
        (base + 500, 0, True, base + 500),
    ):
        own_memory(monkeypatch, rss, shared, plan.total_bytes - held)
        check_free_memory(plan, loaded=loaded)
        own_memory(monkeypatch, rss, shared, plan.total_bytes - held - 1)
        text = sentence(check_free_memory, plan, loaded=loaded)
        assert "main memory" in text and "smaller context than 500 tokens" in text
    own_memory(monkeypatch, 10**12, 0, plan.total_bytes - base - weights + 1000)
    check_free_memory(plan, loaded=True, copied_bytes=1000)
    assert "main memory" in sentence(check_free_memory, plan, loaded=True, copied_bytes=1001)


def test_a_run_that_fits_in_a_small_container_is_not_refused(planted, monkeypatch):
    """600 MB, of which the libraries hold 200: what is left holds what the plan needs besides them."""
    own_memory(monkeypatch, 300 * 10**6, 100 * 10**6, 400 * 10**6)
    monkeypatch.setattr(longrun.runtime.load, "load_parts", lambda *args: (None, None, ()))
    monkeypatch.setattr(longrun.runtime.load, "Runtime", lambda *args: "loaded")
    assert longrun.load(planted.path, device="cpu", ctx=500) == "loaded"


def test_a_session_needs_free_memory(runtime, tmp_path, monkeypatch):
    before = runtime.plan
    session = runtime.new_session()
    session.prefill(range(5, 300))
    session.save(tmp_path / "session")
    monkeypatch.setattr(host_memory, "_machine_bytes", lambda: 10**9)
    text = sentence(runtime.new_session, BIG)
    assert "GB more (" in text and "1.00 GB are free" in text and "400,000 tokens" in text
    assert sentence(runtime.load_session, tmp_path / "session", BIG) == text
    assert runtime.plan == before
    again = runtime.load_session(tmp_path / "session")
    assert torch.equal(again.logits, session.logits)


def test_libraries_that_hold_more_than_planned_are_told_of(runtime, monkeypatch):
    plan = runtime.plan
    sizes = {item.name: item.bytes for item in plan.items}
    base, weights = sizes["runtime base"], sizes["weights"]
    for before, now, told in (
        (300 * 10**6, weights + base + 50 * 10**6, False),
        (300 * 10**6, weights + base + 150 * 10**6, True),
        (base + 10**10, weights + base + 10**10, False),  # a caller with 10 GB of its own
    ):
        own_memory(monkeypatch, now, 0, 0)
        notices = library_notice(plan, before)
        assert ["150 MB more than planned" in notice for notice in notices] == [True] * told


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_ulimit_is_seen(runtime, kind):
    with limited(kind, 10**9):
        assert host_memory.available_bytes() <= 10**9
        text = sentence(runtime.new_session, BIG)
        session = runtime.new_session(1000)
    assert "GB more (" in text and "free memory" in text
    session.prefill([5, 6, 7])


def test_a_failed_allocation_is_a_sentence(runtime, planted, monkeypatch):
    """Where the checks did not see it coming: in a new session, in a step, and while a model is loaded."""
    monkeypatch.setattr(longrun.runtime.runtime, "check_free_memory", lambda *args: None)
    with limited(resource.RLIMIT_AS, 500 * 10**6):
        text = sentence(runtime.new_session, BIG)
    assert text.startswith("memory ran out while a session was made (1.") and "GB more were asked for)" in text

    session = runtime.new_session()

    def fail(*args, **options):
        torch.empty(10**15, dtype=torch.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(runtime.parts.decoder, "forward", fail)
        text = sentence(session.prefill, [5, 6, 7])
    assert text.startswith("memory ran out in the middle of a step") and "1000 TB more" in text
    monkeypatch.setattr(longrun.runtime.load, "load_decoder", fail)
    assert sentence(longrun.load, planted.path, device="cpu", ctx=500).startswith("memory ran out while the model was")


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (ImportError("No module named 'torch'"), False),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_a_failed_allocation_is(error, failed, capsys):
    assert is_failed_allocation(error) == failed
    with pytest.raises(PlanError if failed else type(error)), failed_allocations("here"):
        raise error

    def command():
        raise error

    with pytest.raises(SystemExit if failed else type(error)) as left:
        run(command)
    if failed:
        assert left.value.code == 2
        assert capsys.readouterr().err.startswith("error: memory ran out on the way")
