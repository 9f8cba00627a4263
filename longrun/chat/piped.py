"""What is piped into stdin as one text."""

from __future__ import annotations

import io
import select
import sys

from longrun.documents.document import read_bytes

_SECONDS_BEFORE_A_NOTE = 2.0


def stdin_bytes() -> bytes:
    """All that stdin holds, up to its end; where nothing comes at first, a note on stderr says what is waited for.

    Raises:
        InputError: more than `longrun.documents.document.MAX_BYTES`.
    """
    stdin = sys.stdin
    if not hasattr(stdin, "buffer"):  # a stand-in that holds text
        return stdin.read().encode("utf-8", "surrogateescape")
    if isinstance(stdin, io.TextIOWrapper) and not select.select([stdin], [], [], _SECONDS_BEFORE_A_NOTE)[0]:
        print("waiting for the text on stdin; with < /dev/null there is none", file=sys.stderr, flush=True)
    return read_bytes(stdin.buffer, "stdin")
