"""Archives are read as the folder that was packed; what is hostile or damaged in one is left out or refused."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from longrun.documents import archive, folder
from longrun.documents.archive import ArchiveTooLargeError, read_archive
from longrun.documents.find import Documents, read_documents
from longrun.errors import InputError
from scripts.fuzz_documents import make_pdf

FILES = {
    "repo/.gitignore": b"*.log\n/build/\n", "repo/.git/info/exclude": b"excluded.txt\n", "repo/.git/config": b"[core]",
    "repo/src/main.py": b"print('h\xc3\xa9')\n\n", "repo/src/page.html": b"<p>1 &lt; 2</p>", "repo/run.log": b"log",
    "repo/src/.gitignore": b"!keep.log\n", "repo/src/keep.log": b"kept", "repo/excluded.txt": b"e",
    "repo/build/made.txt": b"made", "repo/.hidden": b"h", "repo/picture.png": b"\x89PNG\0", "repo/empty": b" \n",
    "repo/paper.pdf": make_pdf((("A page",), ())), "repo/Zebra.md": b"# Z", "repo/src/a b.txt": b"a\n",
}  # fmt: skip
READ = ["repo/Zebra.md", "repo/paper.pdf", "repo/src/a b.txt", "repo/src/keep.log", "repo/src/main.py"]
READ.append("repo/src/page.html")


def write_tree(root: Path) -> None:
    for name, raw in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)


def tarred(files: dict[str, bytes], *others: tarfile.TarInfo, mode: str = "w:gz", **settings: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **settings) as packed:
        for name, raw in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            packed.addfile(info, io.BytesIO(raw))
        for info in others:
            packed.addfile(info)
    return out.getvalue()


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as packed:
        for name, raw in files.items():
            packed.writestr(name, raw)
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read(raw: bytes, most_bytes: int = 10**6) -> Documents:
    return read_archive(raw, "code", most_bytes)


def test_an_archive_is_read_as_the_folder_that_was_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    expected = read_documents(["repo"])
    assert [text.name for text in expected.texts] == READ and all(text.headed for text in expected.texts)
    assert expected.texts[-1].text == "<p>1 &lt; 2</p>", "HTML beside code is code"
    notices = tuple(notice.replace("left out of repo:", "left out of code:") for notice in expected.notices)
    assert len(notices) == 2 and "1 binary file (repo/picture.png), 1 empty file (repo/empty)" in notices[0]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as packed:
        packed.add("repo")  # with its folders
    dotted = {f"./{name}": raw for name, raw in FILES.items()}
    for raw in (
        tarred(FILES), tarred(FILES, mode="w"), tarred(FILES, format=tarfile.USTAR_FORMAT), tarred(dotted),
        out.getvalue(), gzip.compress(out.getvalue()), zipped(FILES), zipped(FILES, zipfile.ZIP_STORED),
    ):  # fmt: skip
        found = read(raw)
        assert found.texts == expected.texts and found.notices == notices


def test_without_code_html_is_read_as_a_browser_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"saved/page.html": b"<p>1 &lt; 2</p>", "saved/page_files/x.js": b"x()"}
    assert [text.text for text in read(zipped(files)).texts] == ["1 < 2", "x()"]
    assert read(zipped(files | {"saved/Makefile": b"all:"})).texts[1].text == "<p>1 &lt; 2</p>"
    for name, raw in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    monkeypatch.chdir(tmp_path)
    assert read_documents(["saved"]).texts[0].text == read_documents(["saved/page.html"]).texts[0].text == "1 < 2"


def test_of_two_files_of_one_name_the_later_counts() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        packed.writestr("a.txt", "old")
        with pytest.warns(UserWarning, match="Duplicate"):
            packed.writestr("a.txt", "new")
    assert [text.text for text in read(out.getvalue()).texts] == ["new"]


def test_nothing_leads_out_of_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outside = {"/etc/x.txt": b"x", "../y.txt": b"y", "a/../../z.txt": b"z", "ok.txt": b"ok"}
    links = [special("link", tarfile.SYMTYPE, "/etc/passwd"), special("hard", tarfile.LNKTYPE, "ok.txt")]
    devices = [special("pipe", tarfile.FIFOTYPE), special("null", tarfile.CHRTYPE), special("disk", tarfile.BLKTYPE)]
    found = read(tarred(outside, *links, *devices, special("folder", tarfile.DIRTYPE)))
    assert [(text.name, text.text) for text in found.texts] == [("ok.txt", "ok")]
    assert found.notices == (
        "left out of code: 2 linked files (link, ...), 3 outside files (/etc/x.txt, ...), 3 special files (pipe, ...)",
    )
    link = zipfile.ZipInfo("link")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    out = io.BytesIO(zipped(outside))
    with zipfile.ZipFile(out, "a") as packed:
        packed.writestr(link, "/etc/passwd")
    found = read(out.getvalue())
    assert [(text.name, text.text) for text in found.texts] == [("ok.txt", "ok")]
    assert found.notices == ("left out of code: 1 linked file (link), 3 outside files (/etc/x.txt, ...)",)
    assert os.listdir() == []


def test_a_rule_of_a_folder_around_the_server_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("*.txt\n")
    monkeypatch.chdir(tmp_path)
    assert [text.name for text in read(zipped({"a.txt": b"a"})).texts] == ["a.txt"]


def bombs() -> dict[str, bytes]:
    """Archives that hold 64 MB or more, or say that they do not, in some kilobytes."""
    large = bytes(2**26)
    honest = zipped({"a": large})
    lying = bytearray(honest)
    struct.pack_into("<I", lying, honest.index(b"PK\x01\x02") + 24, 100)  # its size in the directory
    struct.pack_into("<I", lying, 22, 100)  # and in front of it
    pax = tarred({"a": b"a"}, format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 2**26})
    sparse = special("holes", tarfile.GNUTYPE_SPARSE)
    sparse_raw = bytearray(tarred({"ok.txt": b"ok"}, sparse, mode="w", format=tarfile.GNU_FORMAT))
    header = sparse_raw.index(b"holes")
    sparse_raw[header + 483 : header + 495] = b"%011o\0" % 2**32  # its real size
    checked = sum(sparse_raw[header : header + 148]) + 8 * 32 + sum(sparse_raw[header + 156 : header + 512])
    sparse_raw[header + 148 : header + 156] = b"%06o\0 " % checked
    return {"honest": honest, "lying": bytes(lying), "gzip": gzip.compress(large), "tar": tarred({"a": large}),
            "pax": pax, "sparse": bytes(sparse_raw)}  # fmt: skip


def told_of(raw: bytes) -> str:
    """How an archive is refused, or what was left out of one that holds ok.txt besides."""
    try:
        found = read(raw)
    except InputError as error:
        return str(error)
    assert [text.text for text in found.texts] == ["ok"]
    return found.notices[0]


def test_what_unpacks_to_too_much_is_refused_before_it_is_in_memory() -> None:
    messages = {}
    for name, raw in bombs().items():
        tracemalloc.start()
        try:
            messages[name] = told_of(raw)
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert len(raw) < 2**19 and peak < 2**23, (name, peak)
    for name in ("honest", "gzip", "tar", "pax"):
        assert messages[name].startswith("unpacked, archive code holds more than the 1.00 MB that one may: leave out")
    assert messages["lying"].startswith("archive code cannot be read (Bad CRC-32")
    assert messages["sparse"] == "left out of code: 1 sparse file (holes)"
    with pytest.raises(ArchiveTooLargeError):
        read(zipped({str(number): b"x" * 1000 for number in range(1001)}))
    assert len(read(zipped({str(number): b"x" * 1000 for number in range(1000)})).texts) == 1000


def test_the_number_of_entries_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (folder, archive):
        monkeypatch.setattr(module, "MAX_ENTRIES", 5)
    five, six = ({str(number): b"x" for number in range(count)} for count in (5, 6))
    for pack in (zipped, tarred):
        assert len(read(pack(five)).texts) == 5
        with pytest.raises(InputError, match="code stands for more than 5 files and folders"):
            read(pack(six))


def damaged() -> list[tuple[bytes, str]]:
    whole, plain, packed = tarred(FILES), tarred(FILES, mode="w"), bytearray(zipped({"a.txt": b"words " * 100}))
    encrypted = bytearray(packed)
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.index(signature) + place] |= 1
    empty = bytearray(packed)  # as it says of itself
    struct.pack_into("<I", empty, empty.index(b"PK\x01\x02") + 24, 0)
    renamed = bytearray(packed)  # to a hidden file, in the directory alone
    renamed[renamed.rindex(b"a.txt")] = ord(".")
    packed[40] ^= 0xFF
    broken = bytearray(plain)
    broken[512 * 2 + 100] ^= 0xFF
    negative = tarfile.TarInfo("a").tobuf()
    negative = bytearray(negative[:124] + b"\xff" * 12 + negative[136:])
    negative[148:156] = b"%06o\0 " % (sum(negative[:148]) + 8 * 32 + sum(negative[156:512]))
    return [
        (b"", "cannot be read"), (b"just text", "cannot be read"), (b"PK\x03\x04 no", "cannot be read"),
        (whole[: len(whole) // 2], "cannot be read"), (plain[:3000], "cannot be read"), (bytes(broken), "no header"),
        (whole[:-8] + bytes(8), "CRC check failed"), (bytes(packed), "cannot be read"),
        (bytes(renamed), "File name in directory"), (bytes(empty), "Bad CRC-32"),
        (bytes(encrypted), "is encrypted: pack it without a password"),
        (zipped({"a": b"a"}, zipfile.ZIP_BZIP2), r"is packed by bzip2: pack it by deflate"),
        (bytes(negative) + bytes(1024), "it ends too soon"),
        (zipped({}), r"code stands for no text file \(nothing was left out\)"),
        (zipped({"a.bin": b"\0", ".env": b"x"}), r"no text file \(left out of code: 1 binary file \(a\.bin\)\)"),
    ]  # fmt: skip


@pytest.mark.parametrize(("raw", "message"), damaged())
def test_what_cannot_be_read_is_refused_in_a_sentence(raw: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(raw)
