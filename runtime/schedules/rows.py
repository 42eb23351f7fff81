"""A row program as one function: blocks of rows go through all of its steps.

Inside a block bits stay bits, and what one loop over the columns can do is done at once: what is
in registers after a product is scaled, passed through the pointwise steps that follow, packed, and
added to the next row scale or norm. Arguments: step (rows of one block), the inputs, the results.
The functions return 1 if an index was not in its table (and what was looked up is not right), else
nothing.
"""

from __future__ import annotations

from typing import Any

from bincompile.runtime.schedules.common import MODES, ceil_div, return_flag
from bincompile.runtime.schedules.rows_body import LOOK_UPS, Input, Name, Step, steps_of
from bincompile.runtime.schedules.rows_loops import linear_phase, row_phases
from bincompile.runtime.schedules.rows_plan import Plan, plan
from bincompile.runtime.schedules.rows_store import allocate, declare
from bincompile.runtime.schedules.rows_text import helpers
from bincompile.runtime.schedules.rows_vector import Program, input_row

# Passes of TVM without use here that would take half of the time of a compilation.
SKIPPED = ("s_tir.CompactBufferAllocation", "s_tir.HoistIfThenElse")


def build(body: str, inputs: tuple[tuple[Any, ...], ...], rank: int, block: int,
          modes: tuple[str, ...] = ("serial", "rows")) -> Any:
    """The IRModule, with one function for each mode.

    Args:
        body: the program's text.
        inputs: for each input the fields of an `Input`.
        rank: how many leading axes the results have.
        block: the most rows of one block.
        modes: keys of `common.MODES`; "panels" only for products that nothing is added up after.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import ir as I
    from tvm.tirx.script import builder as T

    given = tuple(Input(*fields) for fields in inputs)
    steps, results, widths = steps_of(body, given)
    with IRBuilder() as builder, I.ir_module():
        for mode in modes:
            _function(T, mode, given, steps, plan(steps, results, widths), widths,
                      (rank, block))
    return builder.get()


def _function(T: Any, mode: str, inputs: tuple[Input, ...], steps: list[Step], made: Plan,
              widths: dict[Name, int], sizes: tuple[int, int]) -> None:
    blocks, panels = MODES[mode]
    text = helpers([step.op for step in steps], widths.values())
    with T.prim_func():
        T.func_name(mode)
        T.func_attr({"global_symbol": mode, "tirx.noalias": True})
        arguments = declare(T, inputs, made, widths, sizes[0])
        with T.attr(0, "pragma_import_llvm", text):
            bad = T.alloc_buffer((1,), "int32")
            T.buffer_store(bad, T.int32(0), [0])
            with getattr(T, blocks)(0, ceil_div(arguments.rows, arguments.step)) as block:
                first = block * arguments.step
                count = T.bind(T.min(arguments.step, arguments.rows - first))
                scratch = allocate(T, made, sizes[1])
                program = Program(T, made, inputs, widths, arguments, scratch,
                                  {step.target: step for step in steps}, first, bad, panels,
                                  sizes[1])
                _block(program, count)
            if any(step.op in LOOK_UPS for step in steps):
                return_flag(T, bad)


def _block(program: Program, count: Any) -> None:
    T = program.T
    look_ups = [step for step in program.steps.values() if step.op in LOOK_UPS]
    if look_ups:
        with T.serial(0, count) as row:
            for step in look_ups:
                _find(program, step, row)
    for group in program.plan.groups:
        phases = [program.plan.phases[place] for place in group]
        if phases[0].linear:
            linear_phase(program, phases[0], count)
        elif any(phase.steps for phase in phases):
            with T.serial(0, count) as row:
                row_phases(program, phases, row)


def _find(program: Program, step: Step, row: Any) -> None:
    """Which row of its table a look-up reads; row 0 in place of one that isn't there."""
    T = program.T
    table, indices = step.args[:2] if step.op == "embedding" else (step.args[1], step.args[0])
    buffer = program.arguments.inputs[indices]
    index = T.bind(T.cast(buffer[input_row(program, indices, row)], "int64"))
    is_there = T.And(index >= 0, index < program.arguments.inputs[table].shape[0])
    places = program.scratch.places[step.target]
    with T.If(is_there):
        with T.Then():
            T.buffer_store(places, index, [row])
        with T.Else():
            T.buffer_store(places, T.int64(0), [row])
            T.buffer_store(program.bad, T.int32(1), [0])
