"""Timed tiles of rows with one program each. bench/studies/tune.py writes this file, one architecture at a time.

No entry has been timed yet, so every tile comes from the rule in `launch.tile`.
"""

from __future__ import annotations

# The keys are (architecture, bytes of a logit, whether the divergence has a closed form, columns rounded up to a power
# of 2), the values (BLOCK_V, num_warps).
TILES: dict[tuple[str, int, bool, int], tuple[int, int]] = {}
