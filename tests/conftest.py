"""Fixtures that several test files need."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from long_training import Training
    from playwright.sync_api import Browser
    from run_here import Done
    from server_case import Served
    from warm_python import WarmPython

    from longrun.lab.planted import PlantedModel

# Tests run beside other work: waiting threads must not spin. Read when torch loads its OpenMP runtime.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores; tiny models gain nothing by threads


@pytest.fixture(autouse=True, scope="session")
def _hear_sigint() -> None:
    """A shell starts background jobs with SIGINT ignored, and their children inherit that; tests send the signal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    """A handler that a test leaves behind would be the next test's."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)
    assert after == before, "this test left a signal's handler behind"


@pytest.fixture(autouse=True)
def _empty_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chat reads what is piped in beside --prompt; pytest's own stdin refuses to be read."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's file, from the user's cache or fetched there once."""
    from longrun.model import demo

    return demo.demo_model()


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    """Starts programs without the seconds of importing torch."""
    from warm_python import WarmPython

    warm = WarmPython(tmp_path_factory.mktemp("printed"))
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def warm_interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    """Starts programs whose Triton kernels are interpreted, without the seconds of imports."""
    from warm_python import WarmPython

    warm = WarmPython(tmp_path_factory.mktemp("interpreted"), ("torch", "triton", "pytest"), TRITON_INTERPRET="1")
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> PlantedModel:
    """A tiny model that finds needles by construction; its folder is only read."""
    from longrun.lab.planted import make_planted_model

    return make_planted_model(tmp_path_factory.mktemp("planted") / "model")


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of characters with a chat template; its folder is only read."""
    from server_case import save_chat_model

    return save_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def served(chat_model: Path) -> Iterator[Served]:
    """A server over that model."""
    from server_case import serve

    with serve(chat_model) as running:
        yield running


@pytest.fixture(scope="module")
def kept(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that keeps documents."""
    from server_case import serve

    with serve(chat_model, documents=tmp_path_factory.mktemp("kept")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for tests of the server's page. Of one module: while it runs, its thread runs an event loop."""
    from page_case import CHROMIUM
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, playwright.chromium.launch(
        executable_path=CHROMIUM, args=["--no-sandbox"]
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with the needles of planted_chat.py."""
    from planted_chat import save_text

    path = tmp_path_factory.mktemp("text") / "text.txt"
    save_text(path)
    return path


@pytest.fixture
def chat(
    planted: PlantedModel, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Done]]:
    """Runs the chat's command in this process, as `python -m longrun.chat` does, without its seconds of imports."""
    from planted_chat import chat_here

    yield from chat_here(planted.path, capsys, monkeypatch)


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A tiny model after its training on long texts; its folders are only read."""
    from long_training import Training

    return Training.run(tmp_path_factory.mktemp("training"))


def pytest_collection_finish() -> None:
    """What is imported by now is never garbage: each of many full collections would pass through all of it."""
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are left out (deselected, and counted as such) where torch finds no GPU."""
    import torch

    if torch.cuda.is_available():
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
