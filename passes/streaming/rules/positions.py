"""Positions: pairs of features as complex numbers, which rotary positions turn."""

from __future__ import annotations

from torch import fx

from bincompile.passes.graph import aten
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.facts import Facts
from bincompile.passes.streaming.kinds import Kind, Refused, plain
from bincompile.passes.streaming.rule import Rule


def _joined(node: fx.Node, facts: Facts) -> Kind:
    kind = facts.kind(node.args[0])
    if kind.axes[-1] != plain(2):
        raise Refused("takes two tokens as the parts of a complex number")
    found: Kind = kind.with_axes(kind.axes[:-1])
    return found


def _parted(node: fx.Node, facts: Facts) -> Kind:
    kind = facts.kind(node.args[0])
    found: Kind = kind.with_axes((*kind.axes, plain(2)))
    return found


def _emit(node: fx.Node, build: StepBuilder) -> fx.Node:
    read = build.read(node.args[0], build.kind(node), build.extent(node))
    if node.target is aten.view_as_complex.default:  # it looks at memory as it lies
        read = build.call(aten.clone.default, read)
    return build.call(node.target, read)


joined = Rule((aten.view_as_complex.default,), _joined, _emit)
parted = Rule((aten.view_as_real.default,), _parted, _emit)
