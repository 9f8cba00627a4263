"""`identify`: folder and progress on disk, resuming to the bit, errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from readable_model import save_readable
from test_adapter import write_adapter

from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError, HeadMapError, InputError
from longrun.model.adapter import Adapter
from longrun.model.fingerprint import model_fingerprint, weights_fingerprint
from longrun.needles.needles import generate_sentences
from longrun.patterns import __main__ as command
from longrun.patterns.head_map import HeadMap
from longrun.patterns.identify import identify, read_text
from longrun.patterns.identify_checkpoint import Checkpoint
from longrun.patterns.identify_progress import describe
from longrun.patterns.identify_settings import IdentifyProgress, IdentifySettings

STEPS = 6


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A tiny random Llama with a tokenizer of one token a character: 3 layers of 3 KV heads."""
    return save_readable(tmp_path_factory.mktemp("identify") / "tiny", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    sentences = generate_sentences("identify test")
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(next(sentences) for _ in range(60)))
    return file


@pytest.fixture
def settings(model_dir: Path, text_file: Path, tmp_path: Path) -> IdentifySettings:
    return IdentifySettings(
        str(model_dir), str(tmp_path / "map"), sink_size=4, recent_size=16, context=512, min_context=384, steps=STEPS,
        text_files=(str(text_file),), device="cpu", save_every=2, num_keys=2,
    )  # fmt: skip


class Stop(Exception):
    pass


def stop_after(step: int):
    def on_progress(progress: IdentifyProgress) -> None:
        if progress.step == step:
            raise Stop

    return on_progress


def test_a_map_is_written_with_all_that_decided_it(settings: IdentifySettings) -> None:
    seen: list[IdentifyProgress] = []
    found = identify(settings, seen.append)
    assert [one.step for one in seen] == [1, 2, 3, 4, 5, 6]
    assert all(one.num_steps == STEPS and one.num_heads == 9 and 384 <= one.tokens <= 512 for one in seen)
    saved = HeadMap.load(settings.out)
    assert saved == found
    assert (saved.num_layers, saved.num_kv_heads, saved.sink_size, saved.recent_size) == (3, 3, 4, 16)
    assert min(min(row) for row in found.scores) < 0.97
    facts = json.loads((Path(settings.out) / "config.json").read_text())["identification"]
    assert facts["method"] == "gates" and facts["context"] == 512 and facts["seed"] == 0
    assert facts["losses"] == [float(f"{one.loss:.6g}") for one in seen]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["seconds"] > 0
    text = Path(settings.text_files[0]).read_text()
    assert facts["text"]["num_tokens"] == len(text)
    assert not Path(settings.out + ".partial").exists()


def test_the_same_seed_gives_the_same_map_and_another_seed_another(settings: IdentifySettings, tmp_path: Path) -> None:
    first = identify(settings)
    assert identify(replace(settings, out=str(tmp_path / "again"))).scores == first.scores
    assert identify(replace(settings, out=str(tmp_path / "other"), seed=1)).scores != first.scores


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_an_interrupted_run_goes_on_to_the_very_same_map(settings: IdentifySettings, tmp_path: Path, stop: int) -> None:
    whole = identify(replace(settings, out=str(tmp_path / "whole")))
    with pytest.raises(Stop):
        identify(settings, stop_after(stop))
    assert not Path(settings.out).exists()
    seen: list[IdentifyProgress] = []
    assert identify(settings, seen.append).scores == whole.scores
    assert seen[0].step == stop // 2 * 2 + 1  # saved after every second step
    losses = [json.loads((tmp_path / name / "config.json").read_text())["identification"] for name in ("whole", "map")]
    assert losses[0]["losses"] == losses[1]["losses"]
    assert losses[0]["full_model_accuracy"] == losses[1]["full_model_accuracy"]


def test_progress_of_other_settings_is_refused_by_name_or_dropped_by_force(settings: IdentifySettings) -> None:
    with pytest.raises(Stop):
        identify(settings, stop_after(2))
    message = r"map\.partial holds the progress of other settings \(context 512 there, 500 here, seed 0 there, 7 here\)"
    with pytest.raises(InputError, match=message):
        identify(replace(settings, seed=7, context=500))
    seen: list[IdentifyProgress] = []
    identify(replace(settings, seed=7, context=500, force=True), seen.append)
    assert seen[0].step == 1


def test_force_with_the_same_settings_still_goes_on(settings: IdentifySettings) -> None:
    with pytest.raises(Stop):
        identify(settings, stop_after(2))
    seen: list[IdentifyProgress] = []
    identify(replace(settings, force=True, save_every=1), seen.append)
    assert seen[0].step == 3


@pytest.fixture
def adapter(model_dir: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "long", model_dir, own={"rope_theta": 9000.0, "max_position_embeddings": 4096})


@pytest.mark.parametrize("method", ["gates", "reconstruction"])
def test_an_adapter_is_measured_with_its_model_and_stands_in_the_map(
    settings: IdentifySettings, adapter: Path, model_dir: Path, tmp_path: Path, method: str
) -> None:
    settings = replace(settings, method=method, steps=2, learning_rate=0.05)
    base = identify(replace(settings, out=str(tmp_path / "base")))
    merged = identify(replace(settings, adapter=str(adapter)))
    assert merged.scores != base.scores
    facts = json.loads((tmp_path / "map" / "config.json").read_text())["identification"]
    opened = Adapter.open(adapter, ModelConfig.from_dir(model_dir))
    assert (facts["model"], facts["adapter"]) == ("tiny", "long")
    assert facts["adapter_sha256"] == opened.digest()
    assert facts["model_fingerprint"] == model_fingerprint(model_dir, opened) != model_fingerprint(model_dir)
    assert facts["weights_fingerprint"] == weights_fingerprint(model_dir)
    assert identify(replace(settings, adapter=str(adapter))) == merged  # already there
    with pytest.raises(HeadMapError, match="holds another head map"):
        identify(settings)


def test_the_progress_of_the_model_alone_is_not_gone_on_with(settings: IdentifySettings, adapter: Path) -> None:
    with pytest.raises(Stop):
        identify(settings, stop_after(2))
    with pytest.raises(InputError, match="adapter_sha256 None there"):
        identify(replace(settings, adapter=str(adapter)))


def test_the_adapters_positions_are_the_models(settings: IdentifySettings, adapter: Path) -> None:
    longer = replace(settings, method="reconstruction", context=1200, steps=1)
    with pytest.raises(InputError, match="more than the 2,048 positions"):
        identify(longer)
    identify(replace(longer, adapter=str(adapter)))


def test_a_wrong_adapter_is_refused(settings: IdentifySettings, model_dir: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", model_dir, own={"base_weights": "0" * 64})
    for folder, message in (
        (tmp_path / "none", "holds no adapter_config.json"),
        (other, "made for another checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            identify(replace(settings, adapter=str(folder)))


def test_damaged_progress_is_refused(settings: IdentifySettings) -> None:
    with pytest.raises(Stop):
        identify(settings, stop_after(2))
    state = Path(settings.out + ".partial") / "state.safetensors"
    state.write_bytes(state.read_bytes()[:50])
    with pytest.raises(InputError, match=r"state.safetensors is damaged .* delete .*map.partial to start again"):
        identify(settings)


def test_another_map_is_never_overwritten_without_force(settings: IdentifySettings) -> None:
    HeadMap.full(3, 3).save(settings.out)
    with pytest.raises(HeadMapError, match="holds another head map"):
        identify(settings, stop_after(1))
    found = identify(replace(settings, force=True))
    assert HeadMap.load(settings.out) == found
    # what is asked for is there already: nothing is computed
    assert identify(settings, stop_after(1)) == found
    with pytest.raises(HeadMapError, match="holds another head map"):
        identify(replace(settings, seed=3), stop_after(1))


@pytest.mark.parametrize("foreign", ["file", "model"])
def test_a_folder_of_something_else_is_refused_at_once(settings: IdentifySettings, foreign: str) -> None:
    out = Path(settings.out)
    if foreign == "file":
        out.write_text("notes")
    else:
        out.mkdir()
        (out / "config.json").write_text("{}")
    with pytest.raises(HeadMapError, match="is not a head map: give a new folder with --out"):
        identify(settings, stop_after(1))


def test_a_model_without_a_tokenizer_is_refused(settings: IdentifySettings, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(settings.model_dir, bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(CheckpointError, match="bare has no tokenizer"):
        identify(replace(settings, model_dir=str(bare)))
    (bare / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer in .*bare cannot be loaded"):
        identify(replace(settings, model_dir=str(bare)))


def test_a_text_too_short_is_refused_with_both_numbers(settings: IdentifySettings, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a" * 300)
    with pytest.raises(InputError, match=r"1 file\(s\) has 300 tokens and a context of 512 needs at least as many"):
        identify(replace(settings, text_files=(str(short),)))


def test_the_default_text_is_long_enough_for_any_context(settings: IdentifySettings, monkeypatch) -> None:
    class InBytes:
        def __init__(self, tokenizer: object) -> None:
            pass

        def ids(self, text: str) -> list[int]:
            return list(text.encode())

    monkeypatch.setattr("longrun.patterns.identify.TextEncoder", InBytes)

    chosen = replace(settings, text_files=(), context=1024).resolved(False)
    token_ids, facts = read_text(None, chosen)
    assert facts["num_tokens"] == len(token_ids) > 500_000
    again, same = read_text(None, chosen)
    assert torch.equal(token_ids, again) and same == facts
    assert read_text(None, replace(chosen, seed=1))[1]["sha256"] != facts["sha256"]
    longer, _ = read_text(None, replace(chosen, context=200_000))
    assert len(longer) >= 12 * 200_000  # however long a tokenizer's tokens are
    assert torch.equal(longer[: len(token_ids)], token_ids)


def test_progress_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "p", {"seed": 1}, save_every=3)
    assert checkpoint.load() is None and not checkpoint.folder.exists()
    assert [step for step in range(1, 10) if checkpoint.due(step)] == [3, 6, 9]
    tensors = {"a": torch.randn(2, 3), "n": torch.tensor(4.0), "empty": torch.zeros(0, dtype=torch.float64)}
    checkpoint.save(tensors, {"step": 3, "words": ["x"]})
    with pytest.raises(HeadMapError, match="the progress of a head map, is in use by another owner in this process"):
        Checkpoint(tmp_path / "p", {"seed": 1})
    checkpoint.release()
    loaded, facts = Checkpoint(tmp_path / "p", {"seed": 1}).load()
    assert facts == {"step": 3, "words": ["x"]}
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["settings.json", "state.safetensors"]
    checkpoint.remove()
    assert not (tmp_path / "p").exists()


def test_the_progress_line_tells_step_loss_heads_and_time_left() -> None:
    progress = IdentifyProgress(7, 10, 0.12345, 4, 90, 1024)
    assert describe(progress, 7, 100.0, 100.0) == ("step 7 of 10, loss 0.1235, 4 of 90 heads below 0.5, 1,024 tokens")
    assert describe(replace(progress, step=9), 7, 100.0, 240.0).endswith("1,024 tokens, 1:10 left")


def test_the_command_identifies(settings: IdentifySettings, capsys) -> None:
    arguments = ["identify", "--model", settings.model_dir, "--out", settings.out, "--text", *settings.text_files]
    arguments += ["--context", "0.384K", "--min-context", "384", "--steps", "2", "--sink-size", "4"]
    arguments += ["--recent-size", "16", "--num-keys", "2", "--device", "cpu", "--seed", "5", "--learning-rate", "0.02"]
    assert command.main(arguments) == 0
    out, err = capsys.readouterr()
    assert f"{settings.out}: 9 of 9 heads score at least 0.5" in out
    assert "step 2 of 2, loss" in err
    assert json.loads((Path(settings.out) / "config.json").read_text())["identification"]["seed"] == 5
    with pytest.raises(InputError, match="--context '4Q'"):
        command.main([*arguments, "--context", "4Q"])
