"""A server whose answers select pages, and whose requests are read in full."""

from __future__ import annotations

from pathlib import Path

import pytest
from server_case import NAME, save_chat_model, serve, user

from longrun.runtime import backend


def test_tokens_of_answers_select_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, choose_pages = [], backend.choose_pages

    def noted(scores, view, **more):
        choose_pages(scores, view, **more)
        chosen.append(more["counts_out"].tolist())

    monkeypatch.setattr(backend, "choose_pages", noted)
    messages = user("a longer text " * 60)  # 860 tokens, so twelve pages
    for select, read in ((5, [5, 5, 5]), ("off", None)):
        chosen.clear()
        options = {"kv_format": "k5v3", "select": select, "select_from": 0}
        with serve(save_chat_model(tmp_path / str(select), head_dim=64), **options) as served:
            for _ in range(2):  # the second time the prompt is there already
                served.client().chat.completions.create(model=NAME, messages=messages, max_tokens=20)
        # of 20 tokens the last is not taken in, and a prompt's never select: three layers of 19 steps
        assert chosen == ([] if read is None else [read] * (2 * 19 * 3))
