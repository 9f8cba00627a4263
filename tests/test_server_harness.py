"""What lm-evaluation-harness sends (`--model local-completions`), answered as transformers' own model has it.

The requests are written by hand after version 0.4.13; docs/clients.md says how the real program was run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from server_case import NAME, Served, serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from longrun.errors import InputError
from longrun.server.reading import scored_at_once
from scripts.quality import compare_harness

PAIRS = [
    ("once upon a time ", "there was"),
    ("o", "nce"),
    ("the ", "end"),
    ("a much longer context " * 9, "ends here."),
]


class Reference:
    """transformers' model in float32."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def next_logprobs(self, ids: list[int]) -> torch.Tensor:
        """[len(ids), vocab]."""
        with torch.no_grad():
            return self._model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def loglikelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        found = self.next_logprobs(context + continuation)[len(context) - 1 : -1]
        own = found.gather(1, torch.tensor(continuation)[:, None])[:, 0]
        return own.sum().item(), bool((found.argmax(-1) == torch.tensor(continuation)).all())


@pytest.fixture(scope="module")
def reference(chat_model: Path) -> Reference:
    return Reference(chat_model)


@pytest.fixture(scope="module")
def harness(chat_model: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server in fp32 over a model that ends its answer at once after the first pair."""
    folder = tmp_path_factory.mktemp("harness") / "model"
    shutil.copytree(chat_model, folder)
    end = reference.next_logprobs(reference.ids("".join(PAIRS[0])))[-1].argmax().item()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    with serve(folder, weight_format="fp32") as running:
        yield running


def scoring(prompt: object) -> dict[str, object]:
    return {
        "model": NAME, "prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True
    }  # fmt: skip


def as_the_harness_reads(choice: dict, context_length: int) -> tuple[float, bool]:
    """The last entry is the token that had to be asked for."""
    scores = choice["logprobs"]
    own, top = (scores[name][context_length:-1] for name in ("token_logprobs", "top_logprobs"))
    return sum(own), all(score == max(best.values()) for score, best in zip(own, top, strict=True))


@pytest.mark.parametrize("batch", [1, 3])
def test_loglikelihoods_are_those_of_transformers(harness: Served, reference: Reference, batch: int) -> None:
    pairs = [(reference.ids(context), reference.ids(continuation)) for context, continuation in PAIRS]
    context = reference.ids("once upon")
    likely = [reference.next_logprobs(context)[-1].argmax().item()]
    pairs.append((context, likely))  # greedy
    found = []
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        answer = harness.post("/v1/completions", scoring([a + b for a, b in some])).json()
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(some)))
        assert answer["usage"]["prompt_tokens"] == sum(len(a) + len(b) for a, b in some)
        assert answer["usage"]["completion_tokens"] == len(some)
        found += [
            as_the_harness_reads(*each) for each in zip(answer["choices"], (len(a) for a, _ in some), strict=True)
        ]
    expected = [reference.loglikelihood(*pair) for pair in pairs]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=0.01)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected] and expected[-1][1]


def test_the_token_that_ends_an_answer_has_its_score_and_no_text(harness: Served, reference: Reference) -> None:
    text = "".join(PAIRS[0])
    choice = harness.post("/v1/completions", scoring(text)).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["text"] == text
    best = reference.next_logprobs(reference.ids(text))[-1].max().item()
    assert len(choice["logprobs"]["tokens"]) == len(reference.ids(text)) + 1
    assert choice["logprobs"]["token_logprobs"][-1] == pytest.approx(best, abs=0.01)
    stream = harness.client().completions.create(model=NAME, prompt=text, max_tokens=3, logprobs=1, stream=True)
    scores = [chunk.choices[0].logprobs.token_logprobs for chunk in stream if chunk.choices[0].logprobs]
    assert scores == [[pytest.approx(best, abs=0.01)]]


def test_texts_are_continued_one_after_another(harness: Served, reference: Reference) -> None:
    body = {"model": NAME, "max_tokens": 9, "temperature": 0, "stop": ["\n\n", "</s>"], "seed": 1234}
    for prompts in ([context for context, _ in PAIRS], [reference.ids(context) for context, _ in PAIRS]):
        answer = harness.post("/v1/completions", body | {"prompt": prompts}).json()
        expected = [harness.expected(reference.ids(context), 9) for context, _ in PAIRS]
        assert [choice["text"] for choice in answer["choices"]] == expected
    for change, why in (
        ({"prompt": ["a", "b"], "stream": True}, "2 prompts are not streamed"),
        ({"prompt": ["a"] * 1001}, "1,001 prompts are more than the 1,000 of one request"),
    ):
        refused = harness.post("/v1/completions", body | change)
        assert refused.status_code == 400 and why in refused.json()["error"]["message"]


def test_as_many_tokens_are_scored_at_once_as_have_room_in_the_plan(harness: Served) -> None:
    plan = harness.reference.plan
    activations = next(item.bytes for item in plan.items if item.name == "activations")
    for vocab_size in (97, 49_152, 10**7):
        count = scored_at_once(plan, vocab_size)
        needed = count * (3 * 4 * vocab_size + activations / plan.chunk_size)
        assert 1 <= count <= plan.chunk_size and (needed <= activations or count == 1)
    assert scored_at_once(plan, 97) > 16


def test_two_runs_are_compared_score_by_score(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, last in (("server", -3.0), ("hf", -3.5)):
        (tmp_path / name / "model").mkdir(parents=True)
        samples = [{"doc_id": 0, "resps": [[["-1.0", "True"]], [[last, "False"]]]}]
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        (tmp_path / name / "model" / "samples_my_task_2026-01-01T00-00-00.jsonl").write_text(text)
    runs = [str(tmp_path / "server"), str(tmp_path / "hf")]
    assert compare_harness.main(runs) == 1 and compare_harness.main([*runs, "--most", "0.5"]) == 0
    task = {"items": 1, "scores": 2, "largest_difference": 0.5, "greedy_differs": 0}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "largest_difference": 0.5,
        "tasks": {"my_task": task},
    }
    with pytest.raises(InputError, match="holds no samples"):
        compare_harness.main([str(tmp_path / "server"), str(tmp_path / "none")])


def test_its_remote_tokenizer_is_the_models(harness: Served, reference: Reference) -> None:
    info = httpx.get(f"{harness.root}/tokenizer_info").json()
    tokenizer = reference.tokenizer
    assert (info["bos_token"], info["eos_token"]) == (tokenizer.bos_token, tokenizer.eos_token)
    assert info["chat_template"] == tokenizer.chat_template
    text = f"one {tokenizer.eos_token} two"
    ids = harness.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert ids == reference.ids(text) and tokenizer.eos_token_id in ids
    assert harness.post("/tokenize", {"content": text}).json()["tokens"] != ids
    assert harness.post("/detokenize", {"tokens": ids}).json()["prompt"] == tokenizer.decode(ids)
    for body in ({"tokens": [97]}, {"tokens": ["a"]}, {}):
        assert harness.post("/detokenize", body).status_code == 400
    for body in (
        {"prompt": "a", "content": "b"},
        {"prompt": "a", "add_special": True},
        {"content": "a", "add_special_tokens": True},
    ):
        assert harness.post("/tokenize", body).status_code == 400
