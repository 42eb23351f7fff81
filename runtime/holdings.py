"""Which memory compiled programs hold: what its code, its kernels and its stages can reach."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from bincompile.op import Operator
from bincompile.program import Program
from bincompile.runtime.bound import Bound
from bincompile.runtime.executor import Executable
from bincompile.runtime.straight_line import FILE
from bincompile.stages import StageModule

_WORDS = (torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.uint64)


def holdings(*programs: tuple[Program, Executable]) -> dict[str, int]:
    """Bytes by what they are: "bits" (packed), "numbers" (all other tensors) and "planned".

    A piece of memory counts once, whole, however many tensors lie in it; memory of the user's model
    counts as far as the compiled program itself holds it. "planned" is the memory of results
    inside the program, which is there from the second call at some sizes on.
    """
    found: dict[int, tuple[str, int]] = {}
    for tensor in _tensors([root for program, executable in programs
                            for root in (executable.function, *executable.bound.values(),
                                         *(stage.graph_module for stage in program.stages))]):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in found:
            kind = "bits" if tensor.dtype in _WORDS else "numbers"
            found[storage.data_ptr()] = kind, storage.nbytes()
    total = dict.fromkeys(("bits", "numbers", "planned"), 0)
    for kind, size in found.values():
        total[kind] += size
    return total | {"planned": sum(executable.memory.nbytes for _, executable in programs)}


def _tensors(roots: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Every tensor that can be reached by way of functions and plain containers."""
    pending, seen = list(roots), set[int]()
    kept: list[Any] = []  # so that no number in `seen` is given to another object
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kept.append(value)
        if isinstance(value, torch.Tensor):
            if not (isinstance(value, FakeTensor) or value.is_meta):
                yield value
        elif (foreign := sys.modules.get("tvm_ffi")) and isinstance(value, foreign.Tensor):
            yield torch.from_dlpack(value)
        else:
            pending += _parts(value)


def _parts(value: Any) -> Iterable[Any]:
    """What an object holds that may lead to tensors."""
    if isinstance(value, types.FunctionType):
        written = value.__code__.co_filename == FILE
        return (*(value.__globals__.values() if written else ()), *(value.__defaults__ or ()),
                *(cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)))
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, types.MethodType):
        return (value.__func__, value.__self__)
    if isinstance(value, Bound):
        return (value.shape, value.into)
    if isinstance(value, StageModule):
        return value.sources.values()
    if isinstance(value, Mapping):
        return value.values() if isinstance(value, dict | types.MappingProxyType) else ()
    if isinstance(value, list | tuple | set | frozenset):
        return value
    own = type(value).__module__.startswith("bincompile.")
    if own and not isinstance(value, Program | Operator | type | fx.GraphModule):
        return getattr(value, "__dict__", {}).values()
    return ()


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (an empty cell raises)
    except ValueError:
        return False
    return True
