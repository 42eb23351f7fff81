"""Masks: which keys a query sees, proven from the subgraph that makes the mask.

A mask that follows from sizes alone is computed at several of them, beyond every length that its
subgraph mentions, and held against bands around the diagonal. Where inputs take part, the mask is
computed for many values of them: padding is what leaves a band that depends on sizes, and drops
whole keys from it. Distances that are too long to be computed in full are shortened: the band has
to follow. Whatever is neither is opaque.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from bincompile.passes.graph import shape_of, value_of
from bincompile.passes.mask_graph import ENDLESS, Draw, MaskGraph
from bincompile.passes.patterns import Context
from bincompile.passes.scores import Term
from bincompile.passes.sizes import Assignment, concrete, equal, lengths

DROPPED = -1e4  # an added value at or below this drops a key
LENGTHS = (8, 11, 40)  # tokens in a trial
LONGEST, LONGEST_MADE = 256, 4096  # up to which distances and stored tensors are tried in full
SHORTENED, NEARER = (5, 6), (12, 17)  # what a longer distance becomes, and the lengths for that


@dataclasses.dataclass(frozen=True)
class Kept:
    """The keys that a query sees: those in a band around its own place, perhaps not all of them.

    Args:
        before: how many keys before its own place a query sees; None: all.
        after: the same behind it.
        padding: whole keys are dropped, depending on inputs.
        opaque: it is not known what is kept.
        corner: the places of a query and its key count from the "top-left" or the "bottom-right"
            of the scores; None where both are the same, or where there is no band.
    """

    before: int | None = None
    after: int | None = None
    padding: bool = False
    opaque: bool = False
    corner: str | None = None

    @property
    def kind(self) -> str:
        """The name of this class of masks."""
        reach = (self.before, self.after)
        whole = reach in ((None, None), (None, 0))
        if self.opaque or (None in reach and not whole):
            return "opaque"
        band = "window" if not whole else "causal" if self.after == 0 else ""
        return "+".join(filter(None, (band, "padding" if self.padding else ""))) or "none"

    @property
    def causal(self) -> bool:
        """Whether no query sees a key behind its own place, counted from the top left."""
        return self.after is not None and self.after <= 0 and self.corner != "bottom-right"

    @property
    def window(self) -> int | tuple[int, int] | None:
        """The keys in a causal window with the query's own, or how many before and after."""
        if not self.kind.startswith("window") or self.before is None or self.after is None:
            return None
        return self.before + 1 if self.after == 0 else (self.before, self.after)

    def __and__(self, other: Kept) -> Kept:
        corners = {k.corner for k in (self, other) if (k.before, k.after) != (None, None)}
        return Kept(_least(self.before, other.before), _least(self.after, other.after),
                    self.padding or other.padding,
                    self.opaque or other.opaque or len(corners) > 1,
                    next(iter(corners)) if len(corners) == 1 else None)


OPAQUE = Kept(opaque=True)


def _least(left: int | None, right: int | None) -> int | None:
    return min((x for x in (left, right) if x is not None), default=None)


@dataclasses.dataclass(frozen=True)
class Mask:
    """A tensor that may hide keys, and where it meets the scores.

    Args:
        node: bool, or added to the scores.
        axes: (rank, query, key): the rank of the scores there, and the axes of the two.
        tokens: how many queries and keys there are.
        inverted: True drops a key.
        factor: what an added one is multiplied by.
    """

    node: fx.Node
    axes: tuple[int, int, int]
    tokens: tuple[Any, Any]
    inverted: bool = False
    factor: float = 1.0

    @classmethod
    def of(cls, term: Term, axes: tuple[int, int, int], tokens: tuple[Any, Any]) -> Mask:
        """The mask that a term of the scores is."""
        return cls(term.node, axes, tokens, term.inverted, term.factor)

    @property
    def boolean(self) -> bool:
        """Whether it says itself what is kept; else it is added."""
        return value_of(self.node).dtype == torch.bool

    def kept(self, values: torch.Tensor, rows: int, columns: int) -> torch.Tensor | None:
        """(..., rows, columns), True where a key is kept; None if this is no mask."""
        if self.boolean:
            kept = values != self.inverted
        else:
            scaled = values.double() * self.factor
            kept = scaled == 0
            if not bool((kept | (scaled <= DROPPED)).all()):
                return None
        rank, query, key = self.axes
        if kept.ndim > rank:
            return None
        kept = kept[(None,) * (rank - kept.ndim)].movedim((query, key), (-2, -1))
        if kept.shape[-2] not in (1, rows) or kept.shape[-1] not in (1, columns):
            raise ValueError(f"a mask of {tuple(kept.shape)} for {rows} queries, {columns} keys")
        return kept.expand(*kept.shape[:-2], rows, columns)


_VERDICTS: weakref.WeakKeyDictionary[fx.GraphModule, dict[Any, Kept | None]] = \
    weakref.WeakKeyDictionary()


def verdict(mask: Mask, context: Context) -> Kept | None:
    """What a mask keeps; None if it is a bias. Masks made the same way share one verdict."""
    known = _VERDICTS.setdefault(context.graph_module, {})
    rest = (mask.axes, *map(str, mask.tokens), mask.inverted, mask.factor)
    name = (mask.node.name, *rest)
    if name not in known:
        graph = MaskGraph.of(mask.node, context)
        text = None if graph is None else (graph.text(), *rest)
        if text is None or text not in known:
            known[text] = _by_shape(mask) if graph is None else _proven(mask, graph)
        known[name] = known.pop(None) if text is None else known[text]
    return known[name]


def _by_shape(mask: Mask) -> Kept | None:
    """What a mask that can't be computed on its own keeps: one row for all queries is padding."""
    if not mask.boolean:
        return None
    sizes = shape_of(mask.node)
    axis = mask.axes[1] - mask.axes[0] + len(sizes)
    one = axis < 0 or equal(sizes[axis], 1)
    return Kept(padding=True) if one else OPAQUE


def _proven(mask: Mask, graph: MaskGraph) -> Kept | None:
    compared, made = graph.reach()
    moving = any(isinstance(t, torch.SymInt) for t in mask.tokens)
    wanted = {n for n in {*(c + 3 for c in compared if c + 3 <= LONGEST), *made}
              if max(LENGTHS) < n <= LONGEST_MADE}
    trials = _Trials(mask, graph, tuple(sorted(compared - {0, 1}))[:6])
    found = trials.at((*LENGTHS, *sorted(wanted)))
    if found == Kept() and not mask.boolean and any(
            t.is_floating_point() and t.numel() > 1 for t in graph.stored.values()):
        return None  # a stored bias that is 0
    if found is None or found.opaque or not moving:
        return found
    if any(n > LONGEST_MADE for n in made):
        return OPAQUE
    for number in sorted(n for n in compared if max(LENGTHS) < n < ENDLESS and n + 3 not in wanted):
        nearer = [trials.at(NEARER, {number: n}) for n in SHORTENED]
        found = found & _followed(number, found, nearer)
    return found


def _followed(number: int, found: Kept, nearer: Sequence[Kept | None]) -> Kept:
    """The band at a distance, from the bands where it was replaced by smaller ones."""
    first, second = nearer
    if first is None or second is None or first.opaque or second.opaque:
        return OPAQUE
    sides: list[int | None] = []
    for name in ("before", "after"):
        whole, low, high = (getattr(k, name) for k in (found, first, second))
        if low == high == whole:
            sides.append(None)
        elif low is None or high is None or high - low != SHORTENED[1] - SHORTENED[0]:
            return OPAQUE
        else:
            sides.append(number + low - SHORTENED[0])
    return dataclasses.replace(first, before=sides[0], after=sides[1])


Sample = tuple[int, int, torch.Tensor]  # queries, keys, and what is kept for some input


@dataclasses.dataclass(frozen=True)
class _Trials:
    """Runs of a mask's subgraph; inputs are drawn around these numbers too."""

    mask: Mask
    graph: MaskGraph
    numbers: tuple[int, ...]

    def at(self, wanted: Iterable[int], swap: dict[int, int] | None = None) -> Kept | None:
        """What is kept, from trials at these lengths; None if the mask is a bias."""
        samples, dropped = list[Sample](), False
        sizes = lengths(self.graph.sources, self.mask.tokens, wanted)
        for numbers in sizes[:-1] if swap else sizes:
            if not self.graph.affordable(numbers):
                return OPAQUE
            seen = self._seen(numbers, swap)
            if seen is None:
                return None
            if not seen:
                continue
            base = torch.stack([s.flatten(0, -3).any(0) for s in seen]).any(0)
            for kept in seen:
                if not bool((kept == (base & kept.any(-2, keepdim=True))).all()):
                    return OPAQUE
                dropped = dropped or not bool((kept == base).all())
            samples.append((*base.shape, base))
        moving = any(isinstance(t, torch.SymInt) for t in self.mask.tokens)
        if len(samples) < 1 + moving:
            return OPAQUE
        if self.graph.inputs and not dropped:
            return OPAQUE  # some value that was not tried may drop a key
        return dataclasses.replace(fitted(samples), padding=bool(self.graph.inputs))

    def _seen(self, numbers: Assignment, swap: dict[int, int] | None,
              ) -> list[torch.Tensor] | None:
        """What is kept for each draw of the inputs that the subgraph can be run with."""
        rows, columns = (concrete(t, numbers) for t in self.mask.tokens)
        seen, made = [], self.graph.at(numbers, swap)
        draws = self._draws(columns) if self.graph.inputs else ((_full(0), True),)
        for draw, sure in draws:
            values = made(draw)
            if values is None:
                continue
            try:
                kept = self.mask.kept(values, rows, columns)
            except ValueError:  # of another size than the scores: not a size of this model
                continue
            if kept is not None:
                seen.append(kept)
            elif sure:
                return None
        return seen

    def _draws(self, columns: int) -> Iterable[tuple[Draw, bool]]:
        """How inputs are drawn, and whether a mask has to be made of such values."""
        generator = torch.Generator().manual_seed(0)
        near = (n + d for n in (*self.numbers, columns) for d in (0, 1))
        pool = torch.tensor([-1, 0, 1, 2, 3, *SHORTENED, *near])

        def some(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
            return (torch.rand(shape, generator=generator) > 0.4).to(dtype)

        def wide(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
            if dtype == torch.bool:
                return some(dtype, shape)
            return pool[torch.randint(len(pool), shape, generator=generator)].to(dtype)

        return ((_full(1), True), (_full(0), True), (some, True), (some, True),
                (_full(columns), False), (wide, False), (wide, False))


def _full(number: int) -> Draw:
    return lambda dtype, shape: torch.full(shape, number).to(dtype)


def fitted(samples: Sequence[Sample]) -> Kept:
    """The one band that all samples show."""
    for corner in ("top-left", "bottom-right"):
        found = _band(samples, corner)
        if found is not None:
            before, after = found
            told = (before, after) != (None, None) and any(m != n for m, n, _ in samples)
            return Kept(before, after, corner=corner if told else None)
    return OPAQUE


def _band(samples: Sequence[Sample], corner: str) -> tuple[int | None, int | None] | None:
    """How far back and forth the band reaches in all samples; None if there is no such band."""
    exact: tuple[set[int], set[int]] = (set(), set())
    least = [-ENDLESS, -ENDLESS]
    for rows, columns, kept in samples:
        shift = columns - rows if corner == "bottom-right" else 0
        back = torch.arange(rows)[:, None] + shift - torch.arange(columns)
        if not bool(kept.any()):
            continue
        for side, distance in enumerate((back, -back)):
            reached = int(distance[kept].max())
            if reached < int(distance.max()):
                exact[side].add(reached)
            else:
                least[side] = max(least[side], reached)
        ends = [int(d[kept].max()) for d in (back, -back)]
        if not bool((kept == ((back <= ends[0]) & (-back <= ends[1]))).all()):
            return None
    if max(least) == -ENDLESS and not any(exact):
        return None
    for side in (0, 1):
        if len(exact[side]) > 1 or any(e < least[side] for e in exact[side]):
            return None
    return tuple(next(iter(e), None) for e in exact)  # type: ignore[return-value]
