"""Sessions on disk: the very same next tokens after a restart, and every way a folder can be wrong."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

import longrun
from longrun.errors import InputError, SessionError
from longrun.patterns.head_map import HeadMap
from longrun.session.manifest import VERSION, _digest
from longrun.session.store import is_session
from longrun.specs.reach import ALL_TOKENS

ROOT = Path(__file__).resolve().parent.parent


def mixed_map(flip=False):
    scores = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    return HeadMap.from_scores([row[::-1] if flip else row for row in scores], sink_size=16, recent_size=48)


def token_ids(n, seed=1):
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    return folder


def load(folder, **options):
    settings = {"kv_format": "int4", "device": "cpu", "ctx": 1200, "head_map": mixed_map(), "device_share": 0.5}
    return longrun.load(folder, **{**settings, **options})


@pytest.fixture
def saved(checkpoint, tmp_path):
    """A session of 500 tokens in a folder, with the runtime and the live session."""
    runtime = load(checkpoint)
    session = runtime.new_session()
    session.prefill(token_ids(500))
    session.extra = {"turns": ["é", 2]}
    session.save(tmp_path / "s")
    return runtime, session, tmp_path / "s"


MAPS = {"full": "full", "mixed": mixed_map(), "streaming": HeadMap.from_scores([[0.0] * 3] * 3)}
CASES = [(kv, name) for kv in ("int4", "k5v3", "bf16", "fp32") for name in MAPS]


def test_same_next_tokens_in_a_new_process(checkpoint, tmp_path, warm_python):
    """Every page format and kind of split, sampling, saved here and continued there."""
    expected = []
    for kv, name in CASES:
        session = load(checkpoint, kv_format=kv, head_map=MAPS[name]).new_session()
        session.prefill(token_ids(333))
        list(session.generate(7, temperature=1.0, seed=4, eos=False))
        session.save(tmp_path / kv / name)
        before = session.token_ids
        expected.append([before, list(session.generate(30, temperature=1.0, eos=False))])
    code = f"""
import json, sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
from test_store import CASES, MAPS, load
for kv, name in CASES:
    session = load({str(checkpoint)!r}, kv_format=kv, head_map=MAPS[name]).load_session(f"{tmp_path}/{{kv}}/{{name}}")
    session.cache.check()
    print(json.dumps([session.token_ids, list(session.generate(30, temperature=1.0, eos=False))]))
"""
    script = tmp_path / "continue.py"
    script.write_text(code)
    done = warm_python.run(script)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


def test_extra_and_capacity(saved):
    runtime, session, folder = saved
    again = runtime.load_session(folder)
    assert (again.extra, again.capacity, again.token_ids) == (session.extra, 1200, session.token_ids)
    assert torch.equal(again.logits, session.logits)
    larger = runtime.load_session(folder, capacity=2000)
    assert list(larger.generate(5, eos=False)) == list(session.generate(5, eos=False))
    with pytest.raises(InputError, match="500 tokens"):
        runtime.load_session(folder, capacity=400)


def test_saving_again_writes_only_what_is_new(saved):
    runtime, session, folder = saved
    first = {path.name: path.stat().st_mtime_ns for path in folder.glob("pages-*")}
    session.prefill(token_ids(300, seed=2))
    session.save(folder)
    second = {path.name: path.stat().st_mtime_ns for path in folder.glob("pages-*")}
    assert first.items() < second.items()
    assert len(list(folder.glob("state-*"))) == 1
    session.detach()
    resumed = runtime.load_session(folder)
    resumed.prefill(token_ids(100, seed=3))
    resumed.save(folder)
    assert second.keys() < {path.name for path in folder.glob("pages-*")}
    session.prefill(token_ids(100, seed=3))
    assert torch.equal(runtime.load_session(folder).logits, session.logits)


def test_rewound_pages_are_written_anew(saved):
    runtime, session, folder = saved
    mark = session.mark()
    session.prefill(token_ids(300, seed=2))
    session.save(folder)
    session.rewind(mark)
    session.prefill(token_ids(300, seed=3))
    session.save(folder)
    again = runtime.load_session(folder)
    assert again.token_ids == session.token_ids
    assert list(again.generate(20, eos=False)) == list(session.generate(20, eos=False))


def test_heads_that_drop_pages_are_saved_with_those_they_hold(checkpoint, tmp_path):
    runtime = load(checkpoint, kv_format="k5v3", device_share=1.0)
    reaches = ((ALL_TOKENS, 150), (), (90, 64))
    runtime.plan = replace(runtime.plan, cache=replace(runtime.plan.cache, reaches=reaches))
    session = runtime.new_session()
    folder = tmp_path / "s"
    session.prefill(token_ids(500))
    session.save(folder)
    mark = session.mark()
    session.prefill(token_ids(300, seed=2))
    session.save(folder)
    expected = list(session.generate(40))
    session.rewind(mark)  # the files written later lack what this length reads
    session.save(folder)
    session.prefill(token_ids(300, seed=2))
    session.cache.check()
    assert list(session.generate(40)) == expected
    del session, mark
    runtime.plan = replace(runtime.plan, cache=replace(runtime.plan.cache, reaches=reaches))
    again = runtime.load_session(folder)
    assert again.seq_len == 500 and again.cache.spec.reaches == reaches
    again.cache.check()
    again.prefill(token_ids(300, seed=2))
    assert list(again.generate(40)) == expected
    held = [pages.num_pages() for pages, _ in again.cache.layers if pages is not None]
    assert held[1] < 2 * 5 < again.cache.layers[2][0].num_pooled * 2
    marks = [again.mark(), again.mark()]
    with pytest.raises(SessionError, match=r"2 marks are alive.*release"):
        again.mark()
    again.release(marks.pop())
    again.mark()


def test_another_conversation_replaces_the_old_one_whole(saved):
    runtime, session, folder = saved
    session.detach()
    other = runtime.new_session()
    other.prefill(token_ids(90, seed=8))
    other.save(folder)
    other.detach()
    assert runtime.load_session(folder).token_ids == token_ids(90, seed=8).tolist()
    assert len(list(folder.iterdir())) == 2  # 90 tokens: no pooled page, a state file and a manifest


def flip(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: flip(only(f, "pages-*")), r"pages-.*damaged"),
        (lambda f: flip(only(f, "pages-*"), at=-1), r"pages-.*damaged"),
        (lambda f: flip(only(f, "state-*")), r"state-.*damaged"),
        (lambda f: os.truncate(only(f, "pages-*"), 1000), r"pages-.*truncated"),
        (lambda f: os.truncate(only(f, "state-*"), 1000), r"state-.*truncated"),
        (lambda f: only(f, "pages-*").unlink(), r"pages-.*cannot be read"),
        (lambda f: os.truncate(f / "manifest.json", 100), "manifest"),
        (lambda f: (f / "manifest.json").write_text('{"kind": "other", "version": 1}'), "version None"),
        (lambda f: (f / "manifest.json").unlink(), "holds no session"),
        (lambda f: shutil.rmtree(f), "no session folder"),
    ],
)
def test_damage_is_named(saved, damage, match):
    runtime, _, folder = saved
    damage(folder)
    with pytest.raises(SessionError, match=match):
        runtime.load_session(folder)


def test_a_flipped_byte_anywhere_in_the_manifest_is_found(saved):
    runtime, _, folder = saved
    manifest = folder / "manifest.json"
    good = manifest.read_bytes()
    for at in range(0, len(good), 37):
        if chr(good[at]).isspace():
            continue
        flip(manifest, at)
        with pytest.raises(SessionError):
            runtime.load_session(folder)
        manifest.write_bytes(good)
    runtime.load_session(folder)


def as_version(folder, version):
    """The same session as another version would have signed it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["version"] == VERSION == 2
    del manifest["sha256"]
    manifest["version"] = version
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": _digest(manifest)}))


@pytest.mark.parametrize(
    ("version", "said"),
    [(1, "version 1, whose INT4 pages .* not rotated"), (3, "version 3, this longrun reads version 2")],
)
def test_another_version(saved, version, said):
    runtime, _, folder = saved
    as_version(folder, version)
    with pytest.raises(SessionError, match=f"{said}.*: read the text again .*, or use the longrun that wrote it"):
        runtime.load_session(folder)


def test_exact_pages_of_version_1_are_those_of_version_2(checkpoint, tmp_path):
    runtime = load(checkpoint, kv_format="bf16")
    session = runtime.new_session()
    session.prefill(token_ids(200))
    session.save(tmp_path / "s")
    session.detach()
    as_version(tmp_path / "s", 1)
    again = runtime.load_session(tmp_path / "s")
    assert list(again.generate(4)) == list(session.generate(4))
    again.save(tmp_path / "s")
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["version"] == VERSION


def test_another_runtime_is_refused(saved, checkpoint, tmp_path):
    _, _, folder = saved
    other = tmp_path / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    for options, match in (
        ({"head_map": "full"}, "head split"),
        ({"head_map": mixed_map(flip=True)}, "head split"),
        ({"kv_format": "bf16"}, "kv format int4, but this runtime has bf16: give --kv int4"),
        ({"weight_format": "bf16"}, "weight format fp32"),
        ({"budget": longrun.Budget.parse('[memory]\ngpu="2 GB"\nhost="1 GB"\n[kv]\npage_size=32')}, "page size 64"),
    ):
        with pytest.raises(SessionError, match=match):
            load(checkpoint, **options).load_session(folder)
    with pytest.raises(SessionError, match="saved with model"):
        load(other).load_session(folder)


def test_folders_that_are_no_sessions_are_left_alone(saved, tmp_path):
    _, session, _ = saved
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for call in (session.save, session.attach):
        with pytest.raises(SessionError, match=r"chapter\.txt"):
            call(tmp_path / "thesis")
        with pytest.raises(SessionError, match="is a file"):
            call(tmp_path / "file")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert not is_session(tmp_path / "thesis")


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_a_full_disk_leaves_the_older_session(saved, monkeypatch, fail_at):
    """Writing fails at the page file, the state file or the manifest: what was saved before still loads."""
    runtime, session, folder = saved
    session.prefill(token_ids(300, seed=2))
    calls, sync = 0, os.fsync

    def full(handle):
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SessionError, match="No space left on device"):
        session.save(folder)
    monkeypatch.undo()
    assert runtime.load_session(folder).token_ids == token_ids(500).tolist()
    session.save(folder)
    assert runtime.load_session(folder).num_tokens == 800
