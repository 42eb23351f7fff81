"""Bags of rows of 1-bit bases, compiled by TVM; a majority is counted by bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bincompile.ops import bases
from bincompile.ops.binary_embedding_bag import MAJORITY
from bincompile.runtime.bound import Bound, Size
from bincompile.runtime.kernels import Call, Kernel
from bincompile.runtime.library.tvm_binary_embedding import INDICES, flat, table_reason
from bincompile.runtime.tvm import Recipe, load, obstacle

WORTH_THREADS = 1 << 19  # numbers read, below which a second thread costs more than it brings
_STORED = ("mode", "include_last_offset", "padding_idx", "tie")


def layout(call: Call, columns: int) -> dict[str, Any]:
    """The parameters that all schedules of bags have."""
    offsets = call.value("offsets")
    return {"columns": columns, "indices": INDICES[call.value("indices").dtype],
            "offsets": "" if offsets is None else INDICES[offsets.dtype],
            "last": offsets is not None and bool(call.value("include_last_offset"))}


def _recipe(call: Call) -> Recipe:
    mode, common = call.value("mode"), layout(call, call.value("embedding_dim"))
    if mode == MAJORITY:
        return Recipe("binary_vote", {**common, "tie": float(call.value("tie"))})
    return Recipe("binary_bag", {
        **common, "bases": bases.count_of(call.value("row_scale")), "mode": mode,
        "weighted": call.value("weights") is not None})


def _supports(call: Call) -> str | None:
    return (table_reason(call) or bag_reason(call) or _scale_reason(call)
            or obstacle(_recipe(call), call.target))


def bag_reason(call: Call) -> str | None:
    """Why compiled kernels can't read this call's indices, offsets and weights, if they can't."""
    unknown = [name for name in _STORED if name in call.arguments and not call.is_stored(name)]
    if unknown:
        return f"the {unknown[0]} is known only at run time"
    offsets, weights = call.value("offsets"), call.value("weights")
    if call.value("indices").ndim != (2 if offsets is None else 1):
        return f"indices of rank {call.value('indices').ndim}"
    if offsets is not None and (offsets.ndim != 1 or offsets.dtype not in INDICES):
        return f"offsets {offsets.dtype} of rank {offsets.ndim}"
    if weights is not None and call.value("mode") != "sum":
        return f"weights with mode={call.value('mode')!r}"
    return None


def _scale_reason(call: Call) -> str | None:
    """Why the scales keep a kernel from giving what the reference gives, if they do."""
    scale, mode = call.value("row_scale"), call.value("mode")
    if mode == "max" and not scale.isfinite().all():
        return "a maximum of rows with scales that are not finite"
    if mode != MAJORITY:
        return None
    if scale.ndim != 1 or not scale.shape[0]:
        return f"a majority with scales of shape {tuple(scale.shape)}"
    voting = scale[scale != 0]
    one = float(voting[0]) if voting.numel() else 1.0
    if not (voting == one).all() or one < 0 or math.frexp(one)[0] != 0.5:
        return "a majority of rows whose scales are not one power of two, or 0"
    return None


def _bind(call: Call) -> Bound:
    scales = call.value("row_scale").detach()
    scales = scales.reshape(scales.shape[0], bases.count_of(scales))
    return runner(call, load(_recipe(call), call.target), call.value("embedding_dim"),
                  (call.value("table"), scales), call.partial(call.operator.check))


def runner(call: Call, module: Any, columns: int, stored: Sequence[torch.Tensor],
           refuse: Callable[..., Any]) -> Bound:
    """A kernel of the module for this call.

    Args:
        columns: of the result.
        stored: the arguments of the compiled functions between the offsets and the weights.
        refuse: called with the run-time values of a call that doesn't fit; it raises.
    """
    from tvm_ffi import from_dlpack

    serial, parallel = module["serial"], module["bags"]
    kept = [from_dlpack(tensor.detach().contiguous()) for tensor in stored]
    padding, last = call.value("padding_idx"), int(call.value("include_last_offset"))
    padding, few = -1 if padding is None else padding, WORTH_THREADS // columns
    take = _taker(call)

    def shape(*values: Any) -> tuple[Size, ...]:
        indices, offsets, _ = take(values)
        bags = indices.shape[0] if offsets is None else offsets.shape[0] - last
        if bags < 0:
            refuse(*values)
        return (((bags, columns), torch.float32),)

    def reduce(*given: Any) -> None:
        values, out = given[:-1], given[-1]
        indices, offsets, weights = take(values)
        row = flat(indices)
        arguments = [row] if offsets is None else [row, offsets.contiguous()]
        arguments += kept
        if weights is not None:
            if weights.shape != indices.shape:
                refuse(*values)
            arguments.append(flat(weights.detach().float()))
        serially = row.shape[0] <= few or torch.get_num_threads() == 1
        if (serial if serially else parallel)(*arguments, padding, out):
            refuse(*values)

    return Bound(shape, reduce)


def _taker(call: Call) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Of the run-time values of a call its indices, offsets and weights, stored ones too."""
    places = [(call.dynamic.index(name) if name in call.dynamic else None, call.arguments[name])
              for name in ("indices", "offsets", "weights")]
    return lambda values: tuple(stored if place is None else values[place]
                                for place, stored in places)


KERNEL = Kernel("tvm-bags", "binary_embedding_bag", _supports, _bind, 20, _recipe)
