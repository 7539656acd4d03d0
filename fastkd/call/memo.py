"""The calls of kd_loss that have been checked: an equal call is not checked again.

The checks of small calls take longer than their kernels. All checks but those of values depend on a call's options, and
on the shapes, dtypes, devices and layouts of its tensors. So does the choice of the backend, which also depends on two
environment variables. :func:`key_of` collects these facts; it returns no key for a call that must be checked each time.
Values, such as those that FASTKD_CHECK=1 checks, are in no key.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.call.checks import LossCall
from fastkd.call.contract import Rows, Want
from fastkd.core.environment import variables
from fastkd.divergences import Divergence

Key = tuple[Any, ...]
# A call with a value of another type, such as a tensor, is checked each time. So is a call with a NumPy number: it
# equals Python's number.
PLAIN = frozenset((type(None), bool, int, float, str, Divergence))
# How many calls are remembered. Beyond that, all are forgotten, so batches of ever new shapes hold little memory.
LIMIT = 1024

_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor


class Checked(NamedTuple):
    """What the checks of a call returned, and its backend.

    `call` has no tensors, which the memo would keep alive; checks.with_rows adds those of another call.
    """

    call: LossCall
    want: Want
    kernels: Any  # from fastkd.engine.backend.kernels_for


# By key, the types of the options, and the checked call. Types matter because True == 1 == 1.0, and not every option
# accepts all three.
_checked: dict[Key, tuple[tuple[type, ...], Checked]] = {}
_lock = threading.Lock()


def key_of(tensors: Iterable[object], options: tuple[object, ...]) -> Key | None:
    """Everything that the checks of a call depend on; None if the call must be checked each time.

    The checks depend on more than the key for tensors of a subclass and for tensors that a transform traces, and, under
    FASTKD_CHECK=1, on values. The options come first.
    """
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0:
        return None
    check, *environment = variables("FASTKD_CHECK", "FASTKD_BACKEND", "FASTKD_STRICT")
    if check == "1":
        return None
    facts: list[object] = [options, torch.is_grad_enabled(), *environment]
    for tensor in tensors:
        if tensor is None:
            facts.append(None)
        elif type(tensor) is not Tensor or tensor.is_nested or _is_transformed(tensor):
            return None
        else:
            facts.append(
                (tensor.shape, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad)
            )
    return tuple(facts)


def recall(key: Key | None) -> Checked | None:
    """What is remembered of an equal call; None if there was none."""
    if key is None:
        return None
    try:
        known = _checked.get(key)
    except TypeError:  # an option, such as a list, has no hash
        return None
    return None if known is None or known[0] != tuple(map(type, key[0])) else known[1]


def remember(key: Key | None, call: LossCall, want: Want, kernels: Any) -> None:
    """Remember a call that has been checked, if it has a key and its options are of PLAIN types."""
    if key is None or not PLAIN.issuperset(types := tuple(map(type, key[0]))):
        return
    if isinstance(call.counted, Tensor) or any(tensor is not None for tensor in call.rows):
        call = call._replace(rows=Rows(), counted=0)
    with _lock:
        if len(_checked) >= LIMIT:
            _checked.clear()
        _checked[key] = types, Checked(call, want, kernels)


def forget() -> None:
    """Forget all calls, as before the first one."""
    with _lock:
        _checked.clear()
