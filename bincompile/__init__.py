"""Compile PyTorch graphs to binary and continual operators, each rewrite proven.

Names are resolved when they are first used, so `import bincompile` costs next to nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ != "bincompile":
    raise ImportError(f"import bincompile, not {__name__}")

__version__ = "0.1.0"

_here = Path(__file__).parent
if not (_here / "passes").is_dir():  # in a checkout they stand beside this folder
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from bincompile import nn, optim
    from bincompile.api import inspect, optimize
    from bincompile.artifact import load
    from bincompile.compiled import CompiledModel
    from bincompile.config import Binary, Continual, Guard, Target
    from bincompile.errors import (
        AccuracyError,
        AccuracyUnknownError,
        ArtifactError,
        BincompileError,
        CaptureError,
        ConfigError,
        ContinualError,
        InputError,
        InputTypeError,
        KernelError,
        MissingPackageError,
        ProofError,
        StreamBusyError,
        StreamClosedError,
    )
    from bincompile.patterns import Pattern, check_pattern, register_pattern
    from bincompile.program import Program
    from bincompile.report import Report
    from bincompile.stream import Stream

__all__ = [
    "AccuracyError", "AccuracyUnknownError", "ArtifactError", "Binary", "BincompileError",
    "CaptureError", "CompiledModel", "ConfigError", "Continual", "ContinualError", "Guard",
    "InputError", "InputTypeError", "KernelError", "MissingPackageError", "Pattern", "Program",
    "ProofError", "Report", "Stream", "StreamBusyError", "StreamClosedError", "Target",
    "__version__", "check_pattern", "inspect", "load", "nn",
    "optim", "optimize", "register_pattern",
]

_HOMES = {  # the module that holds a public name; bincompile.errors holds the others
    "inspect": "api", "optimize": "api", "load": "artifact", "CompiledModel": "compiled",
    "Binary": "config", "Continual": "config", "Guard": "config", "Target": "config",
    "Program": "program", "Report": "report", "Pattern": "patterns", "check_pattern": "patterns",
    "register_pattern": "patterns", "Stream": "stream",
}
_MODULES = ("nn", "optim")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bincompile' has no attribute {name!r}")
    if name in _MODULES:
        return importlib.import_module(f"bincompile.{name}")
    home = importlib.import_module(f"bincompile.{_HOMES.get(name, 'errors')}")
    value = globals()[name] = getattr(home, name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
