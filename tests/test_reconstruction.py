"""Head scores from repeating the context: against transformers' own attention matrices, at any chunk size, resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, tiny_model

from longrun.errors import InputError
from longrun.lab.planted import PlantedModel, make_planted_model
from longrun.model.tokenizer import load_tokenizer
from longrun.needles.needles import generate_sentences
from longrun.patterns.head_map import HeadMap
from longrun.patterns.identify import MethodResult, identify, load_model, read_text
from longrun.patterns.identify_checkpoint import Checkpoint
from longrun.patterns.identify_settings import IdentifyProgress, IdentifySettings, rank_scores
from longrun.patterns.reconstruction import ATTN_IMPLEMENTATION, identify_reconstruction, longest_context
from longrun.patterns.reconstruction_scores import Reconstruction, ReconstructionSettings, repeat_parts

CONTEXT = 33
SETTINGS = ReconstructionSettings(sink_size=3, recent_size=6, part_size=14, quote_size=3)


def context_ids(seed: int = 1) -> list[int]:
    return torch.randint(0, 97, (CONTEXT,), generator=torch.Generator().manual_seed(seed)).tolist()


def encode(text: str) -> list[int]:
    return [ord(letter) % 97 for letter in text][:5]


def reconstruct(model, **changes) -> Reconstruction:
    settings = ReconstructionSettings(**{**vars(SETTINGS), **changes})
    ids = context_ids()
    run = Reconstruction(model, ids, repeat_parts(ids, encode, settings), settings)
    run.run()
    return run


def brute_force(model, settings: ReconstructionSettings) -> torch.Tensor:
    """[num_layers, num_kv_heads, CONTEXT]: context and part in one pass of eager attention, looped over in Python."""
    model.set_attn_implementation("eager")
    ids, config = context_ids(), model.config
    group = config.num_attention_heads // config.num_key_value_heads
    best = torch.zeros(config.num_hidden_layers, config.num_key_value_heads, CONTEXT)
    for part in repeat_parts(ids, encode, settings):
        with torch.no_grad():
            attentions = model(torch.tensor([ids + part]), output_attentions=True).attentions
        for layer, attention in enumerate(attentions):
            for query in range(CONTEXT, CONTEXT + len(part)):
                for token in range(settings.sink_size, CONTEXT):
                    if token <= query - settings.recent_size:
                        seen = attention[0, :, query, token].view(-1, group).amax(dim=1)
                        best[layer, :, token] = torch.maximum(best[layer, :, token], seen)
    return best


@pytest.mark.parametrize("family", FAMILIES)
def test_token_scores_are_the_largest_entries_of_transformers_attention_matrices(family: str) -> None:
    model = tiny_model(family)
    expected = brute_force(model, SETTINGS)
    run = reconstruct(model, chunk_size=7)
    torch.testing.assert_close(run.attention.maxima, expected, rtol=1e-4, atol=1e-6)
    assert expected[:, :, 3:].max() > 0.3
    assert run.counted == slice(3, 33)
    torch.testing.assert_close(run.raw_scores().float(), expected[:, :, 3:].mean(dim=-1), rtol=1e-4, atol=1e-6)
    assert model.config._attn_implementation == "eager"  # as it was before


def test_what_the_window_holds_is_not_counted() -> None:
    """The context's last tokens stand in the window of every query where the repeat is shorter than the window."""
    model = tiny_model("llama")
    settings = {"sink_size": 4, "recent_size": 30, "part_size": 16}
    run = reconstruct(model, **settings)
    torch.testing.assert_close(
        run.attention.maxima, brute_force(model, ReconstructionSettings(**{**vars(SETTINGS), **settings}))
    )
    longest = 5 + 3 + 16
    last = CONTEXT + longest - 1 - 30  # seen from outside its window by the last query only
    assert run.counted == slice(4, last + 1)
    assert (run.attention.maxima[:, :, :4] == 0).all()
    assert (run.attention.maxima[:, :, last + 1 :] == 0).all()
    assert (run.attention.maxima[:, :, 4 : last + 1] > 0).all()


@pytest.mark.parametrize(("chunk_size", "tile_bytes"), [(1, 2**20), (5, 1), (64, 3000), (64, 2**25)])
def test_chunk_and_tile_do_not_change_the_scores(chunk_size: int, tile_bytes: int) -> None:
    model = tiny_model("qwen3")
    usual, other = reconstruct(model), reconstruct(model, chunk_size=chunk_size, tile_bytes=tile_bytes)
    torch.testing.assert_close(other.attention.maxima, usual.attention.maxima, rtol=1e-4, atol=1e-6)
    assert rank_scores(other.raw_scores().tolist()) == rank_scores(usual.raw_scores().tolist())
    assert not torch.equal(reconstruct(model, part_size=20).raw_scores(), usual.raw_scores())


def test_the_same_scores_every_time_and_a_part_at_a_time() -> None:
    model, ids = tiny_model("mistral"), context_ids()
    first = reconstruct(model)
    assert torch.equal(reconstruct(model).attention.maxima, first.attention.maxima)
    assert len(first.parts) == 3
    states = []
    parts = repeat_parts(ids, encode, SETTINGS)
    Reconstruction(model, ids, parts, SETTINGS).run(on_part=lambda done, maxima: states.append((done, maxima.clone())))
    for done, maxima in states:
        resumed = Reconstruction(model, ids, parts, SETTINGS)
        resumed.resume(done, maxima)
        passes = []
        left = resumed.passes_left
        resumed.run(on_pass=passes.append)
        assert torch.equal(resumed.attention.maxima, first.attention.maxima)
        assert len(passes) == left
    assert not torch.equal(states[0][1], first.attention.maxima)


def test_parts_begin_with_a_prompt_and_quote_what_came_before() -> None:
    ids = list(range(100, 100 + CONTEXT))
    parts = repeat_parts(ids, encode, SETTINGS)
    assert [len(part) for part in parts] == [5 + 14, 5 + 3 + 14, 5 + 3 + 5]
    assert parts[0][5:] == ids[:14]
    assert parts[1][5:] == ids[11:28]
    assert parts[2][5:] == ids[25:]
    assert [token for part in parts for token in part[-5:]][-5:] == ids[-5:]


def test_quantile_takes_the_token_at_that_rank() -> None:
    model = tiny_model("llama")
    run = reconstruct(model, quantile=1.0)
    assert torch.equal(run.raw_scores(), run.attention.maxima[:, :, 3:].amax(dim=-1).double())
    assert (reconstruct(model, quantile=0.5).raw_scores() < run.raw_scores()).all()


def test_ranks_are_evenly_spaced_and_ties_go_to_the_lower_head() -> None:
    assert rank_scores([[0.1, 0.7], [0.7, 0.0], [0.0, 0.2]]) == [[0.4, 1.0], [0.8, 0.19999999999999996], [0.0, 0.6]]
    ranked = HeadMap.from_scores(rank_scores([[0.5] * 4] * 2))
    assert ranked.split(threshold=0.5).retrieval == ranked.split(0.5).retrieval == ((True,) * 4, (False,) * 4)
    assert rank_scores([[0.3]]) == [[1.0]]


def test_impossible_contexts_and_settings_are_refused() -> None:
    model, ids = tiny_model("llama"), context_ids()
    settings = ReconstructionSettings(sink_size=33)
    with pytest.raises(InputError, match="33 tokens and repeats of 38 leave none outside"):
        Reconstruction(model, ids, repeat_parts(ids, encode, settings), settings)
    sliding = tiny_model("mistral", sliding_window=40)
    with pytest.raises(InputError, match="sliding window of 40"):
        Reconstruction(sliding, ids, repeat_parts(ids, encode, SETTINGS), SETTINGS)
    for change in ({"part_size": 0}, {"quantile": 1.5}, {"chunk_size": 0}, {"recent_size": 0}, {"quote_size": -1}):
        with pytest.raises(InputError, match=next(iter(change))):
            ReconstructionSettings(**change)


def test_longest_context_leaves_room_for_its_repeat() -> None:
    assert longest_context(100_000) == 100_000 - 66 - 8 - 2048
    assert longest_context(2000) == (2000 - 74) // 2


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> PlantedModel:
    return make_planted_model(tmp_path_factory.mktemp("planted") / "model")


def settings_for(planted: PlantedModel, out: Path, **changes) -> IdentifySettings:
    text = out.parent / "text.txt"
    text.write_text(" ".join(islice(generate_sentences(5), 100)))
    settings = {"context": 500, "steps": 1, "device": "cpu", "text_files": (str(text),), **changes}
    return IdentifySettings(str(planted.path), str(out), "reconstruction", **settings)


def test_identify_puts_the_planted_head_first_by_far(planted: PlantedModel, tmp_path: Path) -> None:
    found = identify(settings_for(planted, tmp_path / "map"))
    layer, head = planted.retrieval_head
    assert found.scores[layer][head] == 1.0
    assert HeadMap.load(tmp_path / "map") == found
    raw = json.loads((tmp_path / "map" / "config.json").read_text())["identification"]["raw_scores"]
    second = sorted(score for row in raw for score in row)[-2]
    assert raw[layer][head] > 0.5
    assert second < 0.5 * raw[layer][head]
    assert tuple(map(tuple, rank_scores(raw))) == found.scores


class Stop(Exception):
    """What an interruption looks like here."""


def test_a_stopped_run_goes_on_and_ends_the_same(planted: PlantedModel, tmp_path: Path) -> None:
    settings = settings_for(planted, tmp_path / "map", context=400, steps=2).resolved(False)
    method = ReconstructionSettings(part_size=250, chunk_size=200)
    model, tokenizer = load_model(settings, ATTN_IMPLEMENTATION), load_tokenizer(planted.path)
    text_ids, _ = read_text(tokenizer, settings)

    def measure(name: str, on_progress) -> MethodResult:
        checkpoint = Checkpoint(tmp_path / name, {})
        return identify_reconstruction(model, tokenizer, text_ids, settings, checkpoint, on_progress, method)

    steps: list[IdentifyProgress] = []
    whole = measure("whole", steps.append)
    assert [step.step for step in steps] == list(range(1, 2 * (2 + 2 + 1) + 1))  # context, two parts; two texts
    for stop_after, left in ((4, 2 + 1 + 5), (6, 5)):  # in the first text's second part, in the second text

        def stop(progress: IdentifyProgress, last: int = stop_after) -> None:
            if progress.step > last:
                raise Stop

        with pytest.raises(Stop):
            measure(f"stopped{stop_after}", stop)
        again: list[IdentifyProgress] = []
        assert measure(f"stopped{stop_after}", again.append) == whole
        assert again[-1].step == again[-1].num_steps == len(steps)
        assert len(again) == left  # what was finished is not read again
    assert measure("whole", again.append) == whole
    assert len(again) == left


def test_a_context_beyond_the_trained_window_is_refused(planted: PlantedModel, tmp_path: Path) -> None:
    config = json.loads((planted.path / "config.json").read_text())
    folder = tmp_path / "short"
    folder.mkdir()
    for file in planted.path.iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).symlink_to(file)
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 800}))
    with pytest.raises(InputError, match=r"800 positions .* at most 363"):
        identify(replace(settings_for(planted, tmp_path / "map", context=400), model_dir=str(folder)))
