"""What the driver is asked when host memory is pinned, and how its refusals are reported: with a made-up driver."""

import pytest
import torch
from fake_pinning import PAGE

from longrun.cache import pinned
from longrun.cache.pinned import CudaRegistrar, pinned_bytes
from longrun.errors import PlanError


class FakeDriver:
    """libcuda's part that is used: one context, device pointers `shift` away from the host's."""

    def __init__(self, status=0, shift=0):
        self.status, self.shift, self.calls, self.depth = status, shift, [], 0

    def cuCtxGetCurrent(self, context):
        context._obj.value = 0xC0
        return 0

    def cuCtxPushCurrent_v2(self, context):
        assert context.value == 0xC0
        self.depth += 1

    def cuCtxPopCurrent_v2(self, context):
        self.depth -= 1

    def cuMemHostRegister_v2(self, address, size, flags):
        assert self.depth == 1
        self.calls.append(("register", address.value, size.value, flags.value))
        return self.status

    def cuMemHostGetDevicePointer_v2(self, pointer, address, flags):
        assert self.depth == 1
        pointer._obj.value = address.value + self.shift
        return 0

    def cuCtxSynchronize(self):
        assert self.depth == 1
        self.calls.append(("synchronize",))

    def cuMemHostUnregister(self, address):
        assert self.depth == 1
        self.calls.append(("unregister", address.value))

    def cuGetErrorString(self, status, text):
        text._obj.value = {2: b"out of memory"}.get(status)


@pytest.fixture
def driver(monkeypatch):
    """Makes a registrar of a fake driver."""
    fake = FakeDriver()
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("S", (), {"synchronize": lambda self: None})())
    monkeypatch.setattr(pinned.ctypes, "CDLL", lambda name: fake)
    return fake


def test_the_driver_is_asked_in_torchs_context(driver):
    registrar = CudaRegistrar()
    buffer = pinned_bytes(3 * PAGE, None, registrar, piece_bytes=2 * PAGE)
    at = buffer.tensor.data_ptr()
    assert driver.calls == [("register", at, 2 * PAGE, 3), ("register", at + 2 * PAGE, PAGE, 3)]
    del driver.calls[:]
    buffer.close()
    assert driver.calls == [("synchronize",), ("unregister", at + 2 * PAGE), ("synchronize",), ("unregister", at)]
    assert driver.depth == 0


def test_what_the_driver_says_of_a_failure(driver):
    driver.status = 2
    with pytest.raises(PlanError, match=r"only 0 B could be \(out of memory\)"):
        pinned_bytes(PAGE)
    driver.status = 999
    with pytest.raises(PlanError, match=r"\(CUDA error 999\)"):
        pinned_bytes(PAGE)
    assert [call[0] for call in driver.calls] == ["register", "register"] and driver.depth == 0


def test_another_address_on_the_gpu_is_refused(driver):
    driver.shift = 4096
    with pytest.raises(PlanError, match="another address than the CPU"):
        pinned_bytes(PAGE)
    assert [call[0] for call in driver.calls] == ["register", "synchronize", "unregister"] and driver.depth == 0


def test_without_a_driver(monkeypatch, driver):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pinned.ctypes, "CDLL", missing)
    with pytest.raises(PlanError, match=r"libcuda\.so\.1"):
        pinned_bytes(PAGE)
