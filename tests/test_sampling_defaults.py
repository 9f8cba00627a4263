"""--sampling model: what a model's own files say about sampling, under the options that are given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from planted_chat import NEEDLES, ask, chat_here, spaced

from longrun.errors import ConfigError, InputError
from longrun.model.sampling_defaults import read_sampling_defaults


@pytest.mark.parametrize(
    ("content", "settings"),
    [
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "eos": 1},
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        ),
        ({"do_sample": True, "min_p": 0.1, "top_k": None}, {"min_p": 0.1, "temperature": 1}),
        ({"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}, {"temperature": 0, "repetition_penalty": 1.1}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0}),
    ],
)
def test_generation_config(tmp_path, content, settings):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert read_sampling_defaults(tmp_path).settings == settings


def test_a_gguf_files_header(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_float32("general.sampling.temp", 0.5)
    writer.add_int32("general.sampling.top_k", 20)
    writer.add_float32("general.sampling.penalty_repeat", 1.25)
    writer.add_tensor("x", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_sampling_defaults(tmp_path / "a.gguf")
    assert found.settings == {"temperature": 0.5, "top_k": 20, "repetition_penalty": 1.25}
    assert found.told() == "temperature 0.5, top_k 20, repetition_penalty 1.25"


def test_a_file_that_says_nothing_or_nonsense_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"says nothing about sampling, or is not there: leave --sampling model out"):
        read_sampling_defaults(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": 1}))
    with pytest.raises(InputError, match=r"says nothing about sampling"):
        read_sampling_defaults(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_p": "0.8"}))
    with pytest.raises(ConfigError, match=r"generation_config\.json: top_p is '0\.8', and must be a number"):
        read_sampling_defaults(tmp_path)


@pytest.fixture
def folder(planted, tmp_path) -> Path:
    """A copy of the planted model whose makers draw at random, but only the likeliest token."""
    shutil.copytree(planted.path, tmp_path / "model")
    sampling = {"do_sample": True, "temperature": 50.0, "min_p": 1.0}
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **sampling}))
    return tmp_path / "model"


def test_the_chat_begins_from_them_and_options_override(folder, text_file, capsys, monkeypatch):
    common = ["--ctx", "4K", "--file", text_file, "--prompt", ask(0), "--max-new-tokens", "7"]
    for chat in chat_here(folder, capsys, monkeypatch):
        done = chat(*common, "--sampling", "model")
        assert done.out == f"{spaced(NEEDLES[0].key)}\n" and "; seed " in done.err
        assert "generation_config.json says: temperature 50, min_p 1\n" in done.err
        other = chat(*common, "--sampling", "model", "--min-p", "0", "--seed", "1")
        assert other.out != done.out and "says: temperature 50, min_p 1; given here: min_p\n" in other.err
        plain = chat(*common)
        assert plain.out == done.out and "; seed " not in plain.err
        assert "the answer was cut after 7 tokens: give more --max-new-tokens\n" in plain.err
        broken = json.loads((folder / "generation_config.json").read_text()) | {"top_p": 7}
        (folder / "generation_config.json").write_text(json.dumps(broken))
        refused = chat(*common, "--sampling", "model")
        assert refused.status == 2 and "generation_config.json: top_p 7 is outside the range" in refused.err
