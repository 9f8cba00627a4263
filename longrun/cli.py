"""What every command-line program of longrun shares: how an error leaves the process."""

from __future__ import annotations

import sys
from collections.abc import Callable

from longrun.allocation import allocation_sentence, is_failed_allocation
from longrun.errors import LongrunError


def run(main: Callable[[], int | None]) -> None:
    """Run `main` and leave the process: its return value as status, 2 for a `LongrunError`, 130 after Ctrl-C."""
    try:
        status = main() or 0
    except LongrunError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_failed_allocation(error):
            raise
        print(f"error: {allocation_sentence(error, 'on the way')}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
