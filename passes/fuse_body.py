"""Bodies of regions: statements in place of nodes, and the nodes that feed them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from bincompile.body import Body, Name, Statement
from bincompile.ops.fused_rows import fused_rows
from bincompile.ops.row_ops import ROW_OPS
from bincompile.passes.fuse_ops import Step, fixed
from bincompile.passes.fuse_regions import Region, agree, reads_of
from bincompile.passes.graph import aten, shape_of, value_of
from bincompile.passes.sizes import equal

Read = tuple[fx.Node, str]  # a node, and how it is read: by "rows", by "indices" or "whole"
Sizes = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Written:
    """A region as a body.

    Args:
        region: the nodes.
        body: what they do.
        inputs: the nodes that feed it.
        sizes: nodes that hold sizes, of which leading axes are made.
        signs: the nodes whose inputs' signs it takes, in the order of its statements.
    """

    region: Region
    body: Body
    inputs: tuple[Read, ...]
    sizes: tuple[fx.Node, ...]
    signs: tuple[fx.Node, ...]

    def emit(self, build: Any, values: Mapping[fx.Node, Any]) -> tuple[Any, ...]:
        """The operator, and its results as the region's nodes have them.

        Args:
            build: a `Build` or an `Evaluate`.
            values: what stands for each node of `inputs` and of `sizes`.
        """
        given = [self._placed(build, values, read) for read in self.inputs]
        made = build.call(fused_rows.overload, given, str(self.body))
        return tuple(self._given_back(build, values, build.item(made, place), node)
                     for place, node in enumerate(self.region.results))

    def _placed(self, build: Any, values: Mapping[fx.Node, Any], read: Read) -> Any:
        node, how = read
        columns = [] if how == "indices" else [fixed(size) for size in shape_of(node)[-1:]]
        kind = _other_axes(read, self.region)
        if not kind:
            return values[node]
        lead = self._lead(build, values, self.region.lead) if kind == "rows" else []
        return build.call(aten.reshape.default, values[node], [*lead, *columns])

    def _given_back(self, build: Any, values: Mapping[fx.Node, Any], made: Any,
                    node: fx.Node) -> Any:
        if agree(shape_of(node)[:-1], self.region.lead):
            return made
        lead = self._lead(build, values, shape_of(node)[:-1])
        return build.call(aten.reshape.default, made, [*lead, fixed(shape_of(node)[-1])])

    def _lead(self, build: Any, values: Mapping[fx.Node, Any], wanted: Sizes) -> list[Any]:
        found = [self._size(build, values, size) for size in wanted]
        return [-1 if size is None else size for size in found]

    def _size(self, build: Any, values: Mapping[fx.Node, Any], wanted: Any) -> Any:
        """A size as a number or a node; None where nothing that is at hand has it."""
        if fixed(wanted) is not None:
            return fixed(wanted)
        for node in self.sizes:
            if equal(value_of(node), wanted):
                return values[node]
        for node, _ in self.inputs:
            for axis, size in enumerate(shape_of(node)):
                if equal(size, wanted):
                    return build.size(values[node], axis)
        return None

    @property
    def complete(self) -> bool:
        """Whether all leading axes that have to be written are known.

        One may be left to torch where no other of them can be 0.
        """
        wanted = [shape_of(n)[:-1] for n in self.region.results
                  if not agree(shape_of(n)[:-1], self.region.lead)]
        if any(_other_axes(read, self.region) == "rows" for read in self.inputs):
            wanted.append(self.region.lead)
        return all(not (gaps := [size for size in lead if self._missing(size)])
                   or (len(gaps) == 1 and sum(fixed(size) is not None for size in lead)
                       == len(lead) - 1) for lead in wanted)

    def _missing(self, wanted: Any) -> bool:
        known = [*map(value_of, self.sizes), *(s for n, _ in self.inputs for s in shape_of(n))]
        return fixed(wanted) is None and not any(equal(wanted, size) for size in known)


def _other_axes(read: Read, region: Region) -> str:
    """How an input has to be given other leading axes: as a "vector", as "rows", or not."""
    node, how = read
    sizes = shape_of(node) if how == "indices" else shape_of(node)[:-1]
    if how == "whole" or not sizes or _broadcasts(sizes, region.lead):
        return ""
    return "vector" if how == "rows" and all(equal(size, 1) for size in sizes) else "rows"


def _broadcasts(sizes: Sizes, lead: Sizes) -> bool:
    return len(sizes) <= len(lead) and all(
        equal(a, b) or equal(a, 1)
        for a, b in zip(reversed(sizes), reversed(lead), strict=False))


def write(region: Region) -> Written | None:
    """The body of a region: its steps in the order of the graph; None where sizes are unknown."""
    writer = _Writer(region)
    for node, step in region.steps.items():
        writer.known[node] = writer.name(step)
    body = Body(tuple(writer.statements), tuple(writer.known[n] for n in region.results))
    size_nodes = tuple(dict.fromkeys(
        arg for view in region.views for arg in view.all_input_nodes
        if isinstance(value_of(arg), torch.SymInt)))
    written = Written(region, body, tuple(writer.inputs), size_nodes, tuple(writer.signs))
    return written if written.complete else None


class _Writer:
    """Statements while they are written."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.statements: list[Statement] = []
        self.inputs: list[Read] = []
        self.signs: list[fx.Node] = []
        self.known: dict[fx.Node | Step | Read, Name] = {}
        self.at: fx.Node | None = None

    def name(self, step: Step) -> Name:
        """The name of what a step gives; its statement is written if it is not yet."""
        if step not in self.known:
            hows = dict(_reads(step))
            args = tuple(self.name(arg) if isinstance(arg, Step) else
                         self._read(arg, hows[arg]) if isinstance(arg, fx.Node) else arg
                         for arg in step.args)
            if ROW_OPS[step.op].signs_of is not None:
                self.signs += [n for n, s in self.region.steps.items() if s is step]
            self.statements.append(Statement(step.op, args))
            self.known[step] = Name(f"t{len(self.statements) - 1}")
        return self.known[step]

    def _read(self, node: fx.Node, how: str) -> Name:
        source = self.region.source(node)
        if source in self.known:
            return self.known[source]
        if (source, how) not in self.known:
            self.known[source, how] = Name(f"x{len(self.inputs)}")
            self.inputs.append((source, how))
        return self.known[source, how]


def _reads(step: Step) -> Iterable[tuple[fx.Node, str]]:
    return ((node, how) for how, node in reads_of(step))
