"""A checkpoint folder is checked whole before its weights are read, and none of its code is ever run."""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from tiny_models import edit_config, save_tiny, save_tokenizer

import longrun
from longrun.chat.command import chat_command
from longrun.config.model_config import ModelConfig
from longrun.errors import MESSAGE_LIMIT, CheckpointError, InputError, LongrunError, SessionError
from longrun.model.adapter_merge import load_merged
from longrun.model.folder import check_folder, ends_and_notices
from longrun.model.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
OWN_CODE = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoTokenizer": ["own.Own", None]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, "llama", num_hidden_layers=1).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    save_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_folder_is_sound(folder):
    runtime = longrun.load(folder, device="cpu", ctx=64)
    assert runtime.eos_token_ids == {1, 2}
    assert runtime.tokenizer.decode(runtime.tokenizer("any text?")["input_ids"]) == "any text?"


def eos(value):
    return lambda folder: edit(folder / "generation_config.json", eos_token_id=value)


def tokenizer_config(**changes):
    return lambda folder: edit(folder / "tokenizer_config.json", **changes)


def cut(name: str, share: float):
    def damage(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return damage


def newer_tokenizer(folder: Path) -> None:
    edit(folder / "tokenizer.json", version="3.0", model={"type": "Quantum", "vocab": {}})


def last_shard(change):
    def damage(folder: Path) -> None:
        file = sorted(folder.glob("model-*.safetensors"))[-1]
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        text = json.dumps(change(header)).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def all_of_dtype(name: str):
    return last_shard(lambda header: {k: v if k == "__metadata__" else {**v, "dtype": name} for k, v in header.items()})


DAMAGES = {
    "tokenizer cut": (cut("tokenizer.json", 0.5), "tokenizer in"),
    "tokenizer empty": (cut("tokenizer.json", 0), "tokenizer in"),
    "tokenizer newer": (newer_tokenizer, "newer versions"),
    "tokenizer config cut": (cut("tokenizer_config.json", 0.5), "tokenizer_config.json"),
    "tokenizer config wrong": (tokenizer_config(bos_token=[[1]]), "tokenizer in"),
    "template is a number": (tokenizer_config(chat_template=7), "tokenizer in"),
    "generation config cut": (cut("generation_config.json", 0.5), "generation_config.json"),
    "generation config a list": (lambda f: (f / "generation_config.json").write_text("[]"), "no JSON object"),
    "eos nested": (eos([[1]]), "eos_token_id is"),
    "eos fraction": (eos(1.5), "eos_token_id is 1.5"),
    "eos whole fraction": (eos(2.0), "eos_token_id is 2.0"),
    "eos text": (eos("</s>"), "eos_token_id is '</s>'"),
    "eos true": (eos(True), "eos_token_id is True"),
    "eos beyond": (eos(97), "0 to 96"),
    "eos object": (eos({"a": 1}), "eos_token_id is"),
    "eos long": (eos(10**99), "eos_token_id is"),
    "eos in config": (
        lambda f: ((f / "generation_config.json").unlink(), edit_config(f, eos_token_id=[0.5])),
        "config.json: eos_token_id",
    ),
    "rope theta": (lambda f: edit_config(f, rope_parameters={"rope_type": "default", "rope_theta": 0}), "rope_theta"),
    "rope of one turn": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, "factor": 1e-9}),
        "factor",
    ),
    "config deep": (lambda f: edit_config(f, notes=json.loads("[" * 500 + "]" * 500)), "64 levels"),
    "config of long numbers": (lambda f: edit_config(f, bos_token_id=10**4000), "4,001 digits"),
    "special tokens cut": (lambda f: (f / "special_tokens_map.json").write_text('{"a'), "special_tokens_map.json"),
    "index cut": (cut("model.safetensors.index.json", 0.5), "index.json"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "and 7 more but no model.safetensors.index"),
    "index deep": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": ' + "[" * 9**5 + "]" * 9**5 + "}"),
        "64 levels",
    ),
    "index of lists": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": ["b"]}}'),
        "names no files",
    ),
    "index leaves the folder": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        "names no files",
    ),
    "shard cut": (lambda f: cut(sorted(p.name for p in f.glob("model-*"))[-1], 0.9)(f), "truncated"),
    "dtype unknown": (all_of_dtype("F4_Q"), "dtype 'F4_Q'"),
    "dtype of no weight": (all_of_dtype("I32"), "has dtype I32"),
    "header with huge numbers": (
        last_shard(lambda header: {**header, "x": {"dtype": "F32", "shape": [10**90], "data_offsets": [0, 4]}}),
        "entry of tensor x",
    ),
    "header with a long name": (
        last_shard(lambda header: {**header, "x" * 10**5: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        "xxx",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_wrong_is_found_before_the_weights_are_read(folder, monkeypatch, name):
    damage, said = DAMAGES[name]
    damage(folder)

    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("longrun.runtime.load.load_decoder", read)
    with pytest.raises(LongrunError) as caught:
        longrun.load(folder, device="cpu", ctx=64)
    message = str(caught.value)
    assert said in message, message
    assert message.isprintable() and len(message) <= MESSAGE_LIMIT


def test_a_measured_head_map_comes_after_the_check_as_well(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("LONGRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("longrun.runtime.load.auto_head_map", lambda *args: pytest.fail("the model was measured"))
    cut("tokenizer.json", 0.5)(folder)
    with pytest.raises(CheckpointError, match="tokenizer in"):
        longrun.load(folder, head_map="auto", device="cpu", ctx=64)


def own_code(folder: Path) -> Path:
    """Put code into the folder that leaves a file behind when it runs; returns that file."""
    ran = folder.parent / "code_ran"
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nclass OwnConfig: pass\nOwnModel = Own = OwnConfig\n"
    )
    return ran


def called_in_tokenizer_config(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")


CALLS = {
    "config": (lambda f: edit_config(f, auto_map=OWN_CODE), "auto_map"),
    "unknown type": (lambda f: edit_config(f, auto_map=OWN_CODE, model_type="own", architectures=["Own"]), "Own"),
    "no type": (lambda f: edit_config(f, auto_map=OWN_CODE, model_type=None), "no model_type"),
    "tokenizer": (called_in_tokenizer_config, "tokenizer_config.json names code of its own"),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_code_of_a_checkpoint_runs_though_stdin_says_yes(folder, monkeypatch, name):
    """Before, transformers asked on stdin whether it may, and a piped message `y` was the answer."""
    ran = own_code(folder)
    change, said = CALLS[name]
    change(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    monkeypatch.setattr(builtins, "input", lambda *args: pytest.fail("it asked"))
    with pytest.raises(CheckpointError, match=said):
        longrun.load(folder, device="cpu", ctx=64)
    for load in (load_tokenizer, lambda f: load_merged(f, None)):
        with contextlib.suppress(Exception):  # `pytest.fail` is none
            load(folder)
    assert not ran.exists()


def test_every_call_into_transformers_says_that_no_code_may_run():
    asked = []
    for folder in ("longrun", "patterns", "scripts"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                    trust = {key.arg: getattr(key.value, "value", None) for key in node.keywords}
                    if trust.get("trust_remote_code") is not False and "where" not in ast.dump(node):
                        asked.append(f"{file}:{node.lineno}")
    assert asked == []


def test_check_folder_is_what_load_uses(folder):
    config = ModelConfig.from_dir(folder)
    checked = check_folder(folder, config)
    assert checked.config == config and checked.adapter is None and checked.eos_token_ids == {1, 2}
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert check_folder(folder, config).tokenizer is None


def template(text: str, **names: str):
    return lambda folder: (
        (folder / "chat_template.jinja").write_text(text),
        edit(folder / "tokenizer_config.json", **names),
    )


@pytest.mark.parametrize("generation", [None, 1])
def test_what_ends_a_turn_is_whatever_any_of_the_files_says(folder, generation):
    edit(folder / "generation_config.json", eos_token_id=generation)
    edit_config(folder, eos_token_id=[5])
    template("{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}", eos_token="</s>")(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    checked = check_folder(folder, ModelConfig.from_dir(folder))
    assert checked.eos_token_ids == {1, 5, end} and not checked.notices
    assert longrun.load(folder, device="cpu", ctx=64).eos_token_ids == {1, 5, end}


def test_an_endless_template_is_found_before_weights_and_one_that_refuses_is_told(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    template("{{ 'x' * 10**10 }}")(folder)
    with pytest.raises(CheckpointError, match="chat template needed more than 512 MB of memory"):
        ends_and_notices(load_tokenizer(folder))
    template("{{ raise_exception('tools only') }}")(folder)
    ends, notices = ends_and_notices(load_tokenizer(folder))
    assert ends == {1} and len(notices) == 1 and "refuses a question and its answer (tools only)" in notices[0]


def test_a_session_of_another_run_is_refused_before_the_weights_are_read(folder, tmp_path, monkeypatch):
    session = longrun.load(folder, device="cpu", ctx=64).new_session()
    session.prefill([3, 4, 5])
    session.save(tmp_path / "session")
    monkeypatch.setattr("longrun.runtime.load.load_decoder", lambda *args: pytest.fail("weights were read"))
    for options, said in (
        ({"kv_format": "bf16"}, "saved with kv format k5v3"),
        ({"weight_format": "int8"}, "saved with weight format fp32"),
    ):
        with pytest.raises(SessionError, match=said):
            longrun.load(folder, device="cpu", ctx=64, session=tmp_path / "session", **options)
    manifest = tmp_path / "session" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.raises(SessionError, match=r"manifest\.json"):
        longrun.load(folder, device="cpu", ctx=64, session=tmp_path / "session")


def test_the_tokenizer_is_shown_before_weights_are_read(folder, monkeypatch):
    def refuse(tokenizer) -> None:
        assert tokenizer.decode([5]) == '"'
        raise InputError("no chat with this one")

    monkeypatch.setattr("longrun.runtime.load.load_decoder", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match="no chat with this one"):
        longrun.load(folder, device="cpu", ctx=64, on_tokenizer=refuse)
    template("{{ messages[-1]['content'] }}")(folder)
    with pytest.raises(InputError, match="the model's chat template ignores the system prompt"):
        chat_command(
            ["--model", str(folder), "--ctx", "64", "--device", "cpu", "--system", "Be brief.", "--prompt", "a"]
        )
