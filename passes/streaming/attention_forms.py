"""The two attentions, of numbers and of bits, as one: how they are called, and over a band."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bincompile.ops.attention import attention
from bincompile.ops.binary_attention import binary_attention
from bincompile.ops.stream_attention import BLOCK, slots_for
from bincompile.ops.stream_binary_attention import (
    PROBABILITIES,
    stream_binary_attention,
    words_for,
)
from bincompile.passes.graph import shape_of, value_of
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.kinds import Refused

ATTENTIONS = (attention.overload, binary_attention.overload)
FIRST_SLOTS = 64  # of a ring that grows
_BITS = ("drop", "threshold", "probabilities", "values")  # arguments that binary attention adds


def bound_to(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an attention by name; those that its operator lacks have no effect.

    Raises:
        Refused: weights are dropped, as in training.
    """
    if target is attention.overload:
        return attention.bind(args, dict(kwargs))
    given = binary_attention.bind(args, dict(kwargs))
    if given["drop"] is not None:
        raise Refused("drops some of its weights, as in training", "the model in eval mode")
    plain = {name: given[name] for name in attention.arguments if name in given}
    return {**attention.bind((), plain), **{name: given[name] for name in _BITS}}


def is_binary(bound: Mapping[str, Any]) -> bool:
    """Whether queries and keys are bits."""
    return "probabilities" in bound


def attended(build: StepBuilder, bound: Mapping[str, Any]) -> fx.Node:
    """The result of an attention with these arguments, in the step."""
    operator = binary_attention if is_binary(bound) else attention
    named = {name: bound[name] for name in operator.arguments if name in bound}
    return build.item(build.call(operator.overload, **{**named, "need_weights": False}), 0)


def computed(bound: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """The results of an attention of tensors."""
    operator = binary_attention if is_binary(bound) else attention
    return operator.reference(**{n: bound[n] for n in operator.arguments})


def hidden_too(bound: Mapping[str, Any], seen: torch.Tensor) -> dict[str, Any]:
    """The arguments of an attention that sees fewer keys, and nothing else that is causal."""
    if is_binary(bound):
        mask = seen if bound["mask"] is None else bound["mask"] & seen
        return {**bound, "mask": mask, "causal": False, "need_weights": False}
    late = torch.where(seen, 0.0, -torch.inf).to(bound["query"].dtype)
    late = late if bound.get("late_bias") is None else bound["late_bias"] + late
    return {**bound, "late_bias": late, "causal": False, "need_weights": False}


def needs_window(bound: Mapping[str, Any], added: Mapping[str, Any]) -> bool:
    """Whether an attention of bits is not one that its ring's operator has."""
    return is_binary(bound) and (bool(added) or bound["bias"] is not None
                                 or bound["probabilities"] not in PROBABILITIES)


def ring_of_bits(build: StepBuilder, bound: Mapping[str, Any], parts: list[fx.Node],
                 window: int | None, timing: Mapping[str, int]) -> fx.Node:
    """(M, heads, features): an attention of bits to a ring of them.

    Args:
        build: the step.
        bound: the model's arguments.
        parts: query, key and value (M, heads, features).
        window: tokens that it sees; None: all.
        timing: rate and delay.
    """
    (heads, features), value = shape_of(parts[0])[1:], parts[2]
    width = shape_of(value)[2]
    slots = FIRST_SLOTS if window is None else slots_for(window)
    grows, dtype = 1 if window is None else None, value_of(value).dtype
    tiles = slots // BLOCK
    states = [
        build.state("key_bits", (heads, tiles, words_for(features), BLOCK), torch.int32,
                    grows=grows, block=BLOCK),
        build.state("key_scales", (heads, tiles, BLOCK),
                    torch.promote_types(dtype, torch.float32), grows=grows, block=BLOCK),
        build.state("values", (heads, slots, width), dtype, grows=grows)]
    limit = bound["threshold"]
    limit = None if limit is None else build.read(limit, build.kind(limit))
    return build.call(stream_binary_attention.overload, *parts, *states, build.rows, build.clock,
                      limit, bound["scale"], window, **timing,
                      probabilities=bound["probabilities"], values=bound["values"])
