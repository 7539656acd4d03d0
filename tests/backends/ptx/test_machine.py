"""The PTX machine runs small programs as a device does, and sees each fault that it looks for.

A fault comes as two programs that differ in a word or two: one that the machine must refuse, and one that it must run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.ptx.faults import Fault
from support.ptx.launch import Kernel, settings_from
from support.ptx.machine import Settings
from support.ptx.program import Program

DECLARED = (
    ".reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .b64 %d<32>; .reg .f32 %f<8>;"
    ".shared .align 16 .b8 memory[2048];"
)
# %d0 leads to the output, %d1 to the input; %t is the thread, %m the address of shared memory.
START = ".reg .b32 %t, %m; mov.u32 %t, %tid.x; ld.param.b64 %d0, [out]; ld.param.b64 %d1, [in]; mov.u32 %m, memory;"


def execute(
    body: str,
    given: Any = None,
    threads: int = 64,
    ranks: int = 1,
    blocks: int | None = None,
    settings: Settings | None = None,
    functions: str = "",
) -> Any:
    """Run a body on `given` (64 numbers if None) and return the output, 1024 words."""
    given = np.arange(64, dtype=np.uint32) if given is None else given
    memory = np.full(1024 + 4, 0xFFFFFFFF, np.uint32)
    start = -memory.ctypes.data // 4 % 4  # so that the output begins at a multiple of 16 bytes
    output = memory[start : start + 1024]
    aligned = np.zeros(given.size + 4, given.dtype)
    start = -aligned.ctypes.data // aligned.itemsize % (16 // aligned.itemsize)
    source = aligned[start : start + given.size]
    source[:] = given
    text = f"{functions} .visible .entry test(.param .b64 out, .param .b64 in) {{ {DECLARED} {START} {body} ret; }}"
    arrays = [output, source]
    Kernel(Program(text, "test")).launch(
        (blocks or ranks, 1, 1),
        threads,
        [int(array.ctypes.data).to_bytes(8, "little") for array in arrays],
        [(array.ctypes.data, array.nbytes) for array in arrays],
        ranks,
        settings=settings or Settings(),
    )
    return output


def store(value: str, index: str = "%t") -> str:
    """Output[index] = value."""
    return f"mad.wide.u32 %d31, {index}, 4, %d0; st.global.b32 [%d31], {value};"


SLOT = "shl.b32 %r1, %t, 2; add.u32 %r1, %r1, %m;"  # %r1: this thread's word in shared memory
OTHER = "xor.b32 %r2, %t, 32; shl.b32 %r2, %r2, 2; add.u32 %r2, %r2, %m;"  # %r2: that of the other warp's thread


# What programs do


def test_threads_blocks_and_special_registers() -> None:
    body = (
        "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.u32 %r3, %r1, %r2, %t; mov.u32 %r4, %laneid;"
        "mov.u32 %r5, %nctaid.x; mad.lo.u32 %r4, %r5, 100, %r4;" + store("%r4", "%r3")
    )
    output = execute(body, blocks=3)
    assert output[:192].tolist() == [300 + k % 32 for k in range(192)]


def test_branches_meet_again_before_a_barrier() -> None:
    body = (
        "setp.lt.u32 %p1, %t, 20; @%p1 bra low; mov.u32 %r3, 5; bra.uni join; low: mov.u32 %r3, 7;"
        f"join: bar.sync 0; {store('%r3')}"
    )
    assert execute(body)[:64].tolist() == [7] * 20 + [5] * 44


def test_a_loop_of_different_lengths() -> None:
    body = (
        "mov.u32 %r3, 0; mov.u32 %r4, 0; again: add.u32 %r3, %r3, %r4; add.u32 %r4, %r4, 1; setp.le.u32 %p1, %r4, %t;"
        f"@%p1 bra again; {store('%r3')}"
    )
    assert execute(body)[:64].tolist() == [k * (k + 1) // 2 for k in range(64)]


def test_a_table_of_branches() -> None:
    body = (
        "table: .branchtargets zero, one, two; rem.u32 %r3, %t, 3; brx.idx %r3, table; zero: mov.u32 %r4, 9; bra done;"
        f"one: mov.u32 %r4, 8; bra done; two: mov.u32 %r4, 7; done: {store('%r4')}"
    )
    assert execute(body)[:6].tolist() == [9, 8, 7, 9, 8, 7]


def test_calls_and_local_memory() -> None:
    functions = (
        ".func (.param .b32 result) square(.param .b32 x) { .reg .b32 %a<3>; .local .align 4 .b8 depot[8];"
        ".reg .b64 %l; mov.u64 %l, depot; cvta.local.u64 %l, %l; ld.param.b32 %a1, [x]; mul.lo.u32 %a2, %a1, %a1;"
        "st.b32 [%l+4], %a2; ld.b32 %a0, [%l+4]; st.param.b32 [result], %a0; ret; }"
    )
    body = (
        "{ .param .b32 given; .param .b32 got; st.param.b32 [given], %t; call.uni (got), square, (given);"
        f"ld.param.b32 %r3, [got]; }} {store('%r3')}"
    )
    assert execute(body, functions=functions)[:64].tolist() == [k * k for k in range(64)]


def test_names_in_inner_scopes() -> None:
    body = (
        "mov.u32 %r3, 1; { .reg .b32 %r3; mov.u32 %r3, 2; bra.uni out; out: } { out: }"
        f"add.u32 %r3, %r3, 4; {store('%r3')}"
    )
    assert execute(body)[0] == 5


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("bfly.b32 %r3, %t, 3, 31", [k ^ 3 for k in range(32)]),
        ("down.b32 %r3, %t, 4, 31", [k + 4 if k < 28 else k for k in range(32)]),
        ("up.b32 %r3, %t, 4, 0", [k - 4 if k >= 4 else k for k in range(32)]),
        ("idx.b32 %r3, %t, 6, 31", [6] * 32),
        ("down.b32 %r3, %t, 2, 0x1807", [k + 2 if k % 8 < 6 else k for k in range(32)]),
    ],
)
def test_shuffles(mode: str, expected: list[int]) -> None:
    body = f"shfl.sync.{mode}, -1; {store('%r3')}"
    assert execute(body)[:32].tolist() == expected
    assert execute(body)[32:64].tolist() == [32 + x for x in expected]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("redux.sync.add.u32 %r3, %t, -1;", sum(range(32))),
        ("redux.sync.max.s32 %r3, %t, -1;", 31),
        ("redux.sync.or.b32 %r3, %t, -1;", 31),
        (
            "cvt.rn.f32.u32 %f1, %t; redux.sync.max.NaN.f32 %f2, %f1, -1; cvt.rzi.u32.f32 %r3, %f2;",
            31,
        ),
        ("setp.lt.u32 %p1, %laneid, 3; vote.sync.ballot.b32 %r3, %p1, -1;", 7),
        ("setp.lt.u32 %p1, %t, 31; vote.sync.all.pred %p2, !%p1, -1; selp.b32 %r3, 1, 0, %p2;", 0),
        ("setp.eq.u32 %p1, %t, 5; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r3, 1, 0, %p2;", 1),
        ("elect.sync %r4|%p1, -1; selp.b32 %r3, 1, 0, %p1; redux.sync.add.u32 %r3, %r3, -1;", 1),
    ],
)
def test_instructions_of_a_warp(line: str, expected: int) -> None:
    assert (execute(line + store("%r3"))[:32] == expected).all()


def test_matrices_go_through_shared_memory() -> None:
    """stmatrix, and ldmatrix with a transposition of the half-words."""
    words = np.arange(32, dtype=np.uint32) * 2 + (np.arange(32, dtype=np.uint32) * 2 + 1 << 16)
    body = (
        "and.b32 %r1, %t, 7; shl.b32 %r1, %r1, 4; add.u32 %r1, %r1, %m; mad.wide.u32 %d2, %t, 4, %d1; ld.global.b32 %r3, [%d2];"
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r3};"
        "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r4}, [%r1];" + store("%r4")
    )
    halves = execute(body, words, threads=32)[:32].view(np.uint16).reshape(8, 8)
    assert np.array_equal(halves, np.arange(64).reshape(8, 8).T)


def test_atomic_operations_return_the_value_before() -> None:
    body = (
        "mov.u32 %r3, 0; setp.eq.u32 %p1, %t, 0; @%p1 st.shared.b32 [memory], %r3; bar.sync 0;"
        "atom.shared.add.u32 %r4, [memory], 1; bar.sync 0; ld.shared.u32 %r5, [memory];"
        "add.u32 %r6, %t, 64;" + store("%r4") + store("%r5", "%r6")
    )
    output = execute(body)
    assert sorted(output[:64].tolist()) == list(range(64)) and (output[64:128] == 64).all()


def test_vectors_of_every_width() -> None:
    body = (
        "setp.ne.u32 %p1, %t, 0; @%p1 bra end; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1+16];"
        "st.global.v2.b32 [%d0], {%r1, %r2}; st.global.v2.b32 [%d0+8], {%r3, %r4};"
        "ld.global.u8 %h1, [%d1+4]; cvt.u32.u16 %r5, %h1; st.global.b32 [%d0+16], %r5;"
        "ld.global.s8 %r6, [%d1+1]; st.global.b32 [%d0+20], %r6; end:"
    )
    given = np.arange(64, dtype=np.uint32)
    given[0] = 0xF000
    assert execute(body, given)[:6].tolist() == [4, 5, 6, 7, 1, 0xFFFFFFF0]


# Faults: (what is seen, the program that must be refused, the one that must run, threads, ranks)

INIT = (
    "setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared::cta.b64 [memory+1024], 1;"
    "@%p1 fence.mbarrier_init.release.cluster; bar.sync 0;"
)
COPY = (
    "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory+1024], 256;"
    "@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [memory], [%d1], 256, [memory+1024];"
)
WAIT = "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [memory+1024], 0; @!done bra again; }"
USE = f"{SLOT} ld.shared.b32 %r3, [%r1]; {store('%r3')}"
FILL = f"{SLOT} st.shared.b32 [%r1], %t; bar.sync 0; ld.shared.b32 %r3, [%r1];"
SWAP = f"{SLOT} {OTHER} st.shared.b32 [%r1], %t; BARRIER ld.shared.b32 %r3, [%r2]; {store('%r3')}"
REMOTE = (
    "mov.u32 %r4, %cluster_ctarank; xor.b32 %r5, %r4, 1; mov.u64 %d2, memory; cvta.shared.u64 %d2, %d2;"
    "mapa.u64 %d3, %d2, %r5; mad.wide.u32 %d3, %t, 4, %d3;"
)
MEET = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
READ = f"{SLOT} ld.shared.b32 %r3, [%r1]; mad.lo.u32 %r6, %r4, 64, %t; {store('%r3', '%r6')}"

FAULTS: dict[str, tuple[str, str, str, int, int]] = {
    "a load past a tensor": (
        "outside all tensors", "ld.global.b32 %r3, [%d1+256];", "ld.global.b32 %r3, [%d1+252];", 32, 1),
    "a load before a tensor": (
        "outside all tensors", "ld.global.b32 %r3, [%d1+-4];", "ld.global.b32 %r3, [%d1+0];", 32, 1),
    "a vector that is half outside": (
        "outside all tensors", "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1+256];",
        "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1+240];", 32, 1),
    "a store past a tensor": (
        "outside all tensors", "st.global.b32 [%d0+4096], %r3;", "mov.u32 %r3, 1; st.global.b32 [%d0+4092], %r3;", 32, 1),
    "a misaligned load": (
        "misaligned access of 4 bytes", "ld.global.b32 %r3, [%d1+2];", "ld.global.b16 %h3, [%d1+2];", 32, 1),
    "a misaligned vector": (
        "misaligned access of 16 bytes", "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1+8];",
        "ld.global.v2.b32 {%r1, %r2}, [%d1+8];", 32, 1),
    "a load past shared memory": (
        "outside shared memory", "ld.shared.b32 %r3, [memory+2048];", "ld.shared.b32 %r3, [memory+2044];", 32, 1),
    "a pointer that is none": (
        "outside shared memory", "mov.u32 %r1, 0; ld.shared.b32 %r3, [%r1];", "ld.shared.b32 %r3, [%m];", 32, 1),
    "a shared address for device memory": (
        "address that is not there", "mov.u64 %d2, memory; cvta.shared.u64 %d2, %d2; ld.global.b32 %r3, [%d2];",
        "mov.u64 %d2, memory; cvta.shared.u64 %d2, %d2; ld.b32 %r3, [%d2];", 32, 1),
    "parameters are constant": (
        "store to the parameters", "st.param.b32 [in], %r3;", "ld.param.b32 %r3, [in];", 32, 1),
    "threads write different values": (
        "different values to one place", "st.global.b32 [%d0], %t;", "mov.u32 %r3, 1; st.global.b32 [%d0], %r3;", 32, 1),
    "a read of another warp's word": (
        "race in shared memory: thread", SWAP.replace("BARRIER", ""), SWAP.replace("BARRIER", "bar.sync 0;"), 64, 1),
    "a write over what another warp reads": (
        "race in shared memory: thread",
        f"{FILL} {OTHER} bar.sync 0; ld.shared.b32 %r4, [%r2]; st.shared.b32 [%r1], %r4;",
        f"{FILL} {OTHER} bar.sync 0; ld.shared.b32 %r4, [%r2]; bar.sync 0; st.shared.b32 [%r1], %r4;", 64, 1),
    "two warps write one word": (
        "different values to one place|race in shared memory: thread .* writes what warp",
        "mov.u32 %r3, %warpid; st.shared.b32 [memory], %r3;",
        "mov.u32 %r3, %warpid; setp.lt.u32 %p1, %t, 32; @%p1 st.shared.b32 [memory], %r3; bar.sync 0; @!%p1 st.shared.b32 [memory], %r3;",
        64, 1),
    "a plain read beside an atomic": (
        "race in shared memory", "atom.shared.or.b32 %r3, [memory], 1; ld.shared.b32 %r4, [memory];",
        "atom.shared.or.b32 %r3, [memory], 1; bar.sync 0; ld.shared.b32 %r4, [memory];", 64, 1),
    "two programs write one element": (
        "two programs of a launch", "mov.u32 %r3, 1; st.global.b32 [%d0], %r3;",
        "mov.u32 %r3, 1; mov.u32 %r2, %ctaid.x; " + store("%r3", "%r2"), 32, -2),
    "two programs write one byte": (
        "two programs of a launch", "mov.u32 %r3, 1; st.global.b8 [%d0+1], %r3;",
        "mov.u32 %r3, 1; mov.u32 %r2, %ctaid.x; cvt.u64.u32 %d2, %r2; add.u64 %d2, %d0, %d2; st.global.b8 [%d2], %r3;", 32, -2),
    "one program reads what another writes": (
        "two programs of a launch", f"ld.global.b32 %r3, [%d0+4]; mov.u32 %r2, %ctaid.x; {store('%r2', '%r2')}",
        f"ld.global.b32 %r3, [%d0+8]; mov.u32 %r2, %ctaid.x; {store('%r2', '%r2')}", 32, -2),
    "a barrier that half of a block skips": (
        "deadlock: .*bar.sync",
        "setp.lt.u32 %p1, %t, 32; @%p1 bra on; bar.sync 1, 64; on: bar.sync 0, 64;",
        "setp.lt.u32 %p1, %t, 32; @%p1 bra on; bar.sync 1, 32; on: bar.sync 0, 64;", 64, 1),
    "a shuffle that half of a warp skips": (
        "deadlock: .*shfl",
        "setp.lt.u32 %p1, %t, 16; @%p1 bra on; shfl.sync.bfly.b32 %r3, %t, 1, 31, -1; on: bar.warp.sync -1;",
        "setp.lt.u32 %p1, %t, 16; @%p1 bra on; add.u32 %r3, %t, 1; on: bar.warp.sync -1;", 32, 1),
    "a call without a definition": (
        "does not define", "call.uni nowhere;", "setp.gt.u32 %p1, %t, 99; @%p1 call.uni nowhere;", 32, 1),
    "a trap": ("stops itself", "trap;", "setp.gt.u32 %p1, %t, 99; @%p1 trap;", 32, 1),
    "a bulk copy that nobody waits for": (
        "bulk copy is writing|not waited for", INIT + COPY + USE, INIT + COPY + WAIT + USE, 64, 1),
    "a bulk copy that one warp waits for": (
        "bulk copy is writing|not waited for", f"{INIT} {COPY} setp.gt.u32 %p2, %t, 31; @%p2 bra on; {WAIT} bra.uni on; on: {USE}",
        f"{INIT} {COPY} setp.gt.u32 %p2, %t, 31; @%p2 bra on; {WAIT} bra.uni on; on: bar.sync 0; {USE}", 64, 1),
    "a wait for the phase before": (
        "bulk copy is writing|not waited for", INIT + COPY + WAIT.replace(", 0;", ", 1;") + USE, INIT + COPY + WAIT + USE, 64, 1),
    "fewer bytes announced than copied": (
        "bulk copy is writing|not waited for|deadlock", INIT + COPY.replace("1024], 256;", "1024], 240;", 1) + WAIT + USE,
        INIT + COPY + WAIT + USE, 64, 1),
    "more bytes announced than copied": (
        "deadlock: .*try_wait", INIT + COPY.replace("1024], 256;", "1024], 272;", 1) + WAIT + USE,
        INIT + COPY + WAIT + USE, 64, 1),
    "a bulk copy of a part of a piece": (
        "multiples of 16", INIT + COPY.replace("256", "248"), INIT + COPY + WAIT, 64, 1),
    "a bulk copy from a part of a piece": (
        "multiples of 16", INIT + COPY.replace("[%d1]", "[%d1+8]"), INIT + COPY + WAIT, 64, 1),
    "a bulk copy past a tensor": (
        "outside all tensors", INIT + COPY.replace("[%d1]", "[%d1+16]"), INIT + COPY + WAIT, 64, 1),
    "a bulk copy over a word in use, without a proxy fence": (
        "since their last proxy fence", f"{INIT} {FILL} bar.sync 0; {COPY} {WAIT} {USE}",
        f"{INIT} {FILL} fence.proxy.async.shared::cta; bar.sync 0; {COPY} {WAIT} {USE}", 64, 1),
    "a bulk copy over a word in use, fenced by one warp": (
        "since their last proxy fence",
        f"{INIT} {FILL} setp.lt.u32 %p2, %t, 32; @%p2 fence.proxy.async.shared::cta; bar.sync 0; {COPY} {WAIT} {USE}",
        f"{INIT} {FILL} fence.proxy.async.shared::cta; bar.sync 0; {COPY} {WAIT} {USE}", 64, 1),
    "a bulk copy over a word in use, without a barrier": (
        "since their last proxy fence", f"{INIT} {FILL} fence.proxy.async.shared::cta; {COPY} {WAIT} {USE}",
        f"{INIT} {FILL} fence.proxy.async.shared::cta; bar.sync 0; {COPY} {WAIT} {USE}", 64, 1),
    "two bulk copies to one place": (
        "two bulk copies to one place",
        INIT + COPY + COPY.replace("@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory+1024], 256;", ""),
        INIT + COPY + WAIT, 64, 1),
    "an mbarrier that is not initialized": ("not initialized", "setp.eq.u32 %p1, %t, 0;" + COPY + WAIT, INIT + COPY + WAIT, 64, 1),
    "an mbarrier whose initialization is not seen": (
        "race in shared memory|not initialized", INIT.replace("bar.sync 0;", "") + COPY + WAIT, INIT + COPY + WAIT, 64, 1),
    "an initialization that is not fenced": (
        "initialization was not fenced", INIT.replace("@%p1 fence.mbarrier_init.release.cluster;", "") + COPY + WAIT,
        INIT + COPY + WAIT, 64, 1),
    "a write that only an arrival of another lane follows": (
        "race in shared memory",
        f"{INIT} setp.eq.u32 %p2, %t, 1; @%p2 st.shared.b32 [memory+512], %t; {COPY} {WAIT} ld.shared.b32 %r3, [memory+512];",
        f"{INIT} setp.eq.u32 %p2, %t, 1; @%p2 st.shared.b32 [memory+512], %t; {COPY} {WAIT} bar.sync 0;"
        "ld.shared.b32 %r3, [memory+512];", 64, 1),
    "too many arrivals": (
        "more arrivals", f"{INIT} mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory+1024], 16;",
        f"{INIT} {COPY}", 64, 1),
    "a word of another block before it is known to run": (
        "before it is known to have started", f"{REMOTE} st.b32 [%d3], %t; {MEET} {READ}",
        f"{MEET} {REMOTE} st.b32 [%d3], %t; {MEET} {READ}", 64, 2),
    "a word of another block without a barrier": (
        "race in shared memory", f"{MEET} {REMOTE} st.b32 [%d3], %t; {READ} {MEET}",
        f"{MEET} {REMOTE} st.b32 [%d3], %t; {MEET} {READ}", 64, 2),
    "an arrival that does not release": (
        "race in shared memory", f"{MEET} {REMOTE} st.b32 [%d3], %t; {MEET.replace('arrive', 'arrive.relaxed')} {READ}",
        f"{MEET} {REMOTE} st.b32 [%d3], %t; {MEET} {READ}", 64, 2),
    "a store after the arrival": (
        "race in shared memory",
        f"{MEET} {REMOTE} barrier.cluster.arrive.aligned; st.b32 [%d3], %t; barrier.cluster.wait.aligned; {READ} {MEET}",
        f"{MEET} {REMOTE} st.b32 [%d3], %t; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; {READ} {MEET}", 64, 2),
    "a block that has ended": (
        "block that has ended", f"{MEET} {REMOTE} setp.eq.u32 %p1, %r4, 0; @%p1 exit; st.b32 [%d3], %t;",
        f"{MEET} {REMOTE} setp.eq.u32 %p1, %r4, 0; st.b32 [%d3], %t; {MEET}", 64, 2),
    "a rank that is not there": (
        "outside shared memory", f"{MEET} {REMOTE} mapa.u64 %d3, %d2, 2; st.b32 [%d3], %t; {MEET}",
        f"{MEET} {REMOTE} st.b32 [%d3], %t; {MEET}", 64, 2),
    "another block's address for this block's memory": (
        "with another block's address", f"{MEET} {REMOTE} cvta.to.shared.u64 %d3, %d3; st.shared::cta.b32 [%d3], %t; {MEET}",
        f"{MEET} {REMOTE} cvta.to.shared.u64 %d3, %d3; st.shared::cluster.b32 [%d3], %t; {MEET}", 64, 2),
    "two arrivals without a wait": (
        "arrives at the cluster's barrier twice", "barrier.cluster.arrive.aligned; barrier.cluster.arrive.aligned;",
        MEET + MEET, 64, 2),
    "a wait without an arrival": (
        "without having arrived", "barrier.cluster.wait.aligned;", MEET, 64, 2),
    "a block that does not arrive": (
        "deadlock: .*cluster",
        "mov.u32 %r4, %cluster_ctarank; setp.eq.u32 %p1, %r4, 0; @%p1 barrier.cluster.arrive.aligned;"
        "@%p1 barrier.cluster.wait.aligned; @!%p1 bar.sync 0, 96;",
        "mov.u32 %r4, %cluster_ctarank; setp.eq.u32 %p1, %r4, 0; @%p1 barrier.cluster.arrive.aligned;"
        "@%p1 barrier.cluster.wait.aligned;", 64, 2),
}  # fmt: skip


@pytest.mark.parametrize("random_order", [False, True], ids=["in order", "at random"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str, random_order: bool) -> None:
    message, bad, good, threads, ranks = FAULTS[fault]
    blocks = 2 if ranks == -2 else None  # of a grid without clusters
    settings = Settings(random_order=random_order)
    execute(good, threads=threads, ranks=max(ranks, 1), blocks=blocks, settings=settings)
    with pytest.raises(Fault, match=message):
        execute(bad, threads=threads, ranks=max(ranks, 1), blocks=blocks, settings=settings)


def test_a_bulk_copy_brings_its_bytes() -> None:
    output = execute(INIT + COPY + WAIT + USE)
    assert output[:64].tolist() == list(range(64))


def test_blocks_exchange_words() -> None:
    output = execute(
        f"{MEET} {REMOTE} mad.lo.u32 %r7, %r4, 1000, %t; st.b32 [%d3], %r7; {MEET} {READ}", ranks=2
    )
    assert output[:128].tolist() == [1000 + k for k in range(64)] + list(range(64))


NEIGHBOURS = (
    "shl.b32 %r1, %t, 1; add.u32 %r1, %r1, %m; cvt.u16.u32 %h1, %t; st.shared.b16 [%r1], %h1; bar.sync 0;"
    "setp.eq.u32 %p1, %t, 32; @%p1 ld.shared.b32 %r3, [memory+60]; setp.eq.u32 %p2, %t, 31; @%p2 st.shared.b16 [memory+62], %h1;"
)


def test_a_word_read_for_one_half_is_a_race_if_asked_for() -> None:
    """Thread 32, of the second warp, reads the word whose upper half thread 31 writes."""
    execute(NEIGHBOURS)
    with pytest.raises(Fault, match="race in shared memory"):
        execute(NEIGHBOURS, settings=Settings(strict_halves=True))


@pytest.mark.parametrize("seed", range(3))
def test_random_orders_give_the_same_results(seed: int) -> None:
    body = SWAP.replace("BARRIER", "bar.sync 0;")
    output = execute(body, settings=Settings(seed, random_order=True))
    assert output[:64].tolist() == [k ^ 32 for k in range(64)]


def test_a_program_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.ptx.machine.MOST_BLOCKS", 100)
    with pytest.raises(Fault, match="no end after 100 basic blocks"):
        execute("again: add.u32 %r1, %r1, 1; bra again;")


def test_settings() -> None:
    assert settings_from("") == Settings()
    assert settings_from("random noise halves seed=7") == Settings(7, True, True, True)
    for wrong in ("randum", "seed", "noise=2"):
        with pytest.raises(ValueError, match="is unknown; known: random, noise, halves, seed="):
            settings_from(wrong)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("bra nowhere;", "no label 'nowhere'"),
        ("add.u32 %r1, %r2, %unknown;", "%unknown is unknown"),
        ("add.u32 %d1, %r2, 1;", None),
        ("add.u64 %r1, %d2, 1;", "wider than its register"),
        ("frobnicate.b32 %r1, %r2;", "frobnicate is not implemented"),
        ("shfl.sync.bfly.b32 %r3, %t, 1, 31, 0xffff;", "a part of a warp"),
        (".pragma_of_another_time 1;", "is not understood"),
    ],
)
def test_what_is_not_understood_is_refused(body: str, message: str | None) -> None:
    if message is None:
        execute(body)
        return
    with pytest.raises(Fault, match=message):
        execute(body)
