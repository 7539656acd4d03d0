"""Rows that several programs share: whether, how many, and what passes between the kernels.

One program a row is one launch, and reads a row again from wherever it is by then. Several a row need a kernel a sweep,
for a program knows the statistics of its own columns only: it leaves them in device memory, and every program of the
next kernel merges all of its row's, in one order, so that all of them have the same bits.

Where processes share the vocabulary, a row's programs are those of all processes, which exchange what theirs have left.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastkd.call.contract import Shard

from .sweeps import Partial

# What a program leaves of its share of a row: a Partial but for its last field, and the label's logit (the gradient may
# by then have overwritten it); where processes share the vocabulary also what its spread is relative to, and its number
# of columns.
SPREAD = Partial._fields.index("spread")
LABEL = len(Partial._fields) - 1
PIVOT, COLUMNS = LABEL + 1, LABEL + 2
FIELDS = LABEL + 3
# And where the label's token is compared apart from the others: that last field, and the teacher's logit of the label.
APART_FIELDS = 2

# Lanes that merge a row's shares: the largest number of programs a row, whatever it is in a call. Only where more
# processes than these share a vocabulary are there more.
LANES = 64


class Device(NamedTuple):
    """What the plan depends on."""

    architecture: str  # as Triton's targets have it: "sm_90", "gfx942"
    multiprocessors: int
    l2: int  # bytes
    clusters: bool  # sm_90 and later


class Plan(NamedTuple):
    """How programs share rows."""

    programs: int  # a row
    group: int  # rows that all the kernels go over before the next group's do


# Of the rows of a group, both sides. L2 is written to as well, and on an A100 half of it is the farther one.
GROUP_BYTES = 20 << 20
# The least that a group may have. Below, its kernels are done before the host has launched the next ones.
LEAST_GROUP_BYTES = 16 << 20
# Programs of 8 warps that a multiprocessor holds at 64 registers a thread.
OCCUPANCY = 4
# The least that a row's two sides have where it is worth a launch more.
WIDE = 256 << 10


def plan(rows: int, row_bytes: int, sweeps: int, device: Device | None) -> Plan | None:
    """How to share rows of row_bytes on both sides, which are read `sweeps` times; None for a program a row.

    The figures are a model's; none has been timed.

    Few rows. A program has a tile of each side in flight, 16 KB or so, and waits 0.7 us for it: some 20 GB/s, or 26
    us a sweep over 128,256 columns in bfloat16. With fewer rows than multiprocessors those are idle meanwhile, so
    each row is given as many programs as fill the device, which take a few us. Each sweep then has a launch of its
    own: a few us more where the host is ahead of the device, 50 us more where the device waits for it
    (bench/studies/host.py, two cores of a shared machine). WIDE is between: two sweeps over such a row take
    one program 26 us.

    Groups. With b the bytes of one side, a row a program moves 5 b (7 b without a closed form) where row pairs in
    flight, two a multiprocessor, are more than L2 keeps; narrower rows are in L2 for the second sweep anyway. A group
    whose pairs L2 keeps moves 3 b. It costs two launches (three), past the first group's of some 10 us each: Triton
    spends 5 us on one (`rows._launch_shares`), and the rest is a guess at the driver's. A group of 20 MB then pays
    with an A100, whose 1.5 to 2 TB/s take 15 to 20 us for its 3 b and 25 to 33 us for 5 b, and the more the slower
    the memory is beside L2: 100 us against 167 us at 300 GB/s of an L4. A group of the 2 to 4 MB of an L2 of 4 to 8
    MB (sm_86, AMD) would be done in 3 to 8 us, before the next one is launched. From sm_90 on, `backend="cuda"` reads
    every logit once and needs no group.
    """
    if device is None or not rows:
        return None
    group = rows
    budget = min(device.l2 // 2, GROUP_BYTES)
    in_flight = 2 * device.multiprocessors * row_bytes
    grouped = not device.clusters and sweeps > 1 and LEAST_GROUP_BYTES <= budget < in_flight
    if grouped and row_bytes <= budget:
        groups = -(-rows // (budget // row_bytes))
        group = -(-rows // groups)
    few = rows < device.multiprocessors and row_bytes >= WIDE
    if group == rows and not few:
        return None
    programs = OCCUPANCY * device.multiprocessors // group
    return Plan(min(max(programs, 1), LANES), group)


# Programs that fill a device, and the least columns that one has, where processes share the vocabulary.
FILL = 512
LEAST_COLUMNS = 2048


def shard_plan(rows: int, shard: Shard) -> Plan:
    """As `plan`, for a process's columns of a vocabulary that several share: a sweep has a launch of its own anyway.

    All processes exchange what as many programs leave, so the plan is one of what all of them know. Like figures of
    the other, these have not been timed.
    """
    processes = -(-shard.total // max(shard.widest, 1))  # or more, where their columns are uneven
    widest = -(-shard.widest // LEAST_COLUMNS)
    programs = min(FILL // max(rows, 1), widest, LANES // max(processes, 1))
    return Plan(max(programs, 1), rows)


@functools.cache
def device_of(device: torch.device) -> Device | None:
    """What the plan and the tiles depend on; None for the interpreter, and where torch does not say it."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        architecture, clusters = found.gcnArchName.partition(":")[0], False
    else:
        architecture, clusters = f"sm_{found.major}{found.minor}", found.major >= 9
    return Device(architecture, found.multi_processor_count, found.L2_cache_size, clusters)


@triton.jit
def _leave(split, row, field, value, FIELDS: tl.constexpr = FIELDS):
    """Leave a number of this program's share of a row."""
    place = (row.to(tl.int64) * FIELDS + field) * split.programs
    tl.store(split.statistics + place + tl.program_id(1), value)


@triton.jit
def leave_statistics(split, row, part, z_label, LABEL: tl.constexpr = LABEL):
    """Leave a Partial, and the label's logit."""
    _leave(split, row, LABEL, z_label)
    for field in tl.static_range(LABEL):
        _leave(split, row, field, part[field])


@triton.jit
def leave_apart(split, row, part, t_label, APART_FIELDS: tl.constexpr = APART_FIELDS):
    """Leave what is asked for where the label's token is compared apart from the others."""
    place = split.apart + row.to(tl.int64) * APART_FIELDS * split.programs + tl.program_id(1)
    tl.store(place, part.t_plain_sum)
    tl.store(place + split.programs, t_label)


@triton.jit
def leave_pivot(
    split, row, pivot, columns, PIVOT: tl.constexpr = PIVOT, COLUMNS: tl.constexpr = COLUMNS
):
    """Leave what the spread of a Partial is relative to, and the number of its terms."""
    _leave(split, row, PIVOT, pivot)
    _leave(split, row, COLUMNS, columns)


@triton.jit
def leave_sums(split, row, phi, g):
    """Leave the sums of phi and g."""
    place = split.sums + row.to(tl.int64) * 2 * split.programs + tl.program_id(1)
    tl.store(place, phi)
    tl.store(place + split.programs, g)


@triton.jit
def _lanes(fields, field, split, nothing, LANES: tl.constexpr):
    """A field of all of a row's shares, which lie side by side; its number is an int64."""
    lanes = tl.arange(0, LANES)
    place = fields + field * split.shares + lanes
    return tl.load(place, mask=lanes < split.shares, other=nothing)


@triton.jit
def _left(split, row, field, nothing, LANES: tl.constexpr, FIELDS: tl.constexpr = FIELDS):
    return _lanes(split.statistics, row.to(tl.int64) * FIELDS + field, split, nothing, LANES)


@triton.jit
def left_label(split, row, LANES: tl.constexpr, LABEL: tl.constexpr = LABEL):
    """The label's logit, which is -inf where another process has it."""
    return tl.max(_left(split, row, LABEL, -float("inf"), LANES), 0)


@triton.jit
def _left_plain_sum(split, row, LANES: tl.constexpr, APART_FIELDS: tl.constexpr = APART_FIELDS):
    plain_sum = tl.zeros([LANES], tl.float32)
    if split.apart is not None:
        field = row.to(tl.int64) * APART_FIELDS
        plain_sum = _lanes(split.apart, field, split, 0.0, LANES)
    return plain_sum


@triton.jit
def left_t_label(split, row, LANES: tl.constexpr, APART_FIELDS: tl.constexpr = APART_FIELDS):
    """As left_label, of the teacher."""
    field = row.to(tl.int64) * APART_FIELDS + 1
    return tl.max(_lanes(split.apart, field, split, -float("inf"), LANES), 0)


@triton.jit
def left_spread(
    split,
    row,
    pivot,
    LANES: tl.constexpr,
    SPREAD: tl.constexpr = SPREAD,
    PIVOT: tl.constexpr = PIVOT,
    COLUMNS: tl.constexpr = COLUMNS,
):
    """The sum of z - pivot over a row, of shares with a pivot each."""
    spread = _left(split, row, SPREAD, 0.0, LANES)
    rise = _left(split, row, PIVOT, 0.0, LANES) - pivot
    return tl.sum(spread + rise * _left(split, row, COLUMNS, 0.0, LANES), 0)


@triton.jit
def left_sums(split, row, LANES: tl.constexpr):
    """(sum phi, sum g) over a row."""
    field = row.to(tl.int64) * 2
    phi = _lanes(split.sums, field, split, 0.0, LANES)
    g = _lanes(split.sums, field + 1, split, 0.0, LANES)
    return tl.sum(phi, 0), tl.sum(g, 0)


@triton.jit
def left_statistics(split, row, LANES: tl.constexpr):
    """A Partial of lanes, one a share of the row."""
    lowest: tl.constexpr = -float("inf")
    return Partial(
        _left(split, row, 0, lowest, LANES),
        _left(split, row, 1, lowest, LANES),
        _left(split, row, 2, 0.0, LANES),
        _left(split, row, 3, 0.0, LANES),
        _left(split, row, 4, 0.0, LANES),
        _left(split, row, 5, 0.0, LANES),
        _left(split, row, 6, 0.0, LANES),
        _left(split, row, 7, 0.0, LANES),
        _left(split, row, 8, 0.0, LANES),
        _left(split, row, 9, lowest, LANES),
        _left(split, row, 10, lowest, LANES),
        _left(split, row, 11, -1.0, LANES),
        _left(split, row, 12, lowest, LANES),
        _left(split, row, 13, -1.0, LANES),
        _left(split, row, 14, lowest, LANES),
        _left_plain_sum(split, row, LANES),
    )
