"""What threads wait for: barriers of a block and of a cluster, mbarriers, and bulk copies.

A thread that has to wait gets a state other than RUNS; what it waits for sets it back.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from support.ptx.faults import Fault
from support.ptx.memory import Access, Memory
from support.ptx.races import SharedRaces

RUNS, PARKED, AT_BLOCK, AT_CLUSTER, AT_MBARRIER, DONE = range(6)
STATES = ("runs", "waits for its warp", "bar.sync", "barrier.cluster", "mbarrier", "has returned")
PIECE = 16  # bytes that a bulk copy moves at once
MOST_BYTES = (1 << 20) - 1  # of the bytes that an mbarrier can count


@dataclass
class MBarrier:
    """An mbarrier: arrivals and bytes that are missing from the current phase."""

    count: int
    column: int  # in the clocks
    owner: int  # the warp that initialized it
    fenced: bool = False  # whether that warp has made the initialization known to bulk copies
    pending: int = 0
    bytes: int = 0
    phase: int = 0  # completed phases
    known: tuple[Any, Any] | None = None  # what the arrivals of the current phase release
    released: list[tuple[Any, Any] | None] = field(default_factory=list)  # by phase


@dataclass
class Copy:
    """A bulk copy that is under way."""

    place: int
    source: int
    size: int
    barrier: int


class Barriers:
    """The barriers of a cluster of blocks, and the states of its threads."""

    def __init__(
        self, threads: int, ranks: int, memory: Memory, races: SharedRaces, lot: random.Random
    ) -> None:
        self._memory, self._races, self._clocks, self._lot = memory, races, races.clocks, lot
        self._rank_of = np.arange(threads) // (threads // ranks)
        self._ranks = ranks
        self.state = np.zeros(threads, np.int8)
        self._waits_for = np.zeros(
            threads, np.int64
        )  # number of a block's barrier, or place of an mbarrier
        self._arrived = np.zeros(threads, np.int64)  # how often at the cluster's barrier
        self._passed = np.zeros(threads, np.int64)

    def reset(self) -> None:
        for array in (self.state, self._waits_for, self._arrived, self._passed):
            array[:] = 0
        self._generation = 0
        self._gathering: tuple[Any, Any] | None = None
        self._gathered: tuple[Any, Any] | None = None
        self._mbarriers: dict[int, MBarrier] = {}
        self.copies: list[Copy] = []

    # Blocks

    def sync_block(self, threads: Any, number: int, count: int | None) -> None:
        """bar.sync: wait until all threads of the block, or `count` of them, have come."""
        self.state[threads] = AT_BLOCK
        self._waits_for[threads] = number
        for rank in np.unique(self._rank_of[threads]):
            self._complete_block(rank, number, count)

    def _complete_block(self, rank: int, number: int, count: int | None = None) -> None:
        block = np.flatnonzero(self._rank_of == rank)
        waiting = block[(self.state[block] == AT_BLOCK) & (self._waits_for[block] == number)]
        needed = count or (self.state[block] != DONE).sum()
        if len(waiting) > needed:
            raise Fault(f"{len(waiting)} threads at a barrier of {needed}")
        if len(waiting) == needed and needed:
            self.state[waiting] = RUNS
            self._clocks.meet(np.unique(waiting // 32))

    # The cluster

    def arrive_at_cluster(self, threads: Any, releases: bool) -> None:
        if (self._arrived[threads] > self._passed[threads]).any():
            raise Fault("a thread arrives at the cluster's barrier twice without waiting")
        self._arrived[threads] += 1
        if releases:
            known = self._clocks.released(np.unique(threads // 32))
            self._gathering = _union(self._gathering, known)
        self._complete_cluster()

    def _complete_cluster(self) -> None:
        live = self.state != DONE
        if not live.any() or (self._arrived[live] <= self._generation).any():
            return
        self._generation += 1
        self._gathered, self._gathering = self._gathering, None
        self._memory.started = True
        waiting = np.flatnonzero(self.state == AT_CLUSTER)
        self.state[waiting] = RUNS
        self._pass_cluster(waiting)

    def wait_at_cluster(self, threads: Any) -> None:
        if (self._arrived[threads] == self._passed[threads]).any():
            raise Fault("a thread waits at the cluster's barrier without having arrived")
        through = self._arrived[threads] <= self._generation
        self.state[threads[~through]] = AT_CLUSTER
        self._pass_cluster(threads[through])

    def _pass_cluster(self, threads: Any) -> None:
        self._passed[threads] += 1
        if self._gathered is not None and len(threads):
            self._clocks.acquire(np.unique(threads // 32), self._gathered)

    # Returning

    def end(self, threads: Any) -> None:
        """These threads return: barriers no longer wait for them, nor do warps."""
        self.state[threads] = DONE
        for rank in np.unique(self._rank_of[threads]):
            block = self._rank_of == rank
            at_barrier = block & (self.state == AT_BLOCK)
            for number in np.unique(self._waits_for[at_barrier]):
                self._complete_block(rank, number)
            self._memory.ended[rank] = (self.state[block] == DONE).all()
        warps = np.isin(np.arange(len(self.state)) // 32, threads // 32)
        self.state[warps & (self.state == PARKED)] = RUNS
        self._complete_cluster()

    # mbarriers

    def _places(self, address: int, threads: Any) -> tuple[Any, Access]:
        access = Access(np.full(len(threads), address, np.uint64), 8, 1, threads, True)
        if address % 8:
            raise Fault(f"misaligned mbarrier at {address:#x}")
        return self._memory.shared_place(access), access

    def init_mbarrier(self, address: int, thread: int, count: int) -> None:
        places, access = self._places(address, np.array([thread]))
        self._races.check(places, access)
        self._mbarriers[int(places[0])] = MBarrier(
            count, self._clocks.add_column(), thread // 32, pending=count
        )

    def fence_initializations(self, warps: Any) -> None:
        """Make the mbarriers that these warps have initialized known to bulk copies."""
        for barrier in self._mbarriers.values():
            barrier.fenced |= barrier.owner in warps

    def _place(self, address: int, threads: Any) -> int:
        """The place of an mbarrier whose initialization these threads see."""
        places, access = self._places(address, threads)
        self._races.observe(places, access)
        return int(places[0])

    def _mbarrier(self, place: int) -> MBarrier:
        if place not in self._mbarriers:
            raise Fault("an mbarrier is used that was not initialized")
        return self._mbarriers[place]

    def arrive(
        self, address: int, thread: int, announced: int, arrivals: int, releases: bool
    ) -> None:
        """Arrive at an mbarrier, after announcing bytes that copies will bring.

        Without `releases`, the arrival makes nothing known that the thread's warp has written: a lane that arrives
        alone releases its own writes only.
        """
        place = self._place(address, np.array([thread]))
        barrier = self._mbarrier(place)
        if releases:
            known = self._clocks.released(np.array([thread // 32]))
            barrier.known = _union(barrier.known, known)
        barrier.pending -= arrivals
        barrier.bytes += announced
        self._settle(place)

    def _settle(self, place: int) -> None:
        barrier = self._mbarriers[place]
        if barrier.pending < 0:
            raise Fault("more arrivals at an mbarrier than its phase takes")
        if abs(barrier.bytes) > MOST_BYTES:
            raise Fault("more bytes at an mbarrier than it can count")
        if barrier.pending or barrier.bytes:
            return
        barrier.phase += 1
        barrier.pending = barrier.count
        barrier.released.append(barrier.known)
        barrier.known = None
        waiting = (self.state == AT_MBARRIER) & (self._waits_for == place)
        self.state[waiting] = RUNS

    def phase_is_complete(self, addresses: Any, threads: Any, parities: Any) -> Any:
        """Whether the phase of each thread's parity is complete; those threads then see what it brought."""
        complete = np.zeros(len(threads), np.bool_)
        for address in np.unique(addresses):
            same = addresses == address
            place = self._place(int(address), threads[same])
            barrier = self._mbarrier(place)
            self._waits_for[threads[same]] = place
            complete[same] = barrier.phase & 1 != parities[same] & 1
            self._acquire(barrier, np.unique(threads[same & complete] // 32))
        return complete

    def _acquire(self, barrier: MBarrier, warps: Any) -> None:
        self._clocks.seen[warps, barrier.column] = barrier.phase
        known = barrier.released[-1] if barrier.released else None
        if known is not None and len(warps):
            self._clocks.acquire(warps, known)

    def park(self, threads: Any) -> None:
        """Wait for the mbarrier that was asked last."""
        self.state[threads] = AT_MBARRIER

    # Bulk copies

    def start_copy(self, to: int, source: int, size: int, barrier: int, thread: int) -> None:
        if to % PIECE or source % PIECE or size % PIECE or size <= 0:
            raise Fault(
                f"a bulk copy of {size} bytes from {source:#x} to {to:#x}: "
                f"addresses and size must be multiples of {PIECE}"
            )
        access = Access(np.array([to], np.uint64), size, 1, np.array([thread]), True)
        place = int(self._memory.shared_place(access)[0])
        self._races.start_copy(place, size, thread // 32)
        self._memory.read_for_copy(
            source, size
        )  # outside the tensors it faults here, at the instruction
        signal = self._place(barrier, np.array([thread]))
        if not self._mbarrier(signal).fenced:
            raise Fault("a bulk copy signals an mbarrier whose initialization was not fenced")
        self.copies.append(Copy(place, source, size, signal))

    def land_copy(self) -> None:
        """Complete one of the copies that are under way."""
        copy = self.copies.pop(self._lot.randrange(len(self.copies)))
        barrier = self._mbarrier(copy.barrier)
        self._memory.land(copy.place, self._memory.read_for_copy(copy.source, copy.size))
        self._races.land_copy(copy.place, copy.size, barrier.column, barrier.phase + 1)
        barrier.bytes -= copy.size
        self._settle(copy.barrier)


def _union(a: tuple[Any, Any] | None, b: tuple[Any, Any]) -> tuple[Any, Any]:
    """What two releases make known together."""
    if a is None:
        return b
    columns = max(len(a[0]), len(b[0]))
    seen = [np.pad(x, (0, columns - len(x))) for x in (a[0], b[0])]
    return np.maximum(*seen), np.maximum(a[1], b[1])
