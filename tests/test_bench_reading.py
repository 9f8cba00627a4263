"""`bench.py reading` on a CPU: the chat reads a text in a process of its own, and finds what is hidden there."""

from __future__ import annotations

import pytest
from bench_case import CEILINGS, fixed_ceilings, run

from longrun.errors import InputError
from longrun.model.tokenizer import load_tokenizer
from longrun.needles.needles import make_needles
from scripts.bench import command as bench
from scripts.bench.bench_prefill import ideal_seconds
from scripts.bench.bench_reading import SPARE, text_with_needles


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    with fixed_ceilings(monkeypatch):
        yield


def test_the_chat_reads_a_text_and_finds_its_numbers(planted, capfd, tmp_path):
    heads = ("--head-map", planted.head_map, "--device", "cpu")
    sparse = ("--prefill", "sparse", "--prefill-dense", "0", "--prefill-share", "8%")
    options = ("--model", planted.path, "--length", "6K", "--needles", "3")
    result = run(capfd, tmp_path, "reading", *options, "--", *heads, *sparse)
    assert (result["found"], result["questions"]) == (3, 3)
    assert [row["depth"] for row in result["rows"]] == [0, 0.5, 1] and all(row["right"] for row in result["rows"])
    read = result["read"]
    assert 6000 - SPARE - 40 < read["tokens"] <= 6000 and read["prefill"]["sparse_tokens"] > 500
    assert 0 < read["seconds"] < result["process_seconds"] and read["flops"]["choosing"] > 0
    assert read["of_matmul_and_attention"] == pytest.approx(ideal_seconds(read["flops"], CEILINGS) / read["seconds"])
    cut = run(capfd, tmp_path, "reading", *options, "--", *heads, "--stop", "5")
    assert cut["found"] == sum("5" not in row["number"] for row in cut["rows"]) < 3, "an answer cut short is not right"
    dense = cut["read"]["flops"]
    assert "choosing" not in dense and dense["retrieval_attention"] > read["flops"]["retrieval_attention"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_numbers_stand_at_even_depths(planted, count):
    tokenizer, needles = load_tokenizer(planted.path), make_needles(count, 0)
    text = text_with_needles(tokenizer, 3000, needles, 0)
    assert 0 <= 3000 - SPARE - len(tokenizer(text, add_special_tokens=False).input_ids) < 40
    places = [text.index(needle.sentence) / len(text) for needle in needles]
    assert places[0] == 0
    assert places == pytest.approx([number / max(1, count - 1) for number in range(count)], abs=0.03)


def test_what_cannot_be_read(planted, tmp_path, capfd):
    with pytest.raises(InputError, match="is not a planted model"):
        bench.main(["reading", "--model", str(tmp_path), "--length", "4K"])
    with pytest.raises(InputError, match="has no room for 8 needles"):
        bench.main(["reading", "--model", str(planted.path), "--length", "300"])
    asked = ["reading", "--model", str(planted.path), "--length", "4K", "--"]
    with pytest.raises(InputError, match="--head-map auto is not known"):
        bench.main([*asked, "--head-map", "auto"])
    with pytest.raises(InputError, match="unrecognized arguments: --no-such-option"):
        bench.main([*asked, "--no-such-option"])
    with pytest.raises(InputError, match="the chat ended with status 2"):
        bench.main([*asked, "--head-map", str(tmp_path)])
    assert f"{tmp_path}" in capfd.readouterr().err
