"""HTML and PDF files as text, and what is said of those that have none or ask for too much."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pypdf
import pytest

from longrun.documents import html_text, pdf_text
from longrun.documents.document import read_document
from longrun.documents.find import read_documents
from longrun.errors import InputError
from scripts.fuzz_documents import make_pdf


@pytest.fixture
def write(tmp_path: Path):
    """Writes a file and gives its path."""

    def to(name: str, content: str | bytes) -> Path:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / name

    return to


PAGE = """<html><head><title>On ships</title><style>p{}</style><script>x("<p>no</p>")</script></head><body>
<h2>A &amp; B</h2><p>One <b>bold</b> a_b * <a href="http://x.y">link</a><br>next<p>Two<noscript>no</noscript>
<ul><li>oil<li>wick</ul><table><tr><th>k<th>v<tr><td>1<td>2</table><pre>def f():
    return 1 &lt; 2</pre><!-- no --><template>no</template><img alt="no" src=x></html>"""
SHOWN = """On ships

## A & B

One bold a_b * link  \nnext

Two

* oil
* wick

| k | v |
| --- | --- |
| 1 | 2 |

```
def f():
    return 1 < 2
```"""


def test_html_is_read_as_a_browser_shows_it(write):
    for name in ("a.html", "a.HTM", "a.txt", "a"):
        assert read_document(write(name, PAGE)).text == SHOWN
    assert read_document(write("part.html", "<p>&euro; 5")).text == "€ 5"
    assert read_document(write("part.txt", "<p>&euro; 5")).text == "<p>&euro; 5", "neither its name nor its beginning"
    assert read_document(write("16.html", "<p>日本".encode("utf-16"))).text == "日本"
    latin = '<html><meta http-equiv="x" content="text/html; charset=iso-8859-1"><p>café'
    assert read_document(write("latin.html", latin.encode("latin-1"))).text == "café"
    assert read_document(write("both.html", latin)).text == "café", "UTF-8 where it can be, whatever the head says"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<p></p> ", r"a\.html is HTML without text \(8 bytes\)"),
        (b"", r"a\.html is empty"),
        (b"<p>\0x", r"a\.html is binary \(a NUL byte at byte 3\)"),
        (b"<p>caf\xe9", r"a\.html is not UTF-8 \(byte 0xe9 at byte 6\)"),
        (b"<meta charset=nosuch><p>caf\xe9", r"a\.html is not UTF-8, nor nosuch, which its head names: convert it"),
        (b"<meta charset=ascii><p>caf\xe9", r"a\.html is not UTF-8, nor ascii"),
        (b"<div>" * 5000 + b"x", r"a\.html nests its HTML tags too deep"),
    ],
)
def test_html_that_cannot_be_read_is_refused_in_a_sentence(write, content, message):
    with pytest.raises(InputError, match=message):
        read_document(write("a.html", content))


def test_html_is_limited_in_size(write, monkeypatch):
    monkeypatch.setattr(html_text, "MAX_HTML_BYTES", 1000)
    with pytest.raises(InputError, match=r"a\.html holds 1\.06 KB of HTML, and at most 1\.00 KB can be read"):
        read_document(write("a.html", "<p>" + "x" * 1060))


def test_pdf_is_read_page_by_page(write):
    pages = (("The first line", "and the second"), ("Page two",))
    for name in ("a.pdf", "a.PDF", "a"):
        found = read_document(write(name, make_pdf(pages)))
        assert found.text == "The first line\nand the second\n\nPage two" and found.notices == ()


def test_what_of_a_pdf_was_not_read_is_told(write, tmp_path):
    write("a.pdf", make_pdf((("One",), (), ("Three",))))
    found = read_documents([tmp_path])
    assert found.texts[0].text == "One\n\nThree"
    assert found.notices == (f"1 of 3 pages of {tmp_path.name}/a.pdf hold no text: images are not read",)
    whole = make_pdf((("One",), ("Two",)))
    found = read_document(write("b.pdf", whole.replace(b"/Type /Page /Parent", b"/Type /Nope /Parent", 1)))
    assert found.text == "Two" and "promises 2 pages and 1 are there" in found.notices[0]
    found = read_document(write("c.pdf", whole.replace(b"startxref\n", b"startxref\n1")))
    assert found.text == "One\n\nTwo" and "c.pdf is damaged PDF, read as far as it goes (" in found.notices[0]


def encrypted(password: str) -> bytes:
    writer = pypdf.PdfWriter(clone_from=BytesIO(make_pdf((("Secret",),))))
    writer.encrypt(password, "owner", algorithm="RC4-128")
    writer.write(out := BytesIO())
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (make_pdf(((),)), r"a\.pdf is PDF without text on its 1 pages \(scanned ones need OCR first\)"),
        (b"just text", r"a\.pdf is PDF that cannot be read \(it does not begin as a PDF file does\)"),
        (b"%PDF-1.4\n" + b"x" * 100, r"a\.pdf is PDF that cannot be read \(\w+: .*\): print it into a new PDF file"),
        (encrypted("x"), r"\(it is encrypted with a password\)"),
    ],
)
def test_pdf_that_cannot_be_read_is_refused_in_a_sentence(write, content, message):
    with pytest.raises(InputError, match=message):
        read_document(write("a.pdf", content))


def test_pdf_with_an_empty_password_is_read(write):
    assert read_document(write("a.pdf", encrypted(""))).text == "Secret"


def test_pdf_that_asks_for_too_much_is_refused(write, monkeypatch):
    slow = write("slow.pdf", make_pdf((("word " * 100_000,) * 3,)))
    monkeypatch.setattr(pdf_text, "CPU_SECONDS", 1)
    monkeypatch.setattr(pdf_text, "CPU_SECONDS_PER_MB", 0)
    large = make_pdf((tuple(f"line {number}" for number in range(200_000)),))
    with pytest.raises(InputError, match="it takes more time or memory than a file of its size may"):
        read_document(write("slow.pdf", large))
    monkeypatch.undo()
    monkeypatch.setattr(pdf_text, "MEMORY_BYTES", 2**26)
    monkeypatch.setattr(pdf_text, "MEMORY_BYTES_PER_BYTE", 0)
    with pytest.raises(InputError, match=r"slow\.pdf is PDF that cannot be read \(.*[Mm]emory"):
        read_document(slow)
