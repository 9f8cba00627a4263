"""The demo model comes with its adapter: who gets it, who does not, what is said, and what the chat and a sweep do."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from readable_model import save_readable
from test_adapter import write_adapter

from longrun.chat.command import chat_command
from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError
from longrun.model import choice, demo
from longrun.model.adapter import Adapter
from longrun.model.choice import DEMO_CONTEXT, ModelChoice, choose_model
from longrun.model.fingerprint import model_fingerprint, weights_fingerprint
from scripts.quality import needle_sweep


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands in for the demo model here; it was trained on 64 tokens."""
    return save_readable(tmp_path_factory.mktemp("choice") / "tiny")


@pytest.fixture
def alone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo model where no adapter ships; returns the folder where one would stand."""
    monkeypatch.setattr(choice, "demo_model", lambda: model)
    monkeypatch.setattr(demo, "_ADAPTER", tmp_path / "adapters" / "long")
    return tmp_path / "adapters" / "long"


@pytest.fixture
def shipped(alone: Path, model: Path) -> Path:
    """The same with an adapter, whose window is 2**20 tokens."""
    alone.parent.mkdir()
    base = weights_fingerprint(model)
    return write_adapter(
        alone, model, own={"max_position_embeddings": 2**20, "rope_theta": 900.0, "base_weights": base}
    )


def test_the_adapter_ships_beside_the_code() -> None:
    assert demo._ADAPTER.parent == Path(demo.__file__).parent / "adapters"
    assert (demo._ADAPTER.parent / "README.md").is_file()


@pytest.mark.skipif(demo.demo_adapter() is None, reason="no adapter ships with this state of the package")
def test_the_shipped_adapter_is_the_demo_models(demo_model: Path) -> None:
    adapter = Adapter.open(demo.demo_adapter(), ModelConfig.from_dir(demo_model))
    assert adapter.base_weights == weights_fingerprint(demo_model)
    assert adapter.max_position_embeddings > 8192


def test_nothing_ships(alone: Path, model: Path) -> None:
    assert demo.demo_adapter() is None
    assert choose_model(None, None) == choose_model(None, "none") == ModelChoice(model, None)


def test_the_demo_model_gets_its_adapter_and_others_do_not(shipped: Path, model: Path) -> None:
    chosen = choose_model(None, None)
    assert (chosen.model_dir, chosen.adapter) == (model, shipped)
    assert chosen.notice == "the demo model is loaded with its adapter long: --adapter none leaves it out"
    for none in ("none", Path("none")):
        assert choose_model(None, none) == ModelChoice(model, None)
    assert choose_model(None, "x") == ModelChoice(model, Path("x"))
    assert choose_model(model, None) == choose_model(str(model), "none") == ModelChoice(model, None)
    assert choose_model(model, "x") == ModelChoice(model, Path("x"))


def test_an_incomplete_adapter_is_an_error_and_not_left_out(shipped: Path, model: Path) -> None:
    (shipped / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"long lacks adapter_model.safetensors: install longrun again.*none"):
        choose_model(None, None)
    assert choose_model(None, "none") == ModelChoice(model, None)
    (shipped / "adapter_config.json").unlink()
    shipped.rmdir()
    assert choose_model(None, None) == ModelChoice(model, None)


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the chat on a CPU with one question; returns what was printed besides the answer."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))

    def call(*arguments: str) -> str:
        options = ["--device", "cpu", "--prompt", "The old river", "--max-new-tokens", "1"]
        assert chat_command([*options, *arguments]) == 0
        return capsys.readouterr().err

    return call


def test_the_chat_uses_the_adapter_says_so_and_reads_beyond_the_checkpoints_window(shipped: Path, chat) -> None:
    said = chat()
    assert "note: the demo model is loaded with its adapter long: --adapter none leaves it out\n" in said
    assert (DEMO_CONTEXT, "\n32K tokens on cpu" in said) == (32_000, True)
    said = chat("--ctx", "2K")
    assert "\n2K tokens on cpu" in said and "trained for" not in said
    said = chat("--adapter", "none", "--ctx", "2K")
    assert "adapter" not in said
    assert "2,000 tokens are more than the 64 that the model was trained for" in said
    said = chat("--adapter", "none")
    assert said.startswith("64 tokens on cpu")


def test_a_damaged_adapter_stops_the_chat(shipped: Path, chat) -> None:
    file = shipped / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        chat()


def test_a_sweep_records_the_adapter(shipped: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--lengths", "400", "--depths", "1", "--needles", "1", "--device", "cpu", "--out"]
    opened = Adapter.open(shipped, ModelConfig.from_dir(model))
    for out, more, fingerprint in (("long", [], opened), ("plain", ["--adapter", "none"], None)):
        assert needle_sweep.main([*arguments, str(tmp_path / out), *more]) == 0
        found = json.loads((tmp_path / out / "results.json").read_text())
        assert found["settings"]["model_fingerprint"] == model_fingerprint(model, fingerprint)
        assert found.get("adapter") == (None if more else "long")
        assert ("loaded with its adapter long" in capsys.readouterr().out) == (not more)
