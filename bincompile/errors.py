"""The errors of bincompile: each says what was found, what is allowed, and what to change."""

from __future__ import annotations


class BincompileError(Exception):
    """Base of every error that bincompile raises on purpose.

    Args:
        found: what was found, with its value and, where known, the user's source line.
        allowed: what would have been accepted.
        change: the argument or the line to change.
    """

    def __init__(self, found: str, allowed: str, change: str) -> None:
        super().__init__(f"{found}\n  allowed: {allowed}\n  change:  {change}")
        self.found, self.allowed, self.change = found, allowed, change

    def __reduce__(self):
        return type(self), (self.found, self.allowed, self.change)


class InputError(BincompileError, ValueError):
    """A tensor has the wrong rank, size or value."""


class InputTypeError(BincompileError, TypeError):
    """An argument has the wrong type or dtype."""


class ConfigError(BincompileError, ValueError):
    """An option of `optimize` or of a layer is not one that exists."""


class MissingPackageError(BincompileError, ImportError):
    """An optional package is not installed."""


class CaptureError(BincompileError, RuntimeError):
    """The model can't be turned into a graph."""


class AccuracyUnknownError(BincompileError, RuntimeError):
    """A lossy rewrite was asked for without data to measure it on."""


class AccuracyError(BincompileError, RuntimeError):
    """A lossy rewrite broke its guard and `on_violation="raise"` was given."""


class ProofError(BincompileError, RuntimeError):
    """A compiled program disagrees with the model that it came from."""


class ContinualError(BincompileError, RuntimeError):
    """The model can't run one step at a time and give the same values."""


class StreamBusyError(BincompileError, RuntimeError):
    """Two calls of one stream at the same time."""


class StreamClosedError(BincompileError, RuntimeError):
    """A call of a stream that was closed."""


class KernelError(BincompileError, RuntimeError):
    """A kernel can't be compiled, loaded or run on this machine."""


class ArtifactError(BincompileError, ValueError):
    """A saved model can't be written or read."""


class WeightsGoneError(BincompileError, RuntimeError):
    """An earlier stage of a program is run after the model that it reads is gone."""
