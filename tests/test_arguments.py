"""Every wrong argument gives one sentence: numbers, names, paths, token ids, and every public function."""

from __future__ import annotations

import argparse
import ast
import math
import re
import sys
from array import array
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from planned_models import LLAMA
from tiny_models import save_tiny

import longrun
from longrun.arguments import check_platform, choice, integer, number, real, whole
from longrun.engine.sampling import SamplingParams
from longrun.engine.token_ids import token_id_tensor
from longrun.errors import HeadMapError, InputError, LongrunError
from longrun.paths import cache_dir, path_option, user_path
from longrun.patterns.head_map import HeadMap
from longrun.plan.budget import Budget
from longrun.plan.plan import choose_split, make_plan
from longrun.units import format_tokens, parse_bytes, parse_tokens

ROOT = Path(__file__).resolve().parent.parent
NOT_INTEGERS = [True, 1.0, 1.7, "5", None, [1], {}, math.nan, np.bool_(True), np.float32(1), b"5", 1j]
NOT_NUMBERS = [True, "x", None, math.nan, math.inf, -math.inf, 10**400, [0.5], 1j]
NOT_PATHS = [3, 1.5, None, True, b"folder", ["a"], "", "a\0b", "n" * 300, "~nobody-here/x", "\ud800"]


@pytest.mark.parametrize("value", [5, np.int64(5), np.uint8(5), torch.tensor(5)])
def test_integers_of_any_type_are_integers(value):
    found = integer(value, "count")
    assert found == 5 and type(found) is int


@pytest.mark.parametrize("value", [*NOT_INTEGERS, -1, 10**20, 10**5000], ids=lambda value: str(type(value)))
def test_what_is_no_integer_or_out_of_range_is_one_short_sentence(value):
    with pytest.raises(InputError, match="count") as error:
        integer(value, "count")
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, -0.1, 1.1])
def test_what_is_no_number_or_out_of_range_is_one_short_sentence(value):
    with pytest.raises(InputError, match="from 0 to 1"):
        number(value, "share", 0, 1)


def test_limits_belong_to_the_range_unless_it_begins_above():
    assert number(0, "share", 0, 1) == 0 and number(np.float32(1), "share", 0, 1) == 1
    with pytest.raises(InputError, match="above 0 and at most 1"):
        number(0, "share", 0, 1, above=True)
    with pytest.raises(InputError, match="'tpu' is unknown: use cpu or cuda"):
        choice("tpu", "device", ("cpu", "cuda"))


@pytest.mark.parametrize("text", ["9" * 5000, "nan", "1.5", "-1", "", "x"])
def test_options_of_whole_numbers(text):
    assert whole()("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="value"):
        whole()(text)


@pytest.mark.parametrize("text", ["9" * 5000, "nan", "inf", "-inf", "-0.1", "", "x"])
def test_options_of_numbers(text):
    assert real(0)("0.5") == 0.5
    with pytest.raises(argparse.ArgumentTypeError, match="at least 0"):
        real(0)(text)


@pytest.mark.parametrize(
    "value", [0, -5, True, 1.0, 10**20, None, [1], "3.5Q", "-5", "9" * 5000, "1" * 5000 + "K", "", "nan"]
)
def test_token_counts_and_sizes_that_make_no_sense(value):
    with pytest.raises(InputError, match="ctx") as error:
        parse_tokens(value, "ctx")
    assert len(str(error.value)) < 300
    if value != 0:
        with pytest.raises(InputError):
            parse_bytes(value)


@pytest.mark.parametrize("value", NOT_PATHS)
def test_paths_that_cannot_be_used(value):
    with pytest.raises(InputError, match="folder"):
        user_path(value, "folder")
    if isinstance(value, str):
        with pytest.raises(argparse.ArgumentTypeError):
            path_option(value)


def test_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LONGRUN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert user_path("~/a") == tmp_path / "a" and user_path(Path("~")) == tmp_path
    assert cache_dir() == tmp_path / ".cache" / "longrun"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(InputError, match="home folder that is not known"):
        user_path("~/a")
    with pytest.raises(InputError, match="set LONGRUN_CACHE"):
        cache_dir()
    monkeypatch.setenv("LONGRUN_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path


IDS = [
    [1, 2], (1, 2), range(1, 3), array("i", [1, 2]), deque([1, 2]), [np.int64(1), 2],
    *(np.array([1, 2], kind) for kind in ("int8", "uint8", "int32", "uint16", "uint64", ">i4")),
    *(torch.tensor([1, 2], dtype=kind) for kind in (torch.uint8, torch.int32, torch.int64)),
    torch.tensor([1, 0, 2])[::2],
]  # fmt: skip
NO_IDS = [
    {1: 2}, {1, 2}, iter([1]), "12", b"12", memoryview(b"12"), 3, 1.7, None, [], np.array([]),
    [1.0], [1.7], ["1"], [True], [None], [[1, 2]], [1, math.nan], [-1], [10], [10**30],
    np.array([1.7]), np.array([True]), np.array([[1, 2]]), np.array(1), np.array(["1"]),
    np.array([2**64 - 1], "uint64"),
    torch.tensor([1.7]), torch.tensor([True]), torch.tensor([[1, 2]]), torch.tensor(1),
    torch.empty(2, dtype=torch.int64, device="meta"), torch.tensor([1, 2]).to_sparse(),
]  # fmt: skip


@pytest.mark.parametrize(("count", "text"), [(3_300_000, "3.3M"), (128_000, "128K"), (131_072, "131,072"), (999, "999"),
                                             (123_456_700, "123,456,700"), (64_766_400, "64,766,400")])  # fmt: skip
def test_a_token_count_is_printed_as_it_can_be_given(count, text):
    assert format_tokens(count) == text and parse_tokens(text) == count


@pytest.mark.parametrize("ids", IDS, ids=lambda ids: type(ids).__name__)
def test_token_ids_in_any_shape(ids):
    found = token_id_tensor(ids, 10)
    assert found.tolist() == [1, 2] and found.dtype == torch.int64 and found.device.type == "cpu"


@pytest.mark.parametrize("ids", NO_IDS, ids=lambda ids: re.sub("0x[0-9a-f]+", "", repr(ids))[:30])
def test_what_is_no_token_ids(ids):
    with pytest.raises(InputError, match="token"):
        token_id_tensor(ids, 10)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, "llama")
    runtime = longrun.load(folder, ctx=64, compiled_kernels=False)
    session = runtime.new_session()
    session.prefill([1, 2, 3])
    session.runtime = runtime
    return session


REFUSED = {
    "prefill": {"token_ids": [{"input_ids": [1]}, [1.7], [True], "12", [[1, 2]], torch.ones(1, 2), []]},
    "score": {"token_ids": [[1.7], {1: 2}]},
    "generate": {
        "max_new_tokens": ["5", 0, -1, 1.5, True, None],
        "temperature": ["x", math.nan, -1],
        "top_k": [1.5, "5", -1],
        "top_p": ["x", math.nan, 0, 1.5],
        "repetition_penalty": ["x", math.inf, 0],
        "min_p": ["x", math.nan, -0.1, 1.5],
        "seed": [-1, 2**63, 1.5, "1", True],
        "eos": ["no", 1],
    },
    "save": {"path": NOT_PATHS},
    "attach": {"path": NOT_PATHS},
}


@pytest.mark.parametrize(("method", "name"), [(method, name) for method, names in REFUSED.items() for name in names])
def test_a_session_refuses_and_is_as_it_was(session, method, name):
    for value in REFUSED[method][name]:
        with pytest.raises(LongrunError):
            getattr(session, method)(**{name: value})
    with pytest.raises(InputError, match="progress 5 cannot be called"):
        session.prefill([1], 5)
    assert session.token_ids == [1, 2, 3] and session.seq_len == 3


@pytest.mark.parametrize("capacity", [10**20, 0, -1, True, 1.5, "3.5Q", [1]])
def test_a_runtime_refuses(session, capacity):
    with pytest.raises(InputError, match="capacity"):
        session.runtime.new_session(capacity)
    with pytest.raises(LongrunError):
        session.runtime.load_session(3)


@pytest.mark.parametrize(
    "given",
    [
        *({"model_dir": bad} for bad in NOT_PATHS),
        *({"ctx": bad} for bad in (10**20, -1, 0, True, 1.5, "3.5Q", "9" * 5000)),
        *({"budget": bad} for bad in (3, "", "no-such-budget", ["cpu"])),
        *({"head_map": bad} for bad in (3, True, ["full"], "/nowhere")),
        *({"kv_format": bad} for bad in ("int5", 4, ["int4"])),
        *({"weight_format": bad} for bad in ("int5", 4)),
        *({"device": bad} for bad in ("tpu", "cuda:0", 0, "", torch.device("cpu"))),
        *({"adapter": bad} for bad in (3, "", "/nowhere")),
        *({"retrieval_ratio": bad} for bad in (math.nan, "0.5", -0.1, 1.5, True)),
        *({"chunk_size": bad} for bad in (0, -1, 1.5, "5", True, 10**30)),
        *({"device_share": bad} for bad in (math.nan, "1", 2, None)),
        {"compiled_kernels": "no"},
        *({name: 5} for name in ("on_plan", "on_pin", "on_head_map")),
    ],
    ids=lambda given: re.sub("0x[0-9a-f]+", "", repr(given))[:40],
)
def test_load_refuses(session, given):
    with pytest.raises(LongrunError) as error:
        longrun.load(**{"model_dir": session.runtime.model_dir, "ctx": 64, **given})
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"scores": 3}, {"scores": "abc"}, {"scores": [["x"]]}, {"scores": [[None]]}, {"scores": [[True]]},
        {"scores": [3]}, {"scores": [["1"]]}, {"scores": [[math.nan]]}, {"scores": [[10**400]]}, {"scores": {}},
        {"sink_size": 1.5}, {"sink_size": "64"}, {"recent_size": True}, {"recent_size": 10**20},
    ],
)  # fmt: skip
def test_head_maps_refuse(given):
    with pytest.raises(HeadMapError):
        HeadMap.from_scores(**{"scores": [[1.0, 0.0]], **given})
    with pytest.raises(HeadMapError):
        HeadMap(**{"scores": ((1.0, 0.0),), **given})


def test_head_maps_take_arrays_and_refuse_odd_splits(tmp_path):
    head_map = HeadMap.from_scores(np.array([[1.0, 0.25]]))
    assert head_map == HeadMap.from_scores(torch.tensor([[1.0, 0.25]])) == HeadMap(((1.0, 0.25),))
    for given in ({"retrieval_ratio": math.nan}, {"retrieval_ratio": "x"}, {"threshold": math.nan}, {"threshold": "x"}):
        with pytest.raises(HeadMapError):
            head_map.split(**given)
    for bad in NOT_PATHS:
        with pytest.raises(HeadMapError):
            HeadMap.load(bad)
        with pytest.raises(HeadMapError):
            head_map.save(bad)


@pytest.mark.parametrize(
    "given",
    [
        {"device_bytes": "80 GB"}, {"device_bytes": 10**20}, {"device_bytes": 1.5}, {"host_bytes": -1},
        {"chunk_size": 10**20}, {"kv_format": 4}, {"weight_format": ["int4"]}, {"retrieval_ratio": math.nan},
        {"retrieval_ratio": "x"}, {"page_size": "64"}, {"recent_size": 10**5000},
    ],
)  # fmt: skip
def test_budgets_refuse(given):
    with pytest.raises(LongrunError) as error:
        Budget(**{"device_bytes": 10**9, **given})
    assert len(str(error.value)) < 600


def test_plan_functions_refuse():
    budget = Budget.load("h100-80g")
    for given in (
        {"capacity": 10**20},
        {"capacity": 0},
        {"capacity": 1.5},
        {"device_type": "tpu"},
        {"device_share": math.nan},
    ):
        with pytest.raises(LongrunError):
            make_plan(LLAMA, budget, **given)
    for head_map, ratio in ((3, None), (None, math.nan), (["full"], None), (None, "half")):
        with pytest.raises(LongrunError):
            choose_split(LLAMA, budget, head_map, ratio, assume=True)


@pytest.mark.parametrize(
    "given", [{"temperature": "x"}, {"top_k": 1.5}, {"top_p": True}, {"repetition_penalty": math.inf}]
)
def test_sampling_refuses(given):
    with pytest.raises(InputError):
        SamplingParams(**given)
    assert type(SamplingParams(top_k=np.int64(3)).top_k) is int


def test_native_windows_is_refused_in_one_sentence(monkeypatch):
    check_platform()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(LongrunError, match="native Windows: start it in WSL 2"):
        check_platform()
    with pytest.raises(LongrunError, match="native Windows"):
        longrun.load("anything")


def test_nothing_that_windows_lacks_is_imported_before_that_sentence():
    lacking = {"fcntl", "grp", "pty", "pwd", "resource", "termios"}
    for path in [*ROOT.glob("longrun/**/*.py"), *ROOT.glob("scripts/**/*.py"), *ROOT.glob("patterns/*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not lacking & set(names), f"{path.name} imports {names} at its top: import it where it is used"
