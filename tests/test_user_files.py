"""Files of users: what bounds refuse, and that a message stays one printable line whatever a value holds."""

from __future__ import annotations

import os

import pytest

from longrun.errors import MESSAGE_LIMIT, VALUE_LIMIT, ConfigError, LongrunError, quoted, shortened
from longrun.files.user_files import MAX_BYTES, MAX_DEPTH, parse_object, parse_toml, read_bytes, read_object

ADVICE = "fetch it again"


def refusal(call, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    message = str(caught.value)
    assert message.isprintable() and len(message) <= MESSAGE_LIMIT
    return message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b"[1]", "no JSON object"),
        (b'{"a": "\xff"}', "UTF-8, at byte 7"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5,000 digits"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "64 levels"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "64 levels"),
        (b'{"a": ' * 500 + b"1" + b"}" * 500, "64 levels"),
        (b"9" * 5000, "5,000 digits"),
    ],
    ids=range(9),
)
def test_json_that_is_refused(tmp_path, content, part):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    message = refusal(read_object, file, ConfigError, ADVICE)
    assert part in message and str(file) in message and message.endswith(ADVICE)


def test_json_that_is_read(tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": ' + b"9" * 100 + b', "b": ' + b"[" * 62 + b"]" * 62 + b', "a": 1e400}')
    found = read_object(file, ConfigError, ADVICE)
    assert found["a"] == float("inf") and found["b"]
    assert "'a' twice" in refusal(parse_object, '{"a": 1, "a": 2}', "x", ConfigError, ADVICE, True)


def test_what_is_no_readable_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would never end
    sparse = tmp_path / "sparse"
    sparse.touch()
    os.truncate(sparse, 10**12)
    assert f"{10**12:,} bytes" in refusal(read_bytes, sparse, ConfigError, ADVICE)
    assert "no file" in refusal(read_bytes, tmp_path, ConfigError, ADVICE)
    assert "no file" in refusal(read_bytes, tmp_path / "pipe", ConfigError, ADVICE)
    for name in ("missing", "x" * 5000, "a\0b"):
        assert "no such file" in refusal(read_bytes, tmp_path / name, ConfigError, ADVICE)
    (tmp_path / "just").write_bytes(b"x" * MAX_BYTES)
    assert len(read_bytes(tmp_path / "just", ConfigError, ADVICE)) == MAX_BYTES


@pytest.mark.parametrize(
    ("text", "part"),
    [("a = " + "9" * 5000, "digits"), ("a = " + "[" * 5000 + "]" * 5000, "64 levels"), ("a = ", "line 1")],
    ids=range(3),
)
def test_toml_that_is_refused(text, part):
    assert part in refusal(parse_toml, text, "budget", ConfigError)


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, "\x1b[31m\n\0\ud800", 10**5000, -(10**5000), [[[[[[1]]]]]] * 10**5, {"k" * 99: "v" * 99}, b"\0" * 999,
     {i: i for i in range(999)}, float("nan"), None, object()],
    ids=range(11),
)  # fmt: skip
def test_a_quoted_value_is_short_and_printable(value):
    assert len(quoted(value)) <= VALUE_LIMIT and quoted(value).isprintable()


def test_a_message_is_cut_in_the_middle():
    assert quoted("4096") == "'4096'" and quoted(True) == "True" and quoted(10**30) == "1" + 30 * "0"
    assert shortened("/models/a b") == "/models/a b"
    message = str(LongrunError("begins " + "x" * 10**6 + "\n ends"))
    assert message.startswith("begins xxx") and message.endswith("xxx\\n ends") and len(message) == MESSAGE_LIMIT
