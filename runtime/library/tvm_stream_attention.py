"""Attention of a stream's newest token, compiled by TVM: one pass over the ring, nothing copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bincompile.ops.stream_attention import distances, seen
from bincompile.ops.ticks import check_clock
from bincompile.runtime.bound import Bound, Size
from bincompile.runtime.kernels import Call, Dynamic, Kernel, host_reason
from bincompile.runtime.tvm import Recipe, load, obstacle
from bincompile.runtime.whole import put_back, whole

WORTH_THREADS = 1 << 20  # products below which a second thread costs more than it brings
TENSORS = ("query", "key", "value", "keys", "values", "rows", "clock", "sink", "extra_keys",
           "extra_values", "distance_bias", "slopes")
NUMBERS = ("scale", "window", "rate", "delay", "softcap")
UNBOUNDED = 1 << 62


def _recipe(call: Call) -> Recipe:
    query, key, bias = (call.value(name) for name in ("query", "key", "distance_bias"))
    kind = "" if bias is None else "one" if bias.shape[0] == 1 else "heads"
    return Recipe("stream_attention", {
        "features": key.shape[2], "width": call.value("value").shape[2],
        "repeat": query.shape[1] // key.shape[1], "unbounded": call.value("window") is None,
        "softcap": call.value("softcap") is not None, "sink": call.value("sink") is not None,
        "extras": _has_extras(call), "bias": kind,
        "slopes": call.value("slopes") is not None,
        "avx512": call.target.isa == "avx512-vpopcntdq"})


def _has_extras(call: Call) -> bool:
    extra = call.value("extra_keys")
    return extra is not None and bool(extra.shape[1])


def _supports(call: Call) -> str | None:
    if unknown := next((name for name in NUMBERS if not call.is_stored(name)), None):
        return f"{unknown} is known only at run time"
    for name in TENSORS:
        value = call.value(name)
        if value is not None and name not in ("rows", "clock") and value.dtype != torch.float32:
            return f"a {name} of {value.dtype}"
    sizes = (*call.value("query").shape[1:], *call.value("key").shape[1:],
             call.value("value").shape[2])
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return "heads or features that are not known before the run, or none"
    return host_reason(call) or obstacle(_recipe(call), call.target)


def _bind(call: Call) -> Bound:
    module, given = load(_recipe(call), call.target), taken(call, TENSORS)
    serial, parallel = module["serial"], module["heads"]
    heads = call.value("query").shape[1]
    features, width = call.value("key").shape[2], call.value("value").shape[2]
    window, cap = call.value("window"), call.value("softcap")
    rate, delay = call.value("rate"), call.value("delay")
    numbers = (float(call.value("scale")), 1.0 if cap is None else float(cap),
               UNBOUNDED if window is None else window, rate, delay)
    extras, products = _has_extras(call), heads * (features + width)

    def shape(*values: torch.Tensor) -> tuple[Size, ...]:
        return (((values[0].shape[0], heads, width), torch.float32),)

    def attend(*values: torch.Tensor) -> None:
        tensors, out = given(values), values[-1]
        if not extras:
            tensors[8:10] = None, None
        states = tensors[3:5]
        tensors[:3] = map(in_rows, tensors[:3])
        tensors[3:7] = map(whole, tensors[3:7])
        _, held, rows, clock = tensors[3:7]
        function = serial if torch.get_num_threads() == 1 or (
            rows.shape[0] * products * held.shape[2] < WORTH_THREADS) else parallel
        if function(*(t for t in tensors if t is not None), *numbers, out):
            check_clock(rows, clock, rate, delay)
            seen(*distances(rows, clock, held.shape[2], rate, delay), window)
        put_back(states, tensors[3:5])

    return Bound(shape, attend)


def taken(call: Call, names: Sequence[str]) -> Callable[[tuple[torch.Tensor, ...]], list[Any]]:
    """A function from the run-time values to all tensors, None for one that is not there."""
    known = [None if isinstance(argument := call.arguments[name], Dynamic) or argument is None
             else argument.detach().contiguous() for name in names]
    places = [names.index(name) for name in call.dynamic]

    def given(values: tuple[torch.Tensor, ...]) -> list[Any]:
        found = known.copy()
        for place, value in zip(places, values, strict=False):
            found[place] = value
        return found

    return given


def in_rows(x: torch.Tensor) -> torch.Tensor:
    """With its last axis side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


KERNEL = Kernel("tvm-stream-attention", "stream_attention", _supports, _bind, priority=20,
                recipe=_recipe)
