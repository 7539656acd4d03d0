"""A cache of the oracles' results, for the next backend.

Most tests need the exact results of the same input once per backend and once per way to split a row. Computing them
takes several times as long as the loss under test, so the results are cached by the values of the tensors.
"""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

# Bytes of results that a process caches: enough for all tests of one file.
LIMIT = 2**27
T = TypeVar("T", bound=Callable[..., Any])

_kept: OrderedDict[bytes, tuple[Any, list[int]]] = OrderedDict()
_held = 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _add(digest: Any, value: Any) -> None:
    """Add the type and the contents of a value to a digest."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)} {value.device};".encode())
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        digest.update(plain.view(-1).view(torch.uint8).numpy())
    elif isinstance(value, (tuple, list)):
        digest.update(f"{type(value).__name__} {len(value)};".encode())
        for part in value:
            _add(digest, part)
    elif isinstance(value, dict):
        _add(digest, sorted(value.items()))
    else:
        assert value is None or isinstance(value, (bool, int, float, str, torch.dtype)), value
        digest.update(f"{type(value).__name__} {value!r};".encode())


def remembered(function: T) -> T:
    """Cache the results of a function of tensors and plain values. Callers must not change a result."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        global _held
        digest = hashlib.blake2b(function.__qualname__.encode(), digest_size=16)
        _add(digest, arguments)
        _add(digest, options)
        key = digest.digest()
        if key in _kept:
            _kept.move_to_end(key)
            result, versions = _kept[key]
            now = [tensor._version for tensor in _tensors(result)]
            assert now == versions, f"a result of {function.__qualname__} was changed in place"
            return result
        result = function(*arguments, **options)
        _kept[key] = result, [tensor._version for tensor in _tensors(result)]
        _held += sum(tensor.nbytes for tensor in _tensors(result))
        while _held > LIMIT:
            _, (oldest, _) = _kept.popitem(last=False)
            _held -= sum(tensor.nbytes for tensor in _tensors(oldest))
        return result

    return call  # type: ignore[return-value]
