"""Attention in a step: what stands in the step program where the model attends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bincompile.ops.stream_attention import BLOCK, slots_for, stream_attention
from bincompile.ops.stream_filled import stream_filled
from bincompile.ops.stream_window import stream_window
from bincompile.passes.graph import aten, is_tensor, shape_of, value_of
from bincompile.passes.streaming import attending, distances
from bincompile.passes.streaming.attending import PARTS, Bound
from bincompile.passes.streaming.attention_forms import (
    FIRST_SLOTS,
    attended,
    is_binary,
    needs_window,
    ring_of_bits,
)
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.distances import ADDED, Added, Sight
from bincompile.passes.streaming.facts import settled
from bincompile.passes.streaming.free import emit_windowed, over_window
from bincompile.passes.streaming.kinds import BATCH, Kind, Pairwise, Refused, Stepped, Still

SHORT = 5  # tokens that show whether a value is the same for all of them
SLOW = ("gain", "low", "high", "mix_before", "mix_after", "mix_shift")  # what composition is for


def emit_attention(node: fx.Node, bound: Bound, build: StepBuilder) -> fx.Node:
    """The result (not the weights) of an attention in a step, with the axes of its kind."""
    case = attending.case_of(bound, build.facts)
    if case in (attending.WITHIN, attending.MEMORY):
        return _apart(node, bound, build)
    if attending.is_windowed(bound, build.facts) or build.extent(node) > 1:
        return _Window(node, bound, build).emit()
    return _Newest.of(node, bound, build).emit()


def result_kind(node: fx.Node, build: StepBuilder) -> Any:
    """The kind of the first result."""
    return build.kind(node)[0]


def _apart(node: fx.Node, bound: Bound, build: StepBuilder) -> fx.Node:
    """An attention that does not look at other tokens: as the model has it."""
    like, extent = result_kind(node, build), build.extent(node)
    keys = build.kind(bound["key"]).axes[-2]
    scores = like.with_axes((*like.axes[:-1], keys))

    def part(name: str, arg: fx.Node) -> Any:
        if name == "threshold":
            return build.read(arg, build.kind(arg))
        own = like.with_axes(build.kind(arg).axes) if name in PARTS else scores
        return build.read(arg, own, extent)

    read = {name: part(name, arg) if is_tensor(arg) else arg for name, arg in bound.items()}
    return attended(build, read)


@dataclasses.dataclass(frozen=True)
class _Window:
    """An attention whose keys are all tokens of a window, computed anew."""

    node: fx.Node
    bound: Bound
    build: StepBuilder

    def emit(self) -> fx.Node:
        """The result for the whole window, or for its newest token."""
        build, bound, node = self.build, self.bound, self.node
        like, extent = result_kind(node, build), build.extent(node)
        window = build.facts.positions(build.kind(bound["key"]).length)
        read: dict[str, Any] = dict(bound)
        for name in PARTS:
            read[name] = build.read(bound[name], like, extent if name == "query" else window)
        for name in (*ADDED, "mask", "gain", "sink", "mix_before", "mix_after", "mix_shift",
                     "threshold"):
            if is_tensor(bound.get(name)):
                read[name] = self._operand(bound[name], extent, window)
        if extent == 1:
            read["causal"] = False
        if build.facts.continual.partial_window:
            read["mask"] = self._seen(read["mask"], like, window)
        return attended(build, read)

    def _operand(self, arg: fx.Node, extent: int, window: int) -> fx.Node:
        """A mask or bias over the window: of its newest token where that is all that is asked."""
        build, kind = self.build, self.build.kind(arg)
        if isinstance(kind, Still):
            return build.read(arg, kind)
        if not isinstance(kind, Pairwise) and arg in build.facts:
            raise Refused("has a mask that depends on an input", "a mask of positions alone")
        made = emit_windowed(arg, build, build.facts.window or window)
        if extent == 1 and len(shape_of(made)) > 1 and shape_of(made)[-2] == window:
            made = build.call(aten.slice.Tensor, made, -2, window - 1, window)
        return made

    def _seen(self, mask: fx.Node | None, like: Kind, window: int) -> fx.Node:
        """The mask, and what hides the places of a window that no token has come to yet."""
        build = self.build
        lead = like.axes[:-2]
        if window != build.facts.window:
            raise Refused("reads more than the tokens of a window that is not full",
                          "Continual(partial_window=False)")
        filled = build.call(stream_filled.overload, build.rows, build.clock, window, 1, 0)
        sizes = [build.count if any(a.role == BATCH for a in axis) else 1 for axis in lead]
        if any(a.role == BATCH and len(axis) > 1 for axis in lead for a in axis):
            raise Refused("has heads merged with rows, and windows that are not full",
                          "Continual(partial_window=False)")
        filled = build.call(aten.reshape.default, filled, [*sizes, 1, window])
        return filled if mask is None else build.call(aten.logical_and.default, mask, filled)


@dataclasses.dataclass(frozen=True)
class _Newest:
    """An attention of the newest token to a ring of keys."""

    node: fx.Node
    bound: Bound
    build: StepBuilder
    sight: Sight
    joint: Any  # rate and delay of query, key and value together
    queries: int = 1  # of each head, where they do not move with time

    @classmethod
    def of(cls, node: fx.Node, bound: Bound, build: StepBuilder) -> _Newest:
        """How far it sees, and when its tokens are there."""
        facts = build.facts
        joint = attending.together(bound, facts, PARTS)
        pool = attending.case_of(bound, facts) == attending.POOL
        if not isinstance(joint, Stepped):  # the query alone is of a window
            joint = attending.together(bound, facts, ("key", "value"))
        if facts.semantics == "window" or pool:
            sight = attending.pool_sight(facts)
        else:
            sight = distances.sight_of(bound, facts)
        queries = int(shape_of(bound["query"])[-2]) if pool else 1
        return cls(node, bound, build, sight, joint, queries)

    def emit(self) -> fx.Node:
        """The result with the axes of its kind."""
        build, like = self.build, result_kind(self.node, self.build)
        added = self._added()
        if self._slow(added):
            found = self._composed(added)
        elif is_binary(self.bound):
            timing = {"rate": self.joint.rate, "delay": self.joint.delay}
            found = ring_of_bits(build, self.bound, self._tokens(), self.sight.window, timing)
        else:
            found = self._ring(added)
        plain = like.plain if self.queries == 1 else (*like.plain,)
        found = build.call(aten.reshape.default, found, [build.count, *plain]) \
            if plain != tuple(shape_of(found)[1:]) else found
        return build.restored(found, like.axes)

    @property
    def _dtype(self) -> torch.dtype:
        return value_of(self.bound["value"]).dtype

    def _token(self, name: str, late: int = 0) -> fx.Node:
        """(M, *plain): a part, as old as the latest of them and `late` tokens more."""
        build, arg = self.build, self.bound[name]
        kind = settled(build.kind(arg))
        if isinstance(kind, Stepped):
            like = dataclasses.replace(self.joint, delay=self.joint.delay + late * self.joint.rate)
            return build.token_of(build.read(arg, like), kind)
        return build.token_of(build.read(arg, result_kind(self.node, build)), kind)

    def _leads(self, name: str) -> tuple[int, ...]:
        """Sizes of the axes in front of tokens and features, without the rows."""
        axes = self.build.kind(self.bound[name]).axes[:-2]
        return tuple(math.prod(int(a.size) for a in axis if a.role != BATCH) for axis in axes)

    def _heads(self, name: str, late: int = 0) -> fx.Node:
        """(M, heads, features), with as many heads as there are, or as the queries have."""
        build, token = self.build, self._token(name, late)
        leads, wanted = self._leads(name), self._leads("query")
        features = shape_of(self.bound[name])[-1]
        if name == "query":
            return self._shaped(token, (math.prod(leads) * self.queries, features))
        rank = max(len(leads), len(wanted))
        leads, wanted = ((1,) * (rank - len(s)) + s for s in (leads, wanted))
        groups = self.bound.get("groups", 1)
        if groups > 1:
            wanted = (*wanted[:-1], wanted[-1] // groups)
        same = next((i for i in range(rank, -1, -1) if leads[:i] == wanted[:i]), 0)
        if all(size == 1 for size in leads[same:]) and (same == rank or groups == 1):
            return self._shaped(token, (math.prod(leads), features))
        token = self._shaped(token, (*leads, features))
        token = build.call(aten.expand.default, token, [build.count, *wanted, features])
        return self._shaped(token, (math.prod(wanted), features))

    def _shaped(self, node: fx.Node, sizes: tuple[Any, ...]) -> fx.Node:
        if tuple(shape_of(node)[1:]) == tuple(sizes):
            return node
        return self.build.call(aten.reshape.default, node, [self.build.count, *sizes])

    def _added(self) -> dict[str, Added]:
        """What is added to the scores, by distance from the newest token, for each that adds."""
        facts, found = self.build.facts, dict[str, Added]()
        absolute = any(self.bound.get(n) is not None for n in ("sink", "low", "high"))
        for name in (*ADDED, "gain"):
            arg = self.bound.get(name)
            if arg is None or not (distances.moves_in_pairs(arg, facts)
                                   or distances.of_keys(arg, facts)):
                continue
            if arg in facts:
                raise Refused("adds to its scores what depends on an input and on time",
                              "a bias of positions alone")
            if facts.semantics == "window":
                assert self.sight.window is not None
                found[name] = distances.last_row(arg, facts, self.sight.window)
            else:
                found[name] = distances.added_by(arg, self.sight, facts,
                                                 absolute or name == "gain")
        mask = self.bound.get("mask")
        if mask is not None and facts.semantics != "window" and mask not in facts \
                and not distances.is_band(self.bound, facts):
            found["mask"] = distances.added_by(mask, self.sight, facts)
        return found

    def _slow(self, added: Mapping[str, Added]) -> bool:
        """Whether this needs the general form, which copies the window."""
        facts, bound = self.build.facts, self.bound
        if any(bound.get(name) is not None for name in SLOW) or self.sight.strict \
                or needs_window(bound, added):
            return True
        if facts.semantics == "window" and self._row_mask() is not None:
            return True
        left = [n for n in ADDED if bound.get(n) is not None and n not in added]
        sink = bound.get("sink")
        mask = bound.get("mask")
        moving = mask is not None and mask in facts
        return bool(left) or moving or (sink is not None and self._sink_heads() is None)

    def _sink_heads(self) -> fx.Node | None:
        """(heads,): a sink that is the same for all tokens and rows; None if it is not."""
        arg, facts = self.bound["sink"], self.build.facts
        heads = math.prod(self._leads("query"))
        if arg in facts or self.queries != 1:
            return None
        values = over_window(arg, facts, SHORT) if distances.has_time(arg, facts) \
            else over_window(arg, facts, facts.hint(facts.inputs.length))
        one = values[..., :1, :].flatten()
        if one.numel() != heads or not bool((values == values[..., :1, :]).all()):
            return None
        return self._constant(one, "sink", self._dtype)

    def _constant(self, values: torch.Tensor, name: str, dtype: torch.dtype) -> fx.Node:
        key = ("constant of attention", self.node, name)
        if key not in self.build.shared:
            made = self.build.constant(values.contiguous(), f"{self.node.name}_{name}")
            if value_of(made).dtype != dtype:
                made = self.build.call(aten._to_copy.default, made, dtype=dtype)
            self.build.shared[key] = made
        return self.build.shared[key]

    def _by_head(self, values: torch.Tensor) -> torch.Tensor:
        """Numbers of each head, or of all, where the trailing axes of the heads are given."""
        heads, given = math.prod(self._leads("query")) * self.queries, values.shape[0]
        if given in (1, heads):
            return values
        if heads % given:
            raise Refused(f"adds to its scores what is known of {given} heads of {heads}")
        return values.repeat(heads // given, *(1,) * (values.ndim - 1))

    def _tokens(self) -> list[fx.Node]:
        """Query, key and value (M, heads, features), keys and values of as many heads."""
        query, key, value = (self._heads(n, self.sight.ahead if n == "query" else 0)
                             for n in PARTS)
        return [query, *self._alike(key, value)]

    def _ring(self, added: Mapping[str, Added]) -> fx.Node:
        """(M, heads, features) by the operator for it."""
        build, bound, joint = self.build, self.bound, self.joint
        query, key, value = self._tokens()
        window, dtype = self.sight.window, self._dtype
        if is_binary(bound):
            return ring_of_bits(build, bound, [query, key, value], window,
                                {"rate": joint.rate, "delay": joint.delay})
        slots = FIRST_SLOTS if window is None else slots_for(window)
        groups, features, width = *shape_of(key)[1:], shape_of(value)[-1]
        grows = 1 if window is None else None
        keys = build.state("keys", (groups, slots // BLOCK, features, BLOCK), dtype, grows=grows,
                           block=BLOCK)
        values = build.state("values", (groups, slots, width), dtype, grows=grows)
        facets: dict[str, Any] = {"rate": joint.rate, "delay": joint.delay,
                                  "softcap": bound.get("softcap")}
        if bound.get("sink") is not None:
            facets["sink"] = self._sink_heads()
        total = sum(added.values(), Added())
        if total.table is not None and bool(total.table.any()):
            table = self._by_head(total.table)
            facets["distance_bias"] = self._constant(table, "bias", dtype)
        if total.slopes is not None:
            heads = math.prod(self._leads("query")) * self.queries
            slopes = self._by_head(total.slopes).expand(heads)
            facets["slopes"] = self._constant(slopes, "slopes", dtype)
        return build.call(stream_attention.overload, query, key, value, keys, values, build.rows,
                          build.clock, bound["scale"], window,
                          **{k: v for k, v in facets.items() if v is not None})

    def _alike(self, key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Keys and values of as many heads."""
        counts = [shape_of(n)[1] for n in (key, value)]
        most = max(counts)
        spread = []
        for node, count in zip((key, value), counts, strict=True):
            if count != most:
                node = self.build.call(aten.repeat_interleave.self_int, node, most // count, 1)
            spread.append(node)
        return spread[0], spread[1]

    def _composed(self, added: Mapping[str, Added]) -> fx.Node:
        """(M, heads, features) by the ordinary operator, on copies of the window."""
        build, bound, window = self.build, self.bound, self.sight.window
        if window is None:
            raise Refused("needs a window: its facets are not those of a ring that grows",
                          "Continual(window=)")
        query, *held = self._tokens()
        key, value = (self._over(n, t, window)
                      for n, t in zip(("keys", "values"), held, strict=True))
        heads = shape_of(query)[1]
        query = build.call(aten.unsqueeze.default, query, 2)
        rows: dict[str, Any] = dict(bound)
        for name in (*ADDED, "gain", "sink", "mix_before", "mix_after", "mix_shift", "threshold"):
            if is_tensor(bound.get(name)):
                rows[name] = self._row(name, added, heads, window)
        rows.update(query=query, key=key, value=value, causal=False, mask=self._mask(window, added),
                    fill=self._fill(), groups=heads // shape_of(key)[1])
        found = attended(build, rows)
        return build.call(aten.squeeze.dim, found, 2)

    def _over(self, name: str, token: fx.Node, window: int) -> fx.Node:
        """(M, heads, window, features) of the tokens (M, heads, features)."""
        build, joint = self.build, self.joint
        ring = build.state(name, (window, *shape_of(token)[1:]), value_of(token).dtype)
        held = build.call(stream_window.overload, token, ring, build.rows, build.clock, window,
                          joint.rate, joint.delay)
        return build.call(aten.transpose.int, held, 1, 2)

    def _row(self, name: str, added: Mapping[str, Added], heads: int, window: int) -> fx.Node:
        """What an argument is for one query and the window."""
        build, arg = self.build, self.bound[name]
        if name in added:
            row = self._by_head(added[name].row(window))
            return self._constant(row[:, None, :], name, self._dtype)
        kind = build.kind(arg)
        if isinstance(kind, Still) and not kind.prepared:
            return build.read(arg, kind)
        if isinstance(kind, Stepped) and kind.time_axis == len(kind.axes) - 2:
            late = build.read(arg, dataclasses.replace(
                self.joint, delay=self.joint.delay + self.sight.ahead * self.joint.rate))
            token = build.token_of(late, settled(kind))
            return build.call(aten.reshape.default, token, [build.count, -1, 1, 1])
        raise Refused(f"has a {name} that depends on more than the distance of two tokens",
                      "a bias by distance")

    def _row_mask(self) -> torch.Tensor | None:
        """(heads or 1, window): what the mask of a window leaves its last token, if not all."""
        facts, arg, window = self.build.facts, self.bound.get("mask"), self.sight.window
        if facts.semantics != "window" or arg is None or arg in facts or not (
                distances.moves_in_pairs(arg, facts) or distances.of_keys(arg, facts)):
            return None
        assert window is not None
        row = distances.pairs(arg, facts, window)[:, -1] == 0
        return None if bool(row.all()) else row

    def _fill(self) -> float | None:
        """What a hidden key's score is: the model's where its mask is a row of the window."""
        return self.bound.get("fill") if self._row_mask() is not None else None

    def _mask(self, window: int, added: Mapping[str, Added]) -> fx.Node:
        """(M, 1, 1, window) or more heads: which places of the window are seen."""
        build, joint, row = self.build, self.joint, self._row_mask()
        if self.bound.get("mask") is not None and self.bound["mask"] in build.facts:
            raise Refused("has a mask that depends on an input", "a mask of positions alone")
        filled = build.call(stream_filled.overload, build.rows, build.clock, window, joint.rate,
                            joint.delay)
        filled = build.call(aten.reshape.default, filled, [build.count, 1, 1, window])
        if self.sight.strict:
            row = torch.arange(window - 1, -1, -1)[None] >= self.sight.strict
        if "mask" in added:
            row = added["mask"].row(window) == 0
        if row is None:
            return filled
        seen = self._constant(self._by_head(row)[:, None, :], "mask", torch.bool)
        return build.call(aten.logical_and.default, filled, seen)
