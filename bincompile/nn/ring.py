"""The memory of a continual attention layer: rings that a step writes one slot of."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bincompile.errors import InputError, InputTypeError


class StreamState(NamedTuple):
    """What a stream remembers. Row n of every tensor is the stream of sample n alone.

    Token number t of a row lies in slot t % S of its rings (t % Q for queries), so a state can be
    split, joined and reordered along its first dimension, stored, and moved between layers.

    Args:
        query: (N, H, Q, D) projected queries.
        key: (N, H, S, D) projected keys.
        value: (N, H, S, D) projected values.
        padding: (N, S) added to the scores of each key, or None if no token was ever masked.
        clock: (N,) int64, tokens seen by each row.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    padding: torch.Tensor | None
    clock: torch.Tensor


class Token(NamedTuple):
    """One projected time step: three (N, H, D), and (N,) to add to its key's scores, or None."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    padding: torch.Tensor | None


def empty(batch: int, heads: int, queries: int, slots: int, features: int,
          like: torch.Tensor) -> StreamState:
    """The state before the first token, in the dtype and on the device of `like`."""
    return StreamState(like.new_zeros(batch, heads, queries, features),
                       like.new_zeros(batch, heads, slots, features),
                       like.new_zeros(batch, heads, slots, features), None,
                       like.new_zeros(batch, dtype=torch.int64))


def push(state: StreamState, token: Token, in_place: bool) -> StreamState:
    """The state after one more token, which takes the slot of the oldest.

    With `in_place` the given rings are written, O(N E), else copied. The clock is always new: a
    state whose slot was written but whose clock was not kept means the same as before.
    """
    rows = torch.arange(state.clock.shape[0], device=state.clock.device)
    slots = {size: state.clock % size for size in {state.query.shape[2], state.key.shape[2]}}

    def write(ring: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        by_slot = ring if ring.ndim == 2 else ring.transpose(1, 2)  # (N, slots, ...)
        index = (rows, slots[by_slot.shape[1]])
        if in_place:
            by_slot.index_put_(index, item)
            return ring
        written = by_slot.index_put(index, item)
        return written if ring.ndim == 2 else written.transpose(1, 2)

    padding = state.padding
    if padding is None and token.padding is not None:
        padding = token.key.new_zeros(state.clock.shape[0], state.key.shape[2])
    if padding is not None:
        item = padding.new_zeros(rows.shape[0]) if token.padding is None else token.padding
        padding = write(padding, item)
    return StreamState(write(state.query, token.query), write(state.key, token.key),
                       write(state.value, token.value), padding, state.clock + 1)


def positions(clock: torch.Tensor, slots: int) -> torch.Tensor:
    """(N, slots): the place of each slot in the window, 0 the oldest and slots - 1 the newest."""
    return (torch.arange(slots, device=clock.device) - clock[:, None]) % slots


def window_order(clock: torch.Tensor, slots: int) -> torch.Tensor:
    """(N, slots): the slot of each place in the window, the oldest first."""
    return (torch.arange(slots, device=clock.device) + clock[:, None]) % slots


def to_slots(bias: torch.Tensor, place: torch.Tensor, dim: int) -> torch.Tensor:
    """(N or 1, H or 1, L, S) in window order along `dim` (2 or 3), brought into slot order."""
    shape = [1] * 4
    shape[0], shape[dim] = place.shape
    wide = bias.expand(place.shape[0], *bias.shape[1:])
    sizes = list(wide.shape)
    sizes[dim] = place.shape[1]
    return wide.gather(dim, place.reshape(shape).expand(sizes))


def reset(state: StreamState, rows: torch.Tensor) -> StreamState:
    """The state with the rows of a (N,) bool forgotten: zeros, as before their first token."""
    def clear(x: torch.Tensor) -> torch.Tensor:
        return torch.where(rows.reshape(-1, *[1] * (x.ndim - 1)), torch.zeros_like(x), x)

    return StreamState._make(x if x is None else clear(x) for x in state)


def chosen(state: StreamState, rows: object) -> torch.Tensor:
    """Indices into the batch, or an (N,) bool tensor, as an (N,) bool tensor."""
    batch = state.clock.shape[0]
    index = torch.as_tensor(rows, device=state.clock.device)
    if index.dtype == torch.bool and index.shape == (batch,):
        return index
    whole = not index.dtype.is_floating_point and index.dtype != torch.bool
    if index.numel() and not (whole and -batch <= index.min() and index.max() < batch):
        raise InputError(f"rows {index.tolist()}", f"indices below {batch}, or {batch} bools",
                         "the rows argument")
    return torch.zeros_like(state.clock, dtype=torch.bool).index_fill(0, index.long() % batch, True)


def copy(state: StreamState) -> StreamState:
    """A copy, cut from autograd."""
    return StreamState._make(x if x is None else x.detach().clone() for x in state)


def check(layer: str, state: object, heads: int, queries: int, slots: int,
          features: int) -> StreamState:
    """The state, or an error that says which of its tensors does not fit the layer."""
    if not isinstance(state, tuple) or len(state) != len(StreamState._fields):
        raise InputTypeError(f"a state of {type(state).__name__} for {layer}",
                             f"a StreamState {StreamState._fields}", "the state")
    state = StreamState(*state)
    for name, x in zip(StreamState._fields, state, strict=True):
        if not isinstance(x, torch.Tensor) and (x is not None or name != "padding"):
            raise InputTypeError(f"state.{name} of {type(x).__name__}", "a tensor", "the state")
    batch = state.clock.shape[0] if state.clock.ndim else 0
    shapes: tuple[tuple[int, ...], ...] = (
        (batch, heads, queries, features), (batch, heads, slots, features),
        (batch, heads, slots, features), (batch, slots), (batch,))
    for name, x, shape in zip(StreamState._fields, state, shapes, strict=True):
        if x is None:
            continue
        wanted = torch.int64 if name == "clock" else state.key.dtype
        if x.dtype != wanted or (name != "clock" and not x.dtype.is_floating_point):
            raise InputTypeError(f"state.{name} of dtype {x.dtype}",
                                 "one float dtype for the rings, int64 for the clock", "the state")
        if tuple(x.shape) != shape:
            raise InputError(f"state.{name} of shape {tuple(x.shape)}",
                             f"{shape} for this {layer}", "the state, or the layer's sizes")
    return state


def check_token(state: StreamState, token: Token) -> None:
    """Raise unless the token is one for each stream of the state."""
    if token.key.shape[0] != state.key.shape[0]:
        raise InputError(f"a step of {token.key.shape[0]} tokens for {state.key.shape[0]} streams",
                         "one token for each stream of the state",
                         "the batch, or call clean_state() to begin anew")
    if token.key.dtype != state.key.dtype:
        raise InputTypeError(f"a step in {token.key.dtype} for a stream in {state.key.dtype}",
                             "one dtype from the first token on",
                             "the dtype, or call clean_state() to begin anew")


def writable(state: StreamState, token: Token) -> bool:
    """Whether the rings may be written in place: autograd, if it records, needs the old ones."""
    def any_records(tensors: StreamState | Token) -> bool:
        return any(x is not None and x.requires_grad for x in tensors)

    if any_records(state) or (torch.is_grad_enabled() and any_records(token)):
        return False
    return torch.is_inference_mode_enabled() or not state.key.is_inference()
