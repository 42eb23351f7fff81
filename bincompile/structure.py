"""Structure: objects with tensors in them that torch's pytree does not know, as trees it does."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

DEEPEST = 8  # objects within objects that are searched for tensors
_WHOLE = (torch.nn.Module, torch.Tensor, type, types.ModuleType, types.FunctionType,
          types.MethodType, types.BuiltinFunctionType)
_PLAIN = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float, str,
          type(None))


class Held:
    """An object by its attributes, and its contents where its class is a dict's or a list's."""

    def __init__(self, kind: type, names: tuple[str, ...], values: list[Any]) -> None:
        self.kind, self.names, self.values = kind, names, values


class Fixed:
    """Part of a result that is no tensor or number: the same object in each result."""

    def __init__(self, value: Any) -> None:
        self.value = value


def hold(tree: Any, fixed: bool = False, depth: int = 0) -> Any:
    """The tree with `Held` for each object that holds tensors and that pytree takes for a leaf.

    Args:
        tree: arguments or a result.
        fixed: whether other leaves than tensors and numbers become part of the structure.
        depth: how many objects this tree is inside of.

    Example:
        >>> import types, torch
        >>> tree = hold((types.SimpleNamespace(x=torch.ones(2), n=3),))
        >>> leaves, spec = pytree.tree_flatten(tree)
        >>> leaves[1], pytree.tree_unflatten(leaves, spec)[0].n
        (3, 3)
    """
    def one(leaf: Any) -> Any:
        if isinstance(leaf, _PLAIN):
            return leaf
        if depth < DEEPEST and _holds_tensors(leaf):
            return _held(leaf, fixed, depth + 1)
        return Fixed(leaf) if fixed else leaf

    return pytree.tree_map(one, tree)


def _held(value: Any, fixed: bool, depth: int) -> Held:
    found, items = dict(_attributes(value)), _items(value)
    values = [*found.values()] if items is None else [*found.values(), items]
    return Held(type(value), tuple(found), [hold(v, fixed, depth) for v in values])


def _rebuild(kind: Any, names: tuple[str, ...], values: list[Any]) -> Any:
    made = kind.__new__(kind)
    for name, value in zip(names, values, strict=False):  # contents come behind the attributes
        object.__setattr__(made, name, value)
    if isinstance(made, dict):
        dict.update(made, values[-1])
    elif isinstance(made, list):
        list.extend(made, values[-1])
    return made


def _items(value: Any) -> Any:
    """The contents of an object whose class comes from dict or list."""
    return dict(value) if isinstance(value, dict) else \
        list(value) if isinstance(value, list) else None


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """The attributes that an object of a Python class stores, in a fixed order."""
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value)]
        yield from ((name, getattr(value, name)) for name in names if hasattr(value, name))
        yield from ((k, v) for k, v in getattr(value, "__dict__", {}).items() if k not in names)
        return
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        for name in _slots(kind):
            if inspect.ismemberdescriptor(kind.__dict__.get(name)) and hasattr(value, name):
                yield name, getattr(value, name)


def _slots(kind: type) -> tuple[str, ...]:
    found = kind.__dict__.get("__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, _WHOLE) or depth > DEEPEST or type(value).__module__ == "builtins":
        return False
    items = _items(value)
    parts = [v for _, v in _attributes(value)] + ([] if items is None else [items])
    return any(_holds_tensors(leaf, depth + 1) for part in parts
               for leaf in pytree.tree_leaves(part))


def _keyed(held: Held) -> tuple[list[Any], Any]:
    keys = [*map(pytree.GetAttrKey, held.names), pytree.GetAttrKey("contents")]
    return list(zip(keys, held.values, strict=False)), (held.kind, held.names)


pytree.register_pytree_node(
    Held, lambda h: (h.values, (h.kind, h.names)),
    lambda values, context: _rebuild(context[0], context[1], list(values)),
    flatten_with_keys_fn=_keyed)
pytree.register_pytree_node(Fixed, lambda f: ([], f.value), lambda _, value: value)
