"""Regions: what happens where a value's paths part and meet again: a norm, or rotary positions."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from bincompile.passes.axes import LAYOUTS, SPLITS
from bincompile.passes.graph import aten, in_double, is_sequence, is_tensor, shape_of, value_of
from bincompile.passes.scores import CASTS
from bincompile.passes.sizes import assignments, concrete

NORMS = {aten.layer_norm.default: "layer", aten.rms_norm.default: "rms"}
MEANS = (aten.mean.dim,)
VARIANCES = (aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim)
LENGTHS = (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.sum.dim_IntList)
REDUCTIONS = (*MEANS, *VARIANCES, *LENGTHS)
REGION = (*LAYOUTS, *CASTS, *SPLITS, *REDUCTIONS, operator.getitem, aten.slice.Tensor,
          aten.select.int, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.mul.Tensor,
          aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.cat.default,
          aten.stack.default, aten.flip.default, aten.roll.default, aten.view_as_complex.default,
          aten.view_as_real.default, aten.complex.default, aten.pow.Tensor_Scalar,
          aten.square.default, aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default,
          aten.clamp_min.default, aten.clamp.default, aten.maximum.default, aten.index.Tensor,
          aten.index_select.default, aten.repeat_interleave.self_int, aten.repeat.default,
          aten.matmul.default)


def norm_of(region: Sequence[fx.Node]) -> str | None:
    """The norm that a region is; None if it is none, or not a plain one."""
    targets = {n.target for n in region}
    if not targets & set(REDUCTIONS) or any(_axes(n) != [-1] for n in region
                                            if n.target in REDUCTIONS):
        return None
    if targets & set(VARIANCES):
        return "layer"
    if targets & set(MEANS):
        return "layer" if aten.sub.Tensor in targets else "rms"
    return "l2" if aten.sub.Tensor not in targets else None


def _axes(node: fx.Node) -> list[int]:
    given = node.args[2] if node.target in (
        aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim) else node.args[1]
    rank = len(shape_of(node.args[0]))
    return [a if a < 0 else a - rank for a in ([given] if isinstance(given, int) else given or [])]


def rotation_of(chain: Sequence[fx.Node], region: Sequence[fx.Node], meeting: fx.Node,
                known: dict[str, str | None]) -> str | None:
    """How a region turns pairs of features: "half", "interleaved" or "complex"; None if not so.

    It is run on single features with random cosines and sines: each spreads to one other. `known`
    are the verdicts on regions that were seen before.
    """
    if any(n.target in REDUCTIONS for n in region):
        return None
    ends = _ends(chain, region, meeting)
    if ends is None:
        return None
    below, above, start = ends
    nodes = sorted({*region, *below, *above}, key=_order(meeting.graph).__getitem__)
    end = below[-1] if below else region[0]
    text = _text(nodes, start)
    if text not in known:
        turned = _Turned.of(nodes, end, start)
        known[text] = None if turned is None else _kind(turned.partner(), nodes)
    return known[text]


def _kind(partner: int | None, nodes: Sequence[fx.Node]) -> str | None:
    if partner is None:
        return None
    if any(value_of(n).dtype.is_complex for n in nodes if is_tensor(n)):
        return "complex"
    return "interleaved" if partner == 1 else "half"


def _text(nodes: Sequence[fx.Node], start: fx.Node) -> str:
    """A text that is equal for regions that compute the same."""
    names = {start: f"start {shape_of(start)}", **{n: f"%{i}" for i, n in enumerate(nodes)}}

    def shown(node: fx.Node) -> str:
        value = value_of(node)
        return names.get(node) or (f"{value.dtype}{tuple(value.shape)}"
                                   if isinstance(value, torch.Tensor) else str(value))

    return "\n".join(f"{n.target}{fx.node.map_arg((n.args, dict(n.kwargs)), shown)}"
                     for n in nodes)


def _order(graph: fx.Graph) -> dict[fx.Node, int]:
    return {n: i for i, n in enumerate(graph.nodes)}


def _ends(chain: Sequence[fx.Node], region: Sequence[fx.Node], meeting: fx.Node,
          ) -> tuple[list[fx.Node], list[fx.Node], fx.Node] | None:
    """Layout steps below and above a region, as few as give both ends the same last axis."""
    below: list[fx.Node] = []
    for end in (region[0], *_layouts(reversed(chain[:-1]))):
        if end is not region[0]:
            below.append(end)
        above, start = list[fx.Node](), meeting
        while True:
            sizes = shape_of(end)[-1], shape_of(start)[-1] if is_tensor(start) else None
            if sizes[0] == sizes[1] and isinstance(sizes[0], int) and sizes[0] > 2:
                return below, above, start
            if start.target not in (*LAYOUTS, *SPLITS):
                break
            above.append(start)
            start = start.args[0]
    return None


def _layouts(nodes: Any) -> list[fx.Node]:
    found = []
    for node in nodes:
        if node.target not in (*LAYOUTS, *CASTS):
            break
        found.append(node)
    return found


class _Turned:
    """A region as a function of the value that enters it."""

    def __init__(self, nodes: Sequence[fx.Node], end: fx.Node, start: fx.Node,
                 env: Mapping[fx.Node, Any], shape: list[int]) -> None:
        self.nodes, self.end, self.start, self.env, self.shape = nodes, end, start, env, shape

    @classmethod
    def of(cls, nodes: Sequence[fx.Node], end: fx.Node, start: fx.Node) -> _Turned | None:
        """The region at the first sizes at which it runs."""
        inside = {*nodes, start}
        reads = {n for node in nodes for n in node.all_input_nodes if n not in inside}
        if any(is_sequence(n) for n in reads):
            return None
        for numbers in assignments([*nodes, *reads, start]):
            generator = torch.Generator().manual_seed(0)
            env = {n: _drawn(value_of(n), numbers, generator) for n in reads}
            made = cls(nodes, end, start, env, [concrete(s, numbers) for s in shape_of(start)])
            if made.run(torch.zeros(made.shape, dtype=torch.float64)) is not None:
                return made
        return None

    def run(self, value: torch.Tensor) -> torch.Tensor | None:
        """What leaves the region; None where it can't run at these sizes."""
        env = {**self.env, self.start: value}
        try:
            with torch.no_grad():
                for node in self.nodes:
                    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
                    env[node] = node.target(
                        *in_double(args), **{k: in_double(v) for k, v in kwargs.items()})
        except (RuntimeError, IndexError, ValueError, TypeError):
            return None  # sizes that the model itself does not allow
        return env[self.end]

    def partner(self) -> int | None:
        """How far the other feature is that a single one spreads to; None if that is not so."""
        width = self.shape[-1]
        for feature in (0, width // 2, width - 1):
            single = torch.zeros(self.shape, dtype=torch.float64)
            single[..., feature] = 1.0
            once, twice = self.run(single), self.run(2 * single)
            if once is None or twice is None or not torch.allclose(2 * once, twice):
                return None
            reached = (once.flatten(0, -2).abs().amax(0) > 0).nonzero().flatten().tolist()
            if len(reached) == 2 and feature in reached:
                return reached[1] - reached[0]
        return None


def _drawn(value: Any, numbers: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, torch.Tensor):
        return concrete(value, numbers)
    shape = [concrete(s, numbers) for s in value.shape]
    if value.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex128)
    if value.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.zeros(shape, dtype=value.dtype)
