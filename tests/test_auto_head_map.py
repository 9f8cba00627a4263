"""`--head-map auto`: measured once a model, kept, used again, never half-written; and its errors."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_adapter import write_adapter

import longrun
from longrun.chat.command import chat_command
from longrun.chat.progress import HeadMapProgress
from longrun.config.model_config import ModelConfig
from longrun.errors import HeadMapError, InputError, PlanError
from longrun.lab.planted import PlantedModel, make_planted_model
from longrun.machine import host_memory
from longrun.model.adapter import Adapter
from longrun.paths import cache_dir
from longrun.patterns.head_map import HeadMap
from longrun.patterns.identify_settings import DEFAULTS
from longrun.plan.plan import NoFitError
from longrun.runtime import auto_head_map as auto
from longrun.runtime.auto_head_map import AutoHeadMap, auto_head_map, kept_folder
from longrun.units import ALL_TOKENS

TOPICS = {"lambda": "The text that is read, made short: it is tokenized every time. " * 5}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> PlantedModel:
    return make_planted_model(tmp_path_factory.mktemp("planted") / "My model")


@pytest.fixture(scope="module")
def measured(planted: PlantedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[AutoHeadMap]]:
    """A cache folder with the planted model's map, and what was reported while it was made."""
    cache, told = tmp_path_factory.mktemp("cache"), []
    kernels = cache_dir() / "kernels"  # they are compiled once a machine
    kernels.mkdir(parents=True, exist_ok=True)
    (cache / "kernels").symlink_to(kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGRUN_CACHE", str(cache))
        patch.setitem(auto.CONTEXT, "cpu", 500)
        patch.setattr("pydoc_data.topics.topics", TOPICS)
        auto_head_map(planted.path, "cpu", told.append)
    return cache, told


@pytest.fixture
def cache(measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that cache folder for one test."""
    folder = tmp_path / "cache"
    shutil.copytree(measured[0], folder, symlinks=True)
    monkeypatch.setenv("LONGRUN_CACHE", str(folder))
    monkeypatch.setitem(auto.CONTEXT, "cpu", 500)
    monkeypatch.setattr("pydoc_data.topics.topics", TOPICS)
    return folder


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(auto, "_measure", refuse)


def copy_of(planted: PlantedModel, folder: Path, *without: str, **changes: object) -> Path:
    """The model in another folder: files left out, config.json changed."""
    folder.mkdir()
    for file in planted.path.iterdir():
        if file.is_file() and file.name not in without:
            shutil.copy(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_the_map_is_measured_once_and_kept_under_the_models_name(measured, planted: PlantedModel) -> None:
    cache, told = measured
    (folder,) = (cache / "head_maps").iterdir()  # nothing half done beside it
    assert folder.name.startswith("My-model-")
    assert {one.folder for one in told} == {folder}
    assert not any(one.kept for one in told)
    total = told[-1].total
    assert [one.done for one in told] == list(range(total + 1))
    layer, head = planted.retrieval_head
    assert HeadMap.load(folder).scores[layer][head] == 1.0


@pytest.mark.usefixtures("no_measuring")
def test_load_uses_the_kept_map_at_half_of_the_heads(cache: Path, planted: PlantedModel) -> None:
    options = {"kv_format": "fp32", "device": "cpu", "ctx": 600}
    told: list[AutoHeadMap] = []
    runtime = longrun.load(planted.path, head_map="auto", on_head_map=told.append, **options)
    folder = kept_folder(planted.path)
    assert told == [AutoHeadMap(folder, kept=True)]
    assert runtime.split == HeadMap.load(folder).split(0.5)
    assert runtime.split.total_retrieval == 4
    assert not any("auto" in notice for notice in runtime.notices)

    runtime = longrun.load(planted.path, head_map="auto", retrieval_ratio=0.125, **options)
    layer, head = planted.retrieval_head
    assert runtime.split.retrieval_heads(layer) == [head]
    assert runtime.split.total_retrieval == 1
    assert f"head map auto was measured on this model and is kept in {folder}" in runtime.notices
    budget = longrun.Budget.load("cpu").override(retrieval_ratio=0.25)
    assert longrun.load(planted.path, budget, head_map="auto", **options).split.total_retrieval == 2


def test_with_kv_bytes_reach_losses_are_measured_and_kept_apart(
    cache: Path, planted: PlantedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(DEFAULTS["reach", "cpu"], "context", 1200)
    options = {"kv_format": "fp32", "device": "cpu", "head_map": "auto", "chunk_size": 128}
    with pytest.raises(InputError, match="need a stated context"):  # before anything is measured
        longrun.load(planted.path, kv_bytes="40%", **options)
    with pytest.raises(NoFitError) as error:
        longrun.load(planted.path, kv_bytes="90%", ctx="90M", **options)
    assert "--kv-bytes" in error.value.told_by({"--kv-bytes"})
    monkeypatch.setattr(host_memory, "_machine_bytes", lambda: 10**7)
    with pytest.raises(PlanError, match="runs the whole model with longrun's own decoder, which needs"):
        auto_head_map(planted.path, "cpu", method="reach")
    monkeypatch.undo()
    monkeypatch.setenv("LONGRUN_CACHE", str(cache))
    monkeypatch.setitem(DEFAULTS["reach", "cpu"], "context", 1200)
    told: list[AutoHeadMap] = []
    runtime = longrun.load(planted.path, kv_bytes="40%", ctx=4000, on_head_map=told.append, **options)
    folder = kept_folder(planted.path, method="reach")
    assert folder != kept_folder(planted.path) and folder.name.startswith(kept_folder(planted.path).name + "-reach-")
    assert {one.folder for one in told} == {folder} and not told[0].kept
    assert told[-1].done == told[-1].total == 2 + planted.shape.num_layers
    made = HeadMap.load(folder)
    assert made.reach_losses.measured_length == 1200
    layer, head = planted.retrieval_head
    assert runtime.split.all_reaches[layer][head] == ALL_TOKENS and not runtime.split.is_full
    monkeypatch.setattr(auto, "_measure", None)  # nothing is measured again
    again = longrun.load(planted.path, kv_bytes="40%", ctx=4000, **options)
    assert again.split == runtime.split
    assert longrun.load(planted.path, ctx=600, **options).split == HeadMap.load(kept_folder(planted.path)).split(0.5)
    (folder / "reach_losses.json").unlink()
    with pytest.raises(HeadMapError, match="its reach losses are gone"):
        longrun.load(planted.path, kv_bytes="40%", ctx=4000, **options)
    monkeypatch.setitem(DEFAULTS["reach", "cpu"], "context", 1300)
    assert not kept_folder(planted.path, method="reach").exists()  # other settings, another map
    short = copy_of(planted, tmp_path / "short", max_position_embeddings=1100)
    with pytest.raises(InputError, match="1,200 tokens or more, and 1,100 positions"):
        longrun.load(short, kv_bytes="40%", ctx=1000, **options)


def test_another_model_gets_another_map(cache: Path, planted: PlantedModel, tmp_path: Path) -> None:
    changed = copy_of(planted, tmp_path / "My model")
    assert kept_folder(changed) == kept_folder(planted.path)  # the very same model elsewhere
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, changed / "model.safetensors")
    told: list[AutoHeadMap] = []
    folder = auto_head_map(changed, "cpu", told.append)
    assert folder != kept_folder(planted.path)
    assert not told[0].kept
    assert len(list((cache / "head_maps").iterdir())) == 2


def test_an_adapter_has_a_map_of_its_own(cache: Path, planted: PlantedModel, tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / "lora", planted.path, own={"max_position_embeddings": 2**21}, lora_alpha=1e-3)
    options = {"kv_format": "fp32", "device": "cpu", "ctx": 600, "head_map": "auto", "adapter": lora}
    told: list[AutoHeadMap] = []
    runtime = longrun.load(planted.path, on_head_map=told.append, **options)
    opened = Adapter.open(lora, ModelConfig.from_dir(planted.path))
    folder = kept_folder(planted.path, opened)
    assert folder != kept_folder(planted.path) and {one.folder for one in told} == {folder}
    assert not told[0].kept
    made = json.loads((folder / "config.json").read_text())["identification"]
    assert (made["adapter"], made["adapter_sha256"]) == ("lora", opened.digest())
    assert runtime.split == HeadMap.load(folder).split(0.5)
    told.clear()
    longrun.load(planted.path, on_head_map=told.append, **options)
    assert told == [AutoHeadMap(folder, kept=True)]
    shutil.copytree(kept_folder(planted.path), folder, dirs_exist_ok=True)
    with pytest.raises(HeadMapError, match="it names another model"):
        longrun.load(planted.path, **options)


class Stop(Exception):
    """What an interruption looks like here."""


def test_an_interrupted_measurement_leaves_nothing_to_be_used(cache: Path, planted: PlantedModel) -> None:
    folder = kept_folder(planted.path)
    whole = HeadMap.load(folder)
    shutil.rmtree(folder)

    def stop(told: AutoHeadMap) -> None:
        if told.done == 2:  # within the repeat
            raise Stop

    with pytest.raises(Stop):
        auto_head_map(planted.path, "cpu", stop)
    assert not folder.exists()
    told: list[AutoHeadMap] = []
    assert auto_head_map(planted.path, "cpu", told.append) == folder
    assert not told[0].kept
    assert HeadMap.load(folder) == whole


def damage_scores(folder: Path) -> None:
    path = folder / "full_attention_heads.tsv"
    path.write_text(path.read_text().replace("1.0", "0.5"))


def damage_length(folder: Path) -> None:
    path = folder / "full_attention_heads.tsv"
    path.write_text(path.read_text()[: len(path.read_text()) // 2])


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def damage_fingerprint(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    data["identification"]["model_fingerprint"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(data))


def damage_files(folder: Path) -> None:
    (folder / "full_attention_heads.tsv").unlink()


@pytest.mark.usefixtures("no_measuring")
@pytest.mark.parametrize("damage", [damage_scores, damage_length, damage_config, damage_fingerprint, damage_files])
def test_a_damaged_map_is_refused_with_its_folder(cache: Path, planted: PlantedModel, damage) -> None:
    folder = kept_folder(planted.path)
    damage(folder)
    with pytest.raises(HeadMapError, match="delete that folder to have it measured again") as error:
        auto_head_map(planted.path, "cpu")
    assert str(folder) in str(error.value)


@pytest.mark.usefixtures("no_measuring")
def test_what_cannot_be_measured_is_refused(cache: Path, planted: PlantedModel, tmp_path: Path, monkeypatch) -> None:
    mute = copy_of(planted, tmp_path / "mute", "tokenizer.json", longrun_planted=None, rms_norm_eps=2e-6)
    with pytest.raises(InputError, match="mute has no tokenizer: add its files, or give a head map folder"):
        longrun.load(mute, head_map="auto", device="cpu", ctx=600)
    short = copy_of(planted, tmp_path / "short", max_position_embeddings=900)
    with pytest.raises(InputError, match="448 tokens or more, and 900 positions are too few"):
        auto_head_map(short, "cpu")
    large = copy_of(planted, tmp_path / "large", rms_norm_eps=3e-6)
    monkeypatch.setattr(host_memory, "_machine_bytes", lambda: 10**7)
    with pytest.raises(PlanError, match=r"needs \S+ MB of main memory, and 10\.0 MB are free"):
        auto_head_map(large, "cpu")
    tight = longrun.Budget.load("cpu").override(host_bytes=0)
    with pytest.raises(PlanError, match="device pool memory short"):  # before anything is measured
        longrun.load(large, tight, head_map="auto", ctx="500M", device="cpu")


def test_the_chat_says_where_the_map_is_kept(cache: Path, planted: PlantedModel, monkeypatch, capsys) -> None:
    folder = kept_folder(planted.path)
    arguments = ["--model", str(planted.path), "--ctx", "600", "--device", "cpu", "--head-map", "auto"]
    arguments += ["--prompt", "The old river", "--max-new-tokens", "1"]
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    try:
        assert chat_command(arguments) == 0
        assert f"head map auto: using the one kept in {folder}\n" in capsys.readouterr().err
        shutil.rmtree(folder)
        assert chat_command(arguments) == 0
        said = capsys.readouterr().err
        assert f"head map auto: measuring this model's heads, once; the map will be kept in {folder}\n" in said
        assert "4 of 8 KV heads keep all tokens" in said
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_progress_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 1.0, 6.0, 6.0, 7.0, 20.0])
    monkeypatch.setattr("longrun.chat.progress.time.perf_counter", lambda: next(clock))
    said = io.StringIO()
    progress = HeadMapProgress(Console(file=said, width=200))
    for done in range(5):
        progress(AutoHeadMap(Path("/maps/x"), False, done, 4))
    first, *others = said.getvalue().splitlines()
    assert first.endswith("kept in /maps/x")
    assert others == ["measured 2 of 4 steps"]
