"""Folders of sessions: one owner at a time, what was removed is written again, and nothing outside is touched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

import longrun
from longrun.errors import SessionError
from longrun.files.folder_lock import FolderLock
from longrun.session.manifest import MANIFEST, _digest

ROOT = Path(__file__).resolve().parents[1]


def text(n, seed=1):
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder)
    return longrun.load(folder, device="cpu", ctx=1200, kv_format="int4")


@pytest.fixture
def session(runtime):
    session = runtime.new_session()
    session.prefill(text(300))
    return session


def names(folder, pattern="*"):
    return {path.name for path in folder.glob(pattern)}


def content(session):
    """All that makes a session: every page wherever it stands, tails, rings, tokens, logits, random state, extra."""
    session.cache.check()
    pages = [heads for heads, _ in session.cache.layers if heads is not None]
    parts = [heads.places.read(slice(None), np.arange(heads.num_pooled)) for heads in pages]
    parts += [heads.index[:, : heads.num_pooled] for heads in pages]
    parts += [*session.cache.state().values(), *session.snapshot().values()]
    return session.seq_len, session.extra, [part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts]


def check_loads(runtime, session, folder):
    assert content(runtime.load_session(folder)) == content(session)


def holder(folder, seconds=60):
    """Another process that owns the folder, as soon as this returns."""
    code = (
        "import sys, time; from pathlib import Path; from longrun.errors import SessionError;"
        "from longrun.files.folder_lock import FolderLock;"
        "lock = FolderLock(Path(sys.argv[1]) / 'session.lock', 'it', SessionError, 'wait', 'no'); print(flush=True);"
        f"time.sleep({seconds})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
    process.stdout.readline()
    return process


def test_another_process_is_named_and_leaves_nothing_when_killed(runtime, session, tmp_path):
    other = holder(tmp_path / "s")
    try:
        for call in (session.save, session.attach):
            with pytest.raises(
                SessionError, match=rf"in use by process {other.pid} on .* since \d.* \(.*-c.*: end that"
            ):
                call(tmp_path / "s")
        assert names(tmp_path / "s") == {"session.lock"}
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    assert names(tmp_path / "s") == {"session.lock"}, "the file outlives its owner and holds nobody back"
    session.save(tmp_path / "s")
    check_loads(runtime, session, tmp_path / "s")
    session.detach()
    assert "session.lock" not in names(tmp_path / "s")


def test_two_sessions_of_one_process(runtime, session, tmp_path):
    session.save(tmp_path / "s")
    other = runtime.new_session()
    other.prefill(text(200, seed=2))
    for call in (other.save, other.attach):
        with pytest.raises(SessionError, match="another owner in this process"):
            call(tmp_path / "s")
    check_loads(runtime, session, tmp_path / "s")
    session.detach()
    other.save(tmp_path / "s")
    check_loads(runtime, other, tmp_path / "s")
    other.detach()
    with pytest.raises(SessionError, match="was saved by another run since"):
        session.save(tmp_path / "s")
    check_loads(runtime, other, tmp_path / "s")
    del other
    runtime.load_session(tmp_path / "s").save(tmp_path / "s")


def test_a_session_that_is_owned_can_be_read_and_its_copy_saved_elsewhere(runtime, session, tmp_path):
    session.attach(tmp_path / "s")
    session.prefill(text(60, seed=4))
    copy = runtime.load_session(tmp_path / "s")
    with pytest.raises(SessionError, match="in use"):
        copy.save(tmp_path / "s")
    copy.save(tmp_path / "copy")
    session.prefill(text(60, seed=5))
    check_loads(runtime, session, tmp_path / "s")
    check_loads(runtime, copy, tmp_path / "copy")


def test_a_copy_saved_elsewhere_does_not_detach(runtime, session, tmp_path):
    session.attach(tmp_path / "s")
    session.save(tmp_path / "copy")
    assert names(tmp_path / "copy", "*.lock") == set()
    session.prefill(text(60, seed=4))
    check_loads(runtime, session, tmp_path / "s")


def test_a_link_to_the_folder_is_the_folder(runtime, session, tmp_path):
    session.attach(tmp_path / "s")
    session.prefill([1])
    (tmp_path / "link").symlink_to(tmp_path / "s")
    session.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    check_loads(runtime, session, tmp_path / "s")


def test_a_session_that_is_gone_owns_nothing(runtime, session, tmp_path):
    other = runtime.new_session()
    other.prefill(text(100))
    other.save(tmp_path / "s")
    del other
    session.save(tmp_path / "s")
    check_loads(runtime, session, tmp_path / "s")


@pytest.mark.parametrize("what", ["folder", "pages", "state", "manifest", "everything in it"])
def test_what_was_removed_is_written_again(runtime, session, tmp_path, what):
    folder = tmp_path / "s"
    session.save(folder)
    session.prefill(text(200, seed=2))
    session.save(folder)
    if what == "folder":
        shutil.rmtree(folder)
    for path in folder.glob({"pages": "pages-0-*", "state": "state-*", "manifest": MANIFEST}.get(what, "*")):
        path.unlink()
    session.prefill(text(100, seed=3))
    session.save(folder)
    check_loads(runtime, session, folder)
    assert len(names(folder, "pages-*")) == 3


def test_a_folder_that_another_took_over_is_not_written(runtime, session, tmp_path):
    session.save(tmp_path / "s")
    (tmp_path / "s").rename(tmp_path / "moved")
    other = runtime.new_session()
    other.prefill(text(200, seed=7))
    other.save(tmp_path / "s")
    with pytest.raises(SessionError, match="in use"):
        session.save(tmp_path / "s")
    check_loads(runtime, other, tmp_path / "s")
    check_loads(runtime, session, tmp_path / "moved")


def test_links_in_the_folder_are_not_followed(runtime, session, tmp_path):
    outside = tmp_path / "thesis.txt"
    outside.write_text("years of work")
    folder = tmp_path / "s"
    session.save(folder)
    session.detach()
    for name in ("manifest.json.tmp", ".manifest.json.0123456789ab.new", "state-00.safetensors", "pages-0-9-00.bin"):
        (folder / name).symlink_to(outside)
    session.save(folder)
    session.detach()
    (folder / MANIFEST).rename(tmp_path / MANIFEST)
    (folder / MANIFEST).symlink_to(tmp_path / MANIFEST)
    session.save(folder)
    session.detach()
    assert not (folder / MANIFEST).is_symlink() and len(names(folder)) == 3
    (folder / "session.lock").symlink_to(outside)
    with pytest.raises(SessionError, match=r"cannot be written \(.*symbolic links\S*\): name another folder$"):
        session.save(folder)
    assert outside.read_text() == "years of work"


def test_what_killed_saves_left_is_removed_at_the_start(runtime, session, tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    for name in ("pages-0-4-aa.bin", "state-bb.safetensors", ".manifest.json.0123456789ab.new"):
        (folder / name).write_bytes(b"x" * 100)
    session.attach(folder)
    assert names(folder) == {"session.lock"}
    session.prefill([5])
    session.detach()
    kept = names(folder)
    (folder / "state-bb.safetensors").write_bytes(b"x")
    (folder / "notes.txt").write_text("mine")
    session.attach(folder)
    assert names(folder) == {*kept, "session.lock", "notes.txt"}
    session.detach()
    (folder / MANIFEST).write_text("damaged")
    session.attach(folder)
    assert kept <= names(folder), "which files a damaged manifest names cannot be told"


def sign(folder, change):
    """Change the manifest and give it the checksum that goes with it."""
    fields = json.loads((folder / MANIFEST).read_text())
    del fields["sha256"]
    change(fields)
    (folder / MANIFEST).write_text(json.dumps({**fields, "sha256": _digest(fields)}))


def put(value, *keys):
    def change(fields):
        for key in keys[:-1]:
            fields = fields[key]
        fields[keys[-1]] = value

    return change


WRONG = {
    "state outside": put("../state-aa.safetensors", "state", "name"),
    "state absolute": put("/etc/passwd", "state", "name"),
    "state of pages": put("manifest.json", "state", "name"),
    "pages outside": put("../../pages-0-4-aa.bin", "pages", 0, "name"),
    "pages long": put("pages-0-4-" + "a" * 5000 + ".bin", "pages", 0, "name"),
    "huge capacity": put(10**30, "capacity"),
    "large capacity": put(10**12, "capacity"),
    "negative length": put(-1, "seq_len"),
    "float length": put(300.0, "seq_len"),
    "true length": put(True, "num_tokens"),
    "more tokens": put(301, "num_tokens"),
    "fewer tokens": put(299, "num_tokens"),
    "shorter": lambda fields: fields.update(seq_len=100, num_tokens=100),
    "longer": lambda fields: fields.update(seq_len=1000, num_tokens=1000),
    "huge pages": put(10**18, "pages", 0, "stop"),
    "negative pages": put(-5, "pages", 0, "first"),
    "no pages": put([], "pages"),
    "pages twice": lambda fields: fields["pages"].append(fields["pages"][0]),
    "pages a number": put(7, "pages"),
    "page a list": put([1], "pages", 0),
    "huge state": put(10**15, "state", "bytes"),
    "negative state": put(-1, "state", "bytes"),
    "state null": put(None, "state"),
    "no digest": put("x", "state", "sha256"),
    "extra a list": put([1], "extra"),
    "identity a list": put([], "identity"),
    "identity nested": put({"a": [1] * 10000}, "identity", "model"),
    "version text": put("2", "version"),
    "version true": put(True, "version"),
    "state is pages": lambda fields: fields["state"].update(
        {k: fields["pages"][0][k] for k in ("bytes", "sha256")}
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(runtime, tmp_path_factory):
    session = runtime.new_session()
    session.prefill(text(300))
    session.save(tmp_path_factory.mktemp("good") / "s")
    session.detach()
    return Path(session._keeper._store.folder)


@pytest.mark.parametrize("name", WRONG)
def test_a_manifest_with_the_right_checksum_and_wrong_content(runtime, good, tmp_path, name):
    shutil.copytree(good, tmp_path / "s")
    before = names(tmp_path / "s")
    sign(tmp_path / "s", WRONG[name])
    with pytest.raises(longrun.LongrunError) as refusal:
        runtime.load_session(tmp_path / "s")
    assert isinstance(refusal.value, SessionError) or name == "large capacity"
    assert names(tmp_path / "s") == before and names(tmp_path) == {"s"}


@pytest.mark.parametrize("data", [b"[" * 10**5, b'{"kind": ' * 10**5, b"9" * 5000, b"[1]", b"\xff", b"", b"null"])
def test_a_manifest_that_is_no_json_object(runtime, good, tmp_path, data):
    shutil.copytree(good, tmp_path / "s")
    (tmp_path / "s" / MANIFEST).write_bytes(data)
    with pytest.raises(SessionError, match="cannot be read as a session manifest"):
        runtime.load_session(tmp_path / "s")


def test_a_sparse_file_is_not_read(runtime, good, tmp_path):
    shutil.copytree(good, tmp_path / "s")
    sign(tmp_path / "s", put(2**40, "state", "bytes"))
    (state,) = (tmp_path / "s").glob("state-*")
    os.truncate(state, 2**40)
    with pytest.raises(SessionError, match="where a session has at most"):
        runtime.load_session(tmp_path / "s")


class Odd:
    pass


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({1: "a"}, "a key of extra is 1"),
        ({"a": {None: 1}}, r"a key of extra\['a'\] is None"),
        ({"a": [1, (2, 3)]}, r"extra\['a'\]\[1\] is \(2, 3\)"),
        ({"a": float("nan")}, "is nan"),
        ({"a": {1, 2}}, "is {1, 2}"),
        ({"a": Odd()}, "Odd object"),
        ({"a": b"bytes"}, "is b'bytes'"),
        ({"a": 10**5000}, "digits"),
        ([1], r"extra is \[1\]"),
    ],
)
def test_extra_that_json_does_not_keep_is_refused_before_anything_is_written(session, tmp_path, extra, said):
    session.extra = extra
    with pytest.raises(SessionError, match=said):
        session.save(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_extra_that_is_too_deep_or_holds_itself(session, tmp_path):
    loop: dict = {}
    loop["self"] = loop
    session.extra = loop
    with pytest.raises(SessionError, match="deeper than"):
        session.save(tmp_path / "s")


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", 7, None])
def test_paths_that_can_be_no_folder(runtime, session, path):
    for call in (session.save, session.attach, runtime.load_session):
        with pytest.raises(SessionError):
            call(path)


def test_a_lock_is_given_up_and_taken_again(tmp_path):
    lock = FolderLock(tmp_path / "d" / "l", "it", SessionError, "wait", "no")
    assert lock.held
    with pytest.raises(SessionError, match="it is in use by another owner in this process"):
        FolderLock(tmp_path / "d" / "l", "it", SessionError, "wait", "no")
    lock.release()
    assert not lock.held and not (tmp_path / "d").exists()
    again = FolderLock(tmp_path / "d" / "l", "it", SessionError, "wait", "no")
    lock.release()
    assert again.held
    (tmp_path / "d" / "l").unlink()
    assert not again.held


def test_a_forked_child_takes_nothing_away(tmp_path):
    lock = FolderLock(tmp_path / "l", "it", SessionError, "wait", "no")
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert lock.held
    with pytest.raises(SessionError):
        FolderLock(tmp_path / "l", "it", SessionError, "wait", "no")
