"""Indices, windows, delays, running values and pooling of streams, compiled by TVM.

One function each, of any sizes; a step then is one compiled call after the other.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from bincompile.ops.ticks import check_clock
from bincompile.runtime.bound import Bound
from bincompile.runtime.kernels import Call, Kernel, host_reason
from bincompile.runtime.tvm import Recipe, load, obstacle
from bincompile.runtime.whole import put_back, whole

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.int32: "int32",
          torch.int64: "int64"}
# How the arguments of an operator become those of its function: the states, which other arguments
# become sizes of the result, and which numbers follow it.
STATES = {"stream_window": ("ring",), "stream_shift": ("ring",), "stream_scan": ("total",),
          "stream_pool": ("ring", "ends", "begin")}
FUNCTIONS = {"stream_index": ("stream_clock", "index"), "stream_filled": ("stream_clock", "filled"),
             "stream_window": ("stream_ring", "window"), "stream_shift": ("stream_ring", "shift"),
             "stream_scan": ("stream_scan", "scan"), "stream_pool": ("stream_pool", "pool")}
NUMBERS = {"stream_window": ("fill", "apart", "back"), "stream_shift": ("fill", "by")}


def _recipe(call: Call) -> Recipe:
    name = call.operator.name
    schedule = FUNCTIONS[name][0]
    if name not in STATES:
        return Recipe(schedule, {})
    dtype = DTYPES[call.value("token").dtype]
    if "kind" not in call.operator.arguments:
        return Recipe(schedule, {"dtype": dtype})
    wide = DTYPES[call.value(STATES[name][-1]).dtype]
    return Recipe(schedule, {"kind": call.value("kind"), "dtype": dtype, "wide": wide})


def _supports(call: Call) -> str | None:
    values = {name: call.value(name) for name in ("token", *STATES.get(call.operator.name, ()))
              if name in call.operator.arguments}
    stored = [name for name in (*values, "rows", "clock") if call.is_stored(name)]
    if stored:
        return f"{stored[0]} is stored"
    for name, value in values.items():
        if value.dtype not in DTYPES:
            return f"{name} of {value.dtype}"
    if values and 0 in values["token"].shape[1:]:
        return "tokens without elements"
    if values and call.arguments.get("kind") == "logsumexp" and (
            {v.dtype for v in values.values()} != {torch.float32}):
        return "logarithms in another dtype than float32"
    return host_reason(call) or obstacle(_recipe(call), call.target)


def _bind(call: Call) -> Bound:
    name = call.operator.name
    module = load(_recipe(call), call.target)
    timing = (call.value("rate"), call.value("delay"))
    numbers = tuple(float(call.value(n)) if n == "fill" else call.value(n)
                    for n in NUMBERS.get(name, ()))
    if name in STATES:
        return _of_tokens(call, module, timing, numbers)
    window = () if name == "stream_index" else (call.value("window"),)
    function, dtype = module[FUNCTIONS[name][1]], torch.bool if window else torch.int64

    def shape(rows: torch.Tensor, clock: torch.Tensor) -> Any:
        return (((rows.shape[0], *window), dtype),)

    def tick(rows: torch.Tensor, clock: torch.Tensor, out: torch.Tensor) -> None:
        if function(rows.contiguous(), clock.contiguous(), *timing, out):
            check_clock(rows, clock)

    return Bound(shape, tick)


def _of_tokens(call: Call, module: Any, timing: tuple[int, int],
               numbers: tuple[Any, ...]) -> Bound:
    name, last = call.operator.name, call.arguments.get("last", False)
    states = len(STATES[name])
    window = (call.value("window"),) if name == "stream_window" else ()
    function = module["columns" if last else FUNCTIONS[name][1]]

    def sizes(*features: int) -> tuple[int, ...]:
        return (*features, *window) if last else (*window, *features)

    def shape(token: torch.Tensor, *given: torch.Tensor) -> Any:
        return (((token.shape[0], *sizes(*token.shape[1:])), token.dtype),)

    def step(token: torch.Tensor, *given: torch.Tensor) -> None:
        *held, rows, clock, out = given
        count, size = token.shape[0], math.prod(token.shape[1:])
        pieces = [whole(state) for state in held[:states]]
        flat = [piece.view(*piece.shape[:2], size) for piece in pieces]
        failed = function(token.reshape(count, size).contiguous(), *flat, rows.contiguous(),
                          clock.contiguous(), *timing, out.view(count, *sizes(size)), *numbers)
        put_back(held[:states], pieces)
        if failed:
            check_clock(rows, clock)

    return Bound(shape, step)


KERNELS = tuple(Kernel("tvm-stream", name, _supports, _bind, priority=20, recipe=_recipe)
                for name in FUNCTIONS)
