"""What stands in place of an attention that was found: one operator, and layout around it.

The operator's axes are (batch axes of the first product, queries, keys). Tensors that joined the
scores elsewhere are brought back over the trail of layout operators; the result follows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from bincompile.ops.attention import attention
from bincompile.passes.axes import Contraction
from bincompile.passes.graph import aten, shape_of, value_of
from bincompile.passes.heads import Shared
from bincompile.passes.placed import Mixing, Place, Scores, Term
from bincompile.passes.trail import Move, Plan, Sizes, follow, permutation

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Found:
    """The parts of an attention around a softmax; `by_left`: the queries are the left operand."""

    scores: Scores
    by_left: bool
    softmax: fx.Node
    product: Contraction  # with the values
    at_values: Place  # where the probabilities meet the values
    probabilities_left: bool
    masked_row: str
    weights: tuple[fx.Node, Place] | None  # the probabilities that others read too
    result: fx.Node
    mixing: Mixing | None = None  # of the probabilities
    plan: Plan = dataclasses.field(default_factory=dict)
    shared: tuple[Shared, Shared] | None = None  # keys and values before heads are repeated

    @property
    def need_weights(self) -> bool:
        """Whether others read the probabilities too."""
        return self.weights is not None

    @property
    def first(self) -> Contraction:
        """The product of query and key."""
        return self.scores.product

    @property
    def query_label(self) -> str:
        """What the queries' axis is called."""
        return self.first.own[not self.by_left]

    @property
    def key_label(self) -> str:
        """What the keys' axis is called."""
        return self.first.own[self.by_left]

    @property
    def canonical(self) -> tuple[str, ...]:
        """The axes of the scores as the operator has them."""
        return (*self.first.batch, self.query_label, self.key_label)

    @property
    def value(self) -> fx.Node:
        """The values, as they are multiplied."""
        return self.product.right if self.probabilities_left else self.product.left

    @property
    def value_axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Labels of the second product: those of the probabilities and those of the values."""
        pair = (self.product.left_axes, self.product.right_axes)
        return pair if self.probabilities_left else pair[::-1]

    def oriented(self, axes: tuple[int, int, int]) -> tuple[int, int]:
        """Where the queries and the keys stand."""
        _, left, right = axes
        return (left, right) if self.by_left else (right, left)


def total_trail(found: Found, place: Place) -> tuple[Move, ...]:
    """The moves from the operator's axes to a place; none where they are the same."""
    axes = found.first.axes
    sizes = tuple(shape_of(found.first.node)[axes.index(a)] for a in found.canonical)
    start = permutation(sizes, (found.canonical.index(a) for a in axes))
    moves = start if place.trail == () else start.then(place.trail[0])
    if moves is None:
        return place.trail if start.idle else (start, *place.trail)
    return () if moves.idle and len(place.trail) <= 1 else (moves, *place.trail[1:])


def moves_of(found: Found) -> list[Move]:
    """Every move that the emitted form writes."""
    places = [found.at_values, *(t.place for t in found.scores.tensors)]
    if found.weights is not None:
        places.append(found.weights[1])
    return [move for place in places for move in total_trail(found, place)]


def inputs_of(found: Found, query: fx.Node, key: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """The nodes that feed the operator, by role."""
    kept = (key, found.value) if found.shared is None else (s.node for s in found.shared)
    yield from zip(("query", "key", "value"), (query, *kept), strict=True)
    scores = found.scores
    groups = {"bias": scores.terms, "mask": scores.masks, "factor": scores.gains,
              "late": scores.late, "sink": (scores.sink,) if scores.sink else ()}
    for role, terms in groups.items():
        for index, term in enumerate(terms):
            yield role_of(role, index, term), term.node
    for name, mixing in (("before", scores.mixing), ("after", found.mixing)):
        if mixing is not None:
            yield f"mix_{name}", mixing.matrix
            if mixing.shift is not None:
                yield f"shift_{name}", mixing.shift


def role_of(role: str, index: int, term: Term) -> str:
    """The name of a tensor's role: proofs draw masks, factors and what is added by it."""
    kind = "mask_" if term.hides else "bias_" if role == "late" else ""
    return f"{kind}{role}_{index}"


def emit(found: Found, build: Any, values: Values) -> tuple[Any, ...]:
    """The results of the operator in place of `found.result` and of the probabilities."""
    writer = _Writer(found, build, values, Sizes(build, values, found.plan))
    first, scores = found.first, found.scores
    if found.shared is not None:
        given = zip(("key", "value"), found.shared, strict=True)
        values = {**values, **{role: s.arranged(build, values[role]) for role, s in given}}
        writer = dataclasses.replace(writer, given=values)
    left = arrange(build, values["query" if found.by_left else "key"], first.left_axes,
                   (*first.batch, first.own[0], first.contracted))
    right = arrange(build, values["key" if found.by_left else "query"], first.right_axes,
                    (*first.batch, first.own[1], first.contracted))
    query, key = (left, right) if found.by_left else (right, left)
    query, facets = writer.gained(query)
    facets |= writer.facets()
    pair = build.call(attention.overload, query, key, writer.value(), writer.bias(),
                      writer.mask(), scores.factor, fill=scores.fill if scores.masks else None,
                      masked_row=found.masked_row, need_weights=found.need_weights,
                      **{name: value for name, value in facets.items() if value is not None})
    out = writer.out(build.item(pair, 0))
    if found.weights is None:
        return (out,)
    return out, writer.weights(build.item(pair, 1))


def arrange(build: Any, node: Any, axes: tuple[str, ...], wanted: tuple[str, ...],
            full: bool = False) -> Any:
    """A tensor with its axes in the wanted order; axes that it lacks get size 1.

    Those in front are left out, unless `full`.
    """
    lacking = [i for i, a in enumerate(axes) if a[0] == "_" and a not in wanted]
    if lacking:
        node = build.call(aten.squeeze.dims, node, lacking)
        axes = tuple(a for i, a in enumerate(axes) if i not in lacking)
    present = [a for a in wanted if a in axes]
    order = [axes.index(a) for a in present]
    if order != sorted(order):
        node = build.call(aten.permute.default, node, order)
    lead = 0 if full else next(i for i, a in enumerate(wanted) if a in axes)
    for index, label in enumerate(wanted[lead:]):
        if label not in axes:
            node = build.call(aten.unsqueeze.default, node, index)
    return node


def plain_axes(found: Found) -> tuple[str, ...] | None:
    """The batch axes of the second product in order, where the scores were only permuted."""
    labels = found.at_values.labels
    own, axes = found.value_axes
    if len(labels) != len(found.canonical) or set(labels) != set(found.canonical):
        return None
    more = [a for a in found.product.axes
            if a in axes and a not in own and a != found.product.own[found.probabilities_left]]
    return (*more, *(own[labels.index(a)] for a in found.first.batch))


@dataclasses.dataclass(frozen=True)
class _Writer:
    """Writes the tensors around the operator."""

    found: Found
    build: Any
    given: Values
    sizes: Sizes

    def placed(self, tensor: Any, place: Place) -> Any:
        """A tensor that broadcasts to the scores at a place, in the operator's axes."""
        trail = total_trail(self.found, place)
        if trail:
            for _ in range(len(place.labels) - len(_shape(tensor))):
                tensor = self.build.call(aten.unsqueeze.default, tensor, 0)
            tensor = follow(self.build, tensor, [m.inverse for m in reversed(trail)], self.sizes)
        return tensor

    def term(self, role: str, index: int, term: Term) -> Any:
        """A tensor that is added to the scores."""
        tensor = self.given[role_of(role, index, term)]
        if term.hides:
            tensor = self._hiding(tensor, term.inverted)
        elif term.factor != 1:
            tensor = self.build.call(aten.mul.Tensor, tensor, term.factor)
        return self.placed(tensor, term.place)

    def _hiding(self, mask: Any, inverted: bool) -> Any:
        """-inf where a mask hides a key, else 0."""
        query = self.given["query"]
        dtype = value_of(query).dtype if isinstance(query, fx.Node) else query.dtype
        zeros = self.build.call(aten.zeros_like.default, mask, dtype=dtype)
        if not inverted:
            mask = self.build.call(aten.logical_not.default, mask)
        return self.build.call(aten.masked_fill.Scalar, zeros, mask, float("-inf"))

    def total(self, role: str, terms: tuple[Term, ...], start: int = 0) -> Any:
        """The sum of added tensors from `start` on; None if there are none."""
        total = None
        for index, term in enumerate(terms[start:], start):
            tensor = self.term(role, index, term)
            total = tensor if total is None else self.build.call(aten.add.Tensor, total, tensor)
        return total

    def bias(self) -> Any:
        """What is added before the mask; heads of what came before they were mixed are mixed."""
        terms, mixing = self.found.scores.terms, self.found.scores.mixing
        early = [t for t in terms if t.mixed]
        parts = [self.total("bias", terms, len(early))]
        if mixing is not None:
            parts += [self._mixed(self.total("bias", tuple(early))), self._shift(mixing)]
        parts = [part for part in parts if part is not None]
        total = parts[0] if parts else None
        for part in parts[1:]:
            total = self.build.call(aten.add.Tensor, total, part)
        return total

    def _mixed(self, bias: Any) -> Any:
        if bias is None:
            return None
        for _ in range(3 - len(_shape(bias))):
            bias = self.build.call(aten.unsqueeze.default, bias, 0)
        matrix = self._matrix("mix_before", self.found.scores.mixing)
        return self.build.call(aten.einsum.default, "gh,...hmn->...gmn", [matrix, bias])

    def _shift(self, mixing: Mixing) -> Any:
        if mixing.shift is None:
            return None
        shift = self.build.call(aten.unsqueeze.default, self.given["shift_before"], -1)
        return self.build.call(aten.unsqueeze.default, shift, -1)

    def mask(self) -> Any:
        """Where keys are kept."""
        total = None
        for index, term in enumerate(self.found.scores.masks):
            tensor = self.given[f"mask_{index}"]
            if term.inverted:
                tensor = self.build.call(aten.logical_not.default, tensor)
            tensor = self.placed(tensor, term.place)
            total = tensor if total is None else self.build.call(
                aten.logical_and.default, total, tensor)
        return total

    def gained(self, query: Any) -> tuple[Any, dict[str, Any]]:
        """The query and the gain: factors of whole rows go into the query."""
        total = None
        for index, term in enumerate(self.found.scores.gains):
            tensor = self.placed(self.given[f"factor_{index}"], term.place)
            sizes = _shape(tensor)
            whole = not sizes or (isinstance(sizes[-1], int) and sizes[-1] == 1)
            if whole and _dtype(tensor) == _dtype(query):
                target = aten.div.Tensor if term.divides else aten.mul.Tensor
                query = self.build.call(target, query, tensor)
                continue
            if term.divides:
                tensor = self.build.call(aten.reciprocal.default, tensor)
            total = tensor if total is None else self.build.call(aten.mul.Tensor, total, tensor)
        return query, {"gain": total}

    def facets(self) -> dict[str, Any]:
        """The operator's other arguments."""
        scores, found = self.found.scores, self.found
        sink = None if scores.sink is None else self.placed(
            self.given["sink_0"], scores.sink.place)
        return {
            "softcap": scores.softcap, "low": scores.low, "high": scores.high,
            "late_bias": self.total("late", scores.late), "sink": sink,
            "mix_before": self._matrix("mix_before", scores.mixing),
            "mix_after": self._matrix("mix_after", found.mixing),
            "mix_shift": self.given.get("shift_after"),
            "groups": None if found.shared is None else found.shared[0].groups,
        }

    def _matrix(self, role: str, mixing: Mixing | None) -> Any:
        if mixing is None:
            return None
        matrix = self.given[role]
        if len(_shape(matrix)) > 2:
            matrix = self.build.call(aten.squeeze.dims, matrix, [2, 3])
        return self.build.call(aten.t.default, matrix) if mixing.turned else matrix

    def value(self) -> Any:
        """The values in the operator's axes."""
        found, tensor = self.found, self.given["value"]
        own, axes = found.value_axes
        wanted = plain_axes(found)
        feature = found.product.own[found.probabilities_left]
        if wanted is not None:
            return arrange(self.build, tensor, axes, (*wanted, found.product.contracted, feature))
        tensor = arrange(self.build, tensor, axes, (*own, feature), full=True)
        trail = total_trail(found, found.at_values)
        tensor = follow(self.build, tensor, [m.inverse for m in reversed(trail)], self.sizes)
        return self.build.call(aten.squeeze.dim, tensor, -3)

    def out(self, out: Any) -> Any:
        """The result with its axes as the second product has them."""
        found, build = self.found, self.build
        own, _ = found.value_axes
        feature, query = found.product.own[found.probabilities_left], own[
            found.at_values.labels.index(found.query_label)]
        plain = plain_axes(found)
        if plain is not None:
            axes = (*plain, query, feature)
        else:
            trail = total_trail(found, found.at_values)
            out = follow(build, build.call(aten.unsqueeze.default, out, -2), trail, self.sizes)
            out = build.call(aten.squeeze.dim, out, own.index(found.product.contracted))
            axes = (*(a for a in own if a != found.product.contracted), feature)
            lacking = [i for i, a in enumerate(axes) if a[0] == "_"]
            if lacking:
                out = build.call(aten.squeeze.dims, out, lacking)
                axes = tuple(a for a in axes if a[0] != "_")
        order = [axes.index(a) for a in found.product.axes if a in axes]
        if order != sorted(order):
            out = build.call(aten.permute.default, out, order)
        return out

    def weights(self, weights: Any) -> Any:
        """The probabilities with their axes where others read them."""
        assert self.found.weights is not None
        trail = total_trail(self.found, self.found.weights[1])
        return follow(self.build, weights, trail, self.sizes)


def _shape(tensor: Any) -> tuple[Any, ...]:
    return shape_of(tensor) if isinstance(tensor, fx.Node) else tuple(tensor.shape)


def _dtype(tensor: Any) -> Any:
    return value_of(tensor).dtype if isinstance(tensor, fx.Node) else tensor.dtype
