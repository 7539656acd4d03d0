"""The loss of a draft model on the CPU: forward and gradient, beside the formula in PyTorch.

    python bench/studies/draft.py

Like speculators' eager losses, the formula computes softmax and log-softmax in float32 anew for each term. `cut` has
target logits of the draft vocabulary only. `whole` has the target's vocabulary: PyTorch takes the draft tokens' logits
in each step, and so does fastkd, which also computes the acceptance of the whole vocabulary. Contenders take turns
within a round; a time is the median over the rounds, and a ratio the median of the ratios within rounds. Memory is the
peak of a step beyond the logits, gradient included, in tensors of the draft model's logits, measured in a process of
its own as in memory.py. The error is the largest of any loss per row, against float64 on fewer rows.
"""

from __future__ import annotations

import math
from typing import Any

import study
import torch
from cases import DTYPES, TIMED, random_logits
from measure import Contender, in_a_process, interleave, milliseconds, peak_extra, ratio
from study import emit, progress
from tables import Table
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from fastkd.response import draft_loss

CASES = ((256, 32_000, 128_256),)
LOSSES: tuple[dict[str, float], ...] = (
    {"forward_kl": 1.0}, {"cross_entropy": 0.1, "tvd": 0.9}, {"nla": 1.0}, {"lk_hybrid": 1.0},
    {"forward_kl": 0.4, "reverse_kl": 0.3, "jsd": 0.2, "tvd": 0.1},
)  # fmt: skip
ROWS_OF_ERRORS = 4
COLUMNS = ("N x D of V", "logits", "loss", "target", "", "ms", "of fastkd's", "memory", "error")


def formula(
    student: Tensor, teacher: Tensor, losses: dict[str, float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The loss of each row, from target logits of the draft vocabulary."""

    def forward_kl() -> Tensor:
        log_q, p = student.log_softmax(-1, dtype=dtype), teacher.softmax(-1, dtype=dtype)
        return kl_div(log_q, p, reduction="none").sum(-1)

    def reverse_kl() -> Tensor:
        log_p, q = teacher.log_softmax(-1, dtype=dtype), student.softmax(-1, dtype=dtype)
        return (q * (q.log() - log_p)).sum(-1)

    def jsd() -> Tensor:
        log_q, log_p = (x.log_softmax(-1, dtype=dtype) for x in (student, teacher))
        log_m = torch.logaddexp(log_q, log_p) - math.log(2.0)
        to_p, to_q = (kl_div(log_m, x, reduction="none", log_target=True) for x in (log_p, log_q))
        return 0.5 * (to_p + to_q).sum(-1)

    def acceptance() -> Tensor:
        pair = (logits.softmax(-1, dtype=dtype) for logits in (student, teacher))
        return torch.minimum(*pair).sum(-1)

    def lk_hybrid() -> Tensor:
        accepted = acceptance()
        share = torch.exp(-3.0 * accepted.detach())
        return share * forward_kl() + (1.0 - share) * (1.0 - accepted)

    terms = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": jsd,
        "cross_entropy": lambda: cross_entropy(student, teacher.argmax(-1), reduction="none"),
        "tvd": lambda: 1.0 - acceptance(),
        "nla": lambda: -acceptance().clamp_min(1e-5).log(),
        "lk_hybrid": lk_hybrid,
    }
    total = torch.zeros(len(student), dtype=dtype)
    for name, weight in losses.items():
        total = total + weight * terms[name]()
    return total


def make(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(the draft model's logits, the target's, the target's token of each draft token for a whole target)."""
    rows, size, vocabulary = case["shape"]
    dtype = DTYPES[case["dtype"]]
    if case["target"] == "cut":
        student, teacher = random_logits(rows, size, dtype=dtype, count=2)
        return student.requires_grad_(), teacher, None
    (student,) = random_logits(rows, size, dtype=dtype, count=1)
    (teacher,) = random_logits(rows, vocabulary, dtype=dtype, count=1)
    tokens = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[:size]
    return student.requires_grad_(), teacher, tokens.sort().values


def rows_of(case: dict[str, Any], student: Tensor, teacher: Tensor, ids: Tensor | None) -> Tensor:
    """The loss of each row by the case's contender."""
    if case["contender"] == "fastkd":
        return draft_loss(student, teacher, case["losses"], draft_to_target=ids, reduction="none")
    return formula(student, teacher if ids is None else teacher[:, ids], case["losses"])


def contender(case: dict[str, Any]) -> tuple[Contender, Tensor]:
    """(forward and backward, the draft model's logits)."""
    student, teacher, ids = make(case)

    def drop_gradient() -> None:
        student.grad = None

    return Contender(
        lambda: rows_of(case, student, teacher, ids).mean().backward(), drop_gradient
    ), student


def measure(case: dict[str, Any]) -> float:
    """The peak of a step beyond the logits, in tensors of the draft model's logits."""
    (step, drop_gradient), student = contender(case)
    step()
    drop_gradient()
    return peak_extra(step) / student.nbytes


def error(case: dict[str, Any]) -> float:
    """The largest absolute error of a row's loss with a cut target, against float64."""
    shape = (ROWS_OF_ERRORS, *case["shape"][1:])
    student, teacher, _ = make(case | {"shape": shape, "target": "cut"})
    exact = formula(student.detach().double(), teacher.double(), case["losses"], torch.float64)
    found = rows_of(case, student, teacher, None).detach()
    return float((found - exact).abs().max())


def main() -> None:
    """The command line."""
    parser = study.command_line(__doc__, rounds=7, dtypes=TIMED)
    parser.add_argument("--cases", nargs="+", type=study.shape_of, default=CASES, metavar="NxDxV")
    arguments = study.parsed(parser)
    table = Table("Draft losses, forward and gradient", COLUMNS)
    measurements: list[dict[str, Any]] = []
    for shape in arguments.cases:
        label = "{:,} x {:,} of {:,}".format(*shape)
        for dtype in arguments.dtypes:
            for losses in LOSSES:
                for target in ("cut", "whole"):
                    progress(label, dtype, "+".join(losses), target)
                    cases = {
                        name: {
                            "shape": shape, "dtype": dtype, "losses": losses, "target": target,
                            "contender": name,
                        }
                        for name in ("fastkd", "PyTorch")
                    }  # fmt: skip
                    steps = {name: contender(case)[0] for name, case in cases.items()}
                    seconds = interleave(steps, arguments.rounds)
                    del steps
                    for name, case in cases.items():
                        memory = in_a_process(measure, case, arguments.threads)
                        off, times = error(case), ratio(seconds, name, "fastkd")
                        table.rows.append(
                            [label, dtype, "+".join(losses), target, name, milliseconds(seconds[name]),
                             f"{times:.1f}x", f"{memory:.1f}", f"{off:.1e}"]
                        )  # fmt: skip
                        measurements.append(
                            case
                            | {
                                "seconds": seconds[name],
                                "ratio": times,
                                "peak": memory,
                                "error": off,
                            }
                        )
    emit(arguments, [table], measurements)


if __name__ == "__main__":
    main()
