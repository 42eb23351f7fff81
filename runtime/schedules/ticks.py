"""What the schedules of stream operators share: which rows of a state take a step, and when.

Every function takes rows (M) and clock (N), both int64, and two numbers: the steps between two
indices of a value (`rate`) and the step of index 0 (`delay`). It returns 0, or 1 if there is no
such row; nothing is read or written for a row that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from bincompile.runtime.schedules.common import return_flag


class Steps(NamedTuple):
    """The rows that take a step, as a function takes them."""

    count: Any
    streams: Any
    rows: Any
    clock: Any
    rate: Any
    delay: Any


@contextmanager
def function(name: str) -> Iterator[Any]:
    """A function under this name; gives the builder of its body."""
    from tvm.tirx.script import builder as T

    with T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        yield T


def tensor(T: Any, name: str, shape: tuple[Any, ...], dtype: str) -> Any:
    """An argument of the function being built, as unaligned as a slice of a tensor may be."""
    align = max(1, {"bool": 1}.get(dtype) or int("".join(c for c in dtype if c.isdigit())) // 8)
    return T.match_buffer(T.arg(name, T.handle()), shape, dtype, align=align)


def steps(T: Any, count: Any, streams: Any) -> Steps:
    """The next four arguments of the function being built."""
    return Steps(count, streams, tensor(T, "rows", (count,), "int64"),
                 tensor(T, "clock", (streams,), "int64"), T.arg("rate", T.int64()),
                 T.arg("delay", T.int64()))


def each_step(T: Any, given: Steps, body: Callable[[Any, Any, Any], None]) -> None:
    """`body(place, row, index)` for every row that takes a step, then the function's result."""
    bad = T.alloc_buffer((1,), "int32")
    T.buffer_store(bad, T.int32(0), [0])
    with T.serial(0, given.count) as place:
        local = T.alloc_buffer((2,), "int64")  # else they are spelled out at each use
        T.buffer_store(local, given.rows[place], [0])
        row, index = local[0], local[1]
        with T.If(T.And(row >= 0, row < given.streams)):
            with T.Then():
                T.buffer_store(local, index_of(T, given, row), [1])
                body(place, row, index)
            with T.Else():
                T.buffer_store(bad, T.int32(1), [0])
    return_flag(T, bad)


def index_of(T: Any, given: Steps, row: Any) -> Any:
    """The index that a step computes for a row: below 0 before the first."""
    return T.int64(0) - T.floordiv(given.delay - given.clock[row], given.rate)
