"""A step program made by hand: sums of the last three tokens and the one of five steps ago."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import fx
from torch.utils import _pytree as pytree

from bincompile.config import Target
from bincompile.ops import OPERATORS
from bincompile.program import Program
from bincompile.signature import InputSpec, Signature, TensorMeta
from bincompile.steps import State, StepProgram, TimeInput
from bincompile.stream import Stream
from bincompile.stream_form import StreamForm, fingerprint_of

WINDOW, BACK, SLOTS, FIRST, WIDTH = 3, 5, 8, 2, 2


def step_program(first: int = FIRST, limit: int | None = None, rate: int = 1,
                 factor: float = 2.0) -> StepProgram:
    """`factor * (x[t] + x[t-1] + x[t-2]) + x[t-5]`, from the step `first` on; its long memory
    grows."""
    graph, shape = fx.Graph(), ("m", 1, WIDTH)

    def placed(name: str, sizes: tuple, dtype: torch.dtype = torch.float32) -> fx.Node:
        node = graph.placeholder(name)
        node.meta["val"] = TensorMeta(dtype, sizes)
        return node

    def called(target, *args) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = TensorMeta(torch.float32, ("m", WIDTH))
        return node

    weight = graph.get_attr("weight")
    x = placed("x", shape)
    rows, clock = placed("rows", ("m",), torch.int64), placed("clock", ("n",), torch.int64)
    ring = placed("ring", ("n", WINDOW, WIDTH))
    long = placed("long", ("n", "slots", WIDTH))
    token = called(torch.ops.aten.select.int, x, 1, 0)
    window = called(OPERATORS["stream_window"].overload, token, ring, rows, clock, WINDOW)
    window.meta["val"] = TensorMeta(torch.float32, ("m", WINDOW, WIDTH))
    old = called(OPERATORS["stream_shift"].overload, token, long, rows, clock, BACK)
    total = called(torch.ops.aten.sum.dim_IntList, window, [1])
    scaled = called(torch.ops.aten.mul.Tensor, total, weight)
    both = called(torch.ops.aten.add.Tensor, scaled, old)
    result = called(torch.ops.aten.unsqueeze.default, both, 1)
    result.meta["val"] = TensorMeta(torch.float32, shape)
    graph.output((result,))
    module = fx.GraphModule({"weight": torch.tensor(factor)}, graph)
    weight.meta["val"] = module.weight
    states = (State("ring", (WINDOW, WIDTH), torch.float32),
              State("long", (SLOTS, WIDTH), torch.float32, grows=0))
    return StepProgram(
        Program(module, whole_signature(), "steps"),
        (TimeInput("x", 0, 1, True, (WIDTH,), torch.float32),), states, (1,),
        "by hand", receptive_field=BACK + 1, first=first, limit=limit, rate=rate)


def whole_signature() -> Signature:
    """Of the model that it would be a step of."""
    return Signature((InputSpec("x", torch.float32, ("b", "t", WIDTH)),),
                     pytree.tree_structure(((0,), {})), pytree.tree_structure(0), ("x",))


@functools.cache
def form(**options) -> StreamForm:
    """It, bound to the reference kernels."""
    steps = step_program(**options)
    return StreamForm.bound(steps, whole_signature(), Target("cpu"), fingerprint_of(steps))


def stream(rows: int = 1, **options) -> Stream:
    """A stream of it."""
    made = form(**options)
    return Stream(made, made.rows(rows, {}))


def expected(history: list[torch.Tensor], factor: float = 2.0) -> torch.Tensor:
    """What a step answers after these tokens of one row."""
    old = history[-1 - BACK] if len(history) > BACK else torch.zeros(WIDTH)
    return factor * torch.stack(history[-WINDOW:]).sum(0) + old


def with_memory() -> StreamForm:
    """`x[t] + 2 * memory`, of a memory for each row that does not change with time."""
    graph, before = fx.Graph(), fx.Graph()

    def placed(inside: fx.Graph, name: str, sizes: tuple, dtype=torch.float32) -> fx.Node:
        node = inside.placeholder(name)
        node.meta["val"] = TensorMeta(dtype, sizes)
        return node

    def called(inside: fx.Graph, target, *args) -> fx.Node:
        node = inside.call_function(target, args)
        node.meta["val"] = TensorMeta(torch.float32, ("m", 1, WIDTH))
        return node

    x, rows = placed(graph, "x", ("m", 1, WIDTH)), placed(graph, "rows", ("m",), torch.int64)
    placed(graph, "clock", ("n",), torch.int64)
    base = placed(graph, "base", ("n", 1, WIDTH))
    mine = called(graph, torch.ops.aten.index_select.default, base, 0, rows)
    graph.output((called(graph, torch.ops.aten.add.Tensor, x, mine),))
    memory = placed(before, "memory", ("b", WIDTH))
    placed(before, "unread", ("b", "l"))
    twice = called(before, torch.ops.aten.mul.Tensor, memory, 2)
    before.output((called(before, torch.ops.aten.unsqueeze.default, twice, 1),))
    whole = dataclasses.replace(whole_signature(), inputs=(
        *whole_signature().inputs, InputSpec("memory", torch.float32, ("b", WIDTH)),
        InputSpec("unread", torch.float32, ("b", "l"))))
    steps = StepProgram(
        Program(fx.GraphModule({}, graph), whole, "steps"),
        (TimeInput("x", 0, 1, True, (WIDTH,), torch.float32),),
        (State("base", (1, WIDTH), torch.float32, prepared=0),), (1,), "by hand",
        statics=(1, 2), prepare=Program(fx.GraphModule({}, before), whole, "steps"))
    return StreamForm.bound(steps, whole, Target("cpu"), fingerprint_of(steps))
