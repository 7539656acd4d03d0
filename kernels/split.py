"""Rows that several programs share: whether, how many, and what passes between the kernels.

One program a row is one launch, and reads a row again from wherever it is by then. Several a row need a kernel a sweep,
for a program knows the statistics of its own columns only: it leaves them in device memory, and every program of the
next kernel merges all of its row's, in one order, so that all of them have the same bits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .sweeps import Partial

# What a program leaves of its share of a row: a Partial, the label's logit (the gradient may by then have overwritten
# it), and the sums of phi and g.
LABEL = len(Partial._fields)
FIELDS = LABEL + 3

# Lanes that merge a row's shares: the largest number of programs a row, whatever it is in a call.
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
    own: a few us more where the host is ahead of the device, 50 us more where the device waits for it (bench/host.py,
    two cores of a shared machine). WIDE is between: two sweeps over such a row take one program 26 us.

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
def _place(split, row, field, FIELDS: tl.constexpr = FIELDS):
    """Where the shares of a row have a field, side by side."""
    return split.partials + (row.to(tl.int64) * FIELDS + field) * split.count


@triton.jit
def _leave(split, row, field, value):
    """Leave a number of this program's share of a row."""
    tl.store(_place(split, row, field) + tl.program_id(1), value)


@triton.jit
def leave_statistics(split, row, part, z_label, LABEL: tl.constexpr = LABEL):
    """Leave a Partial, and the label's logit."""
    _leave(split, row, LABEL, z_label)
    for field in tl.static_range(len(part)):
        _leave(split, row, field, part[field])


@triton.jit
def leave_sums(split, row, phi, g, LABEL: tl.constexpr = LABEL):
    """Leave the sums of phi and g."""
    _leave(split, row, LABEL + 1, phi)
    _leave(split, row, LABEL + 2, g)


@triton.jit
def _lanes(split, row, field, nothing, LANES: tl.constexpr = LANES):
    lanes = tl.arange(0, LANES)
    return tl.load(_place(split, row, field) + lanes, mask=lanes < split.count, other=nothing)


@triton.jit
def left_label(split, row, LABEL: tl.constexpr = LABEL):
    """The label's logit, which every share of a row has."""
    return tl.load(_place(split, row, LABEL))


@triton.jit
def left_sums(split, row, LABEL: tl.constexpr = LABEL):
    """(sum phi, sum g) over a row."""
    phi, g = _lanes(split, row, LABEL + 1, 0.0), _lanes(split, row, LABEL + 2, 0.0)
    return tl.sum(phi, 0), tl.sum(g, 0)


@triton.jit
def left_statistics(split, row):
    """A Partial of lanes, one a share of the row."""
    lowest: tl.constexpr = -float("inf")
    return Partial(
        _lanes(split, row, 0, lowest),
        _lanes(split, row, 1, lowest),
        _lanes(split, row, 2, 0.0),
        _lanes(split, row, 3, 0.0),
        _lanes(split, row, 4, 0.0),
        _lanes(split, row, 5, 0.0),
        _lanes(split, row, 6, 0.0),
        _lanes(split, row, 7, 0.0),
        _lanes(split, row, 8, 0.0),
        _lanes(split, row, 9, lowest),
        _lanes(split, row, 10, lowest),
    )
