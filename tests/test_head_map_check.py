"""A head map that names another model than the one loaded gives a notice; one that names this or none does not."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
from readable_model import save_readable
from test_adapter import write_adapter
from tiny_models import edit_config, save_tiny

import longrun
from longrun.config.model_config import ModelConfig
from longrun.errors import HeadMapError
from longrun.lab.planted import make_planted_model
from longrun.model.adapter import Adapter
from longrun.model.fingerprint import model_fingerprint, weights_fingerprint
from longrun.needles.needles import generate_sentences
from longrun.patterns.head_map import HeadMap
from longrun.patterns.head_map_folder import HeadMapOrigin, read_origin
from longrun.patterns.identify import identify
from longrun.patterns.identify_settings import IdentifySettings
from scripts.bench import bench_common

WHAT_TO_DO = ", so it may keep the wrong heads: give one made with this model by python -m longrun.patterns identify"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_readable(tmp_path_factory.mktemp("made") / "mine", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape with other weights."""
    folder = tmp_path_factory.mktemp("made") / "theirs"
    save_tiny(folder, "llama", seed=1, max_position_embeddings=2048)
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("lora") / "long", model)


@pytest.fixture(scope="module")
def measure(model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Measures a map of the model, with or without an adapter; returns its folder."""
    sentences = generate_sentences("head map check")
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(" ".join(next(sentences) for _ in range(30)))
    folder, made = tmp_path_factory.mktemp("maps"), {}

    def get(adapter: Path | None = None) -> Path:
        if adapter not in made:
            made[adapter] = folder / ("plain" if adapter is None else adapter.name)
            identify(
                IdentifySettings(
                    str(model), str(made[adapter]), "reconstruction", sink_size=4, recent_size=16, context=256,
                    steps=1, text_files=(str(text),), device="cpu", adapter=None if adapter is None else str(adapter),
                )
            )  # fmt: skip
        return made[adapter]

    return get


def told(folder: Path, head_map: object, adapter: Path | None = None) -> list[str]:
    runtime = longrun.load(folder, head_map=head_map, adapter=adapter, kv_format="fp32", device="cpu", ctx=300)
    return [notice for notice in runtime.notices if "head map" in notice]


def edit_facts(head_map: Path, target: Path, **changes: object) -> Path:
    """A copy of a map with other facts; None removes one."""
    shutil.copytree(head_map, target)
    data = json.loads((target / "config.json").read_text())
    facts = {**data["identification"], **changes}
    data["identification"] = {name: value for name, value in facts.items() if value is not None}
    (target / "config.json").write_text(json.dumps(data))
    return target


def test_the_right_model_is_silent_wherever_it_stands(model: Path, measure, tmp_path: Path) -> None:
    assert told(model, measure()) == told(model, HeadMap.load(measure()).with_window(2, 30)) == []
    assert told(Path(shutil.copytree(model, tmp_path / "renamed")), str(measure())) == []


def test_other_weights_are_told_of_and_not_refused(model: Path, other: Path, measure) -> None:
    (notice,) = told(other, measure())
    start = f"head map {measure()} was made for mine and not for theirs (the weights differ)"
    assert notice == start + WHAT_TO_DO + ", or auto"
    assert told(other, HeadMap.load(measure()).with_window(2, 30)) == [notice]


def test_another_adapter_or_none_is_told_of(model: Path, other: Path, adapter: Path, measure, tmp_path: Path) -> None:
    second = write_adapter(tmp_path / "second", model, lora_alpha=1.0)
    differ = " (the adapters differ)" + WHAT_TO_DO
    assert told(model, measure(adapter), adapter) == []
    start = f"head map {measure(adapter)} was made for mine with adapter long and not for mine "
    (notice,) = told(model, measure(adapter))
    assert notice.startswith(start + "without an adapter" + differ)
    (notice,) = told(model, measure(adapter), second)
    assert notice.startswith(start + "with adapter second" + differ)
    (notice,) = told(model, measure(), adapter)
    assert "was made for mine without an adapter and not for mine with adapter long (the adapters differ)" in notice
    (notice,) = told(other, measure(adapter), second)
    assert "for mine with adapter long and not for theirs with adapter second (the weights differ)" in notice
    (notice,) = told(other, measure(adapter), adapter)
    assert "(the weights differ)" in notice


def test_another_config_json_is_no_other_model_where_the_map_tells_them_apart(
    model: Path, other: Path, adapter: Path, measure, tmp_path: Path
) -> None:
    longer = Path(shutil.copytree(model, tmp_path / "longer"))
    edit_config(longer, max_position_embeddings=4096)
    assert told(longer, measure()) == told(longer, measure(adapter), adapter) == []
    (notice,) = told(longer, measure(), adapter)
    assert "(the adapters differ)" in notice
    old = edit_facts(measure(), tmp_path / "old", weights_fingerprint=None)
    old_adapted = edit_facts(measure(adapter), tmp_path / "adapted", weights_fingerprint=None)
    assert told(model, old) == told(model, old_adapted, adapter) == []
    assert "(the adapters differ)" in told(model, old_adapted)[0]
    for loaded in (longer, other):
        assert "(the weights or config.json differ)" in told(loaded, old)[0]


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"identification": None},
        {"identification": [1]},
        {"identification": {"model": "mine"}},
        {"identification": {"model": 3, "model_fingerprint": 4}},
        {"identification": {"model_fingerprint": "0" * 64}},
        {"model": "mine", "model_fingerprint": "0" * 64, "passkey_length": 32},
    ],
)
def test_a_map_that_names_no_model_is_silent(model: Path, tmp_path: Path, facts: dict[str, object]) -> None:
    HeadMap.uniform(3, 3, 0.4).save(tmp_path / "map", facts=facts)
    assert read_origin(tmp_path / "map") is None
    assert told(model, tmp_path / "map") == told(model, "full") == told(model, HeadMap.uniform(3, 3, 0.4)) == []
    (tmp_path / "map" / "config.json").unlink()
    assert read_origin(tmp_path / "map") is None


def test_the_map_of_a_planted_model_is_silent(tmp_path: Path) -> None:
    planted = make_planted_model(tmp_path / "planted")
    assert told(planted.path, planted.head_map) == []


def test_the_shipped_maps_name_the_demo_model() -> None:
    for folder in (Path(longrun.__file__).parent / "patterns" / "maps" / "smollm2-135m-instruct").iterdir():
        origin = HeadMap.load(folder).origin
        assert origin == HeadMapOrigin(folder, "smollm2-135m-instruct-q4_1", origin.model_fingerprint)
        assert len(origin.model_fingerprint) == 64


def test_the_demo_model_is_silent_with_its_maps(demo_model: Path) -> None:
    maps = Path(longrun.__file__).parent / "patterns" / "maps" / "smollm2-135m-instruct"
    assert {HeadMap.load(one).origin.model_fingerprint for one in maps.iterdir()} == {model_fingerprint(demo_model)}


def test_equal_scores_are_equal_maps_whoever_made_them(measure) -> None:
    loaded = HeadMap.load(measure())
    assert loaded.origin is not None
    assert loaded == HeadMap(loaded.scores, loaded.sink_size, loaded.recent_size)


def test_a_broken_config_is_still_refused(measure, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(measure(), tmp_path / "broken"))
    (broken / "config.json").write_text("[]")
    with pytest.raises(HeadMapError, match="holds no JSON object"):
        read_origin(broken)


def test_an_adapters_digest_stands_for_it_in_a_fingerprint(model: Path, adapter: Path) -> None:
    opened = Adapter.open(adapter, ModelConfig.from_dir(model))
    assert model_fingerprint(model, opened.digest()) == model_fingerprint(model, opened) != model_fingerprint(model)
    assert model_fingerprint(model) != weights_fingerprint(model)


def test_a_benchmark_records_the_notice_without_folders(model: Path, other: Path, measure) -> None:
    args = argparse.Namespace(
        model=other, head_map=measure(), retrieval_ratio=0.4, kv_bytes=None, select=None, hot_pool=None,
        budget="cpu", kv="fp32", weight_format=None, device="cpu", chunk_size=None, prefill=None, prefill_mass=None,
        prefill_dense=None, prefill_share=None,
    )  # fmt: skip
    settings = bench_common.describe(bench_common.load_runtime(args, 300), args)
    assert any(text.startswith("head map plain was made for mine and not for theirs") for text in settings["notices"])
    assert settings["split_note"] == "head map plain, retrieval ratio 0.4"
