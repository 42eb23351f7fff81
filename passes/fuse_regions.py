"""Regions: connected nodes that act on the same rows, and that one kernel can run in one go.

A region is convex: no path leaves it and comes back, also not through another region. Nodes are
taken in order; each joins the regions of what it reads, and of what else reads the same rows, as
long as that holds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from bincompile.passes.fuse_ops import (
    INDICES,
    WHOLE,
    Rule,
    Step,
    keeps_rows,
    rows_of,
    step_of,
)
from bincompile.passes.graph import is_tensor, shape_of, value_of
from bincompile.passes.sizes import equal

MOST_HEAVY, MOST_NODES = 12, 120  # of one region: what is larger compiles longer, and is not shared


@dataclasses.dataclass(frozen=True)
class Region:
    """Nodes to fuse, in the order of the graph.

    Args:
        steps: for each node that computes something, what it does.
        views: nodes within that only give rows other leading axes.
        lead: the leading axes that all rows are brought to.
    """

    steps: dict[fx.Node, Step]
    views: frozenset[fx.Node]
    lead: tuple[Any, ...]

    def source(self, node: fx.Node) -> fx.Node:
        """What a value is, views of this region aside."""
        while node in self.views:
            node = node.args[0]
        return node

    @functools.cached_property
    def results(self) -> tuple[fx.Node, ...]:
        """The nodes whose value is read outside."""
        inside = {*self.steps, *self.views}
        read = {self.source(n) for n in inside if any(user not in inside for user in n.users)}
        return tuple(n for n in self.steps if n in read)


def reads_of(step: Step) -> Iterator[tuple[str, fx.Node]]:
    """The nodes that a step reads, each with how: "rows", "indices" or "whole"."""
    for place, arg in enumerate(step.args):
        if isinstance(arg, Step):
            yield from reads_of(arg)
        elif isinstance(arg, fx.Node):
            yield ("whole" if place in WHOLE.get(step.op, ()) else
                   "indices" if INDICES.get(step.op) == place else "rows"), arg


def regions_of(graph: fx.Graph, rules: Mapping[Any, Rule], least: int) -> list[Region]:
    """The regions of a graph that are worth a kernel, in order, none of them overlapping.

    Args:
        least: how many operations are worth one.
    """
    moving = run_time(graph)
    growing = _Growing(graph, rules)
    for node in graph.nodes:
        if node in moving and is_tensor(node):
            step = step_of(node, rules)
            if step is not None or keeps_rows(node):
                growing.add(node, step)
    return [region for group in growing.groups() if (region := _region(group, least)) is not None]


def run_time(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that are computed at each call: from an input's values, or from its sizes."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(read in found for read in node.all_input_nodes):
            found.add(node)
    return found


def same_rows(left: fx.Node, right: fx.Node) -> bool:
    """Whether two values have the same number of rows, each value more than a row's factor."""
    return len(shape_of(left)) > 1 and len(shape_of(right)) > 1 \
        and equal(rows_of(left), rows_of(right))


@dataclasses.dataclass(eq=False)
class _Group:
    nodes: dict[fx.Node, Step | None]
    heavy: int
    pinned: tuple[Any, ...] | None  # leading axes that an input repeats along


class _Growing:
    """Groups while they grow, and what can be reached from what if each were one node."""

    def __init__(self, graph: fx.Graph, rules: Mapping[Any, Rule]) -> None:
        self.rules = rules
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.nodes = list(graph.nodes)
        self.above = [0] * len(self.nodes)
        self.below = [0] * len(self.nodes)
        for index, node in enumerate(self.nodes):
            for read in node.all_input_nodes:
                self.above[index] |= self.above[self.order[read]] | 1 << self.order[read]
        for index in reversed(range(len(self.nodes))):
            for user in self.nodes[index].users:
                self.below[index] |= self.below[self.order[user]] | 1 << self.order[user]
        self.group: dict[fx.Node, _Group] = {}
        self.readers: dict[fx.Node, list[_Group]] = {}

    def groups(self) -> list[_Group]:
        return list({id(g): g for g in self.group.values()}.values())

    def add(self, node: fx.Node, step: Step | None) -> None:
        """A node more: it joins every group that it can."""
        own = _Group({node: step}, int(step is not None and self.rules[node.target].heavy),
                     _pinned(node, step))
        self.group[node] = own
        rows = [node.args[0]] if step is None else [read for how, read in reads_of(step)
                                                    if how == "rows" and same_rows(read, node)]
        for read in dict.fromkeys(rows):
            if read in self.group:
                self._join(self.group[read], self.group[node])
        for read in dict.fromkeys(rows):
            if self.group.get(read) is not self.group[node]:
                for reader in self.readers.get(read, ()):
                    other = self.group[next(iter(reader.nodes))]
                    if other is not self.group[node]:
                        self._join(other, self.group[node])
                self.readers.setdefault(read, []).append(self.group[node])

    def _join(self, left: _Group, right: _Group) -> None:
        if left is right or left.heavy + right.heavy > MOST_HEAVY \
                or len(left.nodes) + len(right.nodes) > MOST_NODES \
                or not agree(left.pinned, right.pinned):
            return
        mask = sum(1 << self.order[n] for n in (*left.nodes, *right.nodes))
        above, below = self._around(left, right, self.above), self._around(left, right, self.below)
        if above & below & ~mask:
            return
        above, below = above & ~mask, below & ~mask
        for index in _places(below):
            self.above[index] |= above | mask
        for index in _places(above):
            self.below[index] |= below | mask
        left.nodes.update(right.nodes)
        left.heavy += right.heavy
        left.pinned = left.pinned or right.pinned
        for node in left.nodes:
            self.group[node] = left
            self.above[self.order[node]], self.below[self.order[node]] = above, below

    def _around(self, left: _Group, right: _Group, side: list[int]) -> int:
        return (side[self.order[next(iter(left.nodes))]]
                | side[self.order[next(iter(right.nodes))]])


def _places(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def agree(left: tuple[Any, ...] | None, right: tuple[Any, ...] | None) -> bool:
    """Whether leading axes are known to be equal; None agrees with all."""
    return left is None or right is None or (
        len(left) == len(right) and all(map(equal, left, right)))


def _pinned(node: fx.Node, step: Step | None) -> tuple[Any, ...] | None:
    """The leading axes of a node that reads what repeats along some of them, but not all."""
    lead = shape_of(node)[:-1]
    for how, read in reads_of(step) if step is not None else ():
        sizes = shape_of(read)[:-1]
        if how == "rows" and not all(equal(s, 1) for s in sizes) and not agree(sizes, lead):
            return lead
    return None


def _region(group: _Group, least: int) -> Region | None:
    """The group without views at its edges; None if a kernel of its own gains nothing."""
    nodes = dict(group.nodes)
    while True:
        idle = [n for n, step in nodes.items() if step is None and (
            n.args[0] not in nodes or not any(user in nodes for user in n.users))]
        if not idle:
            break
        for node in idle:
            del nodes[node]
    steps = {n: step for n, step in nodes.items() if step is not None}
    if len(steps) < least or not any(shape_of(n)[-1] > 1 for n in steps):
        return None
    ordered = sorted(steps, key=_order(next(iter(steps)).graph).__getitem__)
    region = Region({n: steps[n] for n in ordered},
                    frozenset(n for n, step in nodes.items() if step is None),
                    group.pinned or _commonest(ordered))
    return region if _closed(region) else None


def _closed(region: Region) -> bool:
    """Whether all results are float32, and no table, weight or index is made inside."""
    return all(value_of(n).dtype == torch.float32 for n in region.results) and not any(
        region.source(read) in region.steps for step in region.steps.values()
        for how, read in reads_of(step) if how != "rows")


def _order(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: index for index, node in enumerate(graph.nodes)}


def _commonest(nodes: Iterable[fx.Node]) -> tuple[Any, ...]:
    """The leading axes that most nodes have; of two, those of the first."""
    found: list[tuple[tuple[Any, ...], int]] = []
    for node in nodes:
        lead = shape_of(node)[:-1]
        place = next((i for i, (known, _) in enumerate(found) if agree(known, lead)), None)
        if place is None:
            found.append((lead, 1))
        else:
            found[place] = (lead, found[place][1] + 1)
    return max(found, key=lambda entry: entry[1])[0]
