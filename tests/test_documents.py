"""What a person names becomes documents: files, folders, patterns and stdin, in order, by .gitignore, as text."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from chat_tokenizers import CHATML, byte_tokenizer

from longrun.chat.conversation import Conversation
from longrun.documents import document, find, folder
from longrun.documents.document import Document, read_document
from longrun.documents.find import read_documents
from longrun.errors import InputError


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository, the working folder, with a folder `src` in it."""
    files = {
        ".gitignore": "*.log\n/src/build/\nsecret*\n!secret-not.txt\n!\n", ".git/info/exclude": "excluded.txt\n",
        ".git/config": "[core]\n", "top.txt": "top", "src/b.txt": "b", "src/a.py": "a", "src/a/z.txt": "z",
        "src/x.log": "log", "src/secret.txt": "s", "src/secret-not.txt": "n", "src/build/made.txt": "made",
        "src/a/build/kept.txt": "kept", "src/a/.gitignore": "z2.txt\n!x.log\nsub/\n", "src/a/z2.txt": "z2",
        "src/a/x.log": "again", "src/a/sub/no.txt": "no", "src/.hidden": "h", "src/.dir/in.txt": "h",
        "src/excluded.txt": "e", "src/[odd].txt": "odd",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / name).write_text(text)
    monkeypatch.chdir(tmp_path / "repo")
    return tmp_path / "repo"


READ = ["src/[odd].txt", "src/a.py", "src/a/build/kept.txt", "src/a/x.log", "src/a/z.txt", "src/b.txt"]
READ.append("src/secret-not.txt")


def names(*paths: str | Path) -> list[str]:
    return [text.name for text in read_documents(paths).texts]


def test_a_folder_stands_for_what_git_would_track_without_hidden_files(tree):
    assert names("src") == names("src/") == names(tree / "src") == READ
    assert names(".") == [*READ, "top.txt"]
    assert names("src/a") == ["src/a/build/kept.txt", "src/a/x.log", "src/a/z.txt"]
    assert names("src/build") == ["src/build/made.txt"], "named in spite of .gitignore"
    assert names("src/x.log", "src/.hidden") == ["src/x.log", "src/.hidden"]


@pytest.mark.skipif(shutil.which("git") is None, reason="compares with git")
def test_git_agrees(tree):
    def git(*arguments: str) -> str:
        alone = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True, env=alone).stdout

    (tree / ".git" / "config").unlink()
    git("init")
    (tree / ".git" / "info" / "exclude").write_text("excluded.txt\n")
    listed = git("-c", "core.quotePath=false", "ls-files", "-co", "--exclude-standard", "src").splitlines()
    assert sorted(name for name in listed if not any(part.startswith(".") for part in name.split("/"))) == READ


def test_a_folder_elsewhere_gives_names_from_its_parent(tree, monkeypatch, tmp_path):
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert names(tree / "src") == READ
    assert names("../repo/src/a") == ["a/build/kept.txt", "a/x.log", "a/z.txt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("src/*.txt", ["src/[odd].txt", "src/b.txt", "src/secret-not.txt"]),
        ("src/**/*.txt", [name for name in READ if name.endswith(".txt")]),
        ("s??/**", READ),
        ("src/a/*", ["src/a/x.log", "src/a/z.txt"]),
        ("src/[[]odd].txt", ["src/[odd].txt"]),
        ("src/build/*", ["src/build/made.txt"]),
    ],
)
def test_patterns(tree, pattern, expected):
    assert names(pattern) == names(tree / pattern) == expected
    assert names("src/[odd].txt") == ["src/[odd].txt"], "a file with that name is that file"


def test_what_has_no_text_is_left_out_of_a_folder_and_counted(tree, tmp_path):
    (tmp_path / "elsewhere.txt").write_text("elsewhere")
    (tree / "d" / "sub").mkdir(parents=True)
    for name, raw in {"1.bin": b"\0", "2.bin": b"a\0", "empty": b"", "latin": b"caf\xe9", "t.txt": b"text"}.items():
        (tree / "d" / name).write_bytes(raw)
    (tree / "d" / "out").symlink_to(tmp_path / "elsewhere.txt")
    (tree / "d" / "back").symlink_to(tree / "d")
    (tree / "d" / "same.txt").symlink_to("t.txt")
    os.mkfifo(tree / "d" / "pipe")
    found = read_documents(["d"])
    assert [(text.name, text.text) for text in found.texts] == [("d/same.txt", "text"), ("d/t.txt", "text")]
    assert found.notices == (
        "left out of d: 2 binary files (d/1.bin, ...), 1 empty file (d/empty), 2 linked files (d/back, ...), "
        "1 not UTF-8 file (d/latin), 1 special file (d/pipe)",
    )
    with pytest.raises(InputError, match=r"file d/1\.bin is binary"):
        read_documents(["d/1.bin"])
    with pytest.raises(InputError, match=r"d/\*\.bin stands for no text file \(left out of d/\*\.bin: 2 binary files"):
        read_documents(["d/*.bin"])
    with pytest.raises(InputError, match=r"d/\*\.nothing stands for no text file \(nothing was left out\)"):
        read_documents(["d/*.nothing"])
    with pytest.raises(InputError, match="d/sub stands for no text file"):
        read_documents(["d/sub"])


def test_several_documents_have_headers_and_one_alone_has_none(tree):
    assert [text.shown for text in read_documents(["top.txt"]).texts] == ["top"]
    assert [text.shown for text in read_documents(["-"], lambda: b"piped\n").texts] == ["piped"]
    several = read_documents(["top.txt", "-", "src/a.py"], lambda: b"piped").texts
    assert [text.shown for text in several] == ["==> top.txt <==\ntop", "==> stdin <==\npiped", "==> src/a.py <==\na"]
    assert [text.shown for text in read_documents(["src/b*"]).texts] == ["==> src/b.txt <==\nb"]
    assert Document("a\nb <==", "", "", True).header == "==> a\\nb <== <==\n"
    with pytest.raises(InputError, match="- is named twice"):
        read_documents(["-", "-"], lambda: b"x")
    with pytest.raises(InputError, match="does not hold a text here"):
        read_documents(["-"])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_a_byte_order_mark_names_the_encoding(tmp_path, encoding):
    text = "Grüße, 日本 🙂\r\nend"
    mark = "" if encoding in ("utf-16", "utf-8-sig") else "\ufeff"
    (tmp_path / "a").write_bytes((mark + text + "\n").encode(encoding))
    assert read_document(tmp_path / "a").text == text


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("text".encode("utf-32"), "a is UTF-32 by its byte order mark: convert it to UTF-8"),
        (b"\xff\xfea\0\0\xd8b\0", r"a is not the UTF-16 that its byte order mark promises \(byte 0x00 at byte 4\)"),
        ("no mark".encode("utf-16-le"), r"a is binary \(a NUL byte at byte 1\)"),
        (b"\xef\xbb\xbfab\xff", r"a is not UTF-8 \(byte 0xff at byte 5\)"),
        (b"\xff\xfe \0", r"a is empty \(4 bytes"),
    ],
)
def test_no_other_encoding_is_guessed(tmp_path, raw, message):
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(InputError, match=message):
        read_document(tmp_path / "a")


def test_what_is_too_large_is_refused_before_it_is_read(tree, monkeypatch):
    monkeypatch.setattr(find, "MAX_BYTES", 9)
    monkeypatch.setattr(find, "read_document", lambda *_: pytest.fail("it was read"))
    with pytest.raises(InputError, match=r"what is named holds \d+ B, and at most .* can be read: give less text"):
        read_documents(["src"])
    monkeypatch.setattr(document, "MAX_BYTES", 3)
    with pytest.raises(InputError, match=r"file src/a/x\.log holds more than"):
        read_document("src/a/x.log")
    monkeypatch.setattr(folder, "MAX_ENTRIES", 5)
    for named in ("src", "src/**"):
        with pytest.raises(InputError, match="stands for more than 5 files and folders"):
            read_documents([named])


class ListSession:
    def __init__(self) -> None:
        self.token_ids, self.capacity, self.extra = [], 10**6, {}

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def test_the_model_sees_the_headers_and_a_reading_begun_without_them_is_taken_up(tree):
    tokenizer = byte_tokenizer(CHATML)
    texts = read_documents(["top.txt", "src/b.txt"]).texts
    session = ListSession()
    ids = Conversation(session, tokenizer, ()).prepare(texts, "what?").token_ids
    assert "\n==> top.txt <==\ntop\n\n==> src/b.txt <==\nb\n\nwhat?" in tokenizer.decode(ids)
    bare = [Document(text.name, text.text, text.sha256) for text in texts]
    for began in (texts, bare):
        session = ListSession()
        whole = Conversation(session, tokenizer, ()).prepare(began, "what?").token_ids
        session.token_ids = whole[:-9]
        reading = Conversation(session, tokenizer, ()).prepare(texts, "what?")
        assert reading.resumed_at == len(whole) - 9 and reading.token_ids == whole[-9:]
