"""How long a server takes to swap one kept document for another: to load the files of its session into memory.

Two documents of the demo's text are asked in turn, with the demo model. The files are in the system's cache, as they
were written or read shortly before. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx

from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.lab.report_env import environment
from longrun.paths import cache_dir, path_option
from scripts.demo import write_text
from scripts.server_process import server

QUESTION = "What is a lambda expression?"


def swaps(kv: str, text: str, rounds: int) -> dict[str, Any]:
    """Put a large and a small document, then ask them in turn."""
    with (
        tempfile.TemporaryDirectory(prefix="longrun-swap-") as folder,
        httpx.Client(timeout=3600) as client,
        server("--ctx", "8K", "--kv", kv, "--documents", folder) as served,
    ):
        sizes = {}
        for name, content in (("large", text), ("small", text[: len(text) // 20])):
            _put(client, f"{served.root}/documents/{name}", content)
            files = (Path(folder) / name / "session").rglob("*")
            sizes[name] = sum(file.stat().st_size for file in files if file.is_file())
        model = client.get(f"{served.root}/v1/models").json()["data"][0]["id"]
        found = []
        for name in ("large", "small") * rounds:
            answer = client.post(
                f"{served.root}/v1/chat/completions",
                json={"model": f"{model}@{name}", "max_tokens": 1,
                      "messages": [{"role": "user", "content": QUESTION}]},
            ).raise_for_status().json()  # fmt: skip
            loading = client.get(f"{served.root}/status").json()["last"]["loading"]
            read = answer["usage"]["prompt_tokens"] - answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            found.append({"document": name, "session_bytes": sizes[name], "tokens": loading["tokens"],
                          "load_s": loading["seconds"], "tokens_read": read})  # fmt: skip
        return {"kv": kv, "swaps": found}


def _put(client: httpx.Client, address: str, content: str) -> None:
    client.put(address, content=content.encode(), headers={"Content-Type": "text/plain"}).raise_for_status()
    while (told := client.get(address).raise_for_status().json())["state"] != "ready":
        if told["state"] == "failed":
            raise InputError(f"the document could not be read: {told['error']}")
        time.sleep(0.2)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = Parser(prog="python scripts/bench/bench_swap.py", description=__doc__.split("\n")[0])
    parser.add_argument("--kv", nargs="+", default=["k5v3", "fp32"], metavar="FORMAT", help="default: k5v3 fp32")
    parser.add_argument("--json", type=path_option, help="write the result here as well")
    args = parser.parse_args(argv)
    text = write_text(cache_dir() / "demo").read_text(encoding="utf-8").strip()
    formats = [swaps(kv, text, 3) for kv in args.kv]
    line = json.dumps({"benchmark": "swap", "formats": formats, "environment": environment()})
    if args.json:
        args.json.write_text(line)
    print(line)


if __name__ == "__main__":
    run(main)
