"""Gates: both ends against independent answers, gradients against differences, and the planted head found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import longrun
from longrun.errors import InputError
from longrun.kernels.banded_attention import plan_band
from longrun.lab.planted import PlantedModel, PlantedShape, make_planted_model
from longrun.needles.needles import generate_sentences
from longrun.patterns.baseline_maps import streaming_map
from longrun.patterns.gate_texts import GateText, GateTexts
from longrun.patterns.gated_attention import ATTN_IMPLEMENTATION, Gates, _alike, streaming_attention
from longrun.patterns.gates import (
    GateTrainer,
    allow_recomputed_layers,
    gate_loss,
    label_states,
    learning_rate,
    recomputed_layers,
)
from longrun.patterns.identify import load_model
from longrun.patterns.identify_settings import IdentifySettings
from tests.tiny_models import FAMILIES, save_tiny

SINKS, RECENT = 4, 12
LENGTH = 600  # beyond two tiles of 256 queries


def settings(folder: Path | str = "unused", **changes: object) -> IdentifySettings:
    values = {"sink_size": SINKS, "recent_size": RECENT, "context": 128, "min_context": 128, "steps": 10}
    return IdentifySettings(str(folder), "unused", **{**values, **changes}).resolved(cuda_available=False)


def random_text(length: int, num_labels: int = 8, vocab_size: int = 97) -> GateText:
    token_ids = torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(length - num_labels - 1, length - 1)
    return GateText(token_ids, token_ids[positions + 1], positions)


def final_states(model, token_ids: torch.Tensor, values: torch.Tensor | None) -> torch.Tensor:
    """[T, hidden_size] after the last norm."""
    gates = None if values is None else Gates.over(values, len(token_ids), SINKS, RECENT, model.dtype)
    with torch.no_grad():
        return model.base_model(input_ids=token_ids[None], use_cache=False, longrun_gates=gates).last_hidden_state[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_are_the_model_itself_and_shut_gates_the_runtimes_streaming_heads(family: str, tmp_path) -> None:
    save_tiny(tmp_path, family, max_position_embeddings=1024)
    token_ids = random_text(LENGTH).token_ids
    model = load_model(settings(tmp_path), ATTN_IMPLEMENTATION)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")(token_ids[None]).logits[0]
    opened = model.lm_head(final_states(model, token_ids, torch.ones(3, 3)))
    assert torch.equal(opened, expected)
    assert torch.equal(model(token_ids[None]).logits[0], expected)

    runtime = longrun.load(
        tmp_path, device="cpu", kv_format="fp32", weight_format="fp32", ctx=1024, chunk_size=128,
        head_map=streaming_map(3, 3, SINKS, RECENT),
    )  # fmt: skip
    session = runtime.new_session()
    session.prefill(token_ids[:1])
    answer = session.score(token_ids[1:])
    shut = model.lm_head(final_states(model, token_ids, torch.zeros(3, 3)))
    torch.testing.assert_close(shut[:-1], answer, atol=1e-4, rtol=1e-4)
    assert (opened - shut).abs().max() > 0.1


def test_a_gate_mixes_both_answers_of_its_own_query_group(tmp_path) -> None:
    """The last layer's output against a mask-based mixture, computed in eager mode for one gate of 0.3."""
    save_tiny(tmp_path, "llama", num_hidden_layers=1, max_position_embeddings=1024)
    model = load_model(settings(tmp_path), ATTN_IMPLEMENTATION)
    token_ids = random_text(300).token_ids
    states = []
    layer = model.model.layers[0].self_attn
    layer.o_proj.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0]))
    for values in ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.3, 0.0]):
        final_states(model, token_ids, torch.tensor([values]))
    full, streaming, mixed = (state.view(300, 3, 2 * 16) for state in states)
    for head, gate in enumerate((1.0, 0.3, 0.0)):
        torch.testing.assert_close(mixed[:, head], gate * full[:, head] + (1 - gate) * streaming[:, head])
    assert (full - streaming)[RECENT + SINKS :].abs().max() > 0.1
    assert torch.allclose(full[: RECENT + SINKS], streaming[: RECENT + SINKS], atol=1e-5)


def test_gradients_agree_with_finite_differences_and_reach_nothing_else(tmp_path) -> None:
    save_tiny(tmp_path, "qwen3", max_position_embeddings=1024)
    model = load_model(settings(tmp_path), ATTN_IMPLEMENTATION).double()  # its norms stay float32, so the step is wide
    chosen, text = settings(tmp_path, regularization=0.5), random_text(96)
    with torch.no_grad():
        target = label_states(model, text, None)
    values = torch.linspace(0.2, 0.9, 9, dtype=torch.float64).view(3, 3).requires_grad_()
    gate_loss(model, text, target, values, chosen).backward()
    for layer, head in ((0, 0), (1, 2), (2, 1)):
        ends = []
        for step in (2e-3, -2e-3):
            moved = values.detach().clone()
            moved[layer, head] += step
            with torch.no_grad():
                ends.append(gate_loss(model, text, target, moved, chosen).item())
        quotient = (ends[0] - ends[1]) / 4e-3
        assert values.grad[layer, head].item() == pytest.approx(quotient, rel=2e-3, abs=1e-4)
    assert (values.grad - chosen.regularization / 9).abs().min() > 1e-3  # the loss itself moves every gate
    assert all(parameter.grad is None for parameter in model.parameters())


def test_recomputing_layers_changes_no_bit(tmp_path) -> None:
    save_tiny(tmp_path, "llama", max_position_embeddings=1024)
    model, text = load_model(settings(tmp_path), ATTN_IMPLEMENTATION), random_text(96)
    with torch.no_grad():
        target = label_states(model, text, None)
    grads, calls = [], []
    allow_recomputed_layers(model)
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
    for wanted in (False, True):
        gates = torch.full((3, 3), 0.5, requires_grad=True)
        with recomputed_layers(model, wanted):
            gate_loss(model, text, target, gates, settings(tmp_path)).backward()
        grads.append(gates.grad)
    assert torch.equal(*grads)
    assert len(calls) == 1 + 2
    assert not model.training


def test_repeatable_tiles_give_the_same_answer_and_gradients_also_in_recomputed_layers(tmp_path) -> None:
    """What a GPU runs: plain products, each tile computed again in the backward pass of a layer computed again."""
    save_tiny(tmp_path, "llama", max_position_embeddings=1024)
    model, text = load_model(settings(tmp_path), ATTN_IMPLEMENTATION), random_text(300)
    allow_recomputed_layers(model)
    found = []
    for repeatable in (False, True):
        values = torch.full((3, 3), 0.5, requires_grad=True)
        gates = replace(Gates.over(values, 300, SINKS, RECENT, torch.float32), repeatable=repeatable)
        with recomputed_layers(model, repeatable):
            states = label_states(model, text, gates)
            states.square().mean().backward()
        found.append((states.detach(), values.grad))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    assert found[0][1].abs().max() > 1e-3


def test_the_rate_rises_over_a_fifth_and_falls_over_the_last_fifth() -> None:
    chosen = settings(steps=100, learning_rate=0.02)
    rates = [learning_rate(step, chosen) / 0.02 for step in range(100)]
    assert rates[0] == pytest.approx(0.1 + 0.9 / 20)
    assert rates[9] == pytest.approx(0.55)
    assert rates[19:81] == pytest.approx([1.0] * 62)
    assert rates[90] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.1 + 0.9 / 20)


def one_head_shape() -> PlantedShape:
    return PlantedShape(
        num_layers=3, hidden_size=256, intermediate_size=256, num_qo_heads=8, num_kv_heads=4, head_dim=64,
        vocab_size=4096, max_position_embeddings=4096, moving_pairs=10, dtype="float32", retrieval_ratio=0.25,
    )  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> PlantedModel:
    return make_planted_model(tmp_path_factory.mktemp("planted") / "model", one_head_shape())


@pytest.fixture(scope="module")
def text_ids(planted: PlantedModel) -> torch.Tensor:
    sentences = generate_sentences("gates test")
    text = " ".join(next(sentences) for _ in range(200))
    return torch.tensor(AutoTokenizer.from_pretrained(planted.path)(text)["input_ids"])


def test_the_planted_head_stands_out_within_few_steps(planted: PlantedModel, text_ids: torch.Tensor) -> None:
    chosen = settings(planted.path, context=256, min_context=256, steps=12, learning_rate=0.15, num_keys=3)
    texts = GateTexts(AutoTokenizer.from_pretrained(planted.path), text_ids, chosen)
    trainer = GateTrainer(load_model(chosen, ATTN_IMPLEMENTATION), chosen)
    for step in range(12):
        trainer.train(texts.text(step))
    gates = trainer.gates.detach()
    best = divmod(gates.argmax().item(), gates.shape[1])
    assert best == planted.retrieval_head
    others = gates.flatten().sort(descending=True).values[1:]
    assert gates.max() > 0.6
    assert others.max() < 0.2
    assert min(trainer.accuracies) > 0.9  # the model does know the pass keys


def test_texts_hide_keys_and_ask_them_back(planted: PlantedModel, text_ids: torch.Tensor) -> None:
    tokenizer = AutoTokenizer.from_pretrained(planted.path)
    texts = GateTexts(tokenizer, text_ids, settings(planted.path, context=512, min_context=256, num_keys=4))
    lengths, starts = set(), []
    for step in range(6):
        text = texts.text(step)
        lengths.add(len(text.token_ids))
        assert torch.equal(text.token_ids[text.label_positions + 1], text.label_ids)
        ids, labels = text.token_ids.tolist(), text.label_ids.tolist()
        assert len(labels) == 4 * 3
        end = int(text.label_positions[0])
        found = []
        for key in range(4):
            words = labels[3 * key : 3 * key + 3]
            places = [i for i in range(end) if ids[i : i + 3] == words]
            assert len(places) == 1  # once before it is asked for
            found.append(places[0] / end)
        assert found != sorted(found) or step not in (0, 1, 2)
        starts += found
        again = GateTexts(tokenizer, text_ids, texts._settings).text(step)
        assert torch.equal(again.token_ids, text.token_ids)
    assert len(lengths) > 3 and min(lengths) >= 256 and max(lengths) <= 512
    assert min(starts) < 0.3 and max(starts) > 0.7
    other = GateTexts(tokenizer, text_ids, replace(texts._settings, seed=1)).text(0)
    assert not torch.equal(other.token_ids[:200], texts.text(0).token_ids[:200])


def test_a_context_too_short_for_a_key_is_refused(planted: PlantedModel, text_ids: torch.Tensor) -> None:
    tokenizer = AutoTokenizer.from_pretrained(planted.path)
    texts = GateTexts(tokenizer, text_ids, settings(planted.path))
    texts.text(0)
    texts._settings = replace(texts._settings, context=40, min_context=40)
    with pytest.raises(InputError, match="a context of 40 tokens is too short for a pass key of 3 words"):
        texts.text(0)
    with pytest.raises(InputError, match="num_keys 1000 is above"):
        GateTexts(tokenizer, text_ids, settings(planted.path, num_keys=1000))


@pytest.mark.parametrize(("length", "sinks", "recent"), [(1400, 4, 12), (1400, 0, 300), (700, 300, 20), (100, 64, 256)])
@pytest.mark.parametrize("most", [1, 2**28])
def test_tiles_computed_at_once_give_the_answer_and_gradients_of_single_ones(
    length: int, sinks: int, recent: int, most: int, monkeypatch
) -> None:
    """Against one mask over all queries and keys: sinks wider than a tile, none, and texts inside of one tile."""
    monkeypatch.setattr("longrun.patterns.gated_attention.BATCH_BYTES", most)
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(2, *shape, generator=generator) for shape in ((3, length, 8), (length, 8), (length, 8))]
    weight = torch.randn(2, 3, length, 8, generator=generator)
    positions = torch.arange(length)
    near = (positions[:, None] - positions < recent) | (positions < sinks)
    seen = near & (positions <= positions[:, None])
    band = plan_band(0, length, sinks, recent, torch.float32, torch.device("cpu"))
    found = []
    for repeatable in (True, None):
        q, k, v = leaves = [x.clone().requires_grad_() for x in inputs]
        if repeatable:
            out = streaming_attention(q, k, v, band, 0.5, repeatable=True)
        else:
            scores = (0.5 * q @ k[:, None].transpose(2, 3)).masked_fill(~seen, float("-inf"))
            out = scores.softmax(dim=-1) @ v[:, None]
        (out * weight).sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)


def test_interior_tiles_are_computed_at_once() -> None:
    """One call of the attention for all tiles but the first and the last: which makes long texts fast on a GPU."""
    band = plan_band(0, 256 * 8 + 10, SINKS, RECENT, torch.float32, torch.device("cpu"))
    assert [len(run) for run in _alike(band.tiles, 10**9)] == [1, 7, 1]
    assert [len(run) for run in _alike(band.tiles, 3 * band.tiles[1].mask.numel())] == [1, 3, 3, 1, 1]
