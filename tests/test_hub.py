"""Names on the Hugging Face hub: told from paths, found in the local cache, fetched with consent, refused."""

from __future__ import annotations

import errno
import io
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_hub import FakeHub
from huggingface_hub import errors
from readable_model import save_readable

import longrun
from longrun.errors import CheckpointError, InputError, LongrunError
from longrun.hub import repository
from longrun.hub.find import find_config, find_model
from longrun.hub.gguf_header import read_header
from longrun.hub.names import HubName, has_tag, model_name, parse_name
from longrun.model.choice import choose_model
from longrun.plan.command import plan_command

NAME = "maker/model"
NEEDED = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_readable(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A hub with one checkpoint and what no run needs; the working folder is empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("LONGRUN_CACHE", str(tmp_path / "longrun"))
    hub = FakeHub.start(tmp_path / "cache" / "hub", monkeypatch)
    hub.add_folder(model)
    more = ("README.md", "pytorch_model.bin", "original/model.safetensors", "consolidated.safetensors")
    hub.files |= dict.fromkeys(more, b"of no use")
    return hub


def terminal(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    stdin = io.StringIO(answer)
    stdin.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


# Names


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_name("a-b/C.1_d") == parse_name(Path("a-b/C.1_d")) == HubName("a-b/C.1_d")
    assert parse_name("a/b/c.gguf") == HubName("a/b", file="c.gguf")
    assert parse_name("a/b/sub/c.gguf") == HubName("a/b", file="sub/c.gguf")
    assert parse_name("a/b:Q4_K_M") == HubName("a/b", tag="Q4_K_M")
    for text in ("a/b", "a/b/c.gguf", "a/b:Q4_K_M"):
        assert str(parse_name(text)) == text
    for path in ("b", "./a/b", "../a/b", "/a/b", "~/a/b", ".", str(tmp_path / "x" / "y")):
        assert parse_name(path) is None
    (tmp_path / "a").mkdir()
    for path in ("a/b", "a/b:Q4_K_M", "a/"):
        assert parse_name(path) is None, "its parent exists, so it is a path"


@pytest.mark.parametrize("text", ["a/b/c", "a/b/c.bin", "a b/c", "a--b/c", "a/b:", "a/../c", "-a/b", "a/b@main"])
def test_neither_path_nor_name(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"is no path .* and no name on the Hugging Face hub: give .*user/repo"):
        find_model(text)


def test_tags() -> None:
    assert has_tag("m-q4_k_m.gguf", "Q4_K_M") and has_tag("sub/M.Q8_0.gguf", "q8_0")
    assert not has_tag("m-iq4_k_m.gguf", "Q4_K_M") and not has_tag("m-q4_k_m-v2.gguf", "Q4_K_M")


def test_what_a_snapshot_is_called(hub: FakeHub) -> None:
    assert model_name(hub.snapshot) == "maker/model"
    assert model_name(hub.snapshot / "sub" / "x.gguf") == "maker/model/sub/x.gguf"
    file = hub.put("config.json") / "config.json"
    assert model_name(file.resolve()) == "maker/model", "a blob of it"
    assert model_name(Path("models/mine")) == "mine"


# The local cache


def test_found_in_the_cache_without_a_network(hub: FakeHub) -> None:
    hub.put(*NEEDED)
    hub.error = AssertionError("no access needed")
    assert find_model(NAME) == find_config(NAME) == hub.snapshot
    choice = choose_model(NAME, None)
    assert (choice.model_dir, choice.adapter) == (hub.snapshot, None)


def test_a_path_is_never_a_download(hub: FakeHub, model: Path) -> None:
    hub.put(*NEEDED)
    Path("maker").mkdir()
    assert find_model(NAME, download=True) == Path(NAME)
    assert find_model(model) == find_model(str(model)) == model
    assert hub.asked == 0


@pytest.mark.parametrize("there", [[], ["config.json"], NEEDED[:2], [NEEDED[0], *NEEDED[2:]]])
def test_what_the_cache_lacks_is_fetched_and_nothing_else(there: list[str], hub: FakeHub) -> None:
    if there:
        hub.put(*there)
    assert find_model(NAME, download=True) == hub.snapshot
    wanted = {*NEEDED, *(name for name in ("generation_config.json", "chat_template.jinja") if name in hub.files)}
    assert sorted(hub.fetched) == sorted(wanted - set(there))
    asked = hub.asked
    assert find_model(NAME) == hub.snapshot and hub.asked == asked


def test_a_cache_without_all_of_the_tokenizer_serves_where_the_hub_is_out_of_reach(hub: FakeHub, capsys) -> None:
    hub.put("config.json", "model.safetensors", "tokenizer.json")
    hub.error = ConnectionError("no route")
    assert find_model(NAME) == hub.snapshot
    assert "maker/model is used as far as the local Hugging Face cache holds it" in capsys.readouterr().err
    hub.error = None
    del hub.files["tokenizer_config.json"]
    assert find_model(NAME) == hub.snapshot and "tokenizer.json" not in hub.fetched
    capsys.readouterr()
    assert find_model(NAME) == hub.snapshot, "there is no more of it"
    assert capsys.readouterr().err == ""


def test_shards_are_those_that_the_index_names(hub: FakeHub) -> None:
    weights = hub.files.pop("model.safetensors")
    hub.files |= {"part-a.safetensors": weights, "part-b.safetensors": weights}
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"x": "part-a.safetensors"}}).encode()
    assert find_model(NAME, download=True) == hub.snapshot
    assert "part-a.safetensors" in hub.fetched and "part-b.safetensors" not in hub.fetched
    assert find_model(NAME) == hub.snapshot
    (hub.snapshot / "part-a.safetensors").unlink()
    with pytest.raises(InputError, match=f"fetch its {len(weights) / 1e3:.0f} KB"):
        find_model(NAME)


def test_a_branch_that_moved_is_fetched_whole(hub: FakeHub) -> None:
    hub.put(*NEEDED[:1])
    hub.commit = "f" * 40
    assert find_model(NAME, download=True) == hub.snapshot
    assert hub.snapshot.name == "f" * 40 and all((hub.snapshot / name).is_file() for name in NEEDED)


def test_loading_by_name(hub: FakeHub) -> None:
    with pytest.raises(InputError, match=r"not in the local Hugging Face cache: fetch its .* with download=True"):
        longrun.load(NAME, "cpu", device="cpu", ctx=64)
    runtime = longrun.load(NAME, "cpu", device="cpu", ctx=64, download=True, compiled_kernels=False)
    assert runtime.model_dir == hub.snapshot and runtime.tokenizer is not None


# Consent


def test_without_a_terminal_nothing_is_fetched(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.claimed_bytes["model.safetensors"] = 3_090_000_000
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(InputError, match=r"maker/model is not in .* cache: fetch its 3\.09 GB with --download, or"):
        find_model(NAME)
    assert hub.fetched == []


def test_on_a_terminal_it_is_asked_for(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    hub.claimed_bytes["model.safetensors"] = 1_000_000
    for answer in ("\n", "n\n", "", "yess\n"):
        terminal(monkeypatch, answer)
        with pytest.raises(InputError, match="was not fetched"):
            find_model(NAME)
    assert hub.fetched == []
    out, err = capsys.readouterr()
    assert out == "" and "1.0" in err and err.count("from the hub? [y/N] ") == 4
    terminal(monkeypatch, "Y\n")
    assert find_model(NAME) == hub.snapshot


# GGUF files


def test_one_gguf_file(hub: FakeHub) -> None:
    hub.files = {"m-q4_k_m.gguf": b"GGUF 4", "m-q8_0.gguf": b"GGUF 8", "sub/n-q8_0.gguf": b"GGUF s", "README.md": b""}
    assert find_model(f"{NAME}:Q4_K_M", download=True) == hub.snapshot / "m-q4_k_m.gguf"
    assert hub.fetched == ["m-q4_k_m.gguf"]
    for spelled in (f"{NAME}:q4_k_m", f"{NAME}/m-q4_k_m.gguf"):
        assert find_model(spelled) == hub.snapshot / "m-q4_k_m.gguf"
    assert find_model(f"{NAME}/sub/n-q8_0.gguf", download=True).read_bytes() == b"GGUF s"
    assert hub.fetched == ["m-q4_k_m.gguf", "sub/n-q8_0.gguf"]
    with pytest.raises(CheckpointError, match=r"no such GGUF file as maker/model:Q5_0 .*holds m-q4_k_m\.gguf, "):
        find_model(f"{NAME}:Q5_0")
    with pytest.raises(CheckpointError, match=r"no such GGUF file as maker/model/x\.gguf"):
        find_model(f"{NAME}/x.gguf", download=True)
    hub.files["o-q4_0.gguf"] = hub.files["p-q4_0.gguf"] = b""
    with pytest.raises(CheckpointError, match=r"means o-q4_0\.gguf, p-q4_0\.gguf: name one file, like"):
        find_model(f"{NAME}:q4_0")
    with pytest.raises(CheckpointError, match=r"holds GGUF files only: name one of them, like maker/model/m-q4"):
        find_model(NAME)
    with pytest.raises(CheckpointError, match=r"holds GGUF files only"):
        find_config(NAME)


def gguf_bytes(tail: bytes) -> tuple[bytes, bytes]:
    """A header with a string, a number, a list of strings, a list of numbers and a tensor; and the file with it."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("llama.block_count") + struct.pack("<II", 4, 7),
        text("tokenizer.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
        text("tokenizer.scores") + struct.pack("<IIQ2f", 9, 6, 2, 1.0, 2.0),
    ]
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 3, 4, 0, 0)
    header = struct.pack("<4sIQQ", b"GGUF", 3, 1, len(keys)) + b"".join(keys) + tensor
    return header, header + tail


def test_a_plan_of_a_gguf_file_fetches_its_header(hub: FakeHub) -> None:
    header, whole = gguf_bytes(b"weights" * 1000)
    hub.files = {"m-q4_0.gguf": whole}
    file = find_config(f"{NAME}:q4_0")
    assert file.stat().st_size == len(whole) and file.suffix == ".gguf"
    assert file.read_bytes() == header + bytes(len(whole) - len(header))
    assert hub.fetched == []
    hub.put("m-q4_0.gguf")
    assert find_config(f"{NAME}:q4_0") == hub.snapshot / "m-q4_0.gguf"


def test_damaged_headers() -> None:
    header, _ = gguf_bytes(b"")
    assert read_header(io.BytesIO(header), "x") == header
    for length in (0, 3, 8, 30, len(header) - 1):
        with pytest.raises(CheckpointError, match="x "):
            read_header(io.BytesIO(header[:length]), "x")
    for wrong in (b"GGML" + header[4:], header[:4] + b"\1\0\0\0" + header[8:], header[:24] + b"\xff" * 8 + header[32:]):
        with pytest.raises(CheckpointError, match=r"x (is no GGUF file|has a damaged header)"):
            read_header(io.BytesIO(wrong), "x")


# The plan


def test_a_plan_fetches_the_config_alone(hub: FakeHub, capsys) -> None:
    assert plan_command(["--model", NAME, "--ctx", "64"]) == 0
    assert hub.fetched == ["config.json"]
    assert "LlamaForCausalLM" in capsys.readouterr().out
    asked = hub.asked
    assert plan_command(["--model", NAME, "--ctx", "64"]) == 0 and hub.asked == asked


# What goes wrong


def answered(status: int) -> SimpleNamespace:
    return SimpleNamespace(status_code=status, headers={}, request=None, text="")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.RepositoryNotFoundError("404", response=answered(404)), "neither a path maker/model here nor a repos"),
        (errors.GatedRepoError("403", response=answered(403)), r"is gated .*accept its terms .*hf auth login"),
        (errors.HfHubHTTPError("500 Server Error\nmore", response=answered(500)), r"cannot be reached \(500 Server"),
        (errors.OfflineModeIsEnabled("Cannot reach it"), r"cannot be reached \(HF_HUB_OFFLINE is set\): fetch it"),
        (ConnectionError("no route"), r"cannot be reached \(no route\): fetch it where there is a network"),
        (errors.HfHubHTTPError.__bases__[0]("[Errno -2] Name or service not known"), "Name or service not known"),
    ],
)
def test_errors_of_the_hub(error: BaseException, words: str, hub: FakeHub) -> None:
    hub.error = error
    for call in (find_model, find_config):
        with pytest.raises(CheckpointError, match=words) as raised:
            call(NAME)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.LocalEntryNotFoundError("An error happened"), r"cannot be reached \(An error happened\)"),
        (errors.EntryNotFoundError("gone"), "is gone from the Hugging Face hub"),
        (OSError(errno.ENOSPC, "No space left on device"), r"cannot be fetched: .* is full; make room, or set HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied"), r"Permission denied\): try again, or set HF_HOME"),
        (RuntimeError("Data processing error"), "Data processing error"),
    ],
)
def test_errors_while_fetching(error: BaseException, words: str, hub: FakeHub) -> None:
    hub.fetch_error = error
    with pytest.raises(CheckpointError, match=words):
        find_model(NAME, download=True)


def test_space_is_checked_before(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    hub.claimed_bytes["model.safetensors"] = 10**9
    with pytest.raises(CheckpointError, match=r"has 1\.00 MB free, and 1\.\d+ GB are needed; make room"):
        find_model(NAME, download=True)
    assert hub.fetched == []


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_no_checkpoint_in_the_repository(lost: str, hub: FakeHub) -> None:
    del hub.files[lost]
    with pytest.raises(CheckpointError, match="holds no checkpoint in safetensors"):
        find_model(NAME)


def test_defects_are_not_taken_for_the_hubs(hub: FakeHub) -> None:
    hub.error = KeyError("ours")
    with pytest.raises(KeyError):
        find_model(NAME)
    assert not issubclass(KeyError, LongrunError)
