"""The check of a call as one written function: a few comparisons in place of a walk over a tree.

It only says yes. On any doubt it returns None, and the general way decides and names what is wrong.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from bincompile import conditions

if TYPE_CHECKING:
    from bincompile.signature import InputSpec

Quick = Callable[[tuple[Any, ...], dict[str, Any]], list[Any] | None]


def never(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """Doubts every call."""
    return None


def quick_check(inputs: Sequence[InputSpec], in_spec: pytree.TreeSpec,
                ranges: Mapping[str, tuple[int, int | None]],
                facts: Sequence[str]) -> Quick:
    """The function from args and kwargs to the flat inputs, or to None.

    Args:
        inputs: the flat inputs.
        in_spec: pytree of `(args, kwargs)`; only flat arguments have a short way.
        ranges: least and greatest size of each symbol.
        facts: conditions on the symbols.
    """
    args_spec, kwargs_spec = in_spec.children()
    flat = args_spec.type is tuple and kwargs_spec.type is dict and all(
        child.is_leaf() for spec in (args_spec, kwargs_spec) for child in spec.children())
    symbols: dict[str, str] = {}
    for spec in inputs:
        for size in spec.shape:
            if isinstance(size, str):
                symbols.setdefault(size, f"n{len(symbols)}")
    if not flat or any(not conditions.is_condition(fact)
                       or not conditions.names(fact) <= set(symbols) for fact in facts):
        return never
    scope: dict[str, Any] = {"Tensor": torch.Tensor, "max": max, "min": min}
    lines = [*_taken(args_spec.num_children, list(kwargs_spec.context)),
             *(line for index, spec in enumerate(inputs)
               for line in _checked(index, spec, symbols, ranges, scope)),
             *_kept(facts, symbols),
             f"return [{', '.join(f'v{i}' for i in range(len(inputs)))}]"]
    text = "".join(["def quick(args, kwargs):\n", *(f"    {line}\n" for line in lines)])
    exec(compile(text, "<bincompile check>", "exec"), scope)
    return scope["quick"]


def _taken(positional: int, named: list[str]) -> list[str]:
    """The lines that take the values out of the call."""
    kwargs = f"len(kwargs) != {len(named)}" if named else "kwargs"
    lines = [f"if len(args) != {positional} or {kwargs}: return None"]
    if positional:
        lines.append("".join(f"v{i}, " for i in range(positional)) + "= args")
    for index, name in enumerate(named, positional):
        lines.append(f"if {name!r} not in kwargs: return None")
        lines.append(f"v{index} = kwargs[{name!r}]")
    return lines


def _checked(index: int, spec: InputSpec, symbols: Mapping[str, str],
             ranges: Mapping[str, tuple[int, int | None]], scope: dict[str, Any]) -> list[str]:
    """The lines that look at one value; a size is bound where its symbol stands first."""
    value = f"v{index}"
    scope[f"c{index}"] = spec.constant if spec.dtype is None else spec.dtype
    if spec.dtype is None:
        return [f"if {value} is not c{index}: return None"]
    lines = [f"if not isinstance({value}, Tensor) or {value}.dtype is not c{index}: return None",
             f"shape = {value}.shape", f"if len(shape) != {len(spec.shape)}: return None"]
    for axis, want in enumerate(spec.shape):
        if not isinstance(want, str):
            lines.append(f"if shape[{axis}] != {int(want)}: return None")
        elif symbols[want] in scope:
            lines.append(f"if shape[{axis}] != {symbols[want]}: return None")
        else:
            scope[symbols[want]] = None  # bound from here on
            low, high = ranges.get(want, (0, None))
            above = "" if high is None else f" or {symbols[want]} > {int(high)}"
            lines += [f"{symbols[want]} = shape[{axis}]",
                      f"if {symbols[want]} < {int(low)}{above}: return None"]
    return lines


def _kept(facts: Sequence[str], symbols: Mapping[str, str]) -> list[str]:
    """The lines that look at the conditions."""
    if not facts:
        return []
    texts = []
    for fact in facts:
        tree = ast.parse(fact, mode="eval")
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                node.id = symbols.get(node.id, node.id)
        texts.append(f"({ast.unparse(tree)})")
    return ["try:", f"    if not ({' and '.join(texts)}): return None",
            "except ZeroDivisionError: return None"]
