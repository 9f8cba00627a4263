"""The parts of `bench.py real`, each in a process of its own, so that memory is one part's and a failure stays there.

A part is a generator of (kind, object): `ceilings`, `settings`, `load`, `row` and `answer`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from longrun.config.gguf_header import gguf_file
from longrun.config.model_config import ModelConfig
from longrun.errors import LongrunError
from longrun.model.adapter_merge import load_merged, set_rope
from longrun.model.rope import RopeParameters
from longrun.patterns.head_map import HeadMap
from longrun.runtime.runtime import Runtime
from longrun.session.session import Session
from longrun.specs.model_bytes import model_weight_bytes
from scripts.bench.bench_common import MemoryWatch, describe, load_runtime, parse_lengths, peak_resident, synchronize
from scripts.bench.bench_decode import WARM_TOKENS, decoded_tokens, floor, timed_decode
from scripts.bench.bench_prefill import chunk_clock, prefill_flops, reading_rates, session_rates
from scripts.bench.bench_transformers import TransformersPeer
from scripts.bench.ceilings import measure_ceilings
from scripts.bench.real_text import CodeChat, Question, as_questions, read_code

Found = Iterator[tuple[str, Any]]
ASK_ROOM, ANSWER_TOKENS = 256, 48
CPU_WARM_TOKENS = 256


def ceilings_part(args: argparse.Namespace) -> Found:
    """What the device does at best."""
    yield "ceilings", measure_ceilings(torch.device(args.device), "memory", "matmul", "attention")


def longrun_part(args: argparse.Namespace, ceilings: dict[str, Any]) -> Found:
    """longrun with the weights of `args.weight_format`: loading, then at every length reading, answers, decoding."""
    device, lengths = torch.device(args.device), parse_lengths(args.lengths)
    memory, runner = MemoryWatch(device), f"longrun {args.weight_format} weights"
    torch.zeros(1, device=device)  # CUDA must be up before peaks are counted, and is no part of loading
    memory.start()
    marks, start = {}, time.perf_counter()

    def passed(name: str) -> Callable[..., None]:
        return lambda *_: marks.__setitem__(name, time.perf_counter() - start - sum(marks.values()))

    room = max(ASK_ROOM, decoded_tokens(args) + 1)
    hooks = {"on_plan": passed("plan"), "on_tokenizer": passed("tokenizer")}
    runtime = load_runtime(args, max(lengths) + room, hooks, args.yarn)
    synchronize(device)
    passed("weights")()
    loaded = memory.measure(runtime.plan)
    session = runtime.new_session()
    synchronize(device)
    passed("session and kernels")()
    del session
    yield "load", {
        "runner": runner, "weight_format": args.weight_format, "seconds": sum(marks.values()), "phases": marks,
        "weight_bytes": runtime.parts.decoder.weight_bytes, "memory": loaded, "peak_resident_bytes": peak_resident(),
    }  # fmt: skip
    chat = CodeChat(runtime.tokenizer, read_code(args.text)[0])
    for length in lengths:
        row = {"runner": runner, "weight_format": args.weight_format, "length": length, "kv": runtime.plan.kv_format}
        memory.start()
        session = runtime.new_session(length + room)
        row |= read(runtime, session, torch.tensor(chat.document_ids(length)), ceilings)
        for found in answers(runtime, session, chat, length, args):
            yield "answer", {"runner": runner, "length": length, **found}
        row |= timed_decode(runtime, session, args, ceilings, memory)
        yield "row", {**row, "peak_resident_bytes": peak_resident()}
        del session
    yield "settings", describe(runtime, args)


def read(runtime: Runtime, session: Session, token_ids: torch.Tensor, ceilings: dict[str, Any]) -> dict[str, Any]:
    """Read once for what libraries load and plan at this length (on a CPU only a little), then on the clock."""
    device, empty = session.cache.device, session.mark()
    session.prefill(token_ids if device.type == "cuda" else token_ids[:CPU_WARM_TOKENS])
    session.rewind(empty)
    before, (ends, progress) = session.prefill_counts, chunk_clock(device)
    start = time.perf_counter()
    session.prefill(token_ids, progress=progress)
    rates = session_rates(runtime, session, len(token_ids), ends[-1] - start, ceilings, before)
    return {"chunk_size": session.plan.chunk_size, **rates}


def answers(runtime: Runtime, session: Session, chat: CodeChat, length: int, args: argparse.Namespace) -> Iterator:
    """Ask what the text answers, always at the end of the text, where the session stands again afterwards."""
    mark = session.mark()
    for question in chat.asked(as_questions(args.question, args.expect), length):
        session.prefill(chat.question_ids(question), sparse=False)
        yield judged(question, "".join(runtime.stream(session, ANSWER_TOKENS)))
        session.rewind(mark)
    session.release(mark)


def judged(question: Question, answer: str) -> dict[str, Any]:
    right = question.is_right(answer)
    return {"question": question.text, "expected": question.expected, "answer": answer, "right": right}


class GgufPeer(TransformersPeer):
    """transformers with its own reader where the model is a GGUF file; a text is read in one forward pass."""

    def _load(self, model_dir: Path) -> dict[str, Any]:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()

        if gguf_file(model_dir) is None:
            self.model = load_merged(model_dir, None, self.yarn, dtype=self.dtype, attn_implementation="sdpa")
        else:
            self.model = AutoModelForCausalLM.from_pretrained(
                str(model_dir.parent), gguf_file=model_dir.name, dtype=self.dtype, attn_implementation="sdpa",
                local_files_only=True, trust_remote_code=False,
            )  # fmt: skip
            set_rope(self.model, RopeParameters.from_dir(model_dir, self.yarn))
        self.model.eval().to(self.device)
        return {}

    def read_and_decode(self, token_ids: torch.Tensor, warm_tokens: int, new_tokens: int) -> dict[str, Any]:
        """Seconds of reading, after `warm_tokens` off the clock, and milliseconds a token after it."""
        row = {"runner": self.runner, "length": len(token_ids), "chunk_size": self.chunk}
        self.cache, self.length = None, len(token_ids)

        @torch.inference_mode()
        def work() -> dict[str, Any]:
            found, self.cache, token = self._timed_read(token_ids, warm_tokens)
            return found | self._time_tokens(self.cache, token, self.length, new_tokens, WARM_TOKENS)

        return self._guarded(row, work)

    @torch.inference_mode()
    def answer(self, token_ids: list[int], eos: Collection[int]) -> list[int]:
        """What follows the tokens of `read_and_decode` and these."""
        self.cache.crop(self.length - self.cache.get_seq_length())
        token, found = torch.tensor([token_ids], device=self.device), []
        while len(found) < ANSWER_TOKENS and not (found and found[-1] in eos):
            token = self._step(token, self.cache)
            found.append(int(token))
        return found


def transformers_part(args: argparse.Namespace, ceilings: dict[str, Any]) -> Found:
    """transformers over the same tokens."""
    from longrun.model.folder import check_folder

    device, lengths = torch.device(args.device), parse_lengths(args.lengths)
    config = ModelConfig.from_dir(args.model).stretched(args.yarn)
    folder = check_folder(args.model, config)
    chat = CodeChat(folder.tokenizer, read_code(args.text)[0])
    chat.document_ids(max(lengths))  # refused before the model is loaded
    torch.zeros(1, device=device)
    start = time.perf_counter()
    peer = GgufPeer(args.model, device, max(lengths), args.yarn)
    synchronize(device)
    load = {"runner": peer.runner, "seconds": time.perf_counter() - start, "peak_resident_bytes": peak_resident()}
    yield "load", load | ({"error": peer.failed} if peer.failed else {})
    split = HeadMap.uniform(config.num_layers, config.num_kv_heads, 1.0).split(1.0)
    weight_format = str(peer.dtype).removeprefix("torch.").replace("float32", "fp32").replace("bfloat16", "bf16")
    weights = model_weight_bytes(config, weight_format, device.type)
    if not config.tie_word_embeddings:
        weights -= (config.vocab_size - 1) * config.hidden_size * peer.dtype.itemsize
    for length in lengths:
        warm = length if device.type == "cuda" else CPU_WARM_TOKENS
        token_ids = torch.tensor(chat.document_ids(length))
        row = peer.read_and_decode(token_ids, warm, args.new_tokens * args.repeats)
        if "error" in row:
            yield "row", row
            continue
        row |= reading_rates(prefill_flops(config, split, length), length, row["seconds"], ceilings)
        yield "row", row | floor({"weights": weights, "cache": row["kv_bytes"]}, row["ms"]["median"], ceilings)
        for question in chat.asked(as_questions(args.question, args.expect), length):
            answer = peer.answer(chat.question_ids(question), folder.eos_token_ids)
            text = folder.tokenizer.decode(answer, skip_special_tokens=True)
            yield "answer", {"runner": peer.runner, "length": length, **judged(question, text)}


def in_child(part: Callable[..., Found], *arguments: Any) -> Found:
    """What `part(*arguments)` yields in a process of its own; where that fails or is killed, ("failed", why) last."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_all, args=(sender, part, arguments), daemon=True)
    child.start()
    sender.close()
    finished = False
    while not finished:
        try:
            item = receiver.recv()
        except EOFError:
            child.join()
            yield "failed", f"its process ended with status {child.exitcode} (a negative one is a signal)"
            return
        finished = item is None or item[0] == "failed"
        if item is not None:
            yield item
    child.join()


def _send_all(sender: Connection, part: Callable[..., Found], arguments: tuple[Any, ...]) -> None:
    try:
        for item in part(*arguments):
            sender.send(item)
        sender.send(None)
    except Exception as error:  # whatever a library raises: it becomes a row, the other parts go on
        name = "" if isinstance(error, LongrunError) else f"{type(error).__name__}: "
        if name:
            traceback.print_exc()
        sender.send(("failed", name + " ".join(str(error).split())[:300]))
