"""One step of a recurrent layer: two matrices by vectors, then the gates, output by output.

`serial` and `parallel`: token (M, features), hidden (2N, size), [cell (2N, size)], rows, clock,
rate, delay, weight_ih (gates * size, features), weight_hh (gates * size, size), [bias_ih, bias_hh
(gates * size)], [initial hidden (M, size), initial cell], out (M, size), [out cell].
The two rows of a stream in a state are those of even and of odd indices. Every row of the weights
is read once for all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bincompile.runtime.schedules import vector_math
from bincompile.runtime.schedules.common import LANE, return_flag, span
from bincompile.runtime.schedules.ticks import Steps, function, index_of, steps, tensor

GATES = {"gru": 3, "lstm": 4, "tanh": 1, "relu": 1}
TILE = {"gru": 2, "lstm": 2, "tanh": 6, "relu": 6}  # outputs that are computed together


class _Layer(NamedTuple):
    cell_kind: str
    features: int
    size: int
    token: Any
    hidden: Any
    cell: Any
    steps: Steps
    weight_ih: Any
    weight_hh: Any
    bias_ih: Any
    bias_hh: Any
    initial: Any
    initial_cell: Any
    out: Any
    out_cell: Any


def build(kind: str, features: int, size: int, biases: tuple[bool, bool], initial: bool) -> Any:
    """The IRModule; `kind` is one of `GATES`."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I

    with IRBuilder() as builder, I.ir_module():
        for mode in ("serial", "parallel"):
            with function(mode) as T:
                layer = _arguments(T, kind, features, size, biases, initial)
                with T.attr(0, "pragma_import_llvm", _text(features, size)):
                    _loops(T, mode, layer)
    return builder.get()


def _text(features: int, size: int) -> str:
    loads = "".join(f"""
define <16 x float> @bincompile_{name}(ptr %p) alwaysinline {{
  %v = call <16 x float> @llvm.masked.load.v16f32.p0(
      ptr %p, i32 4, <16 x i1> <{", ".join(f"i1 {int(i < count % LANE)}" for i in range(LANE))}>,
      <16 x float> zeroinitializer)
  ret <16 x float> %v
}}""" for name, count in (("rest_of_token", features), ("rest_of_hidden", size)))
    return f"""{vector_math.helpers("sigmoid", "tanh", lanes=1)}
declare <16 x float> @llvm.masked.load.v16f32.p0(ptr, i32, <16 x i1>, <16 x float>)
declare <16 x float> @llvm.fmuladd.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
define <16 x float> @bincompile_fma(
    <16 x float> %a, <16 x float> %b, <16 x float> %c) alwaysinline {{
  %r = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %a, <16 x float> %b, <16 x float> %c)
  ret <16 x float> %r
}}
define float @bincompile_sum(<16 x float> %v) alwaysinline {{
  %r = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %v)
  ret float %r
}}
{loads}
"""


def _arguments(T: Any, kind: str, features: int, size: int, biases: tuple[bool, bool],
               initial: bool) -> _Layer:
    count, streams, wide, lstm = T.int64(), T.int64(), GATES[kind] * size, kind == "lstm"

    def given(name: str, shape: tuple[Any, ...], wanted: bool = True) -> Any:
        return tensor(T, name, shape, "float32") if wanted else None

    return _Layer(
        kind, features, size, given("token", (count, features)),
        given("hidden", (streams * 2, size)), given("cell", (streams * 2, size), lstm),
        steps(T, count, streams), given("weight_ih", (wide, features)),
        given("weight_hh", (wide, size)), given("bias_ih", (wide,), biases[0]),
        given("bias_hh", (wide,), biases[1]), given("initial", (count, size), initial),
        given("initial_cell", (count, size), initial and lstm), given("out", (count, size)),
        given("out_cell", (count, size), lstm))


def _loops(T: Any, mode: str, layer: _Layer) -> None:
    given, tile = layer.steps, TILE[layer.cell_kind]
    bad = T.alloc_buffer((1,), "int32")
    T.buffer_store(bad, T.int32(0), [0])
    with T.serial(0, given.count) as place:
        row = given.rows[place]
        with T.If(T.Or(row < 0, row >= given.streams)), T.Then():
            T.buffer_store(bad, T.int32(1), [0])
    with T.If(bad[0] == 0), T.Then():
        if layer.size // tile:
            with getattr(T, mode)(0, layer.size // tile) as part:
                _rows(T, layer, [part * tile + n for n in range(tile)])
        if layer.size % tile:
            _rows(T, layer, range(layer.size // tile * tile, layer.size))
    return_flag(T, bad)


def _rows(T: Any, layer: _Layer, units: Sequence[Any]) -> None:
    with T.serial(0, layer.steps.count) as place:
        local = T.alloc_buffer((2,), "int64")  # else they are spelled out at each use
        T.buffer_store(local, layer.steps.rows[place], [0])
        T.buffer_store(local, index_of(T, layer.steps, local[0]), [1])
        _tile(T, layer, units, place, local[0], local[1])


def _tile(T: Any, layer: _Layer, units: Sequence[Any], place: Any, row: Any, index: Any) -> None:
    gates = GATES[layer.cell_kind]
    weights = [gate * layer.size + unit for unit in units for gate in range(gates)]
    given = [_total(T, layer.bias_ih, at) for at in weights]
    kept = [_total(T, layer.bias_hh, at) for at in weights]
    memory = T.alloc_buffer((2 * len(units),), "float32")  # of each unit: hidden, then cell
    before, now = row * 2 + T.floormod(index + 1, 2), row * 2 + T.floormod(index, 2)
    _products(T, layer.weight_ih, weights, given, layer.token, place, "rest_of_token")

    def recall(hidden: Any, cell: Any, at: Any) -> None:
        for number, unit in enumerate(units):
            if hidden is not None:
                T.buffer_store(memory, hidden[at, unit], [2 * number])
            if cell is not None:
                T.buffer_store(memory, cell[at, unit], [2 * number + 1])

    with T.If(index > 0):
        with T.Then():
            _products(T, layer.weight_hh, weights, kept, layer.hidden, before, "rest_of_hidden")
            recall(layer.hidden, layer.cell, before)
        with T.Else():
            if layer.initial is None:
                for number in range(2 * len(units)):
                    T.buffer_store(memory, T.float32(0), [number])
            else:
                _products(T, layer.weight_hh, weights, kept, layer.initial, place,
                          "rest_of_hidden")
                recall(layer.initial, layer.initial_cell, place)
    for number, unit in enumerate(units):
        part = slice(number * gates, (number + 1) * gates)
        _CELLS[layer.cell_kind](T, layer, [b[0] for b in given[part]], [b[0] for b in kept[part]],
                                (memory[2 * number], memory[2 * number + 1]), (place, now, unit))


def _total(T: Any, bias: Any, at: Any) -> Any:
    total = T.alloc_buffer((1,), "float32")
    T.buffer_store(total, T.float32(0) if bias is None else bias[at], [0])
    return total


def _products(T: Any, weight: Any, rows: Sequence[Any], totals: Sequence[Any], x: Any, at: Any,
              rest: str) -> None:
    """Add the products of some rows of a weight with a row of x to totals."""
    columns = int(x.shape[1])
    sums = [T.alloc_buffer((LANE,), "float32") for _ in rows]  # one each: kept in registers
    whole = [span(T, 0)]

    def add(load: Callable[[Any, Any], Any]) -> None:
        value = load(x, at)
        held = T.alloc_buffer((LANE,), "float32")
        T.buffer_store(held, value, whole)
        for total, row in zip(sums, rows, strict=True):
            T.buffer_store(total, T.call_extern("float32x16", "bincompile_fma", load(weight, row),
                                                held[whole[0]], total[whole[0]]), whole)

    for total in sums:
        T.buffer_store(total, T.broadcast(T.float32(0), LANE), whole)
    if columns // LANE:
        with T.serial(0, columns // LANE) as vector:
            add(lambda source, row: source[row, span(T, vector * LANE)])
    if columns % LANE:
        add(lambda source, row: T.call_extern(
            "float32x16", f"bincompile_{rest}",
            T.address_of(source[row, columns // LANE * LANE])))
    for total, lanes in zip(totals, sums, strict=True):
        T.buffer_store(total, total[0] + T.call_extern("float32", "bincompile_sum",
                                                       lanes[whole[0]]), [0])


Cell = Callable[[Any, _Layer, Sequence[Any], Sequence[Any], tuple[Any, Any], tuple[Any, ...]],
                None]


def _store(T: Any, layer: _Layer, value: Any, at: tuple[Any, ...]) -> None:
    place, now, unit = at
    T.buffer_store(layer.hidden, value, [now, unit])
    T.buffer_store(layer.out, layer.hidden[now, unit], [place, unit])


def _of(T: Any, name: str, x: Any) -> Any:
    return vector_math.apply(T, name, x, lanes=1)


def _held(T: Any, value: Any) -> Any:
    """A value that is used several times, computed once."""
    buffer = T.alloc_buffer((1,), "float32")
    T.buffer_store(buffer, value, [0])
    return buffer[0]


def _gru(T: Any, layer: _Layer, given: Sequence[Any], kept: Sequence[Any],
         memory: tuple[Any, Any], at: tuple[Any, ...]) -> None:
    reset = _of(T, "sigmoid", given[0] + kept[0])
    update = _held(T, _of(T, "sigmoid", given[1] + kept[1]))
    new = _of(T, "tanh", given[2] + reset * kept[2])
    _store(T, layer, (T.float32(1) - update) * new + update * memory[0], at)


def _lstm(T: Any, layer: _Layer, given: Sequence[Any], kept: Sequence[Any],
          memory: tuple[Any, Any], at: tuple[Any, ...]) -> None:
    enter, forget, leave = (_of(T, "sigmoid", given[n] + kept[n]) for n in (0, 1, 3))
    new = _of(T, "tanh", given[2] + kept[2])
    inside = _held(T, forget * memory[1] + enter * new)
    place, now, unit = at
    T.buffer_store(layer.cell, inside, [now, unit])
    T.buffer_store(layer.out_cell, inside, [place, unit])
    _store(T, layer, leave * _of(T, "tanh", inside), at)


def _tanh(T: Any, layer: _Layer, given: Sequence[Any], kept: Sequence[Any],
          memory: tuple[Any, Any], at: tuple[Any, ...]) -> None:
    _store(T, layer, _of(T, "tanh", given[0] + kept[0]), at)


def _relu(T: Any, layer: _Layer, given: Sequence[Any], kept: Sequence[Any],
          memory: tuple[Any, Any], at: tuple[Any, ...]) -> None:
    value = _held(T, given[0] + kept[0])
    _store(T, layer, T.Select(value < T.float32(0), T.float32(0), value), at)


_CELLS: dict[str, Cell] = {"gru": _gru, "lstm": _lstm, "tanh": _tanh, "relu": _relu}
