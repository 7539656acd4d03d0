"""The one table of the option values that tests use: valid ones, invalid ones, and schedules.

TRIED has an entry for each row of fastkd.call.options.TABLE. The tests of backends, sparse teachers, shards, compiled
graphs and error messages take their options from it, so a new option needs an entry here and no other change of these
tests. tests/project/test_options.py lists the tests, and checks that every option changes the results of its sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.accuracy import labels_for

Sets = dict[str, dict[str, Any]]


class Tried(NamedTuple):
    """How tests use one option."""

    # Names, and options of calls whose results depend on this option. The first set of each option is in BRIEF, for
    # tests of slow backends; others exercise a pair that shares a factor in the formulas. "labels" asks for labels.
    sets: Sets
    # Values for the two calls that pass every option at once. At least one of them differs from the default.
    together: tuple[Any, Any]
    # (value, type of the error, its message) for calls of kd_loss without labels.
    invalid: tuple[tuple[Any, type[Exception], str], ...]
    # The options of a call, as a function of the progress of a schedule in [0, 1]. None: the option is a constant of a
    # compiled graph.
    schedule: Callable[[float], dict[str, Any]] | None = None
    # Whether a TopK accepts values other than the default.
    sparse: bool = True


TRIED: dict[str, Tried] = {
    "alpha": Tried(
        {
            "hard labels, T": {"alpha": 0.4, "labels": True, "temperature": 4.0},
            "hard labels": {"alpha": 0.4, "labels": True},
            "only hard labels": {"alpha": 0.0, "labels": True, "temperature": 2.0},
        },
        together=(0.3, 0.5),
        invalid=(
            (0.5, ValueError, "labels are needed for the cross-entropy term where alpha < 1; alpha is 0.5"),
            (1.5, ValueError, "alpha must be in [0, 1], got 1.5"),
            (-0.5, ValueError, "alpha must be in [0, 1], got -0.5"),
            (float("nan"), ValueError, "alpha must be in [0, 1], got nan"),
            ("0.5", TypeError, "alpha must be a number, got str"),
            (torch.tensor(0.5), TypeError, "alpha must be a number, got Tensor"),
        ),
        schedule=lambda x: {"alpha": 1.0 - x},
    ),
    "temperature": Tried(
        {"temperature": {"temperature": 3.0}, "low temperature": {"temperature": 0.25}},
        together=(2.5, 1.5),
        invalid=(
            (0.0, ValueError, "temperature must be positive and finite, got 0.0"),
            (-1, ValueError, "temperature must be positive and finite, got -1"),
            (float("nan"), ValueError, "temperature must be positive and finite, got nan"),
            (float("inf"), ValueError, "temperature must be positive and finite, got inf"),
            ("2", TypeError, "temperature must be a number or a tensor, got str"),
            (None, TypeError, "temperature must be a number or a tensor, got NoneType"),
            (1e-31, ValueError, "temperature must be of a size between 1e-30 and 1e+30, got 1e-31"),
        ),
        schedule=lambda x: {"temperature": 4.0 - 3.0 * x},
    ),
    "teacher_temperature": Tried(
        {
            "two temperatures": {"temperature": 2.0, "teacher_temperature": 0.5},
            "teacher temperature alone": {"teacher_temperature": 4.0},
        },
        together=(1.5, 3.0),
        invalid=((0.0, ValueError, "teacher_temperature must be positive and finite, got 0.0"),),
        schedule=lambda x: {"temperature": 2.0, "teacher_temperature": 4.0 - 3.0 * x},
    ),
    "scale_by_temperature": Tried(
        {
            "no T^2": {"temperature": 3.0, "scale_by_temperature": False},
            "hard labels, T, no T^2": {
                "alpha": 0.7, "labels": True, "temperature": 4.0, "scale_by_temperature": False,
            },
        },
        together=(True, False),
        invalid=(("no", TypeError, "scale_by_temperature must be True or False, got str"),),
    ),
    "label_smoothing": Tried(
        {
            "smoothed labels": {"alpha": 0.4, "labels": True, "label_smoothing": 0.2},
            "only smoothed labels": {
                "alpha": 0.0, "labels": True, "label_smoothing": 0.9, "temperature": 0.5,
            },
        },
        together=(0.1, 0.3),
        invalid=(
            (0.1, ValueError, "label_smoothing needs labels; labels is None"),
            (1.0, ValueError, "label_smoothing must be in [0, 1), got 1.0"),
            (-0.1, ValueError, "label_smoothing must be in [0, 1), got -0.1"),
            (None, TypeError, "label_smoothing must be a number, got NoneType"),
        ),
        schedule=lambda x: {"alpha": 0.5, "label_smoothing": 0.5 * x},
    ),
    "ignore_index": Tried(
        {"ignored": {"labels": True, "ignore_index": 3}},
        together=(3, -1),
        invalid=(
            (-1.0, TypeError, "ignore_index must be an int, got float"),
            (None, TypeError, "ignore_index must be an int, got NoneType"),
            (2**63, ValueError, f"ignore_index must fit in 64 bits, got {2**63}"),
        ),
    ),
    "logit_scale": Tried(
        {
            "logit scale": {"logit_scale": 0.125, "temperature": 2.0},
            "negative logit scale": {
                "logit_scale": -0.5, "teacher_logit_scale": -1.5, "alpha": 0.4, "labels": True,
            },
        },
        together=(0.7, -2.0),
        invalid=(
            (0.0, ValueError, "logit_scale must be finite and not 0, got 0.0"),
            (float("inf"), ValueError, "logit_scale must be finite and not 0, got inf"),
            (None, TypeError, "logit_scale must be a number, got NoneType"),
            (-1e-40, ValueError, "logit_scale must be of a size between 1e-30 and 1e+30, got -1e-40"),
        ),
        schedule=lambda x: {"logit_scale": 0.5 + x},
    ),
    "softcap": Tried(
        {"softcap": {"softcap": 5.0, "temperature": 2.0}},
        together=(12.0, 30.0),
        invalid=(
            (0.0, ValueError, "softcap must be positive and finite, or None for none; got 0.0"),
            (-30.0, ValueError, "softcap must be positive and finite, or None for none; got -30.0"),
            (float("inf"), ValueError, "softcap must be positive and finite, or None for none; got inf"),
            ("30", TypeError, "softcap must be a number or None, got str"),
            (10**400, ValueError, f"softcap must be of a size between 1e-30 and 1e+30, got {10**400}"),
        ),
        schedule=lambda x: {"softcap": 5.0 + 5.0 * x},
    ),
    "teacher_logit_scale": Tried(
        {"teacher logit scale": {"teacher_logit_scale": 1.75, "temperature": 2.0}},
        together=(1.2, 0.5),
        invalid=(
            (0, ValueError, "teacher_logit_scale must be finite and not 0, got 0"),
            (float("nan"), ValueError, "teacher_logit_scale must be finite and not 0, got nan"),
        ),
        schedule=lambda x: {"teacher_logit_scale": 1.5 - x},
        sparse=False,
    ),
    "teacher_softcap": Tried(
        {"teacher softcap": {"teacher_softcap": 4.0}},
        together=(20.0, 15.0),
        invalid=(
            (0, ValueError, "teacher_softcap must be positive and finite, or None for none; got 0"),
        ),
        schedule=lambda x: {"teacher_softcap": 9.0 - 5.0 * x},
        sparse=False,
    ),
}  # fmt: skip

# Every option at once, with labels and columns of padding.
TOGETHER: Sets = {
    name: {option: tried.together[number] for option, tried in TRIED.items()}
    | {"labels": True, "vocab_size": True}
    for number, name in enumerate(("everything", "everything, other values"))
}
BRIEF: Sets = {}
ALL: Sets = {"defaults": {}}
for _tried in TRIED.values():
    BRIEF |= dict(list(_tried.sets.items())[:1])
    ALL |= _tried.sets
BRIEF |= TOGETHER
ALL |= TOGETHER


def for_topk(sets: Sets) -> Sets:
    """The sets that a TopK accepts: without the options that it refuses, and without the sets of those options."""
    refused = {name for name, tried in TRIED.items() if not tried.sparse}
    own = {name for option in refused for name in TRIED[option].sets}
    return {
        name: {option: value for option, value in options.items() if option not in refused}
        for name, options in sets.items()
        if name not in own
    }


def prepared(
    options: dict[str, Any], *lead: int, columns: int, seed: int
) -> tuple[Tensor | None, dict[str, Any]]:
    """(labels of rows [*lead], options of kd_loss) for a set of options.

    There are labels if the set asks for them; a fifth of them are ignore_index. Labels, and vocab_size if the set asks
    for padding, are for that number of columns.
    """
    labels = None
    if options.get("labels"):
        labels = dropped_by(options, labels_for(*lead, vocabulary=columns, seed=seed, ignored=0.2))
    return labels, for_kd_loss(options, columns)


def dropped_by(options: dict[str, Any], labels: Tensor) -> Tensor:
    """Labels of which -100 is replaced with the ignore_index of these options."""
    return labels.masked_fill(labels == -100, options.get("ignore_index", -100))


def for_kd_loss(options: dict[str, Any], columns: int) -> dict[str, Any]:
    """The options of kd_loss for a set: without labels, and with vocab_size if the set asks for padding."""
    options = {name: value for name, value in options.items() if name != "labels"}
    return options | {"vocab_size": columns} if options.pop("vocab_size", False) else options
