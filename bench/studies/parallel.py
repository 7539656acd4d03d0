"""The cost of a loss whose vocabulary is spread over processes: a model as code, and gloo processes on this machine.

    python bench/studies/parallel.py             measures 1, 2 and 4 processes, and the error of the model
    python bench/studies/parallel.py --large     no measurement: the tables for large runs in docs/parallel.md

For one process and one call the model counts floating-point operations, bytes of local memory, bytes on the wire and
collectives. A Machine says what a unit of each costs. Two kinds of figures are fitted here: the rates of one process at
one vocabulary (the first of VOCABULARIES), for the sweeps of each loss and for matrix products, and the latency and
bandwidth of collectives. Everything else is predicted. Bytes and collectives are also counted where fastkd.parallel
starts them, and must equal the model's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import study
import torch
import torch.distributed as dist
from study import emit, progress
from tables import Table

import fastkd
from fastkd.parallel import collectives
from fastkd.parallel.shards import HALF_BYTES

AGREEMENT_BYTES = 64  # between hosts, per call
# Bytes that one process sends per row: (dense statistics, the sums after them, sparse statistics without the tokens).
ROW_BYTES = {
    "cpu": (15 * 8, 3 * 8, 8 * 8),
    "reference": (12 * 8, 3 * 8, 9 * 8),
    "portable": (12 * 8, 3 * 8, 9 * 8),
    "triton": (14 * 4, 2 * 4, 9 * 8),  # per program; with 512 rows or more, a row has one program
}
GIB = 2**30


class Cost(NamedTuple):
    """The cost of a call, forward and gradient, for one process."""

    flops: float  # of matrix products
    product_bytes: float  # the least that the products move in local memory
    sweep_bytes: float  # moved in local memory by the row kernels
    wire_bytes: float  # received from other processes (as many are sent)
    collectives: int  # at most, in sequence; those of two halves overlap
    chunks: int

    def seconds(self, machine: Machine, processes: int) -> float:
        """The time on that machine. Only the arithmetic of a product and its memory traffic overlap."""
        crowded = max(1.0, processes / machine.cores)
        products = max(self.flops / machine.flops, self.product_bytes / machine.product_bytes)
        exchange = 0.0
        if processes > 1:
            latency, bandwidth = machine.latency[processes], machine.bandwidth[processes]
            exchange = self.collectives * latency + self.wire_bytes / bandwidth
        return crowded * (products + self.sweep_bytes / machine.sweep_bytes) + exchange


class Machine(NamedTuple):
    """Rates per second of one process alone. `cores` processes reach them side by side."""

    flops: float
    product_bytes: float
    sweep_bytes: float
    latency: dict[int, float]  # seconds of a collective, by number of processes
    bandwidth: dict[int, float]  # bytes per second that each receives, by number of processes
    cores: float


def model(
    N: int,
    V: int,
    H: int = 0,
    R: int = 1,
    *,
    teacher_H: int = 0,
    itemsize: int = 4,
    teacher_itemsize: int | None = None,
    closed_form: bool = True,
    k: int = 0,
    backend: str = "cpu",
    trained_head: bool = True,
    chunk: int | None = None,
    sequence_parallel: bool = False,
    shared: bool = True,
) -> Cost:
    """The cost of a call with N rows, whose V columns are spread over R processes.

    Args:
        N: Rows, of all processes.
        V: Columns, of all processes.
        H: The student's width; 0 for logits (kd_loss).
        R: Processes.
        teacher_H: The width of a LinearTeacher; 0 for dense logits, or for k tokens if k is given.
        itemsize: Bytes of a logit, or of an element of hidden states and heads, whose logits are float32.
        teacher_itemsize: The same for the teacher; None: as itemsize.
        closed_form: Whether the divergence has a closed form.
        k: The tokens of a TopK teacher; 0 for other teachers.
        backend: The backend, which decides what a row sends.
        trained_head: Whether the head gets a gradient.
        chunk: Rows in a chunk; None: as fastkd plans on a device.
        sequence_parallel: Whether hidden states are spread over the processes by rows.
        shared: Whether a process_group is given.
    """
    columns = -(-V // R)
    others = R - 1
    dense, sums, sparse = ROW_BYTES[backend]
    logit = 4 if H else itemsize
    teacher_logit = 4 if H and teacher_H else (teacher_itemsize or itemsize)
    step = N
    if H:
        step = chunk or plan(N, columns, H, teacher_H, k, itemsize, trained_head).chunk_size
    chunks = -(-N // step)

    # The statistics read both sides. So do the sums, where they are needed, and the gradient, which also writes one
    # side. Without other processes, a row stays in a CPU's cache from one sweep to the next.
    again = shared or backend != "cpu"
    reads = (1 + again * (1 if closed_form or k else 2)) * (logit + (0 if k else teacher_logit))
    sweep_bytes = N * columns * (reads + logit)

    wire = 0.0
    collective_count = 0
    if shared:
        second = not closed_form or backend in ("portable", "reference")
        a_row = sparse if k else dense + second * sums
        wire += others * (AGREEMENT_BYTES + N * a_row) + 2 * others / R * N * 4 * k
        halves = 2 if step * columns * logit >= 2 * HALF_BYTES and step > 1 else 1
        collective_count = 1 + chunks * halves * (2 if k or second else 1)

    flops = product_bytes = 0.0
    if H:
        # Logits, the gradient of the hidden states, and that of the weight.
        products = 3 if trained_head else 2
        flops = 2.0 * N * columns * (products * H + teacher_H)
        heads = columns * ((2 * H + teacher_H) * itemsize + (8 * H if trained_head else 0))
        logits = N * columns * (products * logit + (4 if teacher_H else 0))
        product_bytes = chunks * heads + logits
        if shared:
            hidden = N * H * itemsize
            wire += 2 * others / R * hidden  # gradient: an all-reduce, or a gather and a scatter
            collective_count += 1
            if sequence_parallel:
                wire += others / R * N * teacher_H * itemsize
                collective_count += 1 + bool(teacher_H)
    return Cost(flops, product_bytes, sweep_bytes, wire, collective_count, chunks)


def plan(
    N: int, columns: int, H: int, teacher_H: int, k: int, itemsize: int, trained_head: bool = True
) -> Any:
    """fastkd's plan of chunks on a GPU."""
    return fastkd.memory_plan(
        N,
        columns,
        H,
        teacher="topk" if k else "linear" if teacher_H else "dense",
        teacher_hidden_size=teacher_H or None,
        k=k or 64,
        dtype=torch.float32 if itemsize == 4 else torch.bfloat16,
        weight_gradient=trained_head,
        device="cuda",
    )


ROWS, WIDTH, CHUNK = 128, 256, 64
VOCABULARIES = (32_768, 8_192, 131_072)  # the rates of one process are fitted at the first
PROCESSES = (1, 2, 4)
LOSSES = ("forward_kl", "jsd", "topk")
K = 64


class Case(NamedTuple):
    """A loss and the size of its vocabulary."""

    loss: str
    linear: bool
    V: int

    @property
    def name(self) -> str:
        return f"{'fused_linear_kd_loss' if self.linear else 'kd_loss'} {self.loss}"

    def cost(self, R: int) -> Cost:
        """The cost by the model."""
        shape: dict[str, Any] = {}
        if self.linear:
            shape = {"H": WIDTH, "teacher_H": 0 if self.loss == "topk" else WIDTH, "chunk": CHUNK}
        return model(
            ROWS,
            self.V,
            R=R,
            k=K if self.loss == "topk" else 0,
            closed_form=self.loss == "forward_kl",
            **shape,
        )


CASES = [Case(loss, False, V) for loss in LOSSES for V in VOCABULARIES]
CASES += [Case("forward_kl", True, V) for V in VOCABULARIES]


class Sample(NamedTuple):
    """A step of one process, or the mean over processes."""

    seconds: float
    waiting: float  # seconds in collectives
    wire_bytes: float
    collectives: int
    # Bytes on the wire per row and other process, without the gradient of hidden states.
    row_bytes: float
    # Seconds for the same columns, with as many processes at once that exchange nothing.
    apart: float = 0.0


class Wire:
    """A count of what passes between processes, taken where each collective of fastkd.parallel begins and ends."""

    def __init__(self) -> None:
        self.seconds, self.bytes, self.collectives, self.of_hidden = 0.0, 0.0, 0, 0.0

    @contextmanager
    def counting(self) -> Any:
        """Count all collectives within the context."""
        wire, plain = self, collectives.Pending

        class Counted(plain):  # type: ignore[misc, valid-type]
            def __init__(self, collective: str, group: Any, start: Any, result: Any) -> None:
                size = dist.get_world_size(group)
                held = result.numel() * result.itemsize
                received = {
                    "all-gather": held * (size - 1) / size,
                    "all-reduce": held * 2 * (size - 1) / size,
                    "reduce-scatter": held * (size - 1),
                }[collective.split()[1]]
                wire.bytes += received
                wire.of_hidden += received * ("hidden" in collective)
                wire.collectives += 1
                super().__init__(collective, group, start, result)

            def _guarded(self, call: Callable[[], Any]) -> Any:
                began = time.perf_counter()
                try:
                    return super()._guarded(call)
                finally:
                    wire.seconds += time.perf_counter() - began

        collectives.Pending = Counted  # type: ignore[misc]
        try:
            yield self
        finally:
            collectives.Pending = plain  # type: ignore[misc]


def step_of(case: Case, R: int, group: Any) -> Callable[[], None]:
    """A function that computes forward and gradient of one process's columns."""
    generator = torch.Generator().manual_seed(1)
    columns = case.V // R

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    teacher: Any
    teacher = fastkd.TopK.from_logits(normal(ROWS, case.V), K) if case.loss == "topk" else None
    options: dict[str, Any] = {"process_group": group, "backend": "cpu"}
    if case.loss != "topk":
        options["divergence"] = case.loss
    if case.linear:
        student = (normal(ROWS, WIDTH).requires_grad_(), normal(columns, WIDTH).requires_grad_())
        target = teacher or fastkd.LinearTeacher(normal(ROWS, WIDTH), normal(columns, WIDTH))
        options["chunk_size"] = CHUNK
        loss: Callable[..., torch.Tensor] = fastkd.fused_linear_kd_loss
    else:
        student = (normal(ROWS, columns).requires_grad_(),)
        target = teacher or normal(ROWS, columns)
        loss = fastkd.kd_loss

    def step() -> None:
        for tensor in student:
            tensor.grad = None
        loss(*student, target, **options).backward()

    return step


def sample(step: Callable[[], None], group: Any) -> Sample:
    """Measure one step, which all processes start together."""
    wire = Wire()
    dist.barrier(group)
    with wire.counting():
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    others = dist.get_world_size(group) - 1
    exchanged = wire.bytes - wire.of_hidden - others * AGREEMENT_BYTES
    a_row = exchanged / ROWS / max(others, 1)
    return Sample(seconds, wire.seconds, wire.bytes, wire.collectives, a_row)


SMALL, BIG = 1 << 10, 4 << 20  # bytes per process, for the fit of latency and bandwidth


def collective_times(group: Any, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of all-gathers of SMALL and of BIG bytes."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for size, seconds in zip((SMALL, BIG), times, strict=True):
            value = torch.zeros(size, dtype=torch.uint8)
            dist.barrier(group)
            start = time.perf_counter()
            collectives.all_gather(value, group, "a benchmark").wait()
            seconds.append(time.perf_counter() - start)
    return times


def process(rank: int, port: int, rounds: int, results: Any) -> None:
    """The work of one of four processes. In a round with fewer processes, the others wait at a barrier."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=max(PROCESSES))
    groups = {R: dist.new_group(list(range(R))) for R in PROCESSES}
    own = [dist.new_group([each]) for each in range(max(PROCESSES))][rank]
    found: dict[Any, Any] = {}
    for R in PROCESSES[1:]:
        if rank < R:
            found["collective", R] = collective_times(groups[R], 5 * rounds)
        dist.barrier()
    for case in CASES:
        steps = {
            R: (step_of(case, R, groups[R]), step_of(case, R, own)) for R in PROCESSES if rank < R
        }
        for number in range(rounds + 1):
            for R in PROCESSES:
                if rank < R:
                    together, apart = (sample(step, groups[R]) for step in steps[R])
                    if number:  # the first warms up
                        found.setdefault((case, R), []).append(
                            together._replace(apart=apart.seconds)
                        )
                dist.barrier()
        if rank == 0:
            progress(case.name, f"V = {case.V:,}")
    results.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


def measure(rounds: int) -> tuple[dict[tuple[Case, int], Sample], Machine]:
    """Every case on every number of processes, and this machine for the model.

    A Sample is the mean over processes of the fastest round, which other work on the machine disturbs least.
    """
    import socket

    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").Queue()
    spawned = mp.spawn(process, args=(port, rounds, results), nprocs=max(PROCESSES), join=False)
    by_rank: dict[int, Any] = {}
    while not spawned.join(timeout=1):  # raises if a process raised
        while not results.empty():
            by_rank |= [results.get()]
    while len(by_rank) < max(PROCESSES):
        by_rank |= [results.get(timeout=10)]

    found = {}
    for case in CASES:
        for R in PROCESSES:
            each = [by_rank[rank][case, R] for rank in range(R)]
            means = [
                [sum(values) / R for values in zip(*moment, strict=True)]
                for moment in zip(*each, strict=True)
            ]
            apart = min(moment[-1] for moment in means)
            found[case, R] = Sample(*min(means)[:-1], apart)
    latency, bandwidth = {}, {}
    for R in PROCESSES[1:]:
        small, big = (min(times) for times in by_rank[0]["collective", R])
        bandwidth[R] = (BIG - SMALL) * (R - 1) / max(big - small, 1e-9)
        latency[R] = max(small - SMALL * (R - 1) / bandwidth[R], 0.0)
    return found, Machine(1.0, 1.0, 1.0, latency, bandwidth, len(os.sched_getaffinity(0)))


def fitted(case: Case, found: dict[tuple[Case, int], Sample], machine: Machine) -> Machine:
    """The machine with the rates of one process, fitted to the same loss at the first vocabulary."""
    rates = machine
    for linear in (False, True):
        at = Case(case.loss, linear, VOCABULARIES[0])
        if (at, 1) not in found or (linear and not case.linear):
            continue
        cost, own = at.cost(1), found[at, 1]
        left = own.seconds - own.waiting
        if linear:
            left = max(left - cost.sweep_bytes / rates.sweep_bytes, 1e-9)
            rates = rates._replace(flops=cost.flops / left, product_bytes=float("inf"))
        else:
            rates = rates._replace(sweep_bytes=cost.sweep_bytes / left)
    return rates


def report(rounds: int) -> tuple[list[Table], list[dict[str, Any]], list[str]]:
    """The table of a measurement, with its figures and notes."""
    found, machine = measure(rounds)
    columns = (
        "V", "processes", "collectives", "wire, B per row and other process", "step, ms", "of one process",
        "in collectives", "without exchange, ms", "model, ms", "model's error", "error given that",
    )  # fmt: skip
    table = Table(f"{ROWS} rows, float32; H = {WIDTH}, chunks of {CHUNK} rows", ("loss", *columns))
    measurements, errors, exchange_errors = [], [], []
    for case in sorted(CASES, key=lambda case: (case.linear, LOSSES.index(case.loss), case.V)):
        rates = fitted(case, found, machine)
        for R in PROCESSES:
            own, cost = found[case, R], case.cost(R)
            if R > 1 and (own.collectives, own.wire_bytes) != (cost.collectives, cost.wire_bytes):
                raise AssertionError(
                    f"{case}, {R} processes: the model has {cost}, counted are {own}"
                )
            predicted = cost.seconds(rates, R)
            error = predicted / own.seconds - 1
            is_fitted = R == 1 and case.V in VOCABULARIES[:1]
            if not is_fitted:
                errors.append(abs(error))
            # The error of the model's exchange, added to the measured step without exchange.
            exchange = predicted - cost._replace(collectives=0, wire_bytes=0).seconds(rates, R)
            exchange_error = (own.apart + exchange) / own.seconds - 1
            if R > 1:
                exchange_errors.append(abs(exchange_error))
            table.rows.append(
                (
                    case.name if R == 1 else "",
                    f"{case.V:,}" if R == 1 else "",
                    str(R),
                    f"{round(own.collectives)}",
                    f"{own.row_bytes:.0f}" if R > 1 else "",
                    f"{1e3 * own.seconds:.1f}",
                    f"{own.seconds / found[case, 1].seconds:.2f}x",
                    f"{own.waiting / own.seconds:.0%}",
                    f"{1e3 * own.apart:.1f}" if R > 1 else "",
                    f"{1e3 * predicted:.1f}",
                    "fitted" if is_fitted else f"{error:+.0%}",
                    f"{exchange_error:+.0%}" if R > 1 else "",
                )
            )
            measurements.append(
                {
                    "case": case.name,
                    "V": case.V,
                    "processes": R,
                    "model": predicted,
                    **own._asdict(),
                }
            )
    notes = [
        f"collectives of {R} processes: latency {1e6 * machine.latency[R]:.0f} us, "
        f"{machine.bandwidth[R] / 1e6:.0f} MB/s received"
        for R in machine.latency
    ]
    notes.append(
        f"the model's error where nothing was fitted: median {median(errors):.0%}, largest {max(errors):.0%}; "
        f"with the measured step without exchange: median {median(exchange_errors):.0%}, "
        f"largest {max(exchange_errors):.0%}"
    )
    notes.append(f"load average at the end: {os.getloadavg()[0]:.1f}")
    return [table], measurements, notes


STUDENT, TEACHER = (8e9, 4_096), (70e9, 8_192)  # parameters, width
V, SEQUENCE = 262_144, 8_192  # columns; rows of a call
# Assumptions about an H100 in a node of eight, not measurements.
PEAK, SHARE = 989e12, 0.4  # in bfloat16, and the share of it that a training step reaches
GPU = Machine(
    flops=0.6 * PEAK,
    product_bytes=2.5e12,
    sweep_bytes=2.5e12,
    latency=dict.fromkeys((2, 4, 8), 20e-6) | {16: 60e-6},
    bandwidth=dict.fromkeys((2, 4, 8), 300e9) | {16: 40e9},
    cores=16,
)
HOST_LATENCY = 300e-6  # of the agreement, between hosts
GPUS = (1_024, 4_096)
TOKENS = 1e12


def large() -> list[Table]:
    """The tables for large runs."""
    _, H = STUDENT
    _, teacher_H = TEACHER
    shape = f"{SEQUENCE:,} rows, V = {V:,}, H = {H:,}, teacher's {teacher_H:,}, bfloat16"
    memory = Table(
        f"Memory of a GPU, GiB: {shape}",
        ("group R", "float32 logits of both and gradient", "fused: chunk, rows", "fused: held by the call",
         "heads", "head's gradient", "fused, TopK: held"),
    )  # fmt: skip
    times = Table(
        f"A call on a GPU, by the model: {shape}",
        ("group R", "chunks", "TFLOP", "products, ms", "sweeps, ms", "wire, MB", "collectives",
         "exchange, ms", "agreement, ms", "total, ms", "student's model, ms"),
    )  # fmt: skip
    student_step = 6 * STUDENT[0] * SEQUENCE / (SHARE * PEAK)
    for R in (1, 2, 4, 8, 16):
        columns = V // R
        linear, topk = (
            plan(SEQUENCE, columns, H, width, k, 2) for width, k in ((teacher_H, 0), (0, 64))
        )
        memory.rows.append(
            (
                str(R),
                f"{linear.dense / GIB:.1f}",
                f"{linear.chunk_size:,}",
                f"{linear.peak / GIB:.2f}",
                f"{2 * columns * (H + teacher_H) / GIB:.2f}",
                f"{2 * columns * H / GIB:.2f}",
                f"{topk.peak / GIB:.2f}",
            )
        )
        cost = model(
            SEQUENCE, V, H, R, teacher_H=teacher_H, itemsize=2, backend="triton", shared=R > 1
        )
        products = max(cost.flops / GPU.flops, cost.product_bytes / GPU.product_bytes)
        sweeps = cost.sweep_bytes / GPU.sweep_bytes
        host = HOST_LATENCY if R > 1 else 0.0
        exchange = 0.0
        if R > 1:
            exchange = (cost.collectives - 1) * GPU.latency[R] + cost.wire_bytes / GPU.bandwidth[R]
        total = products + sweeps + exchange + host
        times.rows.append(
            (
                str(R),
                str(cost.chunks),
                f"{cost.flops / 1e12:.1f}",
                f"{1e3 * products:.1f}",
                f"{1e3 * sweeps:.1f}",
                f"{cost.wire_bytes / 1e6:.1f}",
                str(cost.collectives),
                f"{1e3 * exchange:.2f}",
                f"{1e3 * host:.1f}" if R > 1 else "",
                f"{1e3 * total:.1f}",
                f"{1e3 * student_step / R:.0f}",
            )
        )
    return [memory, times, _heads(H, teacher_H), *_teachers(student_step)]


def _heads(H: int, teacher_H: int) -> Table:
    shown = Table(
        f"Received by a GPU, MB per call, for {SEQUENCE:,} rows of each of 8 processes",
        ("weights by FSDP2: both heads, the gradient", "vocabulary shared by 8, for the rows of all 8"),
    )  # fmt: skip
    gathered = 7 / 8 * 2 * V * (2 * H + teacher_H)
    cost = model(
        8 * SEQUENCE,
        V,
        H,
        8,
        teacher_H=teacher_H,
        itemsize=2,
        backend="triton",
        sequence_parallel=True,
    )
    shown.rows.append((f"{gathered / 1e6:,.0f}", f"{cost.wire_bytes / 1e6:,.0f}"))
    return shown


def _teachers(student_step: float) -> list[Table]:
    rate = SEQUENCE / student_step  # tokens per second and GPU, for the student alone
    online = 1 + 2 * TEACHER[0] / (6 * STUDENT[0])
    kinds = {
        "TopK, K = 64": 64 * 8 + 8,
        "TopK, K = 16": 16 * 8 + 8,
        "hidden, bfloat16": 2 * TEACHER[1] + 4,
    }
    cache = Table(
        f"A cache: {rate:,.0f} tokens per second and GPU without a teacher, {rate / online:,.0f} with it online",
        ("kind", "bytes per token", "TB per 10^12 tokens", *(f"GB/s for {n:,} GPUs" for n in GPUS), "MB/s per GPU"),
    )  # fmt: skip
    for kind, size in kinds.items():
        cells = (f"{rate * n * size / 1e9:,.1f}" for n in GPUS)
        cache.rows.append(
            (kind, f"{size:,}", f"{size * TOKENS / 1e12:,.0f}", *cells, f"{rate * size / 1e6:.1f}")
        )
    runs = Table(
        "GPU days for a student on 10^12 tokens, by how often it is trained",
        ("times", "teacher online", "teacher once, then a cache", "cache / online"),
    )
    day = TOKENS / rate / 86_400
    for number in (1, 2, 4):
        first, second = number * day * online, day * (online - 1) + number * day
        runs.rows.append((str(number), f"{first:,.0f}", f"{second:,.0f}", f"{second / first:.2f}"))
    return [cache, runs]


def main() -> None:
    """The command line."""
    parser = study.command_line(__doc__, rounds=15)
    parser.add_argument(
        "--large",
        action="store_true",
        help="print the tables for large runs, without a measurement",
    )
    arguments = study.parsed(parser)
    if arguments.large:
        print("\n\n".join(table.markdown() for table in large()))
        return
    torch.set_num_threads(1)  # as each process does, for the report of the machine
    emit(arguments, *report(arguments.rounds))


if __name__ == "__main__":
    main()
