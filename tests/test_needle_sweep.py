"""The needle sweep: right scores on a model that retrieves by construction, and results that survive a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from longrun.errors import CheckpointError, InputError
from longrun.lab.needle_report import draw_heatmap, grid, summary
from longrun.lab.needle_results import SweepResults
from longrun.lab.planted import NOTE
from longrun.needles.needles import Needle, NeedlePrompt, NeedleQuestion
from longrun.patterns.head_map import HeadMap
from scripts.quality import needle_cells, needle_options
from scripts.quality import needle_sweep as sweep


@pytest.fixture(scope="module")
def streaming_map(planted, tmp_path_factory) -> Path:
    """The planted map with the one retrieval head scored last: at 1/8 another head is kept."""
    head_map = HeadMap.load(planted.head_map)
    layer, head = planted.retrieval_head
    scores = [list(row) for row in head_map.scores]
    scores[layer][head] = 0.0
    folder = tmp_path_factory.mktemp("maps") / "wrong"
    replace(head_map, scores=tuple(map(tuple, scores))).save(folder)
    return folder


def options(planted, out, *more, head_map=None, lengths="500", depths=2) -> list[str]:
    return [
        "--model", str(planted.path), "--lengths", lengths, "--depths", str(depths), "--needles", "1",
        "--head-map", str(head_map or planted.head_map), "--retrieval-ratio", "0.125",
        "--device", "cpu", "--out", str(out), *more,
    ]  # fmt: skip


def read(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_planted_model_scores_one_everywhere_with_int4_pages(planted, tmp_path, capsys):
    more = ["--kv", "int4", "--control", "full", "--needles", "2"]
    arguments = options(planted, tmp_path / "out", *more, lengths="1.2K", depths=3)
    assert sweep.main(arguments) == 0
    found = read(tmp_path / "out")
    cells = {(cell["setting"], cell["length"], cell["depth"]): cell for cell in found["cells"]}
    assert set(cells) == {(s, n, d) for s in ("main", "control") for n in [1200] for d in (0.0, 0.5, 1.0)}
    for cell in cells.values():
        assert cell["score"] == cell["token_accuracy"] == 1.0
        assert cell["length"] * 0.85 < cell["prompt_tokens"] <= cell["length"]
        assert all(needle["generated"].replace(" ", "").startswith(needle["expected"]) for needle in cell["needles"])
    for depth in (0.0, 0.5, 1.0):  # both settings are asked the very same questions
        asked = [[needle["expected"] for needle in cells[s, 1200, depth]["needles"]] for s in ("main", "control")]
        assert asked[0] == asked[1]
    assert (found["main"]["retrieval_heads"], found["control"]["retrieval_heads"]) == (1, 8)
    assert (found["main"]["kv_format"], found["control"]["kv_format"]) == ("int4", "bf16")
    assert found["main"]["split_hash"] != found["control"]["split_hash"]
    assert cells["main", 1200, 0.0]["cache_bytes"] < cells["control", 1200, 0.0]["cache_bytes"]
    assert found["notes"] == [NOTE]
    assert (tmp_path / "out" / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert NOTE in printed
    assert "100% / 100%" in printed
    assert "main minus control: exact match +0.0 points" in printed


def test_without_its_retrieval_head_the_planted_model_scores_zero(planted, streaming_map, tmp_path):
    """Needles in the middle lie outside sinks and window; only those at the end (within 256 tokens) are found."""
    arguments = options(planted, tmp_path / "out", head_map=streaming_map, lengths="1K", depths=3)
    assert sweep.main(arguments) == 0
    cells = {cell["depth"]: cell for cell in read(tmp_path / "out")["cells"]}
    assert cells[0.5]["score"] == 0.0
    assert cells[0.5]["token_accuracy"] < 0.5
    assert cells[1.0]["score"] == 1.0


def test_a_stopped_sweep_goes_on_where_it_was(planted, tmp_path, monkeypatch, capsys):
    real, started = sweep.run_cell, []

    def stopping(runtime, haystack, settings, setting, length, depth, progress):
        if len(started) == 1:
            raise KeyboardInterrupt
        started.append((length, depth))
        return real(runtime, haystack, settings, setting, length, depth, progress)

    monkeypatch.setattr(sweep, "run_cell", stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(options(planted, tmp_path / "out"))
    before = read(tmp_path / "out")["cells"]
    assert [(cell["length"], cell["depth"]) for cell in before] == [(500, 0.0)]
    started.clear()
    assert sweep.main(options(planted, tmp_path / "out")) == 0
    assert started == [(500, 1.0)]
    assert read(tmp_path / "out")["cells"][:1] == before
    assert "1 of 2 cells are there already" in capsys.readouterr().out
    # a finished sweep is only drawn again, without loading the model
    monkeypatch.setattr(sweep, "load_runtime", None)
    assert sweep.main(options(planted, tmp_path / "out")) == 0
    assert len(read(tmp_path / "out")["cells"]) == 2
    # a resumed cell is the cell an uninterrupted run gives
    monkeypatch.undo()
    assert sweep.main(options(planted, tmp_path / "whole")) == 0
    for one, other in zip(read(tmp_path / "out")["cells"], read(tmp_path / "whole")["cells"], strict=True):
        assert untimed(one) == untimed(other)


def untimed(cell: dict) -> dict:
    return {key: value for key, value in cell.items() if "seconds" not in key and "tokens_per_s" not in key}


def test_one_document_holds_the_needles_of_every_depth(planted, tmp_path, monkeypatch, capsys):
    """Each length is read once; a stop between two cells costs one more reading and changes no cell."""
    more = ["--one-document", "--needles", "2", "--chunk-size", "200"]
    arguments = options(planted, tmp_path / "out", *more, lengths="500,900", depths=3)
    read_tokens = []
    real, add = needle_cells.read_document, SweepResults.add
    monkeypatch.setattr(
        needle_cells, "read_document", lambda session, prompt, progress: (
            read_tokens.append(prompt.num_tokens), real(session, prompt, progress))[1]
    )  # fmt: skip

    def stopping(self, cell):
        add(self, cell)
        if len(self.cells) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(SweepResults, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(arguments)
    assert [(cell["length"], cell["depth"]) for cell in read(tmp_path / "out")["cells"]] == [
        (500, 0.0), (500, 0.5), (500, 1.0), (900, 0.0),
    ]  # fmt: skip
    assert len(read_tokens) == 2
    monkeypatch.setattr(SweepResults, "add", add)
    assert sweep.main(arguments) == 0
    assert len(read_tokens) == 3
    assert sweep.main(options(planted, tmp_path / "whole", *more, lengths="500,900", depths=3)) == 0
    assert len(read_tokens) == 5
    found = read(tmp_path / "out")
    assert [untimed(cell) for cell in found["cells"]] == [untimed(c) for c in read(tmp_path / "whole")["cells"]]
    assert found["main"]["chunk_size"] == 200
    assert found["settings"]["one_document"] is True
    assert any("share one document" in note for note in found["notes"])
    for length in (500, 900):
        cells = [cell for cell in found["cells"] if cell["length"] == length]
        assert [cell["depth"] for cell in cells] == [0.0, 0.5, 1.0]
        assert len({needle["name"] for cell in cells for needle in cell["needles"]}) == 6
        for cell in cells:
            assert cell["score"] == 1.0
            assert cell["shared_document"] == {"needles": 6, "depths": 3}
            assert cell["prefill_tokens_per_s"] > 0
            assert [needle["depth"] for needle in cell["needles"]] == [cell["depth"]] * 2
            assert all(abs(needle["at"] - cell["depth"]) < 0.2 for needle in cell["needles"])
    assert "tokens/s" in capsys.readouterr().out


def test_no_earlier_session_is_left_when_the_next_is_made(planted, tmp_path, monkeypatch):
    """Also where a session stands in a reference cycle: its pools are large."""
    import gc
    import weakref

    from longrun.runtime.runtime import Runtime

    earlier, real = [], Runtime.new_session

    def watching(runtime, capacity=None):
        assert [one() for one in earlier] == [None] * len(earlier)
        session = real(runtime, capacity)
        session.itself = session
        earlier.append(weakref.ref(session))
        return session

    monkeypatch.setattr(Runtime, "new_session", watching)
    gc.disable()
    try:
        for more in ([], ["--one-document"]):
            out = tmp_path / f"out{len(more)}"
            assert sweep.main(options(planted, out, *more, lengths="500,600", depths=2)) == 0
    finally:
        gc.enable()
    assert len(earlier) == 4 + 2


def test_other_settings_are_refused_by_name_and_force_starts_over(tmp_path):
    settings = {"lengths": [600], "depths": [0.5], "kv": "int4", "seed": 0}
    cell = {"setting": "main", "length": 600, "depth": 0.5, "score": 1.0, "token_accuracy": 1.0}
    SweepResults.open(tmp_path, settings).add(cell)
    assert SweepResults.open(tmp_path, settings).get("main", 600, 0.5) == cell
    with pytest.raises(InputError, match=r'kv = "int4", now it is "bf16".*--force'):
        SweepResults.open(tmp_path, settings | {"kv": "bf16"})
    with pytest.raises(InputError, match="budget = null, now"):
        SweepResults.open(tmp_path, settings | {"budget": "cpu"})
    assert SweepResults.open(tmp_path, settings | {"kv": "bf16"}, force=True).cells == []
    assert read(tmp_path)["cells"] == [cell]  # until the first new cell is done


@pytest.mark.parametrize("content", ["", "{", "[]", '{"cells": []}', '{"settings": {}, "cells": [{"score": 1}]}'])
def test_a_damaged_results_file_is_not_overwritten(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match="cannot be read as a needle sweep's results"):
        SweepResults.open(tmp_path, {})
    assert (tmp_path / "results.json").read_text() == content


def test_a_full_disk_leaves_the_earlier_results(tmp_path, monkeypatch):
    results = SweepResults.open(tmp_path, {"seed": 0})
    cell = {"setting": "main", "length": 600, "depth": 0.5, "score": 1.0, "token_accuracy": 1.0}
    results.add(cell)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        results.add(cell | {"depth": 1.0})
    assert read(tmp_path)["cells"] == [cell]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".results.json.lock", "results.json"]


class ScriptedSession:
    """Answers from a script, and checks that every question starts from the document's end."""

    def __init__(self, answer: list[int], forced: list[int]) -> None:
        self.answer, self.forced, self.fed = answer, forced, []

    prefill_counts = None

    def prefill(self, token_ids, progress=None, one_by_one=False, sparse=True):
        self.fed += token_ids

    def mark(self):
        return len(self.fed)

    def rewind(self, mark):
        del self.fed[mark:]

    def generate(self, max_new_tokens):
        assert self.fed == [1, 2, 3, 8, 9]
        self.fed += self.answer[:max_new_tokens]
        return iter(self.answer[:max_new_tokens])

    def score(self, token_ids, one_by_one=False):
        assert self.fed == [1, 2, 3, 8, 9]
        return torch.nn.functional.one_hot(torch.tensor(self.forced), 10).float()


@pytest.mark.parametrize(
    ("answer", "forced", "exact", "accuracy"),
    [
        ([4, 5, 6, 0, 0], [4, 5, 6], True, 1.0),
        ([4, 5, 5, 0, 0], [4, 5, 5], False, 2 / 3),
        ([0, 4, 5, 6, 0], [0, 5, 6], False, 2 / 3),  # does not start to copy, but copies once started
        ([4, 5, 6, 6, 0], [4, 5, 6], False, 1.0),  # does not stop
    ],
)
def test_exact_match_and_forced_accuracy_are_counted_apart(answer, forced, exact, accuracy):
    question = NeedleQuestion(Needle("Amelia", "456"), (8, 9), (4, 5, 6), 0.5)
    prompt = NeedlePrompt([1, 2, 3], (question, question))
    session = ScriptedSession(answer, forced)
    found = needle_cells.ask(session, prompt, lambda ids: "".join(".x23456"[i] for i in ids), lambda done, total: None)
    assert [one["exact"] for one in found] == [exact, exact]
    assert found[0]["token_accuracy"] == pytest.approx(accuracy)


def partial_results(tmp_path) -> SweepResults:
    results = SweepResults.open(tmp_path, {"lengths": [1000, 4000], "depths": [0.0, 1.0]})
    cell = {"setting": "main", "length": 1000, "depth": 0.0, "score": 0.5, "token_accuracy": 0.9}
    results.add(cell)
    results.add(cell | {"depth": 1.0, "score": 1.0})
    results.add(cell | {"setting": "control", "score": 1.0, "token_accuracy": 1.0})
    return results


def test_report_shows_missing_cells_as_missing(tmp_path):
    results = partial_results(tmp_path)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(grid(results, "main", "a title"))
    text = console.export_text()
    assert "50% / 90%" in text
    assert "100% / 90%" in text
    assert text.count(" - ") == 2
    assert summary(results) == [
        "main: exact match 75.0%, tokens right 90.0% (2 cells)",
        "control: exact match 100.0%, tokens right 100.0% (1 cells)",
        "main minus control: exact match -50.0 points, tokens right -10.0 (1 cells)",
    ]


def test_heatmap_has_a_panel_per_setting(tmp_path):
    from matplotlib.image import imread

    results = partial_results(tmp_path)
    one = imread(draw_heatmap(results, {"main": "a"})).shape
    both = imread(draw_heatmap(results, {"main": "a", "control": "b"}, note="a note")).shape
    assert both[1] > 1.5 * one[1]
    assert not list(tmp_path.glob(".heat*"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lengths", "1K,zero"], "--lengths 'zero'"),
        (["--lengths", "0"], "--lengths '0' must be at least 1"),
        (["--depths", "0"], "--depths: value 0 is too small"),
        (["--needles", "0"], "--needles: value 0 is too small"),
        (["--needles", "51"], "51 needles"),
        (["--needles", "11", "--one-document"], "55 needles"),
        (["--chunk-size", "zero"], "--chunk-size: value 'zero'"),
        (["--haystack", "no-such-file.txt"], "--haystack no-such-file.txt is not a file"),
    ],
)
def test_bad_arguments(more, said):
    with pytest.raises(InputError, match=said):
        sweep.main(["--lengths", "1K", "--out", "unused", *more])


def test_depths_are_evenly_spaced():
    for count, depths in ((1, [0.5]), (2, [0.0, 1.0]), (5, [0.0, 0.25, 0.5, 0.75, 1.0])):
        more = ["--lengths", "4K,1K,1K", "--depths", str(count), "--chunk-size", "4.096K"]
        settings = needle_options.collect_settings(needle_options.parse_arguments([*more, "--out", "unused"]))
        assert settings["chunk_size"] == 4096
        assert settings["depths"] == depths
        assert settings["lengths"] == [1000, 4000]


def test_model_without_a_tokenizer(planted, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (bare / name).symlink_to(planted.path / name)
    with pytest.raises(InputError, match="has no tokenizer"):
        sweep.main(["--model", str(bare), "--lengths", "600", "--device", "cpu", "--out", str(tmp_path / "out")])
    with pytest.raises(CheckpointError):
        sweep.main(["--model", str(tmp_path / "none"), "--lengths", "600", "--out", str(tmp_path / "out")])


def test_command_line_reports_bad_input_in_one_sentence(planted, tmp_path, warm_python):
    done = warm_python.run("scripts/needle_sweep.py", *options(planted, tmp_path / "out", lengths="60"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: length 60 is too short")
    assert done.stderr.count("\n") == 1


def test_selected_pages_are_read_token_by_token(planted, tmp_path):
    """Answers as a chat decodes them, forced ones too; questions where it is asked for, the control never."""
    found = {}
    for name, more in (("exact", []), ("selected", ["--select-question"])):
        arguments = options(planted, tmp_path / name, "--select", "6", "--control", "full", *more, lengths="1K")
        assert sweep.main(arguments) == 0
        found[name] = read(tmp_path / name)
        assert (found[name]["main"]["selection"]["pages_per_head"], found[name]["control"]["selection"]) == (6, None)
        assert found[name]["settings"]["select"] == 6
    cells = [[cell["needles"] for cell in one["cells"] if cell["setting"] == "control"] for one in found.values()]
    assert cells[0] == cells[1]
    assert [one["settings"]["select_question"] for one in found.values()] == [None, True]
    with pytest.raises(InputError, match="--select-question needs pages to select: give --select N"):
        sweep.main(options(planted, tmp_path / "none", "--select-question"))
