"""Upstream: how a query, key or value came to be, read by walking up from the product.

The walk passes layout, slices, splits, casts, factors, repeated heads, rotary positions and norms,
and ends at a projection. Where several paths part and meet again, the region between is judged as
a whole: one that reduces over features is a norm, one that turns pairs of them is rotary. What is
read here describes a match; it never changes what is run.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import operator
import weakref
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx

from bincompile.passes.axes import LAYOUTS, SPLITS
from bincompile.passes.graph import aten, is_sequence, is_tensor, number, shape_of, value_of
from bincompile.passes.mask_graph import MaskGraph
from bincompile.passes.patterns import Context
from bincompile.passes.regions import NORMS, REGION, norm_of, rotation_of
from bincompile.passes.scores import CASTS

PROJECTIONS = {aten.linear.default: "linear", aten.addmm.default: "addmm",
               aten.conv1d.default: "conv", aten.conv2d.default: "conv",
               aten.conv3d.default: "conv", aten.convolution.default: "conv",
               aten.matmul.default: "einsum", aten.mm.default: "einsum",
               aten.bmm.default: "einsum", aten.einsum.default: "einsum"}
TURNS = (aten.cos.default, aten.sin.default, aten.polar.default)
LOOK_UPS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default,
            aten.gather.default)
# Operators with one input that matters, which is the first.
STEPS = (*LAYOUTS, *CASTS, *SPLITS, aten.slice.Tensor, aten.select.int, aten.index.Tensor,
         aten.index_select.default, aten.repeat_interleave.self_int, aten.repeat.default,
         aten.batch_norm.default, aten.view_as_complex.default, aten.view_as_real.default,
         aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor,
         aten.div.Scalar, aten.cat.default, aten.roll.default, operator.getitem)
WIDEST, LONGEST = 120, 200  # nodes of a region, and steps of a walk


@dataclasses.dataclass(frozen=True)
class Upstream:
    """How a value came to be.

    Args:
        end: the projection's result, or where the walk ended.
        projection: "linear", "addmm", "conv" or "einsum"; None where the walk met none.
        chain: the nodes on the way, from the product upwards.
        factor: the product of the constants that it was multiplied by.
        rope: "half", "interleaved" or "complex".
        norm: "layer", "rms" or "l2", and the node where it ends.
    """

    end: fx.Node
    projection: str | None
    chain: tuple[fx.Node, ...]
    factor: float = 1.0
    rope: str | None = None
    norm: tuple[str, fx.Node] | None = None

    @property
    def source(self) -> fx.Node:
        """What the projection reads; the end itself without one."""
        if self.projection is None:
            return self.end
        if self.end.target is aten.addmm.default:
            return self.end.args[1]
        return self.end.all_input_nodes[0]


_ROTATIONS: weakref.WeakKeyDictionary[fx.GraphModule, dict[str, str | None]] = \
    weakref.WeakKeyDictionary()


def upstream(node: fx.Node, context: Context) -> Upstream:
    """How a value came to be."""
    return _Walk(context).up(node)


class _Walk:
    """A walk; which nodes are cosines and sines of positions is remembered."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.turning: dict[fx.Node, bool] = {}

    @functools.cached_property
    def order(self) -> dict[fx.Node, int]:
        """Where each node stands in the graph."""
        return {n: i for i, n in enumerate(self.context.graph_module.graph.nodes)}

    def up(self, node: fx.Node) -> Upstream:
        chain, facts = [node], {"factor": 1.0, "rope": None, "norm": None}
        for _ in range(LONGEST):
            found = self._before(node, chain, facts)
            if found is None:
                break
            node = found
            chain.append(node)
        kind = self._projection(node)
        return Upstream(node, kind, tuple(chain), **facts)  # type: ignore[arg-type]

    def _before(self, node: fx.Node, chain: list[fx.Node], facts: dict[str, Any]) -> fx.Node | None:
        """The node that this one is made of, with what the step says."""
        if node.op != "call_function" or self._projection(node) is not None:
            return None
        if node.target in NORMS:
            facts["norm"] = facts["norm"] or (NORMS[node.target], node)
            return node.args[0]
        mains = self._mains(node)
        if len(mains) > 1 and node.target is aten.cat.default:
            mains = [m for m in mains if not _is_input(m)] or mains  # keys of steps before
        if not mains:
            return None
        if len(mains) > 1:
            return self._meeting(node, chain, facts)
        if node.target not in STEPS:
            return None
        facts["factor"] *= self._factor(node)
        if node.target is aten.mul.Tensor and value_of(node).dtype.is_complex:
            facts["rope"] = facts["rope"] or "complex"
        return mains[0]

    def _meeting(self, node: fx.Node, chain: list[fx.Node],
                 facts: dict[str, Any]) -> fx.Node | None:
        """Where all paths above a node meet again, with what the region between says."""
        region, meeting = self._region(node)
        if meeting is None:
            return None
        norm = norm_of(region)
        if norm is not None:
            facts["norm"] = facts["norm"] or (norm, node)
            return meeting
        rope = rotation_of(chain, region, meeting,
                           _ROTATIONS.setdefault(self.context.graph_module, {}))
        facts["rope"] = facts["rope"] or rope
        return meeting if rope is not None else None

    def _region(self, node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
        region, seen = [node], set[fx.Node]()
        waiting: list[tuple[int, fx.Node]] = []
        while len(region) < WIDEST:
            if region[-1].target not in REGION:
                break
            for main in self._mains(region[-1]):
                if main not in seen:
                    seen.add(main)
                    heapq.heappush(waiting, (-self.order[main], main))
            if not waiting:
                break
            latest = heapq.heappop(waiting)[1]
            if not waiting:
                return region, latest
            region.append(latest)
        return region, None

    def _projection(self, node: fx.Node) -> str | None:
        made = [n for n in node.all_input_nodes if _carries(n, self.context)]
        return PROJECTIONS.get(node.target) if len(made) == 1 else None

    def _mains(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of a node that carry the model's activations, not positions or weights."""
        if node.target in LOOK_UPS and not _carries(node.args[0], self.context):
            return []
        return [n for n in node.all_input_nodes
                if _carries(n, self.context) and not self._turns(n)]

    def _turns(self, node: fx.Node) -> bool:
        """Whether a node is a cosine or sine, or made of such ones and weights alone."""
        if node not in self.turning:
            self.turning[node] = False  # of a walk that comes back here
            reads = [n for n in node.all_input_nodes if _carries(n, self.context)]
            looked_up = node.target in LOOK_UPS and reads[:1] != [node.args[0]]
            self.turning[node] = node.target in TURNS or looked_up or (
                node.target in REGION and bool(reads) and all(map(self._turns, reads)))
        return self.turning[node]

    def _factor(self, node: fx.Node) -> float:
        if node.target not in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            return 1.0
        left, right = (self._number(a) for a in node.args[:2])
        if node.target in (aten.div.Tensor, aten.div.Scalar):
            return 1 / right if right else 1.0
        return left or right or 1.0

    def _number(self, arg: Any) -> float | None:
        """A number, or the one element of a tensor that is made of stored constants."""
        found = number(self.context.graph_module, arg)
        if found is not None or not is_tensor(arg) or arg in self.context.activations \
                or any(str(size) != "1" for size in shape_of(arg)):
            return found
        graph = MaskGraph.of(arg, self.context)
        made = None if graph is None or graph.inputs or graph.sizes else graph.at({})(_unread)
        return None if made is None or made.is_complex() else float(made)


def _unread(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _carries(node: Any, context: Context) -> bool:
    return isinstance(node, fx.Node) and node in context.activations \
        and (is_tensor(node) or is_sequence(node))


def _is_input(node: fx.Node) -> bool:
    while node.op == "call_function" and node.target in (*LAYOUTS, *CASTS):
        node = node.args[0]
    return node.op == "placeholder"


def elements(node: fx.Node) -> sympy.Expr:
    """How many elements a tensor has, in symbols."""
    return sympy.prod([s.node.expr if isinstance(s, torch.SymInt) else s for s in shape_of(node)])


def heads_of(made: Upstream, features: Any) -> int | None:
    """How many heads a projected value has: its width by the features of one head."""
    tokens = _tokens(made)
    if tokens is None or not isinstance(features, int):
        return None
    kept = _fewest(n for n in made.chain if is_tensor(n))
    found = sympy.cancel(kept / (features * tokens))
    return int(found) if found.is_Integer and found > 0 else None


def _fewest(nodes: Iterable[fx.Node]) -> sympy.Expr:
    """The fewest elements on the way: heads are repeated behind that place, and split above it."""
    found: sympy.Expr | None = None
    for node in nodes:
        count = elements(node)
        ratio = None if found is None else sympy.cancel(count / found)
        if ratio is None or (ratio.is_number and ratio < 1):
            found = count
    return found


def _tokens(made: Upstream) -> sympy.Expr | None:
    """How many tokens a projection reads."""
    if made.projection is None:
        return None
    shape = shape_of(made.end)
    if made.projection in ("linear", "addmm"):
        return elements(made.end) / shape[-1]
    if made.projection == "conv":
        return elements(made.end) / shape[1] if len(shape) > 2 else None
    if made.end.target is aten.einsum.default:
        return _einsum_tokens(made)
    return elements(made.source) / shape_of(made.source)[-1]


def _einsum_tokens(made: Upstream) -> sympy.Expr | None:
    inputs, arrow, output = made.end.args[0].replace(" ", "").partition("->")
    operands = list(made.end.args[1])
    labels = inputs.split(",")
    if not arrow or "." in inputs or made.source not in operands:
        return None
    kept = zip(labels[operands.index(made.source)], shape_of(made.source), strict=True)
    sizes = [s.node.expr if isinstance(s, torch.SymInt) else s for a, s in kept if a in output]
    return sympy.prod(sizes)
