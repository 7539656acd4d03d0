"""What every study shares: it puts bench/ on the path, where who, what and how are measured is."""

from __future__ import annotations

import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCH))
