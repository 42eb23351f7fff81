"""Attention of each row's newest token to the tokens in its ring, and the ring's next slot.

The keys of 16 slots lie side by side, feature by feature, so that one query number times a vector
gives the scores of 16 slots without a horizontal sum. The new key and value are used as they came
and written last: nothing waits for a store. Slots that the token does not see are never added up.

Arguments: query (M, H, features), key (M, G, features), value (M, G, width), each of any strides
but the last axis's; keys (N, G, tiles, features, 16), values (N, G, tiles * 16, width), rows (M)
and clock (N) int64, [sink (H)], [extra_keys (G, X, features), extra_values (G, X, width)],
[bias (H or 1, L)], [slopes (H)], scale, softcap, window, rate, delay (numbers), out (M, H, width).
The functions "serial" and "heads", which splits the heads of all rows among threads, return 1 where
a row is not there, or 2 where its ring has no slot left, of which nothing is read or written then.
No row depends on how the work is split.
"""

from __future__ import annotations

from typing import Any

from bincompile.runtime.schedules import vector_math
from bincompile.runtime.schedules.attention_parts import helpers
from bincompile.runtime.schedules.common import LANE, return_flag
from bincompile.runtime.schedules.stream_queries import HEADS, Facets, Head, Tensors, each_token

MODES = ("serial", "heads")
# Passes of TVM without use here that would take half of the time of a compilation.
SKIPPED = ("s_tir.CompactBufferAllocation", "s_tir.HoistIfThenElse")
_FIRST = """
define float @bincompile_first(<16 x float> %v) alwaysinline {
  %r = extractelement <16 x float> %v, i32 0
  ret float %r
}
"""


def build(**parameters: Any) -> Any:
    """The IRModule of these `Facets`, with one function for each of `MODES`."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I
    from tvm.tirx.script import builder as T

    facets = Facets(**parameters)
    with IRBuilder() as builder, I.ir_module():
        for mode in MODES:
            with T.prim_func():
                _function(T, mode, facets)
    return builder.get()


def _function(T: Any, mode: str, facets: Facets) -> None:
    tensors = _arguments(T, mode, facets)
    count, _, groups, tiles = tensors.sizes
    with T.attr(0, "pragma_import_llvm", _text(facets)):
        bad = T.alloc_buffer((1,), "int32")
        T.buffer_store(bad, T.int32(0), [0])
        if mode == "serial":
            scores = _scores(T, tiles)
            with T.serial(0, count) as place, \
                    each_token(T, facets.unbounded, tensors, place, bad) as token, \
                    T.serial(0, groups) as group:
                Head(T, facets, tensors, token, group, scores).run()
        else:
            with T.parallel(0, count * groups) as unit, each_token(
                    T, facets.unbounded, tensors, T.floordiv(unit, groups), bad) as token:
                Head(T, facets, tensors, token, T.floormod(unit, groups),
                     _scores(T, tiles)).run()
        return_flag(T, bad)


def _text(facets: Facets) -> str:
    """LLVM text of what is called; what two parts declare is declared once."""
    parts = (helpers(facets.avx512), _FIRST, vector_math.helpers("tanh") if facets.softcap else "")
    lines = "\n".join(parts).splitlines()
    declared = dict.fromkeys(line for line in lines if line.startswith("declare "))
    return "\n".join([*declared, *(line for line in lines if line not in declared)])


def _scores(T: Any, tiles: Any) -> Any:
    return T.alloc_buffer((HEADS, tiles * LANE), "float32")


def _arguments(T: Any, name: str, facets: Facets) -> Tensors:
    T.func_name(name)
    T.func_attr({"global_symbol": name, "tirx.noalias": True})
    m, n, heads, groups, tiles, extras, length = (T.int64() for _ in range(7))

    def argument(label: str, shape: tuple[Any, ...], dtype: str = "float32",
                 strided: bool = False) -> Any:
        strides = [T.int64() for _ in shape[1:]] + [T.int64(1)] if strided else None
        sizes = [T.int64(size) if isinstance(size, int) else size for size in shape]
        return T.match_buffer(T.arg(label, T.handle()), sizes, dtype, strides=strides,
                              align=8 if dtype == "int64" else 4)

    def optional(wanted: Any, label: str, *shape: Any) -> Any:
        return argument(label, shape) if wanted else None

    return Tensors(
        (m, n, groups, tiles),
        argument("query", (m, heads, facets.features), strided=True),
        argument("key", (m, groups, facets.features), strided=True),
        argument("value", (m, groups, facets.width), strided=True),
        argument("keys", (n, groups, tiles, facets.features, LANE)),
        argument("values", (n, groups, tiles * LANE, facets.width)),
        argument("rows", (m,), "int64"), argument("clock", (n,), "int64"),
        optional(facets.sink, "sink", heads),
        optional(facets.extras, "extra_keys", groups, extras, facets.features),
        optional(facets.extras, "extra_values", groups, extras, facets.width),
        optional(facets.bias, "bias", heads if facets.bias == "heads" else 1, length),
        optional(facets.slopes, "slopes", heads),
        T.arg("scale", T.float32()), T.arg("softcap", T.float32()), T.arg("window", T.int64()),
        T.arg("rate", T.int64()), T.arg("delay", T.int64()),
        argument("out", (m, heads, facets.width)))
