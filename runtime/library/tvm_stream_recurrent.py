"""Steps of GRU, LSTM and plain recurrent layers, compiled by TVM: one pass over the weights."""

from __future__ import annotations

from typing import Any

import torch

from bincompile.ops.ticks import check_clock
from bincompile.runtime.bound import Bound
from bincompile.runtime.kernels import Call, Kernel, host_reason
from bincompile.runtime.schedules.stream_recurrent import GATES
from bincompile.runtime.tvm import Recipe, load, obstacle
from bincompile.runtime.whole import put_back, whole

WORTH_THREADS = 1 << 18  # products, below which a second thread costs more than it brings
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
STATES = {"stream_gru": ("hidden",), "stream_rnn": ("hidden",),
          "stream_lstm": ("hidden", "cell")}
INITIAL = {"stream_gru": ("initial",), "stream_rnn": ("initial",),
           "stream_lstm": ("initial_hidden", "initial_cell")}


def _kind(call: Call) -> str:
    return call.arguments.get("nonlinearity") or call.operator.name.removeprefix("stream_")


def _recipe(call: Call) -> Recipe:
    return Recipe("stream_recurrent", {
        "kind": _kind(call), "features": call.value("weight_ih").shape[1],
        "size": call.value("weight_hh").shape[0] // GATES[_kind(call)],
        "biases": tuple(call.value(name) is not None for name in WEIGHTS[2:]),
        "initial": call.value(INITIAL[call.operator.name][0]) is not None})


def _supports(call: Call) -> str | None:
    name = call.operator.name
    if any(not call.is_stored(weight) for weight in WEIGHTS):
        return "the weights are known only at run time"
    initial = [call.value(n) is not None for n in INITIAL[name]]
    if any(initial) != all(initial) or call.arguments.get("weight_hr") is not None:
        return "a projection of the output, or one of two initial values"
    stored = [n for n in ("token", "rows", "clock", *STATES[name]) if call.is_stored(n)]
    if stored or (any(initial) and any(map(call.is_stored, INITIAL[name]))):
        return f"{(stored or INITIAL[name])[0]} is stored"
    used = [call.value(n) for n in ("token", *STATES[name], *WEIGHTS, *INITIAL[name])]
    if any(v is not None and v.dtype != torch.float32 for v in used):
        return "another dtype than float32"
    if 0 in (*used[0].shape[1:], *call.value("weight_hh").shape):
        return "a layer without features"
    return host_reason(call) or obstacle(_recipe(call), call.target)


def _bind(call: Call) -> Bound:
    from tvm_ffi import from_dlpack

    name, size = call.operator.name, call.value("weight_hh").shape[1]
    states, parts = len(STATES[name]), len(call.dynamic)
    module = load(_recipe(call), call.target)
    serial, parallel = module["serial"], module["parallel"]
    timing = (call.value("rate"), call.value("delay"))
    weights = [from_dlpack(call.value(n).detach().contiguous()) for n in WEIGHTS
               if call.value(n) is not None]
    few = WORTH_THREADS // sum(call.value(n).numel() for n in WEIGHTS[:2])

    def shape(token: torch.Tensor, *given: torch.Tensor) -> Any:
        return (((token.shape[0], size), torch.float32),) * states

    def step(token: torch.Tensor, *given: torch.Tensor) -> None:
        held, rows, clock = given[:states], given[states], given[states + 1]
        function = serial if token.shape[0] <= few or torch.get_num_threads() == 1 else parallel
        pieces = [whole(state) for state in held]
        failed = function(token.contiguous(), *(p.view(-1, size) for p in pieces),
                          rows.contiguous(), clock.contiguous(), *timing, *weights,
                          *(i.contiguous() for i in given[states + 2:parts - 1]),
                          *given[parts - 1:])
        put_back(held, pieces)
        if failed:
            check_clock(rows, clock)

    return Bound(shape, step, several=states > 1)


KERNELS = tuple(Kernel("tvm-recurrent", name, _supports, _bind, priority=20, recipe=_recipe)
                for name in STATES)
