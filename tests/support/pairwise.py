"""A selection of the combinations of a test's parameters that has every pair of values of two parameters.

Most faults need one value of one parameter, or two of two, and a test of a full grid runs such a pair many times.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Mapping, Sequence


def pairwise(combinations: Sequence[Mapping[str, Hashable]], each: str | None = None) -> list[bool]:
    """For each combination of parameters, whether it is in the selection.

    Every pair of values that some combination has is in a selected one; with `each`, the name of a parameter, beside
    every value of that parameter. The selection is the same in every run: the next combination is always the first of
    those with the most pairs that no selected one has.
    """
    pairs = []
    for parameters in combinations:
        others = sorted(parameters.keys() - {each})
        values = [(name, parameters[name]) for name in others]
        of_each = parameters.get(each or "")
        few = itertools.combinations(values, min(2, len(values)))
        pairs.append({(of_each, *pair) for pair in few})
    missing = set().union(*pairs)
    selected = [False] * len(pairs)
    # The number of missing pairs of a combination only falls, so the first whose number is still right is the best.
    queue = [(-len(found), place) for place, found in enumerate(pairs)]
    heapq.heapify(queue)
    while missing:
        count, place = heapq.heappop(queue)
        now = len(pairs[place] & missing)
        if now == -count:
            selected[place] = True
            missing -= pairs[place]
        elif now:
            heapq.heappush(queue, (-now, place))
    return selected
