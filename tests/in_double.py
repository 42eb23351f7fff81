"""A stage of a program, run in float64 whatever precisions its graph names.

The stages share one captured graph, so the two sides of a comparison differ by the rewrites
alone; eager code, whose casts are out of reach, is compared in its own precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from bincompile.program import Program

ROUNDED = (torch.float32, torch.float16, torch.bfloat16)


def run_in_double(program: Program, flat: Sequence[Any]) -> list[Any]:
    """The flat outputs of a stage at flat inputs, every float and every cast in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of constants that a graph makes
    try:
        with torch.no_grad():
            result = _InDouble(program.graph_module).run(*map(_wide, flat))
    finally:
        torch.set_default_dtype(default)
    return pytree.tree_leaves(result)


class _InDouble(fx.Interpreter):
    def fetch_attr(self, target: str) -> Any:
        return _wide(super().fetch_attr(target))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(_wide, (tuple(args), dict(kwargs)))
        return super().call_function(target, args, kwargs)


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in ROUNDED:
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) and value in ROUNDED else value
