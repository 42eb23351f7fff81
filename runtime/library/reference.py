"""The kernel that every operator has: its own definition in torch."""

from __future__ import annotations

from bincompile.ops import OPERATORS
from bincompile.runtime.kernels import REFERENCE, Call, Kernel


def _supports(call: Call) -> None:
    return None


def _bind(call: Call):
    return call.partial(call.operator.overload)


KERNELS = tuple(Kernel(REFERENCE, name, _supports, _bind, priority=-1) for name in OPERATORS)
