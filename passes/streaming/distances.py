"""Distances: how far a query of a stream sees, and what is added to a score for its distance.

Masks and biases are computed from their subgraph at several lengths. What is the same for every
pair of tokens that are as far from each other is a row of numbers, one for each distance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from bincompile.passes.graph import is_tensor, shape_of
from bincompile.passes.mask_graph import MaskGraph
from bincompile.passes.masks import DROPPED, OPAQUE, Kept, Mask, fitted, verdict
from bincompile.passes.patterns import Context
from bincompile.passes.sizes import least
from bincompile.passes.streaming.facts import Facts
from bincompile.passes.streaming.free import over_window
from bincompile.passes.streaming.kinds import TIME, Refused

LENGTHS = (8, 11, 40)  # at which a bias is looked at
LONGEST = 256  # numbers that a bias compares distances with, and that are tried in full
FAR = 512  # to which distance a bias is read that has no end
MOST_NUMBERS = 2**26  # of a bias that is read
ADDED = ("bias", "late_bias")
BAND = "a mask that keeps the keys of a band around the diagonal"
CAUSAL = "a causal mask, or Continual(window=, semantics='window')"


@dataclasses.dataclass(frozen=True)
class Sight:
    """The tokens that a query sees.

    Args:
        before: how many before its own; None: all.
        ahead: how many behind its own, for which an answer waits.
        strict: tokens nearest to its own, itself among them, that it does not see.
        truncates: whether the window is narrower than what the model itself sees.
    """

    before: int | None
    ahead: int = 0
    strict: int = 0
    truncates: bool = False

    @property
    def window(self) -> int | None:
        """How many tokens these are, with its own; None: all since the row began."""
        return None if self.before is None else self.before + self.ahead + 1


@dataclasses.dataclass(frozen=True)
class Added:
    """What is added to a score, by how many tokens the key is before the newest one.

    Args:
        table: (heads or 1, L) float64; beyond the last entry, that one; -inf hides a key.
        slopes: (heads or 1,) float64: so much is taken off for each token of distance.
    """

    table: torch.Tensor | None = None
    slopes: torch.Tensor | None = None

    def __add__(self, other: Added) -> Added:
        return Added(_sum(self.table, other.table), _sum(self.slopes, other.slopes))

    @property
    def empty(self) -> bool:
        """Whether it adds nothing."""
        return all(t is None or not bool(t.any()) for t in (self.table, self.slopes))

    def row(self, window: int) -> torch.Tensor:
        """(heads or 1, window): what is added over a window, the oldest token first."""
        distance = torch.arange(window - 1, -1, -1)
        total = torch.zeros(1, window, dtype=torch.float64)
        if self.table is not None:
            total = total + self.table[:, distance.clamp(max=self.table.shape[1] - 1)]
        if self.slopes is not None:
            total = total - self.slopes[:, None] * distance
        return total


def _sum(left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor | None:
    if left is None or right is None:
        return left if right is None else right
    if left.ndim == 2:
        length = max(left.shape[1], right.shape[1])
        left, right = (t[:, torch.arange(length).clamp(max=t.shape[1] - 1)] for t in (left, right))
    return left + right


def sight_of(bound: Mapping[str, Any], facts: Facts) -> Sight:
    """How far the queries of an attention of tokens to tokens see, within the window asked for.

    Args:
        bound: the arguments of the attention, by name.
        facts: what is known of the model.

    Raises:
        Refused: it is not known, or has no end ahead.
    """
    kept = kept_of(bound, facts)
    if kept.opaque or (kept.before is not None and kept.before < 0):
        raise Refused("has a mask that is no band around the diagonal, so that what a token sees "
                      "does not move on with it", BAND, by_window=True)
    if kept.after is None:
        raise Refused("lets every token see all that come after it: no causal mask was found",
                      CAUSAL, by_window=True)
    ahead, window = max(kept.after, 0), facts.window
    own = None if kept.before is None else kept.before + ahead + 1
    total = own if window is None else window if own is None else min(window, own)
    if total is not None and total <= ahead:
        raise Refused(f"sees {ahead} tokens ahead, and the window has {total}",
                      "a longer Continual(window=)")
    return Sight(None if total is None else total - 1 - ahead, ahead, max(-kept.after, 0),
                 window is not None and (own is None or window < own))


def kept_of(bound: Mapping[str, Any], facts: Facts) -> Kept:
    """The keys that a query sees, of all masks together."""
    kept = Kept(after=0) if bound["causal"] else Kept()
    fill = bound.get("fill")
    for name in ("mask", *ADDED):
        node = bound.get(name)
        if node is None:
            continue
        found = _verdict(node, bound, facts)
        if name == "mask" and found is None:
            found = OPAQUE
        if name == "mask" and fill is not None and fill > DROPPED and found != Kept():
            raise Refused(f"gives masked keys the score {fill}, so that they are seen nevertheless",
                          "a mask that drops keys")
        if found is not None and found.opaque:
            found = _spread(node, facts)
        kept = kept & (_hidden_by(node, facts) if found is None else found)
    return kept


def is_band(bound: Mapping[str, Any], facts: Facts) -> bool:
    """Whether the mask keeps all keys of a band; else what it hides is known by distance."""
    found = _verdict(bound["mask"], bound, facts)
    return found is not None and not found.opaque


def _spread(node: fx.Node, facts: Facts) -> Kept:
    """The band around the keys that a mask keeps by distance, though not all in between."""
    if node in facts or not moves_in_pairs(node, facts):
        return OPAQUE
    reaches: list[tuple[int, int]] = []
    for length, values in _looked_at(node, facts):
        kept = (values > DROPPED).any(0)
        if bool((kept[1:, 1:] != kept[:-1, :-1]).any()):
            return OPAQUE
        back = (torch.arange(length)[:, None] - torch.arange(length))[kept]
        if back.numel():
            reaches.append((int(back.max()), -int(back.min())))
    ends = [len(set(side)) for side in zip(*reaches, strict=True)]
    if len(reaches) < 2 or any(1 < n < len(reaches) for n in ends):
        return OPAQUE
    before, after = (side[0] if n == 1 else None
                     for side, n in zip(zip(*reaches, strict=True), ends, strict=True))
    return Kept(before, after)


def _verdict(node: fx.Node, bound: Mapping[str, Any], facts: Facts) -> Kept | None:
    """What a tensor keeps as a mask; None where it is a bias."""
    tokens = (shape_of(bound["query"])[-2], shape_of(bound["key"])[-2])
    rank = max(len(shape_of(bound["query"])), len(shape_of(node)))
    return verdict(Mask(node, (rank, rank - 2, rank - 1), tokens), context_of(facts))


def context_of(facts: Facts) -> Context:
    """The context that masks are proven in."""
    return Context(facts.module, frozenset())


def _hidden_by(node: fx.Node, facts: Facts) -> Kept:
    """The keys that a bias leaves to any head."""
    if node in facts or not moves_in_pairs(node, facts):
        return Kept()
    samples = []
    for length, values in _looked_at(node, facts):
        samples.append((length, length, (values > DROPPED).any(0)))
    return fitted(samples) if samples else OPAQUE


def moves_in_pairs(node: Any, facts: Facts) -> bool:
    """Whether a tensor has one entry for each pair of tokens."""
    if not is_tensor(node):
        return False
    sizes = facts.shape(node)[-2:]
    return len(sizes) == 2 and all(map(lambda s: _is_time(s, facts), sizes))


def of_keys(node: Any, facts: Facts) -> bool:
    """Whether a tensor has one entry for each key, whatever the query."""
    sizes = facts.shape(node)[-2:] if is_tensor(node) else ()
    return bool(sizes) and _is_time(sizes[-1], facts) and (len(sizes) == 1 or sizes[0] == 1)


def _is_time(size: Any, facts: Facts) -> bool:
    length = facts.inputs.length
    return facts.depends_on_time(size) if isinstance(length, sympy.Symbol) else size == length


def pairs(node: fx.Node, facts: Facts, length: int) -> torch.Tensor:
    """(heads or 1, length, length) float64: a tensor that is added, for so many tokens.

    A mask adds 0 where it keeps a key, and -inf where it does not.

    Raises:
        Refused: it differs between rows, or can't be computed.
    """
    values = over_window(node, facts, _tokens(node, facts, length))
    for axis in range(-1, -1 - min(2, values.ndim), -1):
        values = values.narrow(axis, 0, min(length, values.shape[axis]))
    if values.dtype is torch.bool:
        values = torch.where(values, 0.0, -torch.inf)
    values = values[(None,) * max(0, 2 - values.ndim)]
    values = values.expand(*values.shape[:-2], length, length)
    if values.ndim > 3:
        if not bool((values == values[:1]).all()):
            raise Refused("adds to its scores what differs from row to row",
                          "a bias that all rows share")
        values = values[0]
    return values.reshape(-1, length, length).double()


def _tokens(node: fx.Node, facts: Facts, positions: int) -> int:
    """How many tokens make a mask or bias for so many positions, which may be fewer."""
    time = facts.inputs.length
    moving = [s for s in facts.shape(node)[-2:] if _is_time(s, facts)]
    if not isinstance(time, sympy.Symbol) or not moving:
        return positions
    return least(positions, lambda n: int(moving[-1].xreplace({time: sympy.Integer(n)}).doit()))


def _looked_at(node: fx.Node, facts: Facts) -> list[tuple[int, torch.Tensor]]:
    """A bias at several lengths."""
    if not isinstance(facts.inputs.length, sympy.Symbol):
        return [(facts.inputs.length, pairs(node, facts, facts.inputs.length))]
    graph = MaskGraph.of(node, context_of(facts), weights=True)
    compared = set() if graph is None else graph.reach()[0]
    lengths = sorted({*LENGTHS, *(c + 3 for c in compared if c + 3 <= LONGEST)})
    found = []
    for length in lengths:
        try:
            found.append((length, pairs(node, facts, length)))
        except Refused:
            if length in LENGTHS[:2]:
                raise
    return found


def added_by(node: fx.Node, sight: Sight, facts: Facts, absolute: bool = True) -> Added:
    """What a bias adds, by distance.

    Args:
        node: one entry for each pair of tokens, or for each key.
        sight: the tokens that are seen.
        facts: what is known of the model.
        absolute: whether what is the same for all keys of a query matters.

    Raises:
        Refused: it depends on more than the distance, or is not known for all that are seen.
    """
    def rows(values: torch.Tensor) -> torch.Tensor:
        return values if absolute else _from_own(values)

    looked = [(length, rows(values)) for length, values in _looked_at(node, facts)]
    for length, values in looked:
        _check_distances(values, sight, length)
    shared = [_read(values, Sight(min(3, length - sight.ahead - 1), sight.ahead))
              for length, values in looked if length > sight.ahead + 4]
    if any(not _close(shared[0], other) for other in shared):
        raise Refused("adds to its scores what depends on the number of tokens",
                      "a bias by distance")
    heads = looked[0][1].shape[0]
    if sight.window is None or heads * sight.window**2 > MOST_NUMBERS:
        return _endless(rows(pairs(node, facts, FAR)))
    return Added(_read(rows(pairs(node, facts, sight.window)), sight))


def _from_own(values: torch.Tensor) -> torch.Tensor:
    """What is added beyond that for the query's own token: softmax sees differences alone."""
    own = values.diagonal(dim1=-2, dim2=-1)[..., None]
    hidden = values <= DROPPED
    return torch.where(hidden, -torch.inf, values - torch.where(own <= DROPPED, 0.0, own))


def _check_distances(values: torch.Tensor, sight: Sight, length: int) -> None:
    """Raise unless what is added is the same for all pairs at one distance that are seen."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = distance >= -sight.ahead
    if sight.before is not None:
        seen = seen & (distance <= sight.before)
    both = (seen[1:, 1:] & seen[:-1, :-1])[None]
    first, second = values[:, 1:, 1:], values[:, :-1, :-1]
    same = (first - second).abs() <= 1e-9 * (1 + first.abs())
    same = same | ((first <= DROPPED) & (second <= DROPPED))
    if not bool((same | ~both).all()):
        raise Refused("adds to its scores what depends on more than the distance of two tokens",
                      "a bias by distance")


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    same = (left - right).abs() <= 1e-9 * (1 + left.abs())
    return bool((same | ((left <= DROPPED) & (right <= DROPPED))).all())


def _read(values: torch.Tensor, sight: Sight) -> torch.Tensor:
    """(heads, window): what is added at each distance from the newest token that is seen."""
    assert sight.before is not None and sight.window is not None
    row = values[:, sight.before, :sight.window].flip(-1)
    return torch.where(row <= DROPPED, -torch.inf, row)


def _endless(values: torch.Tensor) -> Added:
    """A bias that grows by the same for each token, or stays the same from some distance on."""
    table = _read(values, Sight(FAR - 1))
    steps = table[:, 1:] - table[:, :-1]
    if bool((steps - steps[:, :1]).abs().max() <= 1e-9 * (1 + steps.abs().max())):
        return Added(table[:, :1], -steps.mean(1))
    last = table[:, -1:]
    settled = (table[:, FAR // 2:] == last) | ((table[:, FAR // 2:] - last).abs() <= 1e-12)
    if not bool(settled.all()):
        raise Refused("adds to its scores what does not settle with the distance",
                      "Continual(window=): an end to the distances")
    length = FAR
    while length > 1 and bool((table[:, length - 2:length - 1] == last).all()):
        length -= 1
    return Added(table[:, :length])


def last_row(node: fx.Node, facts: Facts, window: int) -> Added:
    """What a bias adds to the scores of the last token of a window."""
    return Added(_read(pairs(node, facts, window), Sight(window - 1)))


def has_time(node: Any, facts: Facts) -> bool:
    """Whether any axis of a tensor is one of time."""
    kind = facts.kind(node)
    return any(a.role == TIME for axis in kind.axes for a in axis)
