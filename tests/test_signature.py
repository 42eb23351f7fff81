"""Calls become flat inputs the short way and the general way alike."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from bincompile.errors import InputError, InputTypeError
from bincompile.signature import InputSpec, Signature

X = InputSpec("x", torch.float32, ("s0", 4))
Y = InputSpec("y", torch.float32, ("s0",))
FLAG = InputSpec("flag", constant=None)


def signature(result: Any = 0) -> Signature:
    """forward(x, y, flag=None) as captured with three positional arguments."""
    return Signature((X, Y, FLAG), pytree.tree_structure(((0, 0, None), {})),
                     pytree.tree_structure(result), ("x", "y", "flag"), {"flag": None},
                     {"s0": (1, 8)})


def test_positional_and_named_calls_give_the_same_flat_inputs() -> None:
    x, y = torch.ones(3, 4), torch.ones(3)
    for args, kwargs in (((x, y, None), {}), ((x,), {"y": y, "flag": None}),
                         ((), {"flag": None, "y": y, "x": x})):
        flat = signature().flatten(args, kwargs)
        assert flat[0] is x and flat[1] is y and flat[2] is None


@pytest.mark.parametrize(("args", "error", "word"), [
    ((torch.ones(3, 4), torch.ones(2), None), InputError, "earlier input"),
    ((torch.ones(3, 5), torch.ones(3), None), InputError, "fixed by the capture"),
    ((torch.ones(9, 4), torch.ones(9), None), InputError, "1 to 8"),
    ((torch.ones(3), torch.ones(3), None), InputError, "rank"),
    ((torch.ones(3, 4).long(), torch.ones(3), None), InputTypeError, "torch.int64"),
    (([torch.ones(3, 4)], torch.ones(3), None), InputTypeError, "list"),
    ((torch.ones(3, 4), torch.ones(3), True), InputTypeError, "flag=True"),
    ((torch.ones(3, 4),), InputTypeError, "3 inputs"),
])
def test_a_wrong_positional_call_says_what_is_wrong(
        args: tuple[Any, ...], error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        signature().flatten(args, {})


@pytest.mark.parametrize("result", [0, (0,), [0], {"out": 0}, (0, {"more": [0, 0]})])
def test_outputs_get_the_structure_of_the_result(result: Any) -> None:
    leaves = [torch.full((), n) for n in range(len(pytree.tree_leaves(result)))]
    found = signature(result).unflatten(tuple(leaves))
    assert pytree.tree_structure(found) == pytree.tree_structure(result)
    assert [int(v) for v in pytree.tree_leaves(found)] == list(range(len(leaves)))


CALLS = [(torch.ones(3, 4), torch.ones(3), None), (torch.ones(8, 4), torch.ones(8), None),
         (torch.ones(6, 4), torch.ones(6), None), (torch.ones(1, 4), torch.ones(1), None),
         (torch.ones(9, 4), torch.ones(9), None), (torch.ones(6, 4), torch.ones(3), None),
         (torch.ones(6, 4).half(), torch.ones(6), None), (torch.ones(6, 4), None, None),
         (torch.ones(6, 4, 1), torch.ones(6), None), (torch.ones(6, 4), torch.ones(6), 1),
         (torch.ones(6, 4), torch.ones(6), False), (torch.ones(0, 4), torch.ones(0), None),
         (torch.nn.Parameter(torch.ones(6, 4)), torch.ones(6), None)]


@pytest.mark.parametrize("facts", [(), ("s0 % 3 == 0",), ("6 // (s0 - 8) < 0", "max(s0, 2) > 1")])
@pytest.mark.parametrize("named", [0, 1, 3])
def test_the_short_way_says_yes_only_where_the_general_one_does(facts, named) -> None:
    names = ("x", "y", "flag")
    plain = Signature((X, Y, FLAG), pytree.tree_structure(
        ((0,) * (3 - named), dict.fromkeys(names[3 - named:], 0))),
        pytree.tree_structure(0), names, {"flag": None}, {"s0": (1, 8)}, facts)
    taken = 0
    for call in CALLS:
        args, kwargs = call[:3 - named], dict(zip(names[3 - named:], call[3 - named:],
                                                  strict=True))
        quick = plain._quick(args, kwargs)
        try:
            plain.check(call)
        except (InputError, InputTypeError) as expected:
            assert quick is None
            with pytest.raises(type(expected)):
                plain.flatten(args, kwargs)
        else:
            assert quick is not None
            assert all(map(operator.is_, quick, call))
            taken += 1
    assert taken


def test_names_of_symbols_and_inputs_are_never_run_as_code() -> None:
    evil = "s0 = __import__('os').abort()"
    strange = Signature((InputSpec(evil, torch.float32, (evil, "s0 or exit()")),),
                        pytree.tree_structure(((), {evil: 0})), pytree.tree_structure(0),
                        (evil,), {}, {evil: (0, None)}, ())
    (x,) = strange.flatten((), {evil: torch.ones(2, 3)})
    assert x.shape == (2, 3)
    broken = dataclasses.replace(strange, conditions=(evil,))
    with pytest.raises(ValueError, match="not a condition"):
        broken.flatten((), {evil: torch.ones(2, 3)})
