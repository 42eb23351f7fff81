"""Recorded calls of compiled functions as csrc/replay.c takes them, and that library's function."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bincompile.runtime import native
from bincompile.runtime.recording import Recorded

# Kinds of arguments in tvm-ffi's C interface.
INT, BOOL, FLOAT, DLTENSOR, TENSOR = 1, 2, 3, 7, 70
CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "complex": 5, "bool": 6}
CPU = 1


class Any_(ctypes.Structure):
    """An argument: its kind, and the number or the address that it is."""

    _fields_ = (("kind", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_int64))


class Tensor(ctypes.Structure):
    """A tensor as DLPack describes it."""

    _fields_ = (("data", ctypes.c_void_p), ("device_type", ctypes.c_int32),
                ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8),
                ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p),
                ("byte_offset", ctypes.c_uint64))


class Call(ctypes.Structure):
    """A call of a function of tvm-ffi, and what it returned when it was recorded."""

    _fields_ = (("function", ctypes.c_void_p), ("self", ctypes.c_void_p),
                ("args", ctypes.c_void_p), ("count", ctypes.c_int64),
                ("expected", ctypes.c_int64))


class Part(ctypes.Structure):
    """Calls in order, the tensors that tokens are copied to before and results come from after.

    At the end each number of the clock is one more.
    """

    _fields_ = (("calls", ctypes.c_void_p), ("count", ctypes.c_int64),
                ("staged", ctypes.c_void_p), ("tokens", ctypes.c_int64),
                ("made", ctypes.c_void_p), ("results", ctypes.c_int64),
                ("clock", ctypes.c_void_p), ("rows", ctypes.c_int64))


@functools.cache
def library() -> tuple[Callable[..., int], int, Any] | None:
    """The function that makes recorded calls, the address of tvm-ffi's own call, and `copy`.

    None where there is neither a built library nor a C compiler.
    """
    path = native.replay_library()
    if path is None:
        return None
    import tvm_ffi
    from tvm_ffi.libinfo import find_libtvm_ffi

    called = ctypes.CDLL(find_libtvm_ffi()).TVMFFIFunctionCall
    module = tvm_ffi.load_module(str(path))
    return module["replay"], ctypes.cast(called, ctypes.c_void_p).value or 0, module["copy"]


def copied(source: torch.Tensor, place: torch.Tensor) -> Recorded | None:
    """The call that copies a tensor to another one of its sizes; None where C doesn't do it."""
    found = library()
    known = source.dtype == place.dtype and source.shape == place.shape \
        and is_known(source) and is_known(place)
    return (found[2], (source.detach(), place), None) if found is not None and known else None


def is_plain(recorded: Recorded) -> bool:
    """Whether a call can be made again from C: its arguments are tensors and numbers."""
    import tvm_ffi

    function, args, given = recorded
    return isinstance(function, tvm_ffi.Function) and isinstance(given, int | None) and all(
        arg is None or isinstance(arg, int | float | tvm_ffi.Tensor)
        or (isinstance(arg, torch.Tensor) and is_known(arg)) for arg in args)


def is_known(value: torch.Tensor) -> bool:
    """Whether a tensor's memory holds its numbers as they are, of a type that DLPack has."""
    return value.device.type == "cpu" and _letters(value.dtype) in CODES and not (
        value.is_conj() or value.is_neg())


def _letters(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").rstrip("0123456789")


class Calls:
    """A part that C can run; what its addresses point to lives as long as it does.

    Args:
        recorded: calls that `is_plain` accepts.
        staged: the tensors that tokens are copied to before.
        made: the tensors that results are copied from after.
        clock: int64, whose numbers are one more in the end.
    """

    def __init__(self, recorded: Sequence[Recorded], staged: Sequence[torch.Tensor] = (),
                 made: Sequence[torch.Tensor] = (), clock: torch.Tensor | None = None) -> None:
        self._alive: list[Any] = [recorded, staged, made, clock]
        calls = (Call * len(recorded))(*map(self._call, recorded))
        self._part = Part(self._kept(calls), len(recorded),
                          self._kept((Tensor * len(staged))(*map(self._tensor, staged))),
                          len(staged),
                          self._kept((Tensor * len(made))(*map(self._tensor, made))), len(made),
                          0 if clock is None else clock.data_ptr(),
                          0 if clock is None else clock.numel())
        self.address = ctypes.addressof(self._part)

    def _kept(self, value: Any) -> int:
        self._alive.append(value)
        return ctypes.addressof(value)

    def _call(self, recorded: Recorded) -> Call:
        found = library()
        assert found is not None
        function, args, given = recorded
        arguments = (Any_ * len(args))(*map(self._argument, args))
        return Call(found[1], function.__chandle__(), self._kept(arguments), len(args), given or 0)

    def _argument(self, arg: Any) -> Any_:
        if isinstance(arg, torch.Tensor):
            return Any_(DLTENSOR, 0, self._kept(self._tensor(arg)))
        if isinstance(arg, bool | int):
            return Any_(BOOL if isinstance(arg, bool) else INT, 0, int(arg))
        if isinstance(arg, float):
            return Any_(FLOAT, 0, ctypes.c_int64.from_buffer_copy(ctypes.c_double(arg)).value)
        return Any_() if arg is None else Any_(TENSOR, 0, arg.__chandle__())

    def _tensor(self, value: torch.Tensor) -> Tensor:
        sizes = ctypes.c_int64 * max(value.ndim, 1)
        return Tensor(value.data_ptr(), CPU, 0, value.ndim, CODES[_letters(value.dtype)],
                      value.dtype.itemsize * 8, 1, self._kept(sizes(*value.shape)),
                      self._kept(sizes(*value.stride())), 0)
