"""A stream as a dict of tensors, and back: to move it to another process or machine.

Every value is a plain tensor, so that torch.save, torch.load(weights_only=True) and safetensors
all take it; what it is about is JSON, as bytes, under "about".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from bincompile.errors import InputError, InputTypeError
from bincompile.steps import State
from bincompile.stream_form import StreamForm
from bincompile.stream_rows import StreamRows

FORMAT, VERSION = "bincompile stream", 1
ABOUT, CLOCK, PREFIX = "about", "clock", "state."


def saved(form: StreamForm, rows: StreamRows) -> dict[str, torch.Tensor]:
    """Copies of all that the rows remember."""
    about = {"format": FORMAT, "version": VERSION, "model": form.fingerprint,
             "semantics": form.steps.semantics}
    text = json.dumps(about, sort_keys=True).encode()
    with torch.inference_mode(False):
        return {ABOUT: torch.tensor(list(text), dtype=torch.uint8), CLOCK: rows.clock.clone(),
                **{PREFIX + state.name: tensor.clone() for state, tensor in
                   zip(form.steps.states, rows.states, strict=True)}}


def restored(form: StreamForm, document: Mapping[str, Any]) -> StreamRows:
    """The rows that `saved` wrote.

    Raises:
        InputTypeError: not such a dict.
        InputError: of another model or version, or with tensors that do not fit.
    """
    if not isinstance(document, Mapping) or not all(
            isinstance(value, torch.Tensor) for value in document.values()):
        raise InputTypeError(f"a state of type {type(document).__name__}",
                             "what Stream.state_dict() gave: a dict of tensors",
                             "the argument of load_state_dict()")
    _check_about(form, document)
    names = {CLOCK, ABOUT, *(PREFIX + state.name for state in form.steps.states)}
    if wrong := sorted(names ^ set(document)):
        raise _misfit(f"a state that {'lacks' if wrong[0] in names else 'has'} {wrong[0]!r}",
                      ", ".join(sorted(names)))
    clock = document[CLOCK]
    if clock.dtype != torch.int64 or clock.ndim != 1 or bool((clock < 0).any()):
        raise _misfit(f"clocks of {clock.dtype} {list(clock.shape)}", "int64, one for each row, "
                      "from 0 up")
    for state in form.steps.states:
        _check_state(state, document[PREFIX + state.name], len(clock))
    with torch.inference_mode(False), torch.no_grad():
        rows = StreamRows(form.steps, [_own(document[PREFIX + state.name])
                                       for state in form.steps.states], _own(clock))
    if len(_growths(rows)) > 1:
        raise _misfit("growing states of different lengths", "equal lengths")
    if rows.room is not None and len(rows) and max(rows.ticks()) > rows.room:
        raise _misfit(f"a clock of {max(rows.ticks())} with states of {rows.room} steps",
                      f"at most {rows.room}")
    return rows


def _check_about(form: StreamForm, document: Mapping[str, torch.Tensor]) -> None:
    try:
        about = json.loads(bytes(document[ABOUT].tolist()))
        found = about["format"], about["version"], about["model"], about["semantics"]
    except (KeyError, TypeError, ValueError) as error:
        raise _misfit("a dict that is no state of a stream", "what Stream.state_dict() gave"
                      ) from error
    if found[:2] != (FORMAT, VERSION):
        raise _misfit(f"a state of {found[0]!r}, version {found[1]!r}",
                      f"{FORMAT!r}, version {VERSION}")
    if found[2] != form.fingerprint:
        raise _misfit(f"a state of another model ({str(found[2])[:12]}, {found[3]})",
                      f"one of this model ({form.fingerprint[:12]}, {form.steps.semantics}): the "
                      "same graph, weights and options")


def _check_state(state: State, tensor: torch.Tensor, rows: int) -> None:
    shape = [rows, *state.shape]
    free = None if state.grows is None else 1 + state.grows
    fits = tensor.dtype == state.dtype and tensor.ndim == len(shape) and tensor.shape[0] == rows
    if fits and state.prepared is None:
        fits = all(found == wanted or axis == free
                   for axis, (found, wanted) in enumerate(zip(tensor.shape, shape, strict=True)))
    if fits and free is not None:
        times, rest = divmod(tensor.shape[free], shape[free])
        fits = not rest and times > 0 and not times & (times - 1)
    if not fits:
        raise _misfit(f"{state.name} of {tensor.dtype} {list(tensor.shape)}",
                      f"{state.dtype} {shape}")


def _growths(rows: StreamRows) -> set[int]:
    """How many times as long as at first growing states are."""
    return {tensor.shape[1 + state.grows] // state.shape[state.grows]
            for state, tensor in zip(rows.steps.states, rows.states, strict=True)
            if state.grows is not None}


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _misfit(found: str, allowed: str) -> InputError:
    return InputError(found, allowed, "load a state that this model's own stream gave; nothing "
                      "was changed")
