#!/usr/bin/env python
"""Logits compared with those of transformers, `scripts/quality/compare_logits.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longrun.cli import run
from scripts.quality.compare_logits import main

if __name__ == "__main__":
    run(main)
