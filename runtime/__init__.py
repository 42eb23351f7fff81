"""The runtime: which kernel runs an operator, how it is compiled, and programs made callable."""

from __future__ import annotations

if __name__ != "bincompile.runtime":
    raise ImportError(f"import bincompile.runtime, not {__name__}")

from bincompile.runtime.executor import Executable, bind
from bincompile.runtime.kernels import Call, Dynamic, Kernel, choose, explain, kernels_of

__all__ = ["Call", "Dynamic", "Executable", "Kernel", "bind", "choose", "explain", "kernels_of"]
