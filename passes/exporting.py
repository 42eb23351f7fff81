"""Exporting: torch as it has to be while a model is captured, and its failures as ours."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.modules import transformer

from bincompile.errors import CaptureError, ConfigError, InputTypeError

log = logging.getLogger(__name__)

one_at_a_time = threading.RLock()  # torch.export keeps state of the process
_LOUD = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """torch.nn in plain operators: its fast path gives other values at masked places."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def exporting(model: nn.Module | ExportedProgram) -> Iterator[None]:
    """torch as it has to be while a model is captured; failures become `CaptureError`.

    One thread at a time: torch.export keeps state of the process.
    """
    try:
        with (one_at_a_time, warnings.catch_warnings(), _quiet(), without_fast_path(),
              _masks_as_given()):
            warnings.simplefilter("ignore")
            yield
    except (InputTypeError, ConfigError, CaptureError):
        raise
    except Exception as error:
        raise _explain(model, error) from error


@contextlib.contextmanager
def _masks_as_given() -> Iterator[None]:
    """nn.Transformer inspects the values of a mask to name it; without a name it uses the mask."""
    detect = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = detect


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch prints beside an exception (graph, advice) for the log: ours says it all."""
    printed = io.StringIO()
    levels = {logger: logger.level for logger in map(logging.getLogger, _LOUD)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(printed):
            yield
        sys.stderr.write(printed.getvalue())
    except Exception:
        log.debug("printed while capturing:\n%s", printed.getvalue())
        raise
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _explain(model: nn.Module | ExportedProgram, error: Exception) -> CaptureError:
    library = str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__)
              if not f.filename.startswith((library, str(Path(__file__).parent), "<"))
              and "contextlib" not in f.filename]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    first = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    control = "DataDependent" in type(error).__name__ or "data-dependent" in str(error)
    return CaptureError(
        f"{type(model).__name__} can't be captured{where}\n  because: "
        f"{type(error).__name__}: {first}",
        "a forward whose control flow and shapes don't depend on the values of tensors",
        "replace the branch on a tensor by torch.where or torch.cond" if control
        else "the line above, or the example inputs")
