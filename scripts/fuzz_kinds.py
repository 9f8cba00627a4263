"""What fuzz.py damages, how longrun uses it, and an independent reading of the damaged files.

A kind's `use` does what a run does and gives back a result that a user would see. Its `expected` computes the same
result without longrun's readers; where it raises, the files mean nothing, and longrun must have refused them:

    config       logits of transformers' own model of the folder
    weights      the same: header, body and index of the shards; bytes of the body have no checksum, so other weights
                 are legitimate where transformers computes the same from them; NaN and infinity must be refused
    gguf         transformers' model of what the gguf package reads; quantized bytes have no checksum either
    tokenizer    ids of the tokenizers library from tokenizer.json alone, for every setting next to it
    generation   the ids that Python's json finds in generation_config.json, which the end tokens must include
    head map     Python's csv and float on every cell, clipped; a window and losses of reaches as json reads them
    budget       Python's tomllib and a regular expression for sizes
    text, html, pdf, questions, archive  see `fuzz_documents`
    adapter      transformers' model with W + alpha / r * B @ A set in float64 from the safetensors library
    session      everything in the folder is under a checksum: what loads must continue exactly like the undamaged one,
                 even where the manifest's own checksum was put right after it was changed
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import longrun
from longrun.config.model_config import ModelConfig
from longrun.model.folder import check_folder
from longrun.model.tokenizer import load_tokenizer
from longrun.plan.budget import Budget
from longrun.plan.plan import choose_split, make_plan
from longrun.text.chat_format import ChatFormat
from scripts.fuzz_documents import (
    damage_html,
    damage_pdf,
    damage_questions,
    expected_archive,
    expected_html,
    expected_pdf,
    expected_questions,
    expected_text,
    make_documents,
    same_or_told,
    same_words,
    use_archive,
    use_html,
    use_pdf,
    use_questions,
    use_text,
)
from scripts.fuzz_gguf import damage_gguf, make_gguf, model_by_package
from scripts.fuzz_models import CAPACITY, PROMPT, TEXT, make_adapter, make_head_map, make_model, make_session
from scripts.fuzz_mutations import damage_bytes, damage_header, damage_json, damage_table, damage_template, damage_toml

_BUDGET = Budget(device_bytes=2 * 10**9, kv_format="fp32", weight_format="fp32", chunk_size=64)
_TOML = (
    '[memory]\ngpu = "3 GB"\nhost = "0.5 GiB"\n[weights]\nformat = "int8"\n[kv]\nformat = "int4"\n'
    "retrieval_ratio = 0.5\nsink_size = 64\nrecent_size = 128\npage_size = 64\n[prefill]\nchunk_size = 256\n"
    'mode = "sparse"\nmass = 0.9\ndense_tokens = 64\n'
)
_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        name: as the table shows it.
        folder: of the sound files, below the base folder; only files of it are damaged.
        files: patterns of their names, one drawn with the weight of its place in the list.
        use, expected: folder -> result, by longrun and without it.
        equal: whether two results are the same; (what longrun gave, what is right).
    """

    name: str
    folder: str
    files: tuple[str, ...]
    use: Callable[[Path], Any]
    expected: Callable[[Path], Any]
    equal: Callable[[Any, Any], bool]


class Bench:
    """The sound files in a base folder, and the kinds over them."""

    def __init__(self, base: Path) -> None:
        self.base = base
        model = base / "model"
        make_model(model)
        make_adapter(base / "adapter", model)
        make_gguf(base / "gguf", model)
        make_head_map(base / "map")
        make_documents(base)
        (base / "budget").mkdir()
        (base / "budget" / "budget.toml").write_text(_TOML)
        self.config = ModelConfig.from_dir(model)
        self.runtime = self._load(model)
        make_session(base / "session", self.runtime)
        shards = ("model-*.safetensors", "model-*.safetensors", "model.safetensors.index.json")
        settings = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        self.kinds = (
            Kind("config", "model", ("config.json",), self._run, _of_transformers, _close),
            Kind("weights", "model", shards, self._run, _of_transformers, _close),
            Kind("gguf", "gguf", ("*.gguf",), self._run, _of_package, _close),
            Kind("tokenizer", "model", settings, _use_tokenizer, _of_tokenizers, _same),
            Kind("generation", "model", ("generation_config.json",), self._ends, _ends_by_json, _includes),
            Kind("head map", "map", ("full_attention_heads.tsv", "config.json", "reach_losses.json"), self._split,
                 _split_by_csv, _same),
            Kind("budget", "budget", ("budget.toml",), self._plan, _budget_by_tomllib, _same),
            Kind("adapter", "adapter", ("adapter_config.json", "adapter_model.safetensors"), self._run_with_adapter,
                 self._merged, _close),
            Kind("text", "text", ("*.txt",), use_text, expected_text, same_words),
            Kind("questions", "questions", ("*.jsonl",), use_questions, expected_questions, _same),
            Kind("html", "html", ("*.html",), use_html, expected_html, same_words),
            Kind("pdf", "pdf", ("*.pdf",), use_pdf, expected_pdf, same_or_told),
            Kind("archive", "archive", ("code.*",), use_archive, expected_archive, _same),
            Kind("session", "session", (*("manifest.json",) * 3, "pages-*", "state-*"), self._go_on, self._undamaged,
                 _same),
        )  # fmt: skip
        self.sound = {kind.name: kind.use(base / kind.folder) for kind in self.kinds}
        for kind in self.kinds:
            assert kind.equal(self.sound[kind.name], kind.expected(base / kind.folder)), kind.name

    def damage(self, kind: Kind, folder: Path, rng: random.Random) -> str:
        """Damage one file in `folder`, a copy of the kind's; what was done is said in words."""
        file = rng.choice(sorted(folder.glob(rng.choice(kind.files))))
        content = file.read_bytes()
        structured = rng.random() < 0.75
        if not structured or file.name.startswith("pages") or kind.name in ("text", "archive"):
            content, what = damage_bytes(rng, content)
        elif file.suffix == ".json":
            finish = _with_checksum if kind.name == "session" and rng.random() < 0.7 else dict
            content, what = damage_json(rng, content, finish)
        elif file.suffix == ".gguf":
            content, what = damage_gguf(rng, file)
        elif file.suffix == ".safetensors":
            content, what = damage_header(rng, content)
        else:
            of_suffix = {
                ".tsv": damage_table, ".toml": damage_toml, ".jinja": damage_template, ".html": damage_html,
                ".pdf": damage_pdf, ".jsonl": damage_questions,
            }  # fmt: skip
            content, what = of_suffix[file.suffix](rng, content)
        if rng.random() < 0.02:
            file.unlink()
            return f"{file.name} removed"
        file.write_bytes(content)
        return f"{file.name}: {what}"

    def _load(self, model: Path, adapter: Path | None = None) -> longrun.Runtime:
        return longrun.load(model, _BUDGET, device="cpu", ctx=CAPACITY, compiled_kernels=False, adapter=adapter)

    def _run(self, folder: Path) -> torch.Tensor:
        return _logits(self._load(folder))

    def _run_with_adapter(self, folder: Path) -> torch.Tensor:
        return _logits(self._load(self.base / "model", folder))

    def _merged(self, folder: Path) -> torch.Tensor:
        settings = json.loads((folder / "adapter_config.json").read_text())
        lora = load_file(folder / "adapter_model.safetensors")
        own = settings.get("longrun") or {}
        theirs = _transformers_model(self.base / "model", own.get("rope_theta"))
        scale, left = settings["lora_alpha"] / settings["r"], set(lora)
        with torch.no_grad():
            for name, weight in theirs.named_parameters():
                key = f"base_model.model.{name.removesuffix('weight')}lora_{{}}.weight"
                if key.format("A") in lora:
                    change = lora[key.format("B")].double() @ lora[key.format("A")].double()
                    weight.copy_(weight.double() + scale * change)
                    left -= {key.format("A"), key.format("B")}
        assert not left and settings["peft_type"] == "LORA"
        return _forward(theirs)

    def _ends(self, folder: Path) -> frozenset[int]:
        return frozenset(check_folder(folder, ModelConfig.from_dir(folder)).eos_token_ids)

    def _split(self, folder: Path) -> tuple[Any, ...]:
        chosen = choose_split(self.config, _BUDGET, folder)
        make_plan(self.config, _BUDGET, CAPACITY, split=chosen, device_type="cpu")
        head_map = chosen.head_map
        losses = None if head_map.reach_losses is None else vars(head_map.reach_losses)
        return head_map.scores, head_map.sink_size, head_map.recent_size, chosen.split.retrieval, losses

    def _plan(self, folder: Path) -> dict[str, Any]:
        budget = Budget.load(folder / "budget.toml")
        make_plan(self.config, budget, CAPACITY, device_type="cpu")
        return {name: getattr(budget, name) for name in _FIELDS.values()}

    def _go_on(self, folder: Path) -> tuple[list[int], list[int], bytes]:
        session = self.runtime.load_session(folder)
        said = list(session.generate(3, eos=False))
        return list(session.token_ids)[:200], said, session.logits.numpy().tobytes()

    def _undamaged(self, folder: Path) -> Any:
        return self.sound["session"]


def _logits(runtime: longrun.Runtime) -> torch.Tensor:
    session = runtime.new_session(CAPACITY)
    session.prefill(PROMPT)
    return session.logits


def _transformers_model(folder: Path, rope_theta: float | None = None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if rope_theta is not None:
        config.rope_parameters = {**config.rope_parameters, "rope_theta": rope_theta}
    return AutoModelForCausalLM.from_pretrained(
        str(folder), config=config, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()


@torch.inference_mode()
def _forward(model: Any) -> torch.Tensor:
    return model(torch.tensor([PROMPT])).logits[0, -1]


def _of_transformers(folder: Path) -> torch.Tensor:
    return _forward(_transformers_model(folder))


def _of_package(folder: Path) -> torch.Tensor:
    return _forward(model_by_package(folder))


def _close(ours: torch.Tensor, right: torch.Tensor) -> bool:
    if ours.shape != right.shape or not bool(ours.isfinite().all()):
        return False
    return float((ours - right).abs().max()) <= _TOLERANCE * max(1.0, float(right.abs().max()))


def _use_tokenizer(folder: Path) -> list[int]:
    tokenizer = load_tokenizer(folder)
    chat = ChatFormat(tokenizer)
    assert all(isinstance(token_id, int) for token_id in chat.opening_ids(None, False))
    tokenizer.decode(tokenizer(TEXT)["input_ids"])
    return tokenizer(TEXT, add_special_tokens=False)["input_ids"]


def _of_tokenizers(folder: Path) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids


def _ends_by_json(folder: Path) -> frozenset[int]:
    file = folder / "generation_config.json"
    ids = json.loads(file.read_bytes().decode("utf-8-sig")).get("eos_token_id") if file.exists() else None
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    assert all(type(token_id) is int and 0 <= token_id < 97 for token_id in ids)
    return frozenset(ids)


def _split_by_csv(folder: Path) -> tuple[Any, ...]:
    with (folder / "full_attention_heads.tsv").open(encoding="utf-8-sig", newline="") as file:
        cells = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    number = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
    assert all(number.fullmatch(cell) and math.isfinite(float(cell)) for row in cells for cell in row)
    scores = tuple(tuple(min(max(float(cell), 0.0), 1.0) for cell in row) for row in cells)
    assert [len(row) for row in scores] == [2, 2]
    window = {"sink_size": None, "recent_size": None}
    if (folder / "config.json").exists():
        window |= json.loads((folder / "config.json").read_bytes().decode("utf-8-sig"))
    sink, recent = window["sink_size"], window["recent_size"]
    sink, recent = 64 if sink is None else sink, 256 if recent is None else recent
    assert type(sink) is int and type(recent) is int and sink >= 0 and recent >= 1
    split = tuple(tuple(score >= 0.5 for score in row) for row in scores)
    return scores, sink, recent, split, _losses_by_json(folder / "reach_losses.json")


def _losses_by_json(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    data = json.loads(file.read_bytes().decode("utf-8-sig"))
    sink, length, reaches = data["sink_size"], data["measured_length"], data["reaches"]
    assert all(type(count) is int and 0 <= count <= 10**9 for count in (sink, length, *reaches))
    assert reaches[0] > 0 and reaches == sorted(set(reaches)) and 4 * reaches[-1] <= length
    assert [len(row) for row in data["losses"]] == [2, 2]
    losses = tuple(tuple(tuple(of_head) for of_head in row) for row in data["losses"])
    for of_head in (of_head for row in losses for of_head in row):
        assert len(of_head) == len(reaches)
        assert all(type(loss) in (int, float) and 0 <= float(loss) < math.inf for loss in of_head)
    return {"sink_size": sink, "measured_length": length, "reaches": tuple(reaches), "losses": losses}


_FIELDS = {
    "memory.gpu": "device_bytes",
    "memory.host": "host_bytes",
    "weights.format": "weight_format",
    "kv.format": "kv_format",
    "kv.retrieval_ratio": "retrieval_ratio",
    "kv.kv_bytes": "kv_bytes",
    "kv.sink_size": "sink_size",
    "kv.recent_size": "recent_size",
    "kv.page_size": "page_size",
    "prefill.chunk_size": "chunk_size",
    "prefill.mode": "prefill_mode",
    "prefill.share": "prefill_share",
    "prefill.mass": "prefill_mass",
    "prefill.dense_tokens": "prefill_dense",
    "decode.pages_per_head": "pages_per_head",
    "decode.selector": "selector",
}


def _budget_by_tomllib(folder: Path) -> dict[str, Any]:
    data = tomllib.loads((folder / "budget.toml").read_bytes().decode("utf-8-sig"))
    given = {f"{section}.{key}": value for section, keys in data.items() for key, value in keys.items()}
    assert given.keys() <= _FIELDS.keys()
    default = Budget(device_bytes=1)
    found = {field: given.get(key, getattr(default, field)) for key, field in _FIELDS.items()}
    return found | {name: _size(found[name]) for name in ("device_bytes", "host_bytes")}


def _size(value: str | int) -> int:
    if isinstance(value, int):
        return value
    number, unit = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", value).groups()
    power = "BKMGT".index(unit.upper()[:1] or "B")
    return int(Decimal(number) * (1024 if unit[1:2] in ("i", "I") else 1000) ** power)


def _same(ours: Any, right: Any) -> bool:
    return ours == right


def _includes(ours: frozenset[int], right: frozenset[int]) -> bool:
    return ours >= right


def _with_checksum(manifest: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}
