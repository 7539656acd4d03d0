"""Rows that several programs share: how many programs, and the partial results that pass between kernels.

With one program per row, one launch does everything. With several, each sweep is a kernel of its own, because a program
knows only the statistics of its own columns. It stores them in device memory as a partial result. Every program of the
next kernel loads all partial results of its row and merges them in the same order, so all programs get the same bits.

If processes share the vocabulary, they exchange their partial results, and each merges those of all processes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastkd.call.contract import Shard

from .sweeps import Partial

# Fields of a stored partial result: a Partial without its last field; the label's z, because the gradient may later
# overwrite the logits; and, used only if processes share the vocabulary, the center of the centered sum and the number
# of columns.
CENTERED_SUM = Partial._fields.index("centered_sum")
LABEL = len(Partial._fields) - 1
CENTER, COLUMNS = LABEL + 1, LABEL + 2
FIELDS = LABEL + 3
# Fields for divergences with a label term: the last field of Partial, and the teacher's z in the label's column.
LABEL_TERM_FIELDS = 2
# Partial sums of a divergence without a closed form: of phi, g and h.
SUMS = 3

# Lanes that merge a row's partial results, and the largest number of programs per row. A kernel has more lanes only if
# more processes than this share the vocabulary.
LANES = 64


class Device(NamedTuple):
    """Properties of a device that the plan depends on."""

    architecture: str  # as in Triton's targets: "sm_90", "gfx942"
    multiprocessors: int
    l2: int  # bytes
    clusters: bool  # sm_90 and later


class Plan(NamedTuple):
    """How programs share rows."""

    num_splits: int  # programs per row
    group: int  # rows that go through all kernels before the next group starts


# Largest size of a group's rows, both sides together. L2 also holds what is written, and each multiprocessor of an A100
# is attached to only one half of it.
GROUP_BYTES = 20 << 20
# Smallest size of a group's rows. The kernels of a smaller group finish before the host has launched the next ones.
LEAST_GROUP_BYTES = 16 << 20
# Programs of 8 warps that a multiprocessor holds at 80 registers per thread (`launch.REGISTERS`).
OCCUPANCY = 3
# Smallest size of a row's two sides that is worth an additional launch.
WIDE = 256 << 10


def plan(rows: int, row_bytes: int, sweeps: int, device: Device | None) -> Plan | None:
    """Choose how programs share rows of row_bytes (both sides) that are read `sweeps` times; None: one program per row.

    The figures come from a model; none has been tuned on a GPU.

    Few rows. A program has one tile of each side in flight, about 8 KB, and waits 0.7 us for it. That is 12 GB/s, or
    44 us per sweep over 128,256 columns in bfloat16. With fewer rows than multiprocessors, the other multiprocessors
    are idle meanwhile. Each row therefore gets enough programs to fill the device; a sweep then takes a few us. Each
    sweep has its own launch, which costs a few us if the host is ahead of the device, and 50 us if the device waits for
    the host (bench/studies/host.py, two cores of a shared machine). WIDE lies between: two sweeps over such a row take
    one program 45 us.

    Groups. Let b be the bytes of one side. One program per row moves 5 b (7 b without a closed form) if the row
    pairs in flight, OCCUPANCY per multiprocessor, exceed L2. Narrower rows are in L2 for the second sweep anyway. A
    group whose row pairs fit into L2 moves 3 b. It costs two more launches (three without a closed form) of about
    10 us each: Python spends a few us on one (`launcher.replay`), and the rest is a guess at the driver's time. A
    group of 20 MB pays off on an A100, which at 1.5 to 2 TB/s needs 15 to 20 us for 3 b and 25 to 33 us for 5 b. It
    saves more if the memory is slower: 67 us of 167 us at the 300 GB/s of an L4. A group of the 2 to 4 MB that fit
    an L2 of 4 to 8 MB (sm_86, AMD) would finish in 3 to 8 us, before the next launch. From sm_90 on,
    `backend="cuda"` reads every logit once and needs no group.
    """
    if device is None or not rows:
        return None
    group = rows
    budget = min(device.l2 // 2, GROUP_BYTES)
    in_flight = OCCUPANCY * device.multiprocessors * row_bytes
    grouped = not device.clusters and sweeps > 1 and LEAST_GROUP_BYTES <= budget < in_flight
    if grouped and row_bytes <= budget:
        groups = -(-rows // (budget // row_bytes))
        group = -(-rows // groups)
    few = rows < device.multiprocessors and row_bytes >= WIDE
    if group == rows and not few:
        return None
    num_splits = OCCUPANCY * device.multiprocessors // group
    return Plan(min(max(num_splits, 1), LANES), group)


# For processes that share the vocabulary: programs that fill a device, and the fewest columns of a program.
FILL = 512
LEAST_COLUMNS = 2048


def shard_plan(rows: int, shard: Shard) -> Plan:
    """Choose how programs share rows if processes share the vocabulary; each sweep then has its own launch anyway.

    Every process must have the same number of programs per row, because they exchange partial results. The choice
    therefore depends only on numbers that all processes know. These figures have not been timed either.
    """
    processes = -(
        -shard.total // max(shard.widest, 1)
    )  # at least; more if their columns are uneven
    most_useful = -(-shard.widest // LEAST_COLUMNS)
    num_splits = min(FILL // max(rows, 1), most_useful, LANES // max(processes, 1))
    return Plan(max(num_splits, 1), rows)


@functools.cache
def device_of(device: torch.device) -> Device | None:
    """Return the properties of a device; None unless it is a CUDA or ROCm GPU, so under the interpreter too."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        architecture, clusters = properties.gcnArchName.partition(":")[0], False
    else:
        architecture, clusters = f"sm_{properties.major}{properties.minor}", properties.major >= 9
    return Device(
        architecture, properties.multi_processor_count, properties.L2_cache_size, clusters
    )


@triton.jit
def _store_field(split, row, field, value, FIELDS: tl.constexpr = FIELDS):
    """Store one number of this program's partial result."""
    offset = (row.to(tl.int64) * FIELDS + field) * split.num_splits
    tl.store(split.statistics + offset + tl.program_id(1), value)


@triton.jit
def store_partial_statistics(split, row, partial, s_label, LABEL: tl.constexpr = LABEL):
    """Store a Partial, and the student's z in the label's column."""
    _store_field(split, row, LABEL, s_label)
    for field in tl.static_range(LABEL):
        _store_field(split, row, field, partial[field])


@triton.jit
def store_partial_label_term(
    split, row, partial, t_label, LABEL_TERM_FIELDS: tl.constexpr = LABEL_TERM_FIELDS
):
    """Store what a label term adds: the teacher's sum at temperature 1, and its z in the label's column."""
    offset = row.to(tl.int64) * LABEL_TERM_FIELDS * split.num_splits + tl.program_id(1)
    pointer = split.label_term + offset
    tl.store(pointer, partial.t_exp_sum_t1)
    tl.store(pointer + split.num_splits, t_label)


@triton.jit
def store_partial_center(
    split,
    row,
    center,
    num_columns,
    CENTER: tl.constexpr = CENTER,
    COLUMNS: tl.constexpr = COLUMNS,
):
    """Store the center of a partial centered sum, and its number of columns."""
    _store_field(split, row, CENTER, center)
    _store_field(split, row, COLUMNS, num_columns)


@triton.jit
def store_partial_sums(split, row, phi, g, h, SUMS: tl.constexpr = SUMS):
    """Store the partial sums of phi, g and h."""
    pointer = split.sums + row.to(tl.int64) * SUMS * split.num_splits + tl.program_id(1)
    tl.store(pointer, phi)
    tl.store(pointer + split.num_splits, g)
    tl.store(pointer + 2 * split.num_splits, h)


@triton.jit
def _load_lanes(pointer, field, split, default, LANES: tl.constexpr):
    """Load one field of all partial results of a row, which are adjacent; `field` is an int64 index over all rows."""
    lanes = tl.arange(0, LANES)
    pointers = pointer + field * split.num_partials + lanes
    return tl.load(pointers, mask=lanes < split.num_partials, other=default)


@triton.jit
def _load_field(split, row, field, default, LANES: tl.constexpr, FIELDS: tl.constexpr = FIELDS):
    index = row.to(tl.int64) * FIELDS + field
    return _load_lanes(split.statistics, index, split, default, LANES)


@triton.jit
def load_s_label(split, row, LANES: tl.constexpr, LABEL: tl.constexpr = LABEL):
    """Return the student's z in the label's column; all partial results but one process's have -inf."""
    return tl.max(_load_field(split, row, LABEL, -float("inf"), LANES), 0)


@triton.jit
def load_t_label(
    split, row, LANES: tl.constexpr, LABEL_TERM_FIELDS: tl.constexpr = LABEL_TERM_FIELDS
):
    """Return the teacher's z in the label's column."""
    index = row.to(tl.int64) * LABEL_TERM_FIELDS + 1
    return tl.max(_load_lanes(split.label_term, index, split, -float("inf"), LANES), 0)


@triton.jit
def _load_t_exp_sum_t1(
    split, row, LANES: tl.constexpr, LABEL_TERM_FIELDS: tl.constexpr = LABEL_TERM_FIELDS
):
    t_exp_sum_t1 = tl.zeros([LANES], tl.float32)
    if split.label_term is not None:
        index = row.to(tl.int64) * LABEL_TERM_FIELDS
        t_exp_sum_t1 = _load_lanes(split.label_term, index, split, 0.0, LANES)
    return t_exp_sum_t1


@triton.jit
def load_centered_sum(
    split,
    row,
    center,
    LANES: tl.constexpr,
    CENTERED_SUM: tl.constexpr = CENTERED_SUM,
    CENTER: tl.constexpr = CENTER,
    COLUMNS: tl.constexpr = COLUMNS,
):
    """Return the sum of z - center over a row; each partial sum has a center of its own."""
    partial_sums = _load_field(split, row, CENTERED_SUM, 0.0, LANES)
    shift = _load_field(split, row, CENTER, 0.0, LANES) - center
    return tl.sum(partial_sums + shift * _load_field(split, row, COLUMNS, 0.0, LANES), 0)


@triton.jit
def load_sums(split, row, LANES: tl.constexpr, SUMS: tl.constexpr = SUMS):
    """Return the sums of phi, g and h over a row."""
    index = row.to(tl.int64) * SUMS
    phi = _load_lanes(split.sums, index, split, 0.0, LANES)
    g = _load_lanes(split.sums, index + 1, split, 0.0, LANES)
    h = _load_lanes(split.sums, index + 2, split, 0.0, LANES)
    return tl.sum(phi, 0), tl.sum(g, 0), tl.sum(h, 0)


@triton.jit
def load_partials(split, row, LANES: tl.constexpr):
    """Return the partial results of a row as a Partial of lanes."""
    lowest: tl.constexpr = -float("inf")
    return Partial(
        _load_field(split, row, 0, lowest, LANES),
        _load_field(split, row, 1, lowest, LANES),
        _load_field(split, row, 2, 0.0, LANES),
        _load_field(split, row, 3, 0.0, LANES),
        _load_field(split, row, 4, 0.0, LANES),
        _load_field(split, row, 5, 0.0, LANES),
        _load_field(split, row, 6, 0.0, LANES),
        _load_field(split, row, 7, 0.0, LANES),
        _load_field(split, row, 8, 0.0, LANES),
        _load_field(split, row, 9, lowest, LANES),
        _load_field(split, row, 10, lowest, LANES),
        _load_field(split, row, 11, -1.0, LANES),
        _load_field(split, row, 12, lowest, LANES),
        _load_field(split, row, 13, -1.0, LANES),
        _load_field(split, row, 14, lowest, LANES),
        _load_t_exp_sum_t1(split, row, LANES),
    )
