"""Bodies: straight-line programs over rows, as text that is a small part of Python.

    t0 = add(x0, x1)
    t1 = layer_norm(t0, x2, x3, 1e-12)
    return t0, t1

`x0`, `x1`, ... are the inputs, `t0`, `t1`, ... the values in order, each assigned once; literals
are numbers, strings, True, False and None (infinity is written 1e999). What an operation does is
said by `bincompile.ops.row_ops`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import re
from typing import Any

from bincompile.errors import InputError, InputTypeError

LONGEST = 100_000  # characters of a body
_INPUT, _VALUE = re.compile(r"x(0|[1-9]\d*)"), re.compile(r"t(0|[1-9]\d*)")


@dataclasses.dataclass(frozen=True)
class Name:
    """A value that a statement reads: an input `x3`, or what a statement before gave, `t3`.

    Example:
        >>> Name("x3").is_input, Name("x3").index
        (True, 3)
    """

    text: str

    @property
    def is_input(self) -> bool:
        """Whether it is an input of the body."""
        return self.text[0] == "x"

    @property
    def index(self) -> int:
        """Its place among the inputs, or among the statements."""
        return int(self.text[1:])

    def __repr__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Statement:
    """One operation: `op(*args)`, whose arguments are names and plain literals.

    Example:
        >>> print(Statement("add", (Name("x0"), 1.0)))
        add(x0, 1.0)
    """

    op: str
    args: tuple[Any, ...]

    @property
    def reads(self) -> tuple[Name, ...]:
        """The names among its arguments."""
        return tuple(arg for arg in self.args if isinstance(arg, Name))

    def __str__(self) -> str:
        return f"{self.op}({', '.join(map(_shown, self.args))})"


@dataclasses.dataclass(frozen=True)
class Body:
    """A straight-line program: statement i gives `ti`; `results` are what it returns.

    Raises:
        InputError: a name that is read before it is assigned, a result that is an input or is
            returned twice, or no result at all.

    Example:
        >>> body = Body.parse("t0 = mul(x0, x0)\\nt1 = add(t0, 1.0)\\nreturn t1")
        >>> body.statements[1].op, body.inputs, body.results
        ('add', 1, (t1,))
        >>> str(Body.parse(str(body))) == str(body)
        True
    """

    statements: tuple[Statement, ...]
    results: tuple[Name, ...]

    def __post_init__(self) -> None:
        for index, statement in enumerate(self.statements):
            for name in statement.reads:
                if not name.is_input and name.index >= index:
                    raise _error(f"t{index} = {statement}", "it reads what is not assigned yet")
        for name in self.results:
            if name.is_input or name.index >= len(self.statements):
                raise _error(f"return {name}", "a result is the value of a statement")
        if not self.results or len(set(self.results)) != len(self.results):
            raise _error(f"return {', '.join(map(str, self.results))}",
                         "each result is returned once, and there is one")

    @functools.cached_property
    def inputs(self) -> int:
        """How many inputs it takes: one more than the highest that a statement reads."""
        return max((name.index + 1 for statement in self.statements
                    for name in statement.reads if name.is_input), default=0)

    def __str__(self) -> str:
        lines = [f"t{index} = {statement}" for index, statement in enumerate(self.statements)]
        return "\n".join([*lines, f"return {', '.join(map(str, self.results))}"])

    @classmethod
    @functools.lru_cache(maxsize=256)
    def parse(cls, text: str) -> Body:
        """The body that a text spells; nothing of the text is run.

        Raises:
            InputTypeError: not a text.
            InputError: a text that spells no body.

        Example:
            >>> Body.parse("t0 = open('/etc/passwd')\\nreturn t0").statements
            (Statement(op='open', args=('/etc/passwd',)),)
            >>> Body.parse("import os")
            Traceback (most recent call last):
            ...
            bincompile.errors.InputError: 'import os' in a body: not a statement
              allowed: lines `t0 = op(x0, 1.0)`, then `return t0, ...`
              change:  the body
        """
        if not isinstance(text, str):
            raise InputTypeError(f"a body of type {type(text).__name__}", "a str", "the body")
        if len(text) > LONGEST:
            raise _error(text[:40], f"more than {LONGEST} characters")
        try:
            lines = ast.parse(f"def body():\n{_indented(text)}").body
        except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
            raise _error(text[:80], str(error)) from error
        if len(lines) != 1 or not isinstance(lines[0], ast.FunctionDef):
            raise _error(text[:80], "not lines of one program")
        *assignments, last = lines[0].body
        if not isinstance(last, ast.Return) or last.value is None:
            raise _error(ast.unparse(last)[:80], "it does not end in a return"
                         if isinstance(last, ast.Assign) else "not a statement")
        results = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
        return cls(tuple(_statement(line, index) for index, line in enumerate(assignments)),
                   tuple(_name(result) for result in results))


def _indented(text: str) -> str:
    return "\n".join(f" {line.strip()}" for line in text.splitlines() if line.strip())


def _statement(line: ast.stmt, index: int) -> Statement:
    if not isinstance(line, ast.Assign) or not isinstance(line.value, ast.Call) \
            or not isinstance(line.value.func, ast.Name) or line.value.keywords:
        raise _error(ast.unparse(line)[:80], "not a statement")
    if [ast.unparse(target) for target in line.targets] != [f"t{index}"]:
        raise _error(ast.unparse(line)[:80], f"statement {index} assigns t{index}")
    return Statement(line.value.func.id, tuple(map(_argument, line.value.args)))


def _argument(arg: ast.expr) -> Any:
    if isinstance(arg, ast.Name):
        return _name(arg)
    negative = isinstance(arg, ast.UnaryOp) and isinstance(arg.op, ast.USub)
    inner = arg.operand if isinstance(arg, ast.UnaryOp) and negative else arg
    value = inner.value if isinstance(inner, ast.Constant) else ...
    if not (value is None or isinstance(value, bool | int | float | str)) or (
            negative and (isinstance(value, bool | str) or value is None)):
        raise _error(ast.unparse(arg)[:80], "not a name and not a literal")
    return -value if negative else value  # type: ignore[operator]


def _name(node: ast.expr) -> Name:
    if isinstance(node, ast.Name) and (_INPUT.fullmatch(node.id) or _VALUE.fullmatch(node.id)):
        return Name(node.id)
    raise _error(ast.unparse(node)[:80], "not a name of an input or a value")


def _shown(arg: Any) -> str:
    if isinstance(arg, float) and math.isinf(arg):
        return "1e999" if arg > 0 else "-1e999"
    if isinstance(arg, float) and math.isnan(arg):
        raise _error("nan", "no literal")
    return repr(arg)


def _error(found: str, reason: str) -> InputError:
    return InputError(f"{found!r} in a body: {reason}",
                      "lines `t0 = op(x0, 1.0)`, then `return t0, ...`", "the body")
