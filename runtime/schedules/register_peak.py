"""The speed limit of 1-bit products: xor, popcount and add on registers, with no memory at all.

Every accumulator depends on its own last value only, so that as many of them as the registers hold
hide the latency of a chain. Arguments: rounds, out (threads,) int32; each thread runs `rounds`
rounds of `accumulators` vectors of `lanes` words of 32 bits.
"""

from __future__ import annotations

from typing import Any


def build(lanes: int, accumulators: int) -> Any:
    """The IRModule, with the function `peak`."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I
    from tvm.tirx.script import builder as T

    with IRBuilder() as builder, I.ir_module(), T.prim_func():
        T.func_name("peak")
        T.func_attr({"global_symbol": "peak", "tirx.noalias": True})
        threads = T.int64()
        rounds = T.arg("rounds", T.int64())
        out = T.match_buffer(T.arg("out", T.handle()), (threads,), "int32", align=4)
        with T.attr(0, "pragma_import_llvm", _text(lanes, accumulators)), \
                T.parallel(0, threads) as thread:
            T.buffer_store(out, T.call_extern("int32", "bincompile_peak", rounds), [thread])
    return builder.get()


def _text(lanes: int, accumulators: int) -> str:
    """LLVM text of a loop that adds popcounts to each accumulator and returns all as one number."""
    vector, each = f"<{lanes} x i32>", range(accumulators)
    first = [f"<{', '.join([f'i32 {place + 1}'] * lanes)}>" for place in each]
    phis = [f"%a{j} = phi {vector} [ {first[j]}, %entry ], [ %b{j}, %loop ]" for j in each]
    steps = [f"""%x{j} = xor {vector} %a{j}, %word
  %p{j} = call {vector} @llvm.ctpop.v{lanes}i32({vector} %x{j})
  %b{j} = add {vector} %a{j}, %p{j}""" for j in each]
    folds = [f"%f{j} = xor {vector} %f{j - 1}, %b{j}" for j in each[1:]]
    return f"""
declare {vector} @llvm.ctpop.v{lanes}i32({vector})
declare i32 @llvm.vector.reduce.add.v{lanes}i32({vector})
define i32 @bincompile_peak(i64 %rounds) noinline {{
entry:
  %low = trunc i64 %rounds to i32
  %one = insertelement {vector} poison, i32 %low, i32 0
  %word = shufflevector {vector} %one, {vector} poison, <{lanes} x i32> zeroinitializer
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %loop ]
  {_block(phis)}
  {_block(steps)}
  %next = add i64 %i, 1
  %again = icmp slt i64 %next, %rounds
  br i1 %again, label %loop, label %end
end:
  %f0 = xor {vector} %b0, %word
  {_block(folds)}
  %sum = call i32 @llvm.vector.reduce.add.v{lanes}i32({vector} %f{accumulators - 1})
  ret i32 %sum
}}
"""


def _block(lines: list[str]) -> str:
    return "\n  ".join(lines)
