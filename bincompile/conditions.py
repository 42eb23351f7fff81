"""Conditions on sizes: what a graph takes for granted, as text that only compares integers."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from types import CodeType

LONGEST = 2000  # characters of a condition
_FUNCTIONS: dict[str, Callable[..., int]] = {"max": max, "min": min}
_ALLOWED = (ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp,
            ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Compare, ast.Eq, ast.NotEq,
            ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Name, ast.Load, ast.Constant, ast.Call)


def is_condition(text: object) -> bool:
    """Whether a text only compares sums, products and remainders of sizes and integers.

    Example:
        >>> is_condition("s0 % 3 == 0"), is_condition("print(s0)"), is_condition("s0 ** s0 > 1")
        (True, False, False)
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, RecursionError, MemoryError, ValueError):
        return False
    return all(isinstance(n, _ALLOWED) and _is_plain(n) for n in nodes)


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
    return True


def names(text: str) -> set[str]:
    """The sizes that a condition reads."""
    found = (n.id for n in ast.walk(ast.parse(text, mode="eval")) if isinstance(n, ast.Name))
    return {name for name in found if name not in _FUNCTIONS}


def tidy(text: str) -> str:
    """A condition without needless brackets.

    Example:
        >>> tidy("((4*s0) % 3) == 0")
        '4 * s0 % 3 == 0'
    """
    return ast.unparse(ast.parse(text, mode="eval"))


def broken(conditions: tuple[str, ...], sizes: Mapping[str, int]) -> str | None:
    """The first condition that these sizes break, or None.

    Example:
        >>> broken(("s0 % 3 == 0", "s0 <= s1"), {"s0": 6, "s1": 5})
        's0 <= s1'
    """
    for text in conditions:
        try:
            kept = eval(_compiled(text), {"__builtins__": {}, **_FUNCTIONS}, dict(sizes))
        except ZeroDivisionError:
            kept = False
        if not kept:
            return text
    return None


@functools.cache
def _compiled(text: str) -> CodeType:
    if not is_condition(text):
        raise ValueError(f"not a condition on sizes: {text[:100]!r}")
    return compile(text, "<condition>", "eval")
