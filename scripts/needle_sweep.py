#!/usr/bin/env python
"""Needle x depth x length grid, scored by exact match, `scripts/quality/needle_sweep.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longrun.cli import run
from scripts.quality.needle_sweep import main

if __name__ == "__main__":
    run(main)
