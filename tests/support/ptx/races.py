"""Which accesses to shared memory are ordered: vector clocks of warps, and the last accesses to every half-word.

Each warp has a time, which goes up with every release. `seen[w, v]` is the time up to which accesses of warp v come
before what warp w does now. A barrier takes the maximum over the warps that meet. Each mbarrier has a column too, whose
time is its number of completed phases; the writes of bulk copies carry it. Lanes of one warp count as ordered.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from support.ptx.faults import Fault

CELL = 2  # bytes: the smallest access that is told apart


class Clocks:
    """What each warp knows of the others' accesses.

    `fenced[w, v]` is what warp w knows of accesses of v that v has ordered before later bulk copies by a proxy fence.
    """

    def __init__(self, warps: int) -> None:
        self.warps = warps
        self.reset()

    def reset(self) -> None:
        self.seen = np.zeros((self.warps, self.warps), np.int32)
        self.fenced = np.zeros((self.warps, self.warps), np.int32)
        np.fill_diagonal(self.seen, 1)

    def add_column(self) -> int:
        """The number of a new column, for an mbarrier."""
        column = np.zeros((self.warps, 1), np.int32)
        self.seen = np.concatenate([self.seen, column], 1)
        return self.seen.shape[1] - 1

    def time(self, warps: Any) -> Any:
        return self.seen[warps, warps]

    def advance(self, warps: Any) -> None:
        """After a release: later accesses of these warps are not part of it."""
        self.seen[warps, warps] += 1

    def fence(self, warps: Any) -> None:
        """Order the warps' accesses so far before bulk copies that start after a barrier."""
        self.fenced[warps, warps] = self.seen[warps, warps]
        self.advance(warps)

    def released(self, warps: Any) -> tuple[Any, Any]:
        """What these warps make known to whoever acquires it."""
        known = self.seen[warps].max(0), self.fenced[warps].max(0)
        self.advance(warps)
        return known

    def acquire(self, warps: Any, known: tuple[Any, Any]) -> None:
        seen, fenced = known
        own = self.seen[warps, warps]
        columns = len(seen)  # mbarriers may have been added since
        self.seen[warps, :columns] = np.maximum(self.seen[warps, :columns], seen)
        self.seen[warps, warps] = own
        self.fenced[warps] = np.maximum(self.fenced[warps], fenced)

    def meet(self, warps: Any) -> None:
        """A barrier of these warps."""
        self.acquire(warps, self.released(warps))


def _by_cell(of_elements: Any, cells: int) -> Any:
    """Properties of elements [threads, elements] as those of cells: of what a cell has, all."""
    threads, elements = of_elements.shape
    if elements > cells:
        return of_elements.reshape(threads, cells, -1).all(2)
    return np.repeat(of_elements, cells // elements, 1)


class SharedRaces:
    """The last accesses to each cell of a cluster's shared memory, and whether later ones are ordered after them.

    Without `strict`, a word that a thread reads for one of its halves is no race with the other half's owner: code may
    read whole words at the edge of its elements and drop what is a neighbour's.
    """

    def __init__(self, warps: int, ranks: int, strict: bool) -> None:
        self.clocks = Clocks(warps)
        self._per_block = warps // ranks
        self._strict = strict

    def reset(self, size: int, room: int) -> None:
        cells = size // CELL
        self._room = room // CELL
        self.clocks.reset()
        self._writer = np.zeros(cells, np.int32)
        self._written = np.zeros(
            cells, np.int32
        )  # the time of that; 0: never, which precedes everything
        self._atomic = np.zeros(cells, np.bool_)
        self._read = np.zeros((cells, self._per_block), np.int32)
        self._read_in_words = np.zeros((cells, self._per_block), np.int32)
        self._arriving = np.zeros(cells, np.bool_)  # a bulk copy is under way

    def check(self, places: Any, access: Any, unchanged: Any = None) -> None:
        """Raise Fault if an access at these bytes races with an earlier one; note it.

        `unchanged` says which elements a store leaves as they are: warps may write one value to one place without a
        barrier, as Triton's do where several hold the same element.
        """
        cells = (places // CELL)[:, None] + np.arange((access.size * access.count + 1) // CELL)
        warps = access.threads // 32
        if self._arriving[cells].any():
            raise Fault("access to shared memory that a bulk copy is writing")
        self._after_writes(cells, warps, access, unchanged)
        if access.writes:
            self._after_reads(cells, warps, access)
            self._note_write(cells, warps, access)
        else:
            reads = self._read_in_words if access.size >= 4 and not self._strict else self._read
            local = (warps % self._per_block)[:, None]
            reads[cells, local] = self.clocks.time(warps)[:, None]

    def observe(self, places: Any, access: Any) -> None:
        """Raise Fault if these bytes may not have their last value yet; used for mbarriers, which order themselves."""
        cells = (places // CELL)[:, None] + np.arange(access.size // CELL)
        self._after_writes(cells, access.threads // 32, access, None)

    def _after_writes(self, cells: Any, warps: Any, access: Any, unchanged: Any) -> None:
        ordered = self._written[cells] <= self.clocks.seen[warps[:, None], self._writer[cells]]
        if unchanged is not None:
            ordered |= _by_cell(unchanged, cells.shape[1])
        if access.atomic:
            ordered |= self._atomic[cells]
        if ordered.all():
            return
        if not self._strict and not access.writes and access.size >= 4:
            halves = ordered.reshape(len(cells), -1, 2)
            if halves.any(2).all():
                return
        lane, cell = np.argwhere(~ordered)[0]
        writer = self._writer[cells[lane, cell]]
        if writer >= self.clocks.warps:
            raise Fault("a bulk copy is used by a thread that has not waited for it")
        verb = "writes" if access.writes else "reads"
        raise Fault(
            f"race in shared memory: thread {access.threads[lane]} {verb} what warp {writer} wrote, "
            "without a barrier in between"
        )

    def _columns(self, cells: Any) -> Any:
        """The warps of the block that a cell belongs to."""
        return (cells // self._room * self._per_block)[..., None] + np.arange(self._per_block)

    def _after_reads(self, cells: Any, warps: Any, access: Any) -> None:
        seen = self.clocks.seen[warps[:, None, None], self._columns(cells)]
        ordered = self._read[cells] <= seen
        if access.size >= 4 or self._strict:
            ordered &= self._read_in_words[cells] <= seen
        if not ordered.all():
            lane = np.argwhere(~ordered)[0][0]
            raise Fault(
                f"race in shared memory: thread {access.threads[lane]} writes what another warp has read, "
                "without a barrier in between"
            )

    def _note_write(self, cells: Any, warps: Any, access: Any) -> None:
        owners = warps[:, None]
        self._writer[cells] = owners
        self._written[cells] = self.clocks.time(warps)[:, None]
        self._atomic[cells] = access.atomic
        self._read[cells] = 0
        self._read_in_words[cells] = 0

    def start_copy(self, place: int, size: int, warp: int) -> None:
        """A bulk copy to these bytes: every access to them must be fenced and known to the warp that asks for it."""
        cells = np.arange(place // CELL, (place + size) // CELL)
        if self._arriving[cells].any():
            raise Fault("two bulk copies to one place at once")
        seen, fenced = self.clocks.seen[warp], self.clocks.fenced[warp]
        writer = self._writer[cells]
        by_threads = writer < self.clocks.warps
        known = np.where(by_threads, fenced[np.where(by_threads, writer, 0)], seen[writer])
        reads = np.maximum(self._read[cells], self._read_in_words[cells])
        if (self._written[cells] > known).any() or (reads > fenced[self._columns(cells)]).any():
            raise Fault(
                "a bulk copy replaces what threads have used since their last proxy fence and barrier"
            )
        self._arriving[cells] = True

    def land_copy(self, place: int, size: int, column: int, phase: int) -> None:
        cells = slice(place // CELL, (place + size) // CELL)
        self._arriving[cells] = False
        self._writer[cells] = column
        self._written[cells] = phase
        self._atomic[cells] = False
        self._read[cells] = 0
        self._read_in_words[cells] = 0
