"""What is read of scores: where they stand, and every tensor that joined them there."""

from __future__ import annotations

import dataclasses

from torch import fx

from bincompile.passes.axes import Contraction
from bincompile.passes.trail import Move


class Declined(Exception):
    """The walk met something that attention does not have."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


class NoScores(Declined):
    """What the walk met shows that it does not walk on scores."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where scores stand: the moves since the product, and what each axis is called.

    `names` holds the labels before each move and after the last; None: mixed with others, or new.
    """

    trail: tuple[Move, ...]
    names: tuple[tuple[str | None, ...], ...]
    own: tuple[str, str]  # of the left and of the right operand

    @property
    def axes(self) -> tuple[int, int, int] | None:
        """The rank, and where the own axes stand; None where one is mixed with others."""
        if not set(self.own) <= set(self.labels):
            return None
        left, right = map(self.labels.index, self.own)
        return len(self.labels), left, right

    @property
    def labels(self) -> tuple[str | None, ...]:
        """The labels of the axes here."""
        return self.names[-1]

    def after(self, move: Move) -> Place:
        """The place one move further; moves that undo each other disappear."""
        last = self.trail[-1] if self.trail else None
        joined = last.then(move) if last is not None else None
        if joined is None:
            if move.idle:
                return self
            names = (*self.names, move.labels(self.labels))
            return Place((*self.trail, move), names, self.own)
        before = Place(self.trail[:-1], self.names[:-1], self.own)
        return before if joined.idle else before.after(joined)


@dataclasses.dataclass(frozen=True)
class Term:
    """A tensor that joins the scores at a place, with a factor.

    `inverted`: of a mask, that True hides a key. `hides`: a mask that is added, as -inf.
    `divides`: of a tensor factor, that the scores are divided by it. `mixed`: heads are mixed
    after it was added.
    """

    node: fx.Node
    place: Place
    factor: float = 1.0
    inverted: bool = False
    hides: bool = False
    divides: bool = False
    mixed: bool = False

    @property
    def axes(self) -> tuple[int, int, int] | None:
        """The rank of the scores at its place, and where their own axes stand there."""
        return self.place.axes


@dataclasses.dataclass(frozen=True)
class Mixing:
    """A mixture of heads: a stored matrix and a shift for each head that comes out.

    `turned`: the matrix is (heads before, heads after).
    """

    matrix: fx.Node
    turned: bool
    shift: fx.Node | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
    """A product and what was done to it, in the order of the operator's facets.

    `offset` is added to every score; a softmax does not see it. `factor` is the whole linear
    factor; with a `softcap` c the scores are c * tanh(factor * product / c).
    """

    product: Contraction
    place: Place
    factor: float = 1.0
    gains: tuple[Term, ...] = ()
    mixing: Mixing | None = None
    softcap: float | None = None
    terms: tuple[Term, ...] = ()
    low: float | None = None
    high: float | None = None
    masks: tuple[Term, ...] = ()
    fill: float | None = None
    late: tuple[Term, ...] = ()
    sink: Term | None = None
    offset: float = 0.0

    @property
    def clamped(self) -> bool:
        """Whether scores were clamped."""
        return self.low is not None or self.high is not None

    @property
    def tensors(self) -> tuple[Term, ...]:
        """Every tensor that joined."""
        sinks = () if self.sink is None else (self.sink,)
        return (*self.gains, *self.terms, *self.masks, *self.late, *sinks)
