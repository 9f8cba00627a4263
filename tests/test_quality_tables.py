"""The quality tables in the document and next to their files: what a comparison gives, what is missing or refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_compare_merge import ROWS, comparison, record

from longrun.errors import InputError
from longrun.lab.quality.report import asked, write_report
from longrun.lab.quality.results import QualityResults
from longrun.lab.quality.row import Row
from scripts.quality import quality_tables as script

ROOT = Path(__file__).resolve().parents[1]
FILE = "results/quality-split.json"
KINDS = (
    "provenance",
    "verdicts",
    "exact",
    "several",
    "difference",
    "beside_int4",
    "kl",
    "top1",
    "perplexity",
    "bytes",
    "pages",
)


@pytest.fixture
def document(tmp_path) -> Path:
    path = tmp_path / "docs" / "page.md"
    path.parent.mkdir()
    path.write_text("# Page\n\n" + "\nBetween.\n".join(f"<!-- table: {k} {FILE} -->\n<!-- /table -->" for k in KINDS))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Two lengths, six questions each: all are right with bf16 pages, five with others. Only read by the tests."""
    folder = comparison(tmp_path_factory.mktemp("finished") / "run", (4000, 64000), 6, ROWS, adapter="0123456789abcdef")
    path = folder / "results.json"
    found = json.loads(path.read_text())
    found["environment"]["torch"] = "2.11.0"
    path.write_text(json.dumps(found))
    return folder


def test_a_published_comparison_fills_the_page(document, finished, capsys):
    def tables(*more: str) -> int:
        return script.main(["--document", str(document), *more])

    assert tables() == 0  # nothing is measured
    assert document.read_text().count(f"*Not measured yet: {FILE} is not there.*") == len(KINDS)
    assert tables("--check") == 0
    assert tables("--publish", str(finished), "split") == 0
    text = document.read_text()
    assert "Not measured yet" not in text and text.count("Between.") == len(KINDS) - 1
    lines = text.splitlines()
    assert "| row | heads | 4K | 64K |" in lines
    assert "| reference | 100% | 100% [61, 100] | 100% [61, 100] |" in lines  # Wilson, 6 of 6
    assert "| half | 50% | 83% [44, 97] | 83% [44, 97] |" in lines  # 5 of 6
    assert "| half | 50% | 60.0 KB (30%) | 960 KB (30%) |" in lines
    assert "| full int4 | 100% | 0.1000 [0.1000, 0.1000] | 0.1000 [0.1000, 0.1000] |" in lines
    for kind in ("difference", "kl", "top1", "perplexity"):  # beside itself it says nothing
        assert "| reference" not in text[text.index(f"table: {kind} ") :].partition("<!-- /table -->")[0]
    assert any(line.startswith("- half: exact 83%") for line in lines)
    (said,) = (line for line in lines if line.startswith("From "))
    assert "tiny with adapter 0123456789ab; a GPU; torch 2.11.0; commit c0ffee; seed 0. 6 question(s)" in said
    page = (document.parent / FILE).with_suffix(".md").read_text()
    assert "](quality-split.json)" in page and all(line in page for line in lines if line.startswith(("| ", "- half")))
    for name in ("bytes", "ratio"):
        picture = document.parent / "pictures" / f"quality-split-{name}.png"
        assert f"](../pictures/{picture.name})" in page and picture.read_bytes().startswith(b"\x89PNG")
    assert "quality-split-window.png" not in page  # no two rows differ by their window
    assert "## Exact match, several needles" in page and "## Exact match, pass keys" not in page  # none were asked
    assert tables("--check") == 0
    source, published = (json.loads(path.read_text()) for path in (finished / "results.json", document.parent / FILE))
    assert published.pop("verdicts") and len(published.pop("beside_int4")) == 2 * 2
    assert published == source
    section = text[text.index("table: beside_int4") :].partition("<!-- /table -->")[0]
    assert "| half | 50% | +0.0 [-50.0, +50.0] | +0.0 [-50.0, +50.0] |" in section  # 3 of 6 to either side
    assert "| reference | 100% | +16.7 [" in section and "| full int4" not in section
    document.write_text(text.replace("83% [44, 97]", "84% [44, 97]", 1))  # a figure that no file gives
    capsys.readouterr()
    assert tables("--check") == 1
    assert capsys.readouterr().out.startswith("page.md is not what its result files give: run python scripts/quality/")
    assert tables() == 0
    wrong = (document.parent / FILE).with_suffix(".md")
    wrong.write_text(page.replace("83% [44, 97]", "84% [44, 97]", 1))
    assert tables("--check") == 1 and "quality-split.md is not" in capsys.readouterr().out
    wrong.unlink()
    assert tables("--check") == 1 and not wrong.exists()
    assert tables() == 0 and wrong.read_text() == page


def test_a_table_shows_the_rows_that_its_marker_names(document, finished):
    document.write_text(f"<!-- table: exact {FILE}; half; reference -->\n<!-- /table -->\n")
    assert script.main(["--document", str(document), "--publish", str(finished), "split"]) == 0
    assert [line.split(" | ")[0] for line in document.read_text().splitlines() if line.startswith("|")] == [
        "| row", "| ---", "| reference", "| half",
    ]  # fmt: skip
    for marker, message in (
        (f"exact {FILE}; halves", "has no row 'halves'"),
        (f"verdicts {FILE}; half", "has no rows to choose from"),
    ):
        document.write_text(f"<!-- table: {marker} -->\n<!-- /table -->\n")
        with pytest.raises(InputError, match=message):
            script.main(["--document", str(document)])


def test_other_results_have_no_page(document, tmp_path):
    (document.parent / "results").mkdir()
    other = document.parent / "results" / "quality-other.json"
    other.write_text('{"records": []}')
    assert script.main(["--document", str(document)]) == 0
    assert list(other.parent.iterdir()) == [other]
    other.write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        script.main(["--document", str(document)])
    with pytest.raises(InputError, match=r"nowhere\.md cannot be read"):
        script.main(["--document", str(tmp_path / "nowhere.md")])


def test_what_cannot_be_published_or_made(document, finished, tmp_path):
    def tables(*more: str) -> int:
        return script.main(["--document", str(document), *more])

    for more, message in (
        (["--publish", str(tmp_path / "nowhere"), "split"], "cannot be read"),
        (["--publish", str(finished), "a/b"], "'a/b' must be of letters"),
        (["--publish", str(finished), "split", "--check"], "leave --publish out"),
    ):
        with pytest.raises(InputError, match=message):
            tables(*more)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    found = json.loads((finished / "results.json").read_text())
    del found["summary"]
    (unfinished / "results.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match="has no report yet"):
        tables("--publish", str(unfinished), "split")
    assert not (document.parent / FILE).exists()
    tables("--publish", str(finished), "split")
    text = document.read_text()
    for old, new, message in (
        ("table: exact", "table: dances", "'dances' cannot be made"),
        ("table: exact", "table: pictures", "'pictures' cannot be made"),  # their links are the result page's
        (f"exact {FILE}", f"exact {FILE} {FILE}", "one result file"),
        ("-->\n\n| row", "--\n\n| row", "not closed"),
    ):
        assert old in text
        document.write_text(text.replace(old, new, 1))
        with pytest.raises(InputError, match=message):
            tables()
    document.write_text(text)
    (document.parent / FILE).write_text(json.dumps(found))
    with pytest.raises(InputError, match="use --publish"):
        tables()


def test_a_row_of_some_lengths_leaves_the_others_empty_and_bars_do_not_break_the_table():
    rows = [row.to_dict() for row in (*ROWS, Row("new | row", "streaming"))]
    summary = [
        {"name": name, "length": length, "retrieval_ratio": 0.5, "kv_used": used, "kv_computed": computed,
         "beside_int4": None}
        for name, length, used, computed in (
            ("reference", 4000, 200, None), ("reference", 8000, 400, None), ("new | row", 8000, 100, 50),
        )
    ]  # fmt: skip
    found = {"rows": rows, "summary": summary, "settings": {"lengths": [4000, 8000, 16000]}}
    assert script.by_length(found, script.CELLS["bytes"]) == [
        "| row | heads | 4K | 8K |",
        "| --- | --- | --- | --- |",
        "| reference | 50% | 200 B (100%) | 400 B (100%) |",
        "| new \\| row | 50% |  | 50 B (12%), computed |",
    ]


def test_what_was_not_measured_is_empty_and_said(document, tmp_path):
    folder = comparison(tmp_path / "run", (4000, 64000), 6, ROWS, adapter=None, tasks=["several", "single", "text"])
    results = QualityResults.read(folder)
    results.head["environment"]["torch"] = "2.11.0"
    for row, length in ((ROWS[0], 4000), (ROWS[0], 64000), (ROWS[1], 4000), (ROWS[1], 64000), (ROWS[2], 64000)):
        results.records.append(record(row, length, "single", 4, 4, task="needle"))
    write_report(results)
    assert script.main(["--document", str(document), "--publish", str(folder), "split"]) == 0
    sections = {kind: part for kind in KINDS if (part := document.read_text().partition(f"table: {kind} ")[2])}
    sections = {kind: part.partition("<!-- /table -->")[0] for kind, part in sections.items()}
    assert "half was not measured at 4K (single).\n" in sections["provenance"]
    assert "full int4 was" not in sections["provenance"] and "reference was" not in sections["provenance"]
    assert "| half | 50% |  | 90% [60, 98] |" in sections["exact"]  # 9 of 10, and nothing where a task lacks
    assert "| half | 50% | 83% [44, 97] | 83% [44, 97] |" in sections["several"]
    for kind in ("difference", "beside_int4"):
        assert "| half | 50% |  | " in sections[kind]
    (line,) = (line for line in sections["verdicts"].splitlines() if line.startswith("- half"))
    assert "exact 88% [" in line and line.endswith("; not measured: 4K (single)")  # 14 of 16
    assert sections["verdicts"].count("not measured") == 1


def test_the_projects_tables_are_current():
    assert script.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (["single"], "2 question(s) of each task at each of 3 depths a length."),
        (["text"], "4 text(s) a length with the last 256 tokens predicted."),
        (["several", "text"], "2 question(s) of each task at each of 3 depths a length, 4 text(s) a length with the "
         "last 256 tokens predicted."),
    ],
)  # fmt: skip
def test_only_what_was_asked_is_told(tasks, said):
    own = {"items": 2, "depths": [0.0, 0.5, 1.0], "texts": 4, "score_tokens": 256, "tasks": tasks}
    results = SimpleNamespace(head={"settings": {"lengths": [4000]}}, settings_at=lambda length: own)
    assert asked(results) == [said]


def test_pages_are_compared_with_their_twins_question_by_question(tmp_path):
    rows = (
        ROWS[0], ROWS[1], Row("full five", kv="k5v3"), ROWS[2], Row("half five", "maps/gates", 0.5, "k5v3"),
        Row("third five", "maps/gates", 0.35, "k5v3"), Row("half simulated", "maps/gates", 0.5, "sim:k4-channel/v4"),
    )  # fmt: skip
    found = json.loads((comparison(tmp_path / "run", (4000, 64000), 6, rows) / "results.json").read_text())
    for one in found["records"]:
        if one["row"] == "full five" and one["group"] == "text":
            one["items"] = [item | {"kl": 0.08} for item in reversed(one["items"])]
        if one["row"] == "full five" and one["group"] == "several":
            one["items"][5]["exact"], one["items"][0]["exact"] = True, one["length"] == 4000  # its twin has 5 wrong
    found["records"] = [one for one in found["records"] if (one["row"], one["length"]) != ("half five", 64000)]
    assert script.page_table(found) == [
        "| row | instead of | 4K | 64K | answers right |",
        "| --- | --- | --- | --- | --- |",
        "| full five | full int4 | -0.0200 [-0.0200, -0.0200] (-20%) | -0.0200 [-0.0200, -0.0200] (-20%) | "
        "2 more, 1 fewer of 12 |",
        "| half five | half | +0.0000 [+0.0000, +0.0000] (+0%) |  | 0 more, 0 fewer of 6 |",
    ]
    texts = [one["items"] for one in found["records"] if one["row"] == "full five" and one["group"] == "text"]
    texts[0][0]["block"] = 7  # another text than its twin's
    with pytest.raises(KeyError):
        script.page_table(found)
