"""GGUF files that are wrong, cut, foreign or not supported: one sentence each, before any weight is read."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import transformers
from tiny_models import save_tiny, tiny_model

import longrun
import longrun.runtime.runtime  # before a test patches what it takes from others
from longrun.chat.command import chat_command
from longrun.config.gguf_header import PassedOver, read_gguf_header
from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError, LongrunError
from longrun.model.tokenizer import has_tokenizer, load_tokenizer
from longrun.plan.command import plan_command
from scripts.tiny_gguf import LETTERS, write_gguf

MODEL = tiny_model("llama")
QWEN = tiny_model("qwen2")


@pytest.fixture
def sound(tmp_path) -> Path:
    return write_gguf(tmp_path / "model.gguf", MODEL, tokenizer="llama")


def refused(path: Path, *parts: str) -> str:
    """One sentence from `longrun.load`, before fingerprint and weights look for tensors."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("fingerprint", "checkpoint"):
            patch.setattr(f"longrun.model.{module}.find_tensors", lambda *_: pytest.fail("weights were read"))
        with pytest.raises(LongrunError) as caught:
            longrun.load(path, device="cpu", ctx=32)
    message = str(caught.value)
    assert message.isprintable() and str(path) in message
    for part in parts:
        assert part in message, message
    return message


def made(tmp_path: Path, model=MODEL, **options) -> Path:
    return write_gguf(tmp_path / "made.gguf", model, **options)


@pytest.mark.parametrize("size", [0, 3, 4, 20, 200, 2000, 10_000, -1, -5000])
def test_cut_files(sound, size):
    sound.write_bytes(sound.read_bytes()[:size])
    refused(sound, "no GGUF file" if 0 <= size < 4 else "truncated")


def test_every_cut_of_the_header_is_one_sentence(sound):
    data = sound.read_bytes()
    start = min(entry.offset for entry in read_gguf_header(sound).tensors.values())
    for size in range(4, start, 13):
        sound.write_bytes(data[:size])
        with pytest.raises(LongrunError, match=r"truncated|cannot be used"):
            ModelConfig.from_dir(sound)


def test_foreign_files(tmp_path, sound):
    folder = tmp_path / "other"
    save_tiny(folder, "llama")
    refused(folder / "model.safetensors", "no GGUF file", "a folder with config.json")
    data = bytearray(sound.read_bytes())
    data[4:8] = struct.pack("<I", 1)
    sound.write_bytes(data)
    refused(sound, "GGUF version 1")
    refused(write_gguf(tmp_path / "big.gguf", MODEL, endianess=gguf.GGUFEndian.BIG), "big-endian")


def test_one_part_of_several(tmp_path):
    file = made(tmp_path, change=lambda writer: writer.add_uint16("split.count", 3))
    refused(file, "one of 3 parts", "merge them")
    made(tmp_path, change=lambda writer: writer.add_uint16("split.count", 1))
    assert ModelConfig.from_dir(file).num_layers == 3


def test_folders(tmp_path, sound):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "2 GGUF files", "a.gguf", "name one of them")
    (tmp_path / "a.gguf").unlink()
    (tmp_path / "config.json").write_text("{}")  # not read where a GGUF file is
    assert ModelConfig.from_dir(tmp_path) == ModelConfig.from_dir(sound)
    sound.rename(tmp_path / "notes.txt")
    refused(tmp_path, "model_type")
    refused(sound, "there is no GGUF file", "model.gguf: check the path")


def test_other_architectures(tmp_path):
    def rename(data: bytes) -> bytes:
        return data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma")

    file = made(tmp_path)
    file.write_bytes(rename(file.read_bytes()))
    refused(file, "architecture gemma is not supported", "llama, qwen2, qwen3")


def test_tensor_types_that_are_not_supported(tmp_path):
    blocks = {"blk.0.ffn_up.weight": gguf.GGMLQuantizationType.IQ4_NL}
    file = made(tmp_path)
    entry = read_gguf_header(file).tensors["blk.0.ffn_up.weight"]
    data = file.read_bytes()
    name = struct.pack("<Q", len(entry.name)) + entry.name.encode() + struct.pack("<I", 2)
    at = data.index(name) + len(name) + 16
    for number, said in ((blocks["blk.0.ffn_up.weight"].value, "IQ4_NL"), (99, "number 99"), (4, "number 4")):
        file.write_bytes(data[:at] + struct.pack("<I", number) + data[at + 4 :])
        refused(file, "blk.0.ffn_up.weight", f"type {said}, which is not supported", "Q4_K")


@pytest.mark.parametrize(
    ("model", "change", "said"),
    [
        (MODEL, lambda w: w.add_expert_count(8), "num_experts 8 is not supported"),
        (MODEL, lambda w: w.add_logit_scale(0.5), "logit_scale 0.5"),
        (MODEL, lambda w: w.add_causal_attention(False), "is_causal false"),
        (QWEN, lambda w: w.add_sliding_window(64), "use_sliding_window true"),
        (QWEN, lambda w: w.add_rope_dimension_count(8), "rope.dimension_count is 8 where a head has 16 channels"),
        (MODEL, lambda w: w.add_value_length(8), "attention.value_length is 8 where a head has 16 channels"),
        (MODEL, lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "RoPE type 'longrope'"),
        (MODEL, lambda w: w.add_rope_scaling_yarn_log_mul(0.1), "rope.scaling.yarn_log_multiplier"),
        (MODEL, lambda w: w.add_uint32("general.alignment", 3), "general.alignment is 3"),
        (MODEL, lambda w: w.add_string("llama.rope.scaling.factor", "x"), "factor is 'x'"),
    ],
)
def test_other_arithmetic(tmp_path, model, change, said):
    refused(made(tmp_path, model, change=change), said)


def test_missing_and_wrong_metadata(tmp_path):
    for key, name in (("rms_eps", "llama.attention.layer_norm_rms_epsilon"), ("block_count", "llama.block_count")):
        refused(made(tmp_path, drop=(key,)), f"metadata lacks {name}")
    refused(made(tmp_path, drop=("head_count",), change=lambda w: w.add_head_count([6, 6, 3])), "differs from layer")
    refused(made(tmp_path, drop=("block_count",), change=lambda w: w.add_block_count(4)), "lacks tensor blk.3.attn_q")
    refused(made(tmp_path, drop=("block_count",), change=lambda w: w.add_block_count(2)), "holds tensor blk.2.attn")
    refused(made(tmp_path, drop=("block_count",), change=lambda w: w.add_block_count(10**9)), "1 to 512")
    wide = made(tmp_path, drop=("feed_forward_length",), change=lambda w: w.add_feed_forward_length(128))
    refused(wide, "blk.0.ffn_gate.weight has shape [136, 96]", "[128, 96]")
    same = made(tmp_path, drop=("head_count",), change=lambda w: w.add_head_count([6, 6, 6]))
    assert ModelConfig.from_dir(same).num_qo_heads == 6
    refused(made(tmp_path, change=lambda w: w.add_eos_token_id(97)), "eos_token_id is [97]")


def test_wrong_tensors(tmp_path):
    refused(made(tmp_path, tensors=lambda t: t.pop("output_norm.weight")), "lacks tensor output_norm.weight")
    refused(made(tmp_path, tensors=lambda t: t.pop("token_embd.weight")), "lacks tensor token_embd.weight")
    extra = {"blk.0.ffn_gate_inp.weight": np.zeros((2, 96), np.float32)}
    refused(made(tmp_path, tensors=lambda t: t.update(extra)), "holds tensor blk.0.ffn_gate_inp.weight")
    for values in (np.zeros(8), np.full(8, np.nan), np.ones(6)):
        refused(made(tmp_path, tensors=lambda t, v=values: t.update({"rope_freqs.weight": v})), "8 positive numbers")


def test_a_window_of_mistral_is_kept(tmp_path):
    file = made(tmp_path, tiny_model("mistral", sliding_window=48))
    config = ModelConfig.from_dir(file)
    assert (config.model_type, config.sliding_window) == ("mistral", 48)
    assert ModelConfig.from_dir(made(tmp_path, tiny_model("mistral"))).sliding_window is None


def test_unknown_keys_are_told(tmp_path):
    file = made(tmp_path, change=lambda w: w.add_uint32("llama.attention.strange", 3))
    (warning,) = ModelConfig.from_dir(file).warnings
    assert "llama.attention.strange" in warning.text


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("gpt2", lambda w: w.add_tokenizer_pre("cuneiform"), "'cuneiform' of splitting text"),
        ("gpt2", lambda w: w.add_token_merges(["t h e"]), "does not name two tokens"),
        ("gpt2", lambda w: w.add_token_merges(["t q"]), "out of vocabulary"),
        ("gpt2", lambda w: w.add_token_types([1, 2]), "2 items for 97 tokens"),
        ("llama", lambda w: w.add_tokenizer_model("t5"), "kind 't5'"),
        ("llama", lambda w: w.add_token_list(["a"] * 97), "stand twice"),
        ("llama", lambda w: w.add_bos_token_id(200), "200, which is no token"),
        ("llama", lambda w: w.add_token_scores([1.0]), "1 items for 97 tokens"),
    ],
)
def test_tokenizers_that_are_refused(tmp_path, kind, change, said):
    def again(writer: gguf.GGUFWriter) -> None:
        entries, before = writer.kv_data[0], dict(writer.kv_data[0])
        for key in list(entries):
            del entries[key]
        change(writer)
        changed = dict(entries)
        entries.clear()
        entries.update({**before, **changed})

    refused(made(tmp_path, tokenizer=kind, change=again), said)


def test_no_tokenizer(tmp_path, capsys):
    file = made(tmp_path)
    assert not has_tokenizer(file)
    runtime = longrun.load(file, device="cpu", ctx=64)
    assert runtime.tokenizer is None and "no tokenizer" in runtime.notices[-1]
    with pytest.raises(LongrunError, match="has no tokenizer"):
        chat_command(["--model", str(file), "--ctx", "64", "--device", "cpu", "--prompt", "a"])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tokenizers_are_what_transformers_makes_of_the_file(tmp_path, kind):
    file = made(tmp_path, QWEN if kind == "gpt2" else MODEL, tokenizer=kind)
    ours = load_tokenizer(file)
    right = transformers.AutoTokenizer.from_pretrained(
        tmp_path, gguf_file=file.name, local_files_only=True, trust_remote_code=False
    )
    letters = "".join(LETTERS)
    for text in ("the other the", " the", "then  there", "a the</s>the", letters, "x" * 300, "thethe the1234 the"):
        ids = ours(text)["input_ids"]
        assert ids == right(text)["input_ids"], text
        assert ours.decode(ids) == right.decode(ids)
    assert ours("the")["input_ids"][:1] == ([1] if kind == "llama" else ours.convert_tokens_to_ids(["the"]))
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")
    chat = [{"role": "user", "content": "the"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "[user]the</s>[a]"


def test_planned_from_the_header_alone(tmp_path, capsys):
    """The weights may be missing: of a cut file nothing is planned, but no byte of a tensor is read."""
    file = made(tmp_path, tiny_model("qwen3"))
    folder = tmp_path / "original"
    save_tiny(folder, "qwen3")
    plans = []
    for model in (file, folder):
        assert plan_command(["--model", str(model), "--ctx", "64", "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    of_file, of_folder = plans
    base = next(number for number, item in enumerate(of_file["items"]) if item["name"] == "runtime base")
    assert of_folder["items"][base]["bytes"] - of_file["items"][base]["bytes"] == 160_000_000  # what a folder imports
    assert of_folder["total_bytes"] - of_file["total_bytes"] == 160_000_000
    depends = {"items", "total_bytes", "device_bytes", "max_ctx"}
    assert [of_file[key] for key in of_file if key not in depends] == [
        of_folder[key] for key in of_folder if key not in depends
    ]
    assert [item for n, item in enumerate(of_file["items"]) if n != base] == [
        item for n, item in enumerate(of_folder["items"]) if n != base
    ]
    data = bytearray(file.read_bytes())
    start = min(entry.offset for entry in read_gguf_header(file).tensors.values())
    data[start:] = b"\xff" * (len(data) - start)
    file.write_bytes(data)
    assert plan_command(["--model", str(file), "--ctx", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == plans[0]


def test_long_arrays_are_passed_over(tmp_path):
    file = made(tmp_path, change=lambda w: (w.add_array("a.words", ["x"] * 7), w.add_array("b.numbers", [1] * 2000)))
    metadata = read_gguf_header(file).metadata
    assert metadata["a.words"] == PassedOver(7) and metadata["b.numbers"] == PassedOver(2000)
    metadata = read_gguf_header(file, keep=("a.words", "b.numbers")).metadata
    assert metadata["a.words"] == ["x"] * 7 and metadata["b.numbers"] == [1] * 2000


def test_a_header_is_read_once_unless_the_file_changes(tmp_path, monkeypatch):
    """A file that changed within the last two seconds is read again whatever its times say."""
    file = write_gguf(tmp_path / "model.gguf", tiny_model("llama"))
    assert read_gguf_header(file) is not read_gguf_header(file)
    settled = time.time_ns() + 3 * 10**9
    monkeypatch.setattr("longrun.config.gguf_header.time.time_ns", lambda: settled)
    assert read_gguf_header(file) is read_gguf_header(file)
    assert read_gguf_header(file, keep=("x",)) is not read_gguf_header(file)
    with open(file, "r+b") as stream:
        stream.write(b"GGUX")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        read_gguf_header(file)
