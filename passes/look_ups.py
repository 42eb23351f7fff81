"""Look-ups by torch's indexing operators: which axis of which table, by which indices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from bincompile.ops.embedding import embedding
from bincompile.passes.graph import arguments, aten, shape_of
from bincompile.passes.patterns import Context, TableUse
from bincompile.passes.sizes import equal
from bincompile.passes.tables import is_index, is_table, never_negative, wrapped

Place = tuple[str, int] | None  # of an axis: ("table", i), ("indices", i), or a new one of size 1


@dataclasses.dataclass(frozen=True)
class LookUp:
    """Slices of a table along one axis.

    Args:
        axis: the axis of the table that is indexed.
        places: for each axis of the result, the axis of the table or of the indices that it is.
        wrap: negative indices count from the end.
        modulo: an index counts modulo the rows, as torch.take_along_dim has it.
        shortened: whether a proof may use a table of fewer rows.
    """

    table: fx.Node
    indices: fx.Node
    axis: int
    places: tuple[Place, ...]
    wrap: bool = False
    modulo: bool = False
    shortened: bool = True

    @property
    def rest(self) -> tuple[int, ...]:
        """The other axes of the table."""
        return tuple(a for a in range(len(shape_of(self.table))) if a != self.axis)

    @property
    def plain(self) -> bool:
        """Whether rows of a matrix come out as they are, in the order of the indices."""
        count = len(shape_of(self.indices))
        return self.axis == 0 and self.rest == (1,) and self.places == (
            *(("indices", i) for i in range(count)), ("table", 1))

    @property
    def use(self) -> TableUse:
        """What a proof has to know of it."""
        return TableUse(self.axis, self.axis if self.shortened else None,
                        "any" if self.modulo else "negative" if self.wrap else "rows")

    @property
    def attrs(self) -> dict[str, Any]:
        """Its attributes, as a match shows them."""
        sizes = shape_of(self.table)
        attrs = {"num_embeddings": sizes[self.axis],
                 "embedding_dim": math.prod(sizes[a] for a in self.rest), "padding_idx": None}
        return {**attrs, **({"negative": True} if self.wrap else {}),
                **({"modulo": True} if self.modulo else {}),
                **({"axis": self.axis} if self.axis else {})}

    def inside(self, build: Any, values: Mapping[str, Any]) -> Any:
        """The indices, from 0 on where the model allows others."""
        rows = build.size(values["table"], self.axis)
        if self.modulo:
            return build.call(aten.remainder.Scalar, values["indices"], rows)
        return wrapped(build, values["indices"], rows) if self.wrap else values["indices"]

    def emit(self, build: Any, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """The operator on a table of two axes, and the layout around it."""
        table, indices = values["table"], values["indices"]
        if self.modulo:
            indices = self.inside(build, values)
        count, sizes = len(shape_of(self.indices)), [build.size(table, a) for a in self.rest]
        rows = _permuted(build, table, (self.axis, *self.rest))
        if len(sizes) != 1:
            rows = build.call(aten.reshape.default, rows,
                              [build.size(table, self.axis), math.prod(sizes)])
        found = build.call(embedding.overload, rows, indices, *([True] if self.wrap else []))
        if len(sizes) != 1:
            found = build.call(aten.reshape.default, found, [*build.shape(indices), *sizes])
        own = [place[1] if place[0] == "indices" else count + self.rest.index(place[1])
               for place in self.places if place is not None]
        left_out = [a for a in range(count + len(sizes)) if a not in own]
        found = _permuted(build, found, (*own, *left_out))
        for _ in left_out:  # axes of size 1
            found = build.call(aten.select.int, found, -1, 0)
        for position, place in enumerate(self.places):
            if place is None:
                found = build.call(aten.unsqueeze.default, found, position)
        return (found,)


def _permuted(build: Any, value: Any, order: tuple[int, ...]) -> Any:
    if order == tuple(range(len(order))):
        return value
    return build.call(aten.permute.default, value, list(order))


def look_up(node: Any, context: Context) -> LookUp | None:
    """The look-up that a node makes, or None if it makes none."""
    reader = READERS.get(node.target) if isinstance(node, fx.Node) else None
    found = None if reader is None else reader(node)
    if found is None or not is_table(found.table, context) or not is_index(found.indices) \
            or not all(isinstance(s, int) for s in shape_of(found.table)):
        return None
    if found.wrap and never_negative(found.indices, context):
        return dataclasses.replace(found, wrap=False)
    return found


def _of_axis(table: fx.Node, indices: fx.Node, axis: int, wrap: bool) -> LookUp:
    rank, count = len(shape_of(table)), len(shape_of(indices))
    axis %= rank
    places: list[Place] = [("table", a) for a in range(rank)]
    places[axis:axis + 1] = [("indices", i) for i in range(count)]
    return LookUp(table, indices, axis, tuple(places), wrap)


def _embedding(node: fx.Node) -> LookUp:
    found = arguments(node)
    return _of_axis(found["weight"], found["indices"], 0, wrap=False)


def _index(node: fx.Node) -> LookUp | None:
    table, indices = node.args
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    return _of_axis(table, given[0][1], given[0][0], wrap=True) if len(given) == 1 else None


def _index_select(node: fx.Node) -> LookUp:
    table, axis, indices = node.args
    found = _of_axis(table, indices, axis, wrap=False)
    if len(shape_of(indices)) == 1:
        return found
    places = list(found.places)
    places.insert(found.axis, None)  # an index of no axes selects one row and keeps its axis
    return dataclasses.replace(found, places=tuple(places))


def _take(node: fx.Node) -> LookUp | None:
    table, indices = node.args
    return _of_axis(table, indices, 0, wrap=True) if len(shape_of(table)) == 1 else None


def _gather(node: fx.Node) -> LookUp | None:
    found = arguments(node)
    index = found["index"] if node.target is aten.gather.default else found["indices"]
    if found["dim"] is None or len(shape_of(found["self"])) != len(shape_of(index)):
        return None
    rank = len(shape_of(node))
    if rank == 0:
        return None
    dim = found["dim"] % rank
    (table, columns), (indices, axes) = spread(found["self"]), spread(index)
    if columns[dim] is None:
        return None
    broadcast = node.target is not aten.gather.default
    places = tuple(
        _place(a, columns[a], axes[a], (found["self"], index, node), broadcast)
        if a != dim else (None if axes[a] is None else ("indices", axes[a]))
        for a in range(rank))
    if "differs" in places or (places[dim] is None and shape_of(node)[dim] != 1):
        return None
    return LookUp(table, indices, columns[dim], places,  # type: ignore[arg-type]
                  modulo=broadcast, shortened=table is found["self"])


def _place(axis: int, column: int | None, own: int | None, nodes: tuple[fx.Node, ...],
           broadcast: bool) -> Place | str:
    """Where an axis of a gather comes from; "differs" if rows or numbers of rows differ by it."""
    source, index, result = (shape_of(n)[axis] for n in nodes)
    varies = column is not None and source != 1, own is not None and index != 1
    if all(varies) or (varies[0] and not broadcast and not equal(source, index)):
        return "differs"
    if not any(varies) and result != 1:
        return "differs"
    if varies[0] or (column is not None and not varies[1]):
        return ("table", column)  # type: ignore[return-value]
    return None if own is None else ("indices", own)


def spread(node: fx.Node) -> tuple[fx.Node, list[int | None]]:
    """What a value repeats along new axes: the value itself, and its axis at each axis or None."""
    axes: list[int | None] = list(range(len(shape_of(node))))
    while node.target in SPREADS:
        back = SPREADS[node.target](node)
        if back is None:
            break
        axes = [None if a is None else back[a] for a in axes]
        node = node.args[0]
    return node, axes


def _expanded(node: fx.Node) -> list[int | None]:
    before, after = shape_of(node.args[0]), shape_of(node)
    lead = len(after) - len(before)
    return [None if a < lead or not equal(before[a - lead], after[a]) else a - lead
            for a in range(len(after))]


def _repeated(node: fx.Node) -> list[int | None] | None:
    before, times = shape_of(node.args[0]), node.args[1]
    lead = len(times) - len(before)
    if any(n != 1 and a >= lead and before[a - lead] != 1 for a, n in enumerate(times)):
        return None
    return [None if a < lead or n != 1 else a - lead for a, n in enumerate(times)]


def _unsqueezed(node: fx.Node) -> list[int | None]:
    rank = len(shape_of(node))
    new = node.args[1] % rank
    return [None if a == new else a - (a > new) for a in range(rank)]


def _reshaped(node: fx.Node) -> list[int | None] | None:
    """A reshape that only adds axes of size 1."""
    before, axes = list(shape_of(node.args[0])), list[int | None]()
    for size in shape_of(node):
        place = len([a for a in axes if a is not None])
        if place < len(before) and equal(size, before[place]):
            axes.append(place)
        elif isinstance(size, int) and size == 1:
            axes.append(None)
        else:
            return None
    return axes if len([a for a in axes if a is not None]) == len(before) else None


SPREADS: dict[Any, Callable[[fx.Node], list[int | None] | None]] = {
    aten.expand.default: _expanded, aten.repeat.default: _repeated,
    aten.unsqueeze.default: _unsqueezed, aten.reshape.default: _reshaped,
}
READERS: dict[Any, Callable[[fx.Node], LookUp | None]] = {
    aten.embedding.default: _embedding, aten.index.Tensor: _index,
    aten.index_select.default: _index_select, aten.take.default: _take,
    aten.gather.default: _gather, aten.take_along_dim.default: _gather,
}
