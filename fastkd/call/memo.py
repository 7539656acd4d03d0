"""The calls of kd_loss that have been checked: an equal call is not checked again.

The checks of small calls take longer than their kernels. All checks but those of values depend on a call's options, and
on the shapes, dtypes, devices and layouts of its tensors. :func:`key_of` collects these facts; it returns no key for a
call that must be checked each time. Values, such as those that FASTKD_CHECK=1 checks, are in no key.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.call.checks import LossCall, checking
from fastkd.call.contract import Rows, Want
from fastkd.divergences import Divergence

Key = tuple[Any, ...]
# A call with a value of another type, such as a tensor, is checked each time. So is a call with a NumPy number: it
# equals Python's number.
PLAIN = frozenset((type(None), bool, int, float, str, Divergence))
# How many calls are remembered. Beyond that, all are forgotten, so batches of ever new shapes hold little memory.
LIMIT = 1024

_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor


class Checked(NamedTuple):
    """What the checks of a call returned.

    `call` has no tensors, which the memo would keep alive; checks.with_rows adds those of another call.
    """

    call: LossCall
    want: Want


_checked: dict[Key, Checked] = {}
_lock = threading.Lock()


def key_of(tensors: Iterable[object], options: tuple[object, ...]) -> Key | None:
    """Everything that the checks of a call depend on; None if the call must be checked each time.

    The checks depend on more than the key for tensors of a subclass and for tensors that a transform traces, and, under
    FASTKD_CHECK=1, on values.
    """
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0 or checking():
        return None
    # Types are a part of the key because True == 1 == 1.0, and not every option accepts all three.
    types = tuple(map(type, options))
    if not PLAIN.issuperset(types):
        return None
    facts: list[object] = [torch.is_grad_enabled(), options, types]
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
    """What the checks of an equal call returned; None if there was none."""
    return None if key is None else _checked.get(key)


def remember(key: Key | None, call: LossCall, want: Want) -> None:
    """Remember a call that has been checked, if it has a key."""
    if key is None:
        return
    if isinstance(call.counted, Tensor) or any(tensor is not None for tensor in call.rows):
        call = call._replace(rows=Rows(), counted=0)
    with _lock:
        if len(_checked) >= LIMIT:
            _checked.clear()
        _checked[key] = Checked(call, want)


def forget() -> None:
    """Forget all calls, as before the first one."""
    with _lock:
        _checked.clear()
