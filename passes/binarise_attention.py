"""Binarise attention: queries and keys to bits, and where asked values too.

Scores become sign(q) . sign(k) * s(q) s(k) * scale, with s(x) the mean |x| of a row
(BinaryAttention, arXiv:2603.09582). With binary values each value is its signs times its mean, and
what each is multiplied by is rounded to 8 bits ("uint8" of `ops/binary_attention.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import fx

from bincompile.config import Binary
from bincompile.ops.attention import attention
from bincompile.ops.binary_attention import binary_attention
from bincompile.passes.graph import Build, aten, shape_of, value_of
from bincompile.passes.patterns import owner_of
from bincompile.program import Program
from bincompile.record import Refusal

LOW = -1e3  # a finite fill that is at most this hides a key as -inf does
PROBABILITIES = {"float": "float", "binary": "uint8"}  # by the kind of values
_WITHOUT = {"softcap": "capped scores", "gain": "scores multiplied by a tensor",
            "low": "clamped scores", "high": "clamped scores", "sink": "a sink",
            "mix_before": "mixed heads", "mix_after": "mixed heads", "mix_shift": "mixed heads"}


def binary_reason(node: fx.Node) -> str | None:
    """Why this attention can't become one of 1-bit queries and keys, if it can't."""
    found = attention.bind(node.args, dict(node.kwargs))
    if given := next((name for name in _WITHOUT if found[name] is not None), None):
        return f"{_WITHOUT[given]}: binary attention has no such thing"
    if found["fill"] is not None and not found["fill"] <= LOW:
        return f"hidden scores of {found['fill']:g}, where binary attention has -inf"
    lead = [[str(size) for size in shape_of(found[name])[:-2]] for name in ("query", "key")]
    if any(len(shape_of(found[name])) != 4 for name in ("query", "key", "value")):
        return "a query, key or value that is not (batch, heads, tokens, features)"
    value = [str(size) for size in shape_of(found["value"])[:2]]
    heads = shape_of(found["key"])[1]
    groups = found["groups"]
    repeated = [lead[1][0], str(heads * groups if isinstance(heads, int) else heads)]
    if value != lead[1] or repeated != lead[0] or (groups > 1 and not isinstance(heads, int)):
        return "a query, key and value whose batch or heads differ"
    if any(len(shape_of(found[name])) > 4 for name in ("bias", "mask", "late_bias")
           if found[name] is not None):
        return "a bias or mask of more than four dimensions"
    if not value_of(found["query"]).dtype.is_floating_point or not math.isfinite(found["scale"]):
        return "a query that is not of floats, or a scale that is not finite"
    return None


def asked(program: Program, binary: Binary) -> Iterator[tuple[fx.Node, str]]:
    """The attention nodes that `binary` asks for, and their module paths."""
    if binary.attention == "binary":
        for node in program.graph.nodes:
            if node.target is attention.overload and binary.covers(path := owner_of((node,))):
                yield node, path


def attention_refusals(program: Program, binary: Binary) -> list[Refusal]:
    """The attentions that were asked for and stay float, with the facet that keeps them so."""
    return [Refusal("attention", path, f"stays float: {reason}", node.name)
            for node, path in asked(program, binary)
            if (reason := binary_reason(node)) is not None]


def emit_attention(build: Build, node: fx.Node, binary: Binary) -> fx.Node:
    """Binary attention in place of a float one, with the same two results."""
    found = attention.bind(node.args, dict(node.kwargs))
    key, value = (_repeated(build, found[name], found["groups"]) for name in ("key", "value"))
    bias, late = found["bias"], found["late_bias"]
    if late is not None:  # a key that the mask hides stays hidden
        bias = late if bias is None else build.call(aten.add.Tensor, bias, late)
    return build.call(binary_attention.overload, found["query"], key, value, bias, found["mask"],
                      None, None, found["scale"], found["causal"], PROBABILITIES[binary.values],
                      binary.values, found["need_weights"])


def _repeated(build: Build, x: Any, groups: int) -> Any:
    return x if groups == 1 else build.call(aten.repeat_interleave.self_int, x, groups, 1)
