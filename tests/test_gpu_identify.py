"""`identify` on a real GPU: `pytest -m gpu`. It repeats to the bit, resumes after a stop, is linear in memory."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from readable_model import save_readable
from test_adapter import write_adapter

from longrun.needles.needles import generate_sentences
from longrun.patterns.head_map import HeadMap
from longrun.patterns.identify import identify
from longrun.patterns.identify_settings import IdentifyProgress, IdentifySettings

pytestmark = pytest.mark.gpu

# As a process of identify's own has it: other GPU tests in this process may use cuBLAS first, which reads it once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = "cuda"
METHODS = ("gates", "reconstruction")
SHAPE = {"head_dim": 64, "hidden_size": 192, "intermediate_size": 320, "max_position_embeddings": 2**16}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_readable(tmp_path_factory.mktemp("gpu identify") / "tiny", **SHAPE)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentences = generate_sentences("identify on a GPU")
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(next(sentences) for _ in range(800)))
    return file


@pytest.fixture
def settings(model_dir: Path, text_file: Path, tmp_path: Path) -> IdentifySettings:
    """Four texts of 1,024 tokens at most: tiles of every kind, and repeated parts."""
    return IdentifySettings(
        str(model_dir), str(tmp_path / "map"), context=1024, min_context=700, steps=4, learning_rate=0.05,
        text_files=(str(text_file),), device=DEVICE, save_every=1, num_keys=2, sink_size=4, recent_size=32,
    )  # fmt: skip


class Stop(Exception):
    pass


def measured(settings: IdentifySettings, out: str, **changes: object) -> HeadMap:
    return identify(replace(settings, out=str(Path(settings.out).with_name(out)), **changes))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_map_to_the_bit(settings: IdentifySettings, method: str) -> None:
    first, again, other = (
        measured(settings, out, method=method, seed=seed) for out, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first.scores == again.scores
    assert first.scores != other.scores
    assert len({score for row in first.scores for score in row}) > 3


@pytest.mark.parametrize("layers_again", [False, True])
def test_gates_repeat_also_where_layers_are_computed_again(
    settings: IdentifySettings, layers_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longrun.patterns.gates.CHECKPOINT_BYTES", 0 if layers_again else 2**40)
    assert measured(settings, "first").scores == measured(settings, "again").scores


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_to_the_very_same_map(settings: IdentifySettings, method: str) -> None:
    whole = measured(settings, "whole", method=method)
    seen: list[IdentifyProgress] = []

    def stop(progress: IdentifyProgress) -> None:
        seen.append(progress)
        if len(seen) > 2 and progress.step * 2 > progress.num_steps:
            raise Stop

    settings = replace(settings, method=method)
    with pytest.raises(Stop):
        identify(settings, stop)
    later: list[IdentifyProgress] = []
    assert identify(settings, later.append).scores == whole.scores
    assert 1 < later[0].step <= seen[-1].step + 1


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_measured_too(settings: IdentifySettings, model_dir: Path, tmp_path: Path, method: str) -> None:
    adapter = write_adapter(tmp_path / "lora", model_dir, dtype=torch.bfloat16, own={"rope_theta": 9000.0})
    base = measured(settings, "base", method=method)
    assert measured(settings, "long", method=method, adapter=str(adapter)).scores != base.scores


@pytest.mark.parametrize("method", METHODS)
def test_the_gpu_agrees_with_the_cpu_in_float32(settings: IdentifySettings, method: str) -> None:
    """Scores of the same two texts: ranks may swap where raw scores are nearly equal, gates move nearly alike."""
    settings = replace(settings, method=method, dtype="float32", steps=2, context=600, min_context=600)
    maps = [measured(settings, device, device=device) for device in ("cpu", DEVICE)]
    found, expected = (torch.tensor(one.scores) for one in maps)
    if method == "reconstruction":
        assert (found - expected).abs().max() <= 1 / 8 + 1e-6
    else:
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_memory_grows_with_the_text_and_not_with_its_square(settings: IdentifySettings, method: str) -> None:
    """16,384 tokens: one matrix of all scores of a layer's six heads would take 3.2 GB in bf16."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    measured(settings, "long", method=method, context=16384, min_context=16384, steps=1)
    assert torch.cuda.max_memory_allocated() - before < 2.8e9
