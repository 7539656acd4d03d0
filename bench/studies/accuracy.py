"""Error of loss and gradient against float64: fastkd, plain PyTorch in float32, and in bfloat16.

    python bench/studies/accuracy.py
    TRITON_INTERPRET=1 python bench/studies/accuracy.py --worst [--backend portable cpu cuda triton]

The exact result is the plain composition in float64 on the same logits; bfloat16 logits are exact numbers too. Errors
are per row: the loss's, relative to the loss, and the gradient's largest, relative to the row's largest entry. The
tables have the median and the largest over rows and seeds.

The gradient of bfloat16 logits is bfloat16 for every contender, so rounding its entries alone costs up to half of 2^-8.
fastkd should have at most the error of PyTorch that upcasts to float32. The last column says whether that holds for
both the median and the largest error.

With --worst it prints one table: the worst ratio of fastkd's error to that of float32 PyTorch on peaked, close and real
rows, over the value and both gradients of each divergence. tests/support/sure_rows.py describes the method. Without a
GPU, cuda is the source of the kernels, compiled for the host, and triton needs its interpreter. These two get no real
rows, and triton only rows of 40 columns. cpu/baseline is the cpu backend without newer instructions.
"""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import study
import torch
from cases import DTYPES, TIMED, Result, Tensors, by_definition
from peers import Loss, Rows, eager_rows, fastkd_loss, published
from study import emit, progress
from support import cuda_emulation, sure_rows
from tables import Table
from torch import Tensor

import fastkd

ROWS = 32
CONTENDERS = ("fastkd", "float32", "bfloat16")


def normal(generator: torch.Generator, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Normal logits of standard deviation 3: (student, teacher)."""
    student, teacher = (3 * torch.randn(ROWS, vocabulary, generator=generator) for _ in range(2))
    return student, teacher


def peaked(generator: torch.Generator, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Logits where one token has nearly all of the mass on both sides, as is common in language models."""
    student, teacher = normal(generator, vocabulary)
    token = torch.randint(vocabulary, (ROWS, 1), generator=generator)
    return student.scatter(-1, token, 22.0), teacher.scatter(-1, token, 25.0)


LOGITS = {"normal": normal, "peaked": peaked}


def errors(result: Result, exact: Result) -> dict[str, Tensor]:
    """The errors of each row."""
    [gradient], [exact_gradient] = result.gradients, exact.gradients
    largest = exact_gradient.abs().amax(-1)
    return {
        "loss": (result.rows - exact.rows).abs() / exact.rows.abs(),
        "gradient": (gradient - exact_gradient).abs().amax(-1) / largest,
    }


def survey(
    loss: Loss, logits: str, dtype: torch.dtype, seeds: int, vocabulary: int
) -> dict[str, dict[str, tuple[float, float]]]:
    """(median, largest) of the errors over all seeds, by loss or gradient and then by contender."""
    contenders: dict[str, Rows] = {
        "fastkd": fastkd_loss(loss, reduction="none"),
        "float32": eager_rows(loss, torch.float32),
    }
    if dtype == torch.bfloat16:
        contenders["bfloat16"] = eager_rows(loss, torch.bfloat16)
    found: dict[str, dict[str, list[Tensor]]] = {"loss": {}, "gradient": {}}
    for seed in range(seeds):
        student, teacher = LOGITS[logits](torch.Generator().manual_seed(seed), vocabulary)
        tensors = Tensors([student.to(dtype)], [teacher.to(dtype)])
        exact = by_definition(eager_rows(loss, torch.float64), tensors, torch.float64)
        for name, rows in contenders.items():
            for what, error in errors(by_definition(rows, tensors, dtype), exact).items():
                found[what].setdefault(name, []).append(error)
    return {
        what: {
            name: (float(torch.cat(each).median()), float(torch.cat(each).max()))
            for name, each in by_contender.items()
        }
        for what, by_contender in found.items()
    }


def rows_for(backend: str) -> list[Any]:
    """The cases of --worst, which are those of tests/losses/test_sure_rows.py."""
    cases = sure_rows.made_up((40,) if backend == "triton" else (40, 2500), (1e-3, 1e-6, 1e-9))
    return cases if backend in ("triton", "cuda") else [*cases, *sure_rows.all_real()]


def worst(variant: sure_rows.Variant, backend: str) -> str:
    """A cell of the table of ratios."""
    name, parameters = variant
    divergence = fastkd.DIVERGENCES[name](**parameters)
    backend, _, instructions = backend.partition("/")
    if backend == "cpu":
        from fastkd import _C

        _C.use_instruction_set(instructions or _C.instruction_sets()[0])
    found = []
    for case in rows_for(backend):
        exact, plain = (
            sure_rows.plain(case, dtype, divergence=name, parameters=parameters)
            for dtype in (torch.float64, torch.float32)
        )
        ours = sure_rows.run(
            lambda s, t: fastkd.kd_loss(
                s, t, divergence=divergence, reduction="none", backend=backend
            ),
            case,
        )
        for what, ratio in sure_rows.ratios(ours, plain, exact)._asdict().items():
            found.append((ratio, f"{what}, {case.name}"))
    ratio, where = max(found)
    return f"{ratio:.2f}" if ratio <= 1 else f"{ratio:.2f} ({where})"


def worst_table(arguments: argparse.Namespace) -> Table:
    """The table of --worst."""
    title = "Worst ratio of fastkd's error to that of float32 PyTorch, and where it is above 1"
    table = Table(title, ["divergence", *arguments.backend])
    with pytest.MonkeyPatch.context() as patch:
        if "cuda" in arguments.backend and not torch.cuda.is_available():
            cuda_emulation.install(cuda_emulation.host_module(), patch)
        for variant in sure_rows.VARIANTS:
            if variant[0] in arguments.divergences:
                progress(sure_rows.shown(variant))
                cells = [worst(variant, backend) for backend in arguments.backend]
                table.rows.append([sure_rows.shown(variant), *cells])
    return table


def main() -> None:
    """The command line."""
    parser = study.command_line(__doc__, dtypes=TIMED, divergences=[*fastkd.DIVERGENCES])
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--seeds", type=int, default=5, help=f"{ROWS} rows each")
    parser.add_argument("--worst", action="store_true", help="ratios on peaked and real rows")
    parser.add_argument("--backend", nargs="+", default=["cpu"], help="for --worst")
    arguments = study.parsed(parser)
    if arguments.worst:
        emit(arguments, [worst_table(arguments)])
        return
    columns = [
        "divergence",
        "logits",
        "dtype",
        *CONTENDERS,
        "fastkd / float32",
        "fastkd <= float32",
    ]
    titles = {
        "loss": "Relative error of a row's loss: median, largest",
        "gradient": "Largest error of a row's gradient, relative to its largest entry: median, largest",
    }
    tables = {what: Table(title, columns) for what, title in titles.items()}
    measurements: list[dict[str, Any]] = []
    for name in arguments.divergences:
        loss = published(name)
        for logits in LOGITS:
            for dtype in arguments.dtypes:
                progress(loss.label, logits, dtype)
                found = survey(loss, logits, DTYPES[dtype], arguments.seeds, arguments.vocabulary)
                for what, pairs in found.items():
                    ratios = [a / b for a, b in zip(pairs["fastkd"], pairs["float32"], strict=True)]
                    cells = [
                        "{:.1e}, {:.1e}".format(*pairs[key]) if key in pairs else "-"
                        for key in CONTENDERS
                    ]
                    cells += [
                        "{:.2f}x, {:.2f}x".format(*ratios),
                        "yes" if max(ratios) <= 1 else "no",
                    ]
                    tables[what].rows.append([loss.label, logits, dtype, *cells])
                    measurements.append(
                        {"of": what, "divergence": loss.label, "logits": logits, "dtype": dtype}
                        | {key: {"median": m, "largest": x} for key, (m, x) in pairs.items()}
                    )
    emit(arguments, list(tables.values()), measurements)


if __name__ == "__main__":
    main()
