"""Kernels beside their references, on the values of one call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from bincompile.errors import ProofError
from bincompile.op import Operator
from bincompile.passes.validate import difference
from bincompile.program import Program
from bincompile.runtime.executor import Executable

# Largest relative difference of a whole model's outputs, by the dtype that they have.
LIMITS = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-4, torch.float64: 1e-9}
FLIPPED_ROWS = 0.02  # most rows of a result, beside one, that another sign may change


def check_kernels(program: Program, executable: Executable, flat: Sequence[Any],
                  on: str = "reference", errors: list[float] | None = None) -> list[Any]:
    """Run every bound kernel beside its reference.

    Args:
        program: the program that is bound.
        executable: its kernels.
        flat: flat inputs of one call.
        on: whose values each kernel gets: those of the "reference" before it, or of the "kernels".
        errors: a list for the relative difference of each result, rows in doubt left out.

    Returns:
        The flat results, of references or of kernels.

    Raises:
        ProofError: a kernel is further from its reference than its operator allows.
    """
    seen: list[float] = [] if errors is None else errors

    class Compare(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            if node.name not in executable.bound:
                return super().run_node(node)
            call = executable.calls[node.name]
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            values = call.operator.bind(args, kwargs)
            before, apart = call.operator.isolated(values), call.operator.isolated(values)
            given = (values, apart) if on == "reference" else (apart, values)
            expected = call.operator.overload(**given[0])
            found = executable.bound[node.name](*call.run_time(given[1]))
            seen.extend(_differences(node.name, call.operator, before, expected, found))
            for name in call.operator.mutated:
                seen.extend(_differences(f"{node.name}, in what it writes to {name},",
                                         call.operator, before, given[0][name], given[1][name]))
            return expected if on == "reference" else found

    with torch.no_grad():
        return list(Compare(program.graph_module).run(*flat))


def _differences(name: str, operator: Operator, values: Mapping[str, Any], expected: Any,
                 found: Any) -> Iterator[float]:
    """The difference of each result, checked; rows in which a sign fell otherwise left out."""
    several = isinstance(expected, tuple | list)
    for left, right in zip(*((expected, found) if several else ((expected,), (found,))),
                           strict=True):
        loose = max(operator.tolerance.rtol, LIMITS.get(left.dtype, 0.0) / 10)
        limit = 0.0 if operator.tolerance.bits else loose
        error = difference(left, right)
        if error > limit or math.isnan(error):
            sure = _sure_rows(operator, values, left, right, limit)
            if sure is None:
                raise ProofError(f"the kernel of {name} differs from its reference by {error:.2g}",
                                 f"at most {limit:.0e}", "report it, and set BINCOMPILE_ISA=none "
                                 "to use reference kernels until it is mended")
            error = sure
        yield error


def _sure_rows(operator: Operator, values: Mapping[str, Any], left: torch.Tensor,
               right: torch.Tensor, limit: float) -> float | None:
    """The difference but for few rows, in each of which a sign was taken of nearly 0.

    None where results differ otherwise too.
    """
    doubt = operator.doubtful_rows(values) if operator.doubtful_rows is not None else None
    rows = left.shape[:-1].numel()
    if doubt is None or left.shape != right.shape or doubt.numel() != rows:
        return None
    flat = [side.reshape(rows, -1) for side in (left, right)]
    sure = difference(flat[0][~doubt], flat[1][~doubt])
    if sure > limit:
        return None
    apart = [difference(a, b) > limit for a, b in zip(flat[0][doubt], flat[1][doubt], strict=True)]
    return sure if sum(apart) <= 1 + FLIPPED_ROWS * rows else None
