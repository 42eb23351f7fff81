"""Operators over the features of a token: norms, reductions, softmax, sorting, sums."""

from __future__ import annotations

from typing import Any

from torch import fx

from bincompile.ops.fake_binary_rows import fake_binary_rows
from bincompile.ops.fake_signs import fake_signs
from bincompile.ops.fit_bases import fit_bases
from bincompile.ops.pack_bases import pack_bases
from bincompile.ops.pack_signs import pack_signs
from bincompile.passes.graph import arguments, aten, value_of
from bincompile.passes.streaming.facts import Facts, settled
from bincompile.passes.streaming.kinds import BATCH, TIME, Axes, Kind, Kinds, Refused, Still, plain
from bincompile.passes.streaming.rule import Rule
from bincompile.passes.streaming.rules.linear import emit
from bincompile.passes.streaming.rules.pointwise import overloads

NORMS = ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
CHANNELS = ("group_norm", "native_group_norm", "instance_norm")
BATCH_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit",
               "native_batch_norm", "cudnn_batch_norm", "_batch_norm_no_update")
ALONG = ("sum", "mean", "amax", "amin", "max", "min", "prod", "logsumexp", "linalg_vector_norm",
         "norm", "any", "all", "argmax", "argmin", "var", "std", "var_mean", "std_mean", "topk",
         "sort", "argsort", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "softmax",
         "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "median", "nanmedian", "mode",
         "kthvalue", "glu", "count_nonzero", "nansum", "nanmean", "aminmax", "quantile",
         "_weight_norm_interface", "constant_pad_nd")
ROWS = (fake_binary_rows, fake_signs, fit_bases, pack_bases, pack_signs)


def _what(name: str) -> str:
    return f"computes {name} over time"


def check_plain(axes: Axes, dims: Any, what: str) -> None:
    """Raise where one of these axes holds time or the batch."""
    for dim in dims:
        if any(atom.role == TIME for atom in axes[dim]):
            raise Refused(what, "a norm or reduction over features", by_window=True)
        if any(atom.role == BATCH for atom in axes[dim]):
            raise Refused(f"{what.removesuffix(' over time')} over the rows of the batch")


def only_first(node: fx.Node, facts: Facts) -> Any:
    """The kind of the first argument, where all others are stored."""
    if any(not isinstance(facts.kind(n), Still) for n in node.all_input_nodes[1:]):
        raise Refused("takes another argument that changes with time")
    return settled(facts.kind(node.args[0]))


def _like_values(kind: Any, node: fx.Node, axes: Axes, first: int) -> Kinds:
    """The kinds of a node's results: axes before `first` are kept, others have their sizes."""
    value = value_of(node)
    if not isinstance(value, tuple | list):
        found: Kind = kind.with_axes(axes)
        return found
    return tuple(kind.with_axes((*axes[:first], *(plain(s) for s in part.shape[first:])))
                 if part.ndim == len(axes) else Still(tuple(plain(s) for s in part.shape))
                 for part in value)


def _normed(node: fx.Node, facts: Facts) -> Kinds:
    kind = only_first(node, facts)
    count = len(arguments(node)["normalized_shape"])
    rank = len(kind.axes)
    check_plain(kind.axes, range(rank - count, rank), _what("a norm"))
    return _like_values(kind, node, kind.axes, rank - count)


def _channels(node: fx.Node, facts: Facts) -> Kinds:
    """Norms over groups of channels, and over what is behind them."""
    kind = only_first(node, facts)
    check_plain(kind.axes, range(1, len(kind.axes)), _what("a norm"))
    if isinstance(value_of(node), tuple):
        raise Refused("is a norm with statistics as results")
    found: Kind = kind.with_axes(kind.axes)
    return found


def _batch_norm(node: fx.Node, facts: Facts) -> Kinds:
    """Batch norm in eval mode acts on every channel by itself."""
    kind, given = only_first(node, facts), arguments(node)
    if given.get("training") or given.get("running_mean") is None:
        raise Refused(_what("statistics"), "model.eval()")
    check_plain(kind.axes, (1,), "scales every token by itself over time")
    return _like_values(kind, node, kind.axes, len(kind.axes))


def _along(node: fx.Node, facts: Facts) -> Kinds | None:
    """Anything along axes that hold neither time nor the batch."""
    kind, given = only_first(node, facts), arguments(node)
    name = node.target._schema.name.removeprefix("aten::").strip("_")
    rank = len(kind.axes)
    dims = given.get("dim", given.get("axis"))
    dims = [dims] if isinstance(dims, int) else list(dims) if dims else list(range(rank))
    dims = [d % rank for d in dims] if rank else []
    check_plain(kind.axes, dims, _what(name))
    value = value_of(node)
    parts = value if isinstance(value, tuple | list) else (value,)
    found = tuple(kind.with_axes(_after(kind.axes, dims, part)) for part in parts)
    return found if isinstance(value, tuple | list) else found[0]


def _after(axes: Axes, dims: list[int], part: Any) -> Axes:
    if part.ndim < len(axes):
        return tuple(axis for i, axis in enumerate(axes) if i not in dims)
    return tuple(plain(part.shape[i]) if i in dims else axis for i, axis in enumerate(axes))


def _padded(node: fx.Node, facts: Facts) -> Kind | None:
    """A pad of axes that hold neither time nor the batch."""
    kind, given = settled(facts.kind(node.args[0])), list(arguments(node)["pad"])
    rank = len(kind.axes)
    dims = [rank - 1 - i // 2 for i, count in enumerate(given) if facts.size(count) != 0]
    check_plain(kind.axes, dims, "pads the tokens over time")
    found: Kind = kind.with_axes(_after(kind.axes, dims, value_of(node)))
    return found


def _rows(node: fx.Node, facts: Facts) -> Kinds:
    """What is binary row by row: the last axis alone is changed."""
    kind = settled(facts.kind(node.args[0]))
    check_plain(kind.axes, (len(kind.axes) - 1,), _what("a scale"))
    value, lead = value_of(node), kind.axes[:-1]
    if not isinstance(value, tuple | list):
        found: Kind = kind.with_axes((*lead, *(plain(s) for s in value.shape[len(lead):])))
        return found
    return tuple(kind.with_axes((*lead, *(plain(s) for s in part.shape[len(lead):])))
                 for part in value)


norms = Rule(overloads(NORMS), _normed, emit)
channels = Rule(overloads(CHANNELS), _channels, emit)
batch_norms = Rule(overloads(BATCH_NORMS), _batch_norm, emit)
along = Rule(overloads(tuple(n for n in ALONG if n != "constant_pad_nd")), _along, emit,
             general=True)
pads = Rule((aten.constant_pad_nd.default, aten.pad.default, aten.reflection_pad1d.default,
             aten.replication_pad1d.default, aten.reflection_pad2d.default), _padded, emit,
            general=True)
rows = Rule(tuple(op.overload for op in ROWS), _rows, emit)
