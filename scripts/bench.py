#!/usr/bin/env python
"""Speed and memory: `python scripts/bench.py --help` lists the commands, which stand in scripts/bench/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longrun.cli import run
from scripts.bench.command import main

if __name__ == "__main__":
    run(main)
