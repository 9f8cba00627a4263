"""What a GGUF file loses in a weight format, against transformers' own computation; load times in processes."""

import json

import pytest
import torch
from tiny_models import tiny_model

from longrun.errors import InputError
from scripts.quality import gguf_loss
from scripts.tiny_gguf import LETTERS, write_gguf

TEXT = "the th " + " ".join(LETTERS)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=128, hidden_size=256, intermediate_size=256, num_attention_heads=4,
                      num_key_value_heads=2, head_dim=64)  # fmt: skip


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", model, tokenizer="llama")


def test_loss_and_distributions_are_those_of_the_model(file, model):
    token_ids, found = gguf_loss.next_tokens(file, "fp32", TEXT, 40)
    with torch.inference_mode():
        right = model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)
    assert len(token_ids) == 40 and (found.exp().sum(-1) - 1).abs().max() < 1e-4
    assert (found.exp() * (found - right)).sum(-1).mean() < 1e-3  # bf16 pages
    assert (found.exp() * (found - right.roll(1, 0))).sum(-1).mean() > 0.1


def test_report(file, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_loss, "PIECE", 16)
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "loss.json"
    options = ["--tokens", "40", "--formats", "fp32", "int8", "int4", "--load-times", "1", "--out", str(out)]
    assert gguf_loss.main([str(file), str(tmp_path / "text.txt"), *options]) == 0
    found = json.loads(out.read_text())
    formats = found["formats"]
    assert formats["bf16"]["kl"] == 0 and formats["bf16"]["top1"] == 1
    assert 0 < formats["int8"]["kl"] < formats["int4"]["kl"] and formats["fp32"]["kl"] < formats["int4"]["kl"]
    assert found["model"] == "model.gguf" and str(tmp_path) not in out.read_text()
    assert list(found["load_times"]) == ["bf16", "int4", "transformers"]
    assert all(times[0]["seconds"] > 0 for times in found["load_times"].values())


def test_a_text_that_is_too_short(file):
    with pytest.raises(InputError, match="text has 3 tokens where --tokens is 40: give a longer one"):
        gguf_loss.next_tokens(file, "fp32", "th", 40)
