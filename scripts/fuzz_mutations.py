"""Damage as it happens: bytes that a disk or a download got wrong, and values that a person or another program wrote.

Every function takes a `random.Random` and gives back the damaged content with a word on what was done to it.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 64, 10**6, 10**9, 10**18, 10**30, -(10**30), 0.0, 0.5, 1.0, 1.5, 2.0, -0.5,
    1e-300, 1e300, float("nan"), float("inf"), "", "x", "1", "80 GB", "x" * 20_000, "\0", "../../etc", "\u2028\x1b[2J",
    "\ud800", [], [1], [[1]], [None], ["x"] * 3000, {}, {"a": 1}, {"a": {"b": [1]}}, {str(i): i for i in range(500)},
)  # fmt: skip
_FLOATS = (float("nan"), float("inf"), 1e38, -1e30, 1e-40, 0.0, 1.0, 1000.0)
_RAW = ("9" * 30, "9" * 5000, "-" + "1" * 200, "1e999", "NaN", "[" * 200 + "]" * 200, "[" * 60_000 + "]" * 60_000)
_KEYS = (
    "dual_chunk_attention_config", "attention_chunk_size", "attn_logit_softcapping", "partial_rotary_factor",
    "auto_map",
    "layer_types", "quantization_config", "sliding_window", "rope_scaling", "head_dim", "use_dora", "longrun",
    "lora_bias",
    "chat_template", "add_prefix_space", "sha256", "__proto__", "é", "x" * 2000, "",
)  # fmt: skip


def damage_bytes(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """One fault of a file as bytes: flipped, cut, doubled, overwritten, emptied, or with something foreign in it."""
    data = bytearray(content)
    size = max(1, len(data))
    at = rng.randrange(size)
    many = rng.choice((1, 2, 8, 100))
    kind = rng.choice(
        (
            "bit",
            "bit",
            "number",
            "number",
            "byte",
            "cut",
            "cut",
            "head",
            "insert",
            "drop",
            "double",
            "zeros",
            "empty",
            "append",
        )
    )
    if kind == "bit" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "number":
        data[at // 4 * 4 : at // 4 * 4 + 4] = struct.pack("<f", rng.choice(_FLOATS))
    elif kind == "byte" and data:
        data[at] = rng.choice(b'0919-+.eE"{}[],: \t\n\0_/\xff')
    elif kind == "cut":
        del data[at:]
    elif kind == "head":
        del data[:at]
    elif kind == "insert":
        data[at:at] = rng.randbytes(many)
    elif kind == "drop":
        del data[at : at + many]
    elif kind == "double":
        data[at:at] = data[at : at + many]
    elif kind == "zeros":
        data[at : at + many] = bytes(len(data[at : at + many]))
    elif kind == "empty":
        data.clear()
    else:
        data += rng.choice((b"\0", b"\n", b"}", b"x" * many, b"\xef\xbb\xbf"))
    return bytes(data), f"{kind} at {at:,} of {size:,}"


def damage_json(
    rng: random.Random, content: bytes, finish: Callable[[dict], dict] = lambda data: data
) -> tuple[bytes, str]:
    """Another value, name, number of copies or depth for one item of a JSON object.

    Args:
        finish: put the object right again after the change, such as a checksum in it.
    """
    data = json.loads(content)
    place, name = rng.choice(_places(data))
    kind = rng.choice(("value", "value", "value", "value", "drop", "rename", "add", "nudge", "nudge", "raw", "twice"))
    what = f"{kind} of {str(name)[:40]!r}"
    if kind == "drop":
        del place[name]
    elif kind == "rename" and isinstance(place, dict):
        place[rng.choice(_KEYS)] = place.pop(name)
    elif kind == "add" and isinstance(place, dict):
        name = rng.choice(_KEYS)
        place[name] = rng.choice(VALUES)
        what = f"add {name[:40]!r}: {str(place[name])[:30]!r}"
    elif kind == "nudge" and type(place[name]) in (int, float):
        place[name] = rng.choice((place[name] + 1, place[name] - 1, place[name] * 2, -place[name], float(place[name])))
        what += f" to {place[name]}"
    elif kind == "raw":
        place[name] = "RAW"
        return json.dumps(finish(data)).replace('"RAW"', rng.choice(_RAW), 1).encode(), what
    elif kind == "twice" and isinstance(place, dict):
        extra = f"{json.dumps(name)}: {json.dumps(rng.choice(VALUES))}, "
        return json.dumps(finish(data)).replace(
            json.dumps(name) + ":", extra + json.dumps(name) + ":", 1
        ).encode(), what
    else:
        place[name] = rng.choice(VALUES)
        what += f" to {str(place[name])[:30]!r}"
    return json.dumps(finish(data)).encode(), what


def damage_header(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """`damage_json` of a safetensors file's header, with the length before it put right."""
    length = int.from_bytes(content[:8], "little")
    header, what = damage_json(rng, content[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + content[8 + length :], f"header: {what}"


def damage_table(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Another cell, row or number of rows for a table of numbers separated by tabs."""
    rows = [line.split("\t") for line in content.decode().splitlines()]
    row = rng.choice(rows)
    kind = rng.choice(("cell", "cell", "cell", "short", "long", "row", "rows"))
    if kind == "cell":
        cells = (
            "nan",
            "inf",
            "-inf",
            "1e999",
            "-1",
            "7",
            "0_5",
            "٣",
            "0x1",
            "",
            " ",
            "x" * 9000,
            "1,5",
            "1e-400",
            "0.5 0.5",
        )
        row[rng.randrange(len(row))] = rng.choice(cells)
    elif kind == "short":
        row.pop()
    elif kind == "long":
        row.append("0.5")
    elif kind == "row":
        rows.remove(row)
    else:
        rows += [row] * rng.choice((1, 3, 2000))
    return "\n".join("\t".join(cells) for cells in rows).encode(), f"table: {kind}"


def damage_toml(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Another value, key or section for one line of a TOML file."""
    lines = content.decode().splitlines()
    at = rng.randrange(len(lines))
    values = (
        "80", '"80 GB"', '"-1 GB"', "-1", "0", "1", "64", "1.5", "true", "nan", "inf", "[]", "{}", '"x"',
        "1979-05-27", "0x10",
        "9" * 30, "9" * 5000, '"' + "9" * 5000 + ' GB"', '"' + "x" * 20_000 + '"', "[" * 5000 + "]" * 5000, '"1e9 GB"',
        "",
        '"int4"', '"fp32"', '"0.5 GiB"', '"80GB"', "1_000",
    )  # fmt: skip
    kind = rng.choice(("value", "value", "value", "key", "section", "drop", "twice"))
    if kind == "value" and "=" in lines[at]:
        lines[at] = f"{lines[at].split('=')[0]}= {rng.choice(values)}"
    elif kind == "key" and "=" in lines[at]:
        lines[at] = f"{rng.choice(('gpu', 'host', 'ratio', 'sink', 'x' * 3000))} = {lines[at].split('=', 1)[1]}"
    elif kind == "section":
        lines.insert(at, rng.choice(("[memory]", "[kv]", "[x]", "[[kv]]", "[a.b.c]", "[" + "x." * 3000 + "x]")))
    elif kind == "drop":
        lines.pop(at)
    else:
        lines.insert(at, lines[at])
    return "\n".join(lines).encode(), f"toml: {kind} in line {at + 1}"


def damage_template(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Something in a chat template that runs without end, fills memory, writes without end, reaches out or is wrong."""
    pieces = (
        "{% for i in range(10**9) %}{% endfor %}", "{% for i in range(10**7) %}xxxxxxxxxx{% endfor %}",
        "{{ 'x' * 10**10 }}", "{{ 10 ** 10 ** 8 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}", "{% if %}", "{{", "\0",
        "{{ missing.name.of }}", "{% set x = 1 %}", "{{ '[' * 100 }}", "{% include '/etc/passwd' %}", "{{ 1 / 0 }}",
        "{{ bos_token }}", "{{ 'y' | indent(10**9) }}",
    )  # fmt: skip
    text, piece = content.decode(), rng.choice(pieces)
    at = rng.choice((0, text.index("{% for"), text.index("[{{"), len(text)))
    return (text[:at] + piece + text[at:]).encode(), f"template: {piece!r} at {at}"


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every (object or list, key or index) of a JSON value."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in items for place in ((data, key), *_places(value)[:40])]
