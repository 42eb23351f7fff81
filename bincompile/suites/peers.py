"""The float peers: a model as torch runs it, in bf16, in dynamic int8 and under torch.compile."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bincompile.runtime.native import compiler
from bincompile.suites.rows import EAGER, HALF, INDUCTOR, INT8


def peers(model: nn.Module, *args: torch.Tensor, half: bool = True, int8: bool = True,
          inductor: bool = True) -> dict[str, Callable[[], Any]]:
    """Candidates that run this float model on these inputs.

    Args:
        model: a float32 model in eval mode.
        args: its inputs; floats are cast for bf16.
        half: with one in bf16.
        int8: with one whose linears are dynamic int8 (torch.ao, quantize_dynamic).
        inductor: with torch.compile in its default mode, where there is a C compiler.
    """
    found: dict[str, Callable[[], Any]] = {EAGER: lambda: model(*args)}
    if inductor and compiler() is not None:
        compiled = torch.compile(model)
        found[INDUCTOR] = lambda: compiled(*args)
    if half:
        small = copy.deepcopy(model).to(torch.bfloat16)
        cast = [x.bfloat16() if x.is_floating_point() else x for x in args]
        found[HALF] = lambda: small(*cast)
    if int8:
        quantised = _quantised(model)
        found[INT8] = lambda: quantised(*args)
    return found


def _quantised(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its own quantisation will move
        inside = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(copy.deepcopy(model)), {nn.Linear}, dtype=torch.qint8)
    return inside
