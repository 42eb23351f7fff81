"""Compiled functions, and which of them are called, with what, while a recording runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

Recorded = tuple[Any, tuple[Any, ...], Any]  # a compiled function, its arguments, what it gave
_recordings: dict[int, list[Recorded]] = {}  # by thread


class Functions:
    """The compiled functions of a library by name; their calls can be recorded.

    Args:
        module: the library as tvm-ffi opened it.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._known: dict[str, Callable[..., Any]] = {}

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self._known:
            self._known[name] = _recordable(self._module[name])
        return self._known[name]


def _recordable(function: Any) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if not _recordings:
            return function(*args)
        given = function(*args)
        calls = _recordings.get(threading.get_ident())
        if calls is not None:
            calls.append((function, args, given))
        return given

    return call


@contextlib.contextmanager
def recording() -> Iterator[list[Recorded]]:
    """The calls of compiled functions that this thread makes inside, in order.

    Example:
        >>> twice = _recordable(lambda x: 2 * x)
        >>> with recording() as calls:
        ...     _ = twice(3)
        >>> [(args, given) for _, args, given in calls]
        [((3,), 6)]
    """
    own, before = threading.get_ident(), _recordings.get(threading.get_ident())
    calls: list[Recorded] = []
    _recordings[own] = calls
    try:
        yield calls
    finally:
        if before is None:
            del _recordings[own]
        else:
            _recordings[own] = before
