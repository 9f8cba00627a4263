"""What a batch of long texts teaches: losses by hand, values found and exact, positions, attention without a mask."""

from __future__ import annotations

from dataclasses import replace

import torch
from long_text import tokenizer


def test_a_batch_learns_answers_and_draws_text(training):
    ours = training.trainer(training.trained)
    (batch,) = ours.share(6)
    ids = torch.from_numpy(batch.token_ids)
    assert ids.shape == (2, 384)
    learned = batch.weights > 0
    assert not (learned & batch.text).any() and learned.any(axis=1).all()
    answer = tokenizer().decode(batch.token_ids[0][learned[0]])
    assert answer.endswith("</s>")
    assert not (learned | batch.text)[:, 0].any()
    assert batch.text.sum(axis=1).tolist() == [32, 32]
    # an independent computation of both losses: all logits, by hand
    with torch.no_grad():
        (answers, text), _ = ours._losses(batch)
        logs = ours.lora.model(ids).logits.log_softmax(dim=-1)
    for loss, marked in ((answers, batch.weights), (text, batch.text)):
        at = [(r, p) for r in range(2) for p in range(ids.shape[1]) if marked[r, p]]
        want = -sum(float(marked[r, p]) * logs[r, p - 1, ids[r, p]] for r, p in at)
        assert abs(loss - want) < 1e-4 * len(at)


def test_values_count_as_found_and_as_exact(training):
    """Values are put in that the model itself would say: one whole, of another the first token alone."""
    ours = training.trainer(training.trained)
    batch = next(one for step in range(5, 10) for one in ours.share(step) if len(one.values) >= 3)
    assert batch.positions is None
    ids, counts = torch.from_numpy(batch.token_ids), []
    for value, stop in ((None, None), (batch.values[0], 2), (batch.values[1], 1)):
        if value is not None:
            for place in range(int(value[0]), int(value[stop]) + (stop == 1)):
                row, column = divmod(place, ids.shape[1])
                with torch.no_grad():
                    likeliest = ours.lora.model(ids[row : row + 1, :column]).logits[0, -1].argsort(descending=True)
                ids[row, column] = likeliest[0]
            if stop == 1:
                with torch.no_grad():  # the token after the first one is the second likeliest
                    after = ours.lora.model(ids[row : row + 1, : column + 1]).logits[0, -1].argsort(descending=True)
                ids[row, column + 1] = after[1]
        with torch.no_grad():
            counts.append(ours._losses(batch)[1].tolist())
    in_first_answer = bool(batch.groups[0][0])
    assert batch.groups[:, 0].sum() <= 2 and not batch.groups[:, 1].any()
    assert counts[0] == [0, 0, 0, 0]
    assert counts[1] == [1, 1, in_first_answer, 0]
    assert counts[2] == [2, 1, in_first_answer, 0]


def test_stretched_samples_have_positions_of_their_own(training):
    ours = training.trainer(training.trained)
    batches = [batch for step in range(5) for batch in ours.share(step)]
    jumping = [batch.positions for batch in batches if batch.positions is not None]
    assert 0 < len(jumping) <= 5
    for one in batches:
        for value, (first, stretched) in zip(one.values, one.groups, strict=True):
            row, start = divmod(int(value[0]), 256)
            assert first == (not (one.token_ids[row, one.weights[row].argmax() : start] == 1).any())
            assert stretched == (one.positions is not None and (one.positions[row] != range(256)).any())
    rows = [row for positions in jumping for row in positions if (row != range(256)).any()]
    assert 2 <= len(rows) < 10  # about half of ten samples
    assert max(row.max() for row in rows) > 1000 and max(row.max() for row in rows) < 4096
    batch = next(batch for batch in batches if batch.positions is not None)
    with torch.no_grad():
        moved, plain = (ours._losses(one)[0] for one in (batch, replace(batch, positions=None)))
    assert (moved - plain).abs().min() > 1e-3


def test_attention_sees_no_mask_and_no_repeated_keys(training, monkeypatch):
    """A mask of T x T or keys repeated for every query head would cost the flash kernel, and at 256K the memory."""
    ours = training.trainer(training.trained)
    (batch,) = ours.share(6)
    assert batch.token_ids.shape[0] == 2
    plain, seen = torch.nn.functional.scaled_dot_product_attention, []

    def watched(query, key, value, **options):
        seen.append((query.shape[1], key.shape[1], options.get("attn_mask"), options.get("is_causal")))
        return plain(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        ours._losses(batch)
        next(ours.keeper.losses(0, range(1)))
    assert seen == [(4, 2, None, True)] * 6  # two layers, three forward passes
