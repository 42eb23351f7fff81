"""Attention of a stream's newest token to keys of 1 bit, compiled by TVM."""

from __future__ import annotations

import torch

from bincompile.ops.stream_attention import distances, seen
from bincompile.ops.ticks import check_clock
from bincompile.runtime.bound import Bound, Size
from bincompile.runtime.kernels import Call, Kernel, host_reason
from bincompile.runtime.library.tvm_stream_attention import UNBOUNDED, in_rows, taken
from bincompile.runtime.tvm import Recipe, load, obstacle
from bincompile.runtime.whole import put_back, whole

WORTH_THREADS = 1 << 20  # products below which a second thread costs more than it brings
TENSORS = ("query", "key", "value", "key_bits", "key_scales", "held", "rows", "clock", "threshold")
NUMBERS = ("scale", "window", "rate", "delay", "probabilities", "values")
FLOATS = ("query", "key", "value", "key_scales", "held", "threshold")


def _recipe(call: Call) -> Recipe:
    return Recipe("stream_binary_attention", {
        "features": call.value("key").shape[2], "width": call.value("value").shape[2],
        "unbounded": call.value("window") is None,
        **{name: call.value(name) for name in ("probabilities", "values")},
        "avx512": call.target.isa == "avx512-vpopcntdq"})


def _supports(call: Call) -> str | None:
    if unknown := next((name for name in NUMBERS if not call.is_stored(name)), None):
        return f"{unknown} is known only at run time"
    for name in FLOATS:
        value = call.value(name)
        if value is not None and value.dtype != torch.float32:
            return f"a {name} of {value.dtype}"
    sizes = (*call.value("query").shape[1:], call.value("value").shape[2])
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return "heads or features that are not known before the run, or none"
    return host_reason(call) or obstacle(_recipe(call), call.target)


def _bind(call: Call) -> Bound:
    module, given = load(_recipe(call), call.target), taken(call, TENSORS)
    serial, parallel = module["serial"], module["heads"]
    heads, width = call.value("query").shape[1], call.value("value").shape[2]
    window, rate, delay = (call.value(name) for name in ("window", "rate", "delay"))
    numbers = (float(call.value("scale")), UNBOUNDED if window is None else window, rate, delay)

    def shape(*values: torch.Tensor) -> tuple[Size, ...]:
        return (((values[0].shape[0], heads, width), torch.float32),)

    def attend(*values: torch.Tensor) -> None:
        tensors, out = given(values), values[-1]
        states = tensors[3:6]
        tensors[:3] = map(in_rows, tensors[:3])
        tensors[3:8] = map(whole, tensors[3:8])
        held, rows, clock = tensors[5:8]
        function = serial if torch.get_num_threads() == 1 or (
            rows.shape[0] * heads * held.shape[2] * width < WORTH_THREADS) else parallel
        if function(*(t for t in tensors if t is not None), *numbers, out):
            check_clock(rows, clock, rate, delay)
            seen(*distances(rows, clock, held.shape[2], rate, delay), window)
        put_back(states, tensors[3:6])

    return Bound(shape, attend)


KERNEL = Kernel("tvm-stream-binary-attention", "stream_binary_attention", _supports, _bind,
                priority=20, recipe=_recipe)
