#!/usr/bin/env python
"""Quality compared with full attention, `scripts/quality/compare.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longrun.cli import run
from scripts.quality.compare import main

if __name__ == "__main__":
    run(main)
