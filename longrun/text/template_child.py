"""A process of its own that renders chat templates, with a limit on time, memory and output:
`longrun.text.chat_template` starts it. A template is a program out of a checkpoint. The sandbox keeps it from files
and from Python's insides, but not from a loop without an end or a string of many gigabytes, in any of the dozens of
ways to write one.

Run by path: one JSON object on stdin, one on stdout, and nothing of longrun's is imported.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes


class _TooMuch(Exception):
    """The rendered text is longer than it may be."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what an assistant writes, for training: here it leaves its body as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def environment(now: float | None = None) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What chat templates are written for: transformers' settings, functions and filters; it is `now`, seconds since
    1970, or the clock's time."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: (
        datetime.now() if now is None else datetime.fromtimestamp(now)
    ).strftime(form)
    return made


def render_all(request: dict[str, Any]) -> dict[str, Any]:
    """{"texts": ...} of `request`'s chats, or of the first that fails {"refused": why} or {"too_much": what}."""
    try:
        template = environment(request["now"]).from_string(request["template"])
        texts = []
        for chat in request["chats"]:
            text, left = [], request["max_chars"]
            for piece in template.generate({"tools": None, "documents": None, **request["names"], **chat}):
                left -= len(piece)
                if left < 0:
                    raise _TooMuch(f"wrote more than {request['max_chars']:,} characters")
                text.append(piece)
            texts.append("".join(text))
    except _TooMuch as error:
        return {"too_much": str(error)}
    except MemoryError:
        return {"too_much": f"needed more than {request['memory_bytes'] // 2**20} MB of memory"}
    except Exception as error:  # a template may raise anything
        return {"refused": f"{error}"[:1000] or type(error).__name__}
    return {"texts": texts}


def main() -> None:
    import resource

    request = json.load(sys.stdin)
    for limit, name in ((resource.RLIMIT_CPU, "cpu_seconds"), (resource.RLIMIT_AS, "memory_bytes")):
        _, hard = resource.getrlimit(limit)
        value = request[name] if hard == resource.RLIM_INFINITY else min(request[name], hard)
        resource.setrlimit(limit, (value, value))
    answer = render_all(request)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
