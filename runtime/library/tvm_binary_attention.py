"""Attention with 1-bit queries and keys, compiled by TVM: popcounts, and products of bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bincompile.runtime.bound import Bound, Size
from bincompile.runtime.kernels import Call, Dynamic, Kernel, host_reason
from bincompile.runtime.tvm import Recipe, load, obstacle

WORTH_THREADS = 1 << 16  # scores below which a second thread costs more than it brings
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_STORED = ("scale", "causal", "probabilities", "values", "need_weights")
_FLOATING = ("query", "key", "value", "bias", "threshold")
TENSORS = ("query", "key", "value", "bias", "mask", "threshold")


def _recipe(call: Call) -> Recipe:
    return Recipe("binary_attention", {
        "features": call.value("query").shape[3], "width": call.value("value").shape[3],
        "bias": call.value("bias") is not None, "mask": call.value("mask") is not None,
        **{name: call.value(name) for name in ("causal", "probabilities", "values")},
        "vnni": call.target.isa == "avx512-vpopcntdq"})


def _supports(call: Call) -> str | None:
    if unknown := next((name for name in _STORED if not call.is_stored(name)), None):
        return f"{unknown} is known only at run time"
    if call.value("need_weights"):
        return "the weights are asked for, and the kernel does not write them"
    if call.value("drop") is not None:
        return "weights are dropped, as in training"
    given = [(name, call.value(name)) for name in _FLOATING]
    if other := next((n for n, t in given if t is not None and t.dtype not in FLOATS), None):
        return f"a {other} of {call.value(other).dtype}"
    widths = (call.value("query").shape[3], call.value("value").shape[3])
    if not all(isinstance(width, int) and width > 0 for width in widths):
        return "features that are not known before the run, or none"
    if any(t is not None and t.ndim > 4 for t in (call.value("bias"), call.value("mask"))):
        return "a bias or mask of more than four dimensions"
    return host_reason(call) or obstacle(_recipe(call), call.target)


def _bind(call: Call) -> Bound:
    module = load(_recipe(call), call.target)
    given, check = _taken(call), call.operator.check
    scale, probabilities, values_ = (call.value(n) for n in ("scale", "probabilities", "values"))
    dtype, kind = call.value("value").dtype, call.value("query").dtype

    def shape(*values: torch.Tensor) -> tuple[Size, ...]:
        query, _, value, *_ = given(values)
        (batch, heads, rows, _), width = query.shape, value.shape[3]
        strides = (rows * heads * width, width, heads * width, 1)  # merging heads copies nothing
        return ((batch, heads, rows, width), dtype, strides), ((0,), kind)

    def attend(*values: torch.Tensor) -> None:
        query, key, value, bias, mask, threshold = given(values[:-2])
        if query.shape[:2] != key.shape[:2] or key.shape[:3] != value.shape[:3]:
            check(query, key, value, bias, mask, None, threshold, scale, False, probabilities,
                  values_)
        out, (batch, heads, rows, _), keys = values[-2], query.shape, key.shape[2]
        if not out.numel() or not keys:
            out.zero_()
            return
        sizes = (batch, heads, rows, keys)
        flags = None if mask is None else mask.view(torch.uint8)
        extras = (_expanded(bias, sizes), _expanded(flags, sizes), _floats(threshold))
        whole = out if dtype is torch.float32 else torch.empty_like(out, dtype=torch.float32)
        module[_mode(batch * heads, rows * keys)](
            *(_floats(x) for x in (query, key, value)),
            *(extra for extra in extras if extra is not None), float(scale), whole)
        if whole is not out:
            out.copy_(whole)

    return Bound(shape, attend, several=True)


def _taken(call: Call) -> Callable[[tuple[torch.Tensor, ...]], list[torch.Tensor]]:
    """A function from the run-time values to all tensors, None for one that is not there."""
    known = [None if isinstance(argument := call.arguments[name], Dynamic) or argument is None
             else argument.detach() for name in TENSORS]
    places = [TENSORS.index(name) for name in call.dynamic]

    def given(values: tuple[torch.Tensor, ...]) -> list[Any]:
        found = known.copy()
        for place, value in zip(places, values, strict=True):
            found[place] = value
        return found

    return given


def _mode(heads: int, scores: int) -> str:
    """How the work is split: not at all, by heads, or by the rows of each."""
    threads = torch.get_num_threads()
    if threads == 1 or heads * scores < WORTH_THREADS:
        return "serial"
    return "rows" if heads % threads == 0 or heads >= 4 * threads else "panels"


def _floats(x: torch.Tensor | None) -> torch.Tensor | None:
    """float32, with its last axis side by side."""
    if x is None:
        return None
    wide = x if x.dtype is torch.float32 else x.float()
    return wide if wide.stride(-1) == 1 else wide.contiguous()


def _expanded(x: torch.Tensor | None, sizes: tuple[int, ...]) -> torch.Tensor | None:
    """Of all sizes: the last axis is copied where it repeats, no other one is."""
    if x is None:
        return None
    wide = x.float() if x.dtype in FLOATS[1:] else x
    if wide.ndim == 0 or wide.shape[-1] != sizes[-1]:
        wide = wide.expand(*wide.shape[:-1], sizes[-1])
    return (wide if wide.stride(-1) == 1 else wide.contiguous()).expand(sizes)


KERNEL = Kernel("tvm-binary-attention", "binary_attention", _supports, _bind, priority=20,
                recipe=_recipe)
