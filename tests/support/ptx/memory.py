"""The memories of a device: bounds, alignment, and elements that several clusters touch.

Device memory is the process's own, at the same addresses, but only the tensors that a launch was given. The other
memories have windows of addresses above it.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

from support.ptx.faults import Fault
from support.ptx.numbers import UNSIGNED
from support.ptx.races import SharedRaces

GLOBAL, SHARED, PARAM, LOCAL = range(4)  # the window of an address: its bits from WINDOW on
WINDOW = 48
RANK = (
    24  # in an address of shared memory, the bits from here on are the block's rank in its cluster
)
FIRST = 1024  # the first address in shared memory that a program may use, so that no valid address is small
SPACES = {"global": GLOBAL, "shared": SHARED, "param": PARAM, "local": LOCAL, "const": PARAM}
WATCHED = (
    1 << 26
)  # bytes of the largest tensor whose elements are watched for access by several clusters


class Access(NamedTuple):
    """An access of some threads: `count` consecutive elements of `size` bytes per thread, [threads] addresses."""

    addresses: Any
    size: int
    count: int
    threads: Any
    writes: bool
    atomic: bool = False


def _check_alignment(access: Access) -> None:
    wrong = access.addresses & np.uint64(access.size * access.count - 1)
    if wrong.any():
        address = int(access.addresses[np.flatnonzero(wrong)[0]])
        raise Fault(f"misaligned access of {access.size * access.count} bytes at {address:#x}")


class Tensors:
    """Device memory: the tensors of a launch, by their addresses."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        ranges = sorted({(address, size) for address, size in ranges if size})
        self._first = np.array([address for address, _ in ranges], np.uint64)
        self._end = np.array([address + size for address, size in ranges], np.uint64)
        self._views = [self._view(address, size) for address, size in ranges]
        self._touched = [_Touched(size) if size <= WATCHED else None for _, size in ranges]

    @staticmethod
    def _view(address: int, size: int) -> tuple[int, dict[int, Any]]:
        start = address & ~15  # NumPy's views of wider elements begin at a multiple of their size
        whole = (ctypes.c_uint8 * (address - start + size + 15 & ~15)).from_address(start)
        octets = np.frombuffer(whole, np.uint8)
        return start, {size: octets.view(kind) for size, kind in UNSIGNED.items()}

    def _tensor_of(self, addresses: Any, size: int) -> Any:
        numbers = np.searchsorted(self._first, addresses, "right") - 1
        outside = numbers < 0
        if len(self._end):
            outside |= addresses + np.uint64(size) > self._end[numbers]
        if outside.any():
            address = int(addresses[np.flatnonzero(outside)[0]])
            raise Fault(f"access of {size} bytes outside all tensors, at {address:#x}")
        return numbers

    def _parts(self, access: Access, cluster: int) -> Any:
        """Per tensor: (elements of a view, their places [threads, count], which threads)."""
        numbers = self._tensor_of(access.addresses, access.size * access.count)
        for number in [numbers[0]] if (numbers == numbers[0]).all() else np.unique(numbers):
            who = numbers == number
            start, views = self._views[number]
            bytes_in = (access.addresses[who] - np.uint64(start)).astype(np.int64)
            places = (bytes_in // access.size)[:, None] + np.arange(access.count)
            touched = self._touched[number]
            if touched is not None and not access.atomic:
                offset = int(self._first[number]) - start
                touched.see(bytes_in - offset, access.size * access.count, cluster, access.writes)
            yield views[access.size], places, who

    def load(self, access: Access, cluster: int) -> Any:
        values = np.empty((len(access.addresses), access.count), UNSIGNED[access.size])
        for elements, places, who in self._parts(access, cluster):
            values[who] = elements[places]
        return values

    def store(self, access: Access, values: Any, cluster: int) -> None:
        for elements, places, who in self._parts(access, cluster):
            elements[places] = values[who]
            _check_agreement(elements[places], values[who])

    def bytes_at(self, address: int, size: int, cluster: int) -> Any:
        """The bytes of a tensor that a bulk copy reads."""
        one = Access(np.array([address], np.uint64), size, 1, np.array([0]), False)
        number = self._tensor_of(one.addresses, size)[0]
        touched = self._touched[number]
        if touched is not None:
            inside = np.array([address - int(self._first[number])])
            touched.see(inside, size, cluster, False)
        start, views = self._views[number]
        return views[1][address - start : address - start + size]


def _check_agreement(stored: Any, values: Any) -> None:
    if not np.array_equal(stored, values):
        raise Fault("two threads write different values to one place at once")


class _Touched:
    """Which cluster of a launch wrote and read each place of a tensor: clusters run in no particular order.

    A place is a half-word, or a byte once a thread has accessed a single byte.
    """

    SEVERAL = -2

    def __init__(self, size: int) -> None:
        self._bytes = 2
        self._writer = np.full(size // 2 + 1, -1, np.int32)
        self._reader = np.full(size // 2 + 1, -1, np.int32)

    def see(self, places: Any, size: int, cluster: int, writes: bool) -> None:
        if size < self._bytes:
            self._bytes = 1
            self._writer, self._reader = np.repeat(self._writer, 2), np.repeat(self._reader, 2)
        cells = (places // self._bytes)[:, None] + np.arange(-(-size // self._bytes))
        others = [self._writer[cells]]
        if writes:
            others.append(self._reader[cells])
            self._writer[cells] = cluster
        else:
            readers = self._reader[cells]
            alone = (readers == -1) | (readers == cluster)
            self._reader[cells] = np.where(alone, cluster, self.SEVERAL)
        for other in others:
            if ((other != -1) & (other != cluster)).any():
                raise Fault(
                    "two programs of a launch touch one element of a tensor, and one of them writes it"
                )


class Memory:
    """All memories that a cluster's threads reach."""

    def __init__(
        self, threads: int, ranks: int, shared: int, local: int, races: SharedRaces
    ) -> None:
        self._races = races
        self._room = shared + 127 & ~127
        self._end = shared
        self._ranks = ranks
        self._shared_bytes = np.zeros(self._room * ranks, np.uint8)
        self._param_bytes = np.zeros(1 << 13, np.uint8)
        self._local_bytes = np.zeros((threads, local + 15 & ~15), np.uint8)
        self._shared = {size: self._shared_bytes.view(kind) for size, kind in UNSIGNED.items()}
        self._rank_of = np.arange(threads) // (threads // ranks)
        self.ended = np.zeros(ranks, np.bool_)  # blocks whose threads have all returned
        self.started = False  # whether all blocks of the cluster are known to have started

    def reset(self, tensors: Tensors, cluster: int, parameters: bytes) -> None:
        """Before a cluster runs: undefined shared memory is all ones, NaN in every type."""
        self._tensors, self._cluster = tensors, cluster
        self._shared_bytes[:] = 0xFF
        self._local_bytes[:] = 0xFF
        self._param_bytes[: len(parameters)] = np.frombuffer(parameters, np.uint8)
        self.ended[:] = False
        self.started = False

    def load(self, access: Access) -> Any:
        """Values [threads, count]."""
        _check_alignment(access)
        windows = access.addresses >> np.uint64(WINDOW)
        if (windows == windows[0]).all():
            return self._load_from(int(windows[0]), access)
        values = np.empty((len(windows), access.count), UNSIGNED[access.size])
        for window in np.unique(windows):
            who = windows == window
            part = access._replace(addresses=access.addresses[who], threads=access.threads[who])
            values[who] = self._load_from(int(window), part)
        return values

    def store(self, access: Access, values: Any) -> None:
        """Store values [threads, count]."""
        _check_alignment(access)
        windows = access.addresses >> np.uint64(WINDOW)
        for window in np.unique(windows):
            who = windows == window
            part = access._replace(addresses=access.addresses[who], threads=access.threads[who])
            self._store_to(int(window), part, values[who])

    def _load_from(self, window: int, access: Access) -> Any:
        if window == GLOBAL:
            return self._tensors.load(access, self._cluster)
        if window == SHARED:
            places = self.shared_place(access)
            self._races.check(places, access)
            return self._shared[access.size][
                places[:, None] // access.size + np.arange(access.count)
            ]
        elements, rows, places = self._private(window, access)
        return elements[rows, places]

    def _store_to(self, window: int, access: Access, values: Any) -> None:
        if window == GLOBAL:
            self._tensors.store(access, values, self._cluster)
        elif window == SHARED:
            places = self.shared_place(access)
            where = places[:, None] // access.size + np.arange(access.count)
            self._races.check(places, access, self._shared[access.size][where] == values)
            self._shared[access.size][where] = values
            _check_agreement(self._shared[access.size][where], values)
        elif window == LOCAL:
            elements, rows, places = self._private(window, access)
            elements[rows, places] = values
        else:
            raise Fault("a store to the parameters of a kernel")

    def _private(self, window: int, access: Access) -> tuple[Any, Any, Any]:
        """Parameters, or local memory: (elements, rows, places)."""
        octets = self._local_bytes if window == LOCAL else self._param_bytes[None]
        offsets = (access.addresses & np.uint64((1 << WINDOW) - 1)).astype(np.int64)
        if (offsets + access.size * access.count > octets.shape[1]).any():
            raise Fault("access outside the parameters or local memory of a kernel")
        rows = access.threads[:, None] if window == LOCAL else 0
        places = (offsets // access.size)[:, None] + np.arange(access.count)
        return octets.view(UNSIGNED[access.size]), rows, places

    def shared_place(self, access: Access) -> Any:
        """Places in the array of all blocks' shared memory, in bytes."""
        offsets = access.addresses & np.uint64((1 << RANK) - 1)
        ranks = (access.addresses >> np.uint64(RANK)) & np.uint64((1 << WINDOW - RANK) - 1)
        size = access.size * access.count
        outside = (offsets < FIRST) | (offsets + np.uint64(size) > self._end)
        if (outside | (ranks >= self._ranks)).any():
            raise Fault(
                f"access of {size} bytes outside shared memory, which ends at {self._end:#x}"
            )
        ranks = ranks.astype(np.int64)
        remote = ranks != self._rank_of[access.threads]
        if remote.any():
            self._check_remote(ranks[remote], access.writes)
        return ranks * self._room + offsets.astype(np.int64)

    def _check_remote(self, ranks: Any, writes: bool) -> None:
        if not writes:
            raise Fault("a load from another block's shared memory, which is not implemented")
        if not self.started:
            raise Fault(
                "access to another block's shared memory before it is known to have started"
            )
        if self.ended[ranks].any():
            raise Fault("access to the shared memory of a block that has ended")

    @property
    def shared_size(self) -> int:
        """Bytes of all blocks' shared memory."""
        return len(self._shared_bytes)

    def read_for_copy(self, address: int, size: int) -> Any:
        """The bytes of device memory that a bulk copy takes."""
        return self._tensors.bytes_at(address, size, self._cluster)

    def land(self, place: int, values: Any) -> None:
        """What a bulk copy brings to shared memory."""
        self._shared_bytes[place : place + len(values)] = values
