"""Tiles of rows that have one program, as bench/studies/tune.py has timed them.

It writes this file, an architecture at a time.

No entry has been timed yet: every tile is that of the rule in `rows.tile`.
"""

from __future__ import annotations

# (architecture, bytes of a logit, whether the divergence has a closed form, columns rounded up to a power of 2)
# to (BLOCK_V, num_warps)
TILES: dict[tuple[str, int, bool, int], tuple[int, int]] = {}
