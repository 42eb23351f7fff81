"""How a compiled row program reads its inputs, or why it can't: what is known before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from bincompile.body import Body, Name, Statement
from bincompile.ops import bits
from bincompile.ops.row_ops import ROW_OPS
from bincompile.runtime.schedules.rows_body import POWERS, TRUTHS, Input
from bincompile.runtime.schedules.rows_store import ROWS, WIDE

# The role of each argument that is not a value of rows: operation -> role by place.
ROLES: Mapping[str, Mapping[int, str]] = {
    "binary_linear": {1: "panels", 2: "padded", 3: "padded", 6: "columns", 7: "columns"},
    "linear": {1: "weights"},
    "embedding": {0: "table", 1: "indices"},
    "binary_embedding": {0: "indices", 1: "bits", 2: "scales"},
}
STORED = ("panels", "padded")
_INDICES = {torch.int32: "int32", torch.int64: "int64"}
_KEEPS_TRUTH = ("where", "logical_and", "logical_or", "logical_not")

Lead = tuple[Any, ...]


class Unsuitable(Exception):
    """Why a compiled row program can't run a call."""


def inputs_of(body: Body, values: Sequence[Any], is_stored: Sequence[bool],
              ) -> tuple[tuple[Input, ...], int]:
    """Every input with its role, and how many leading axes the results have.

    Args:
        values: the inputs, or what has their dtypes and shapes.
        is_stored: which of them are known before the run.

    Raises:
        Unsuitable: this body, or these inputs, are not for compiled row programs.
    """
    roles = _roles(body)
    _check_statements(body)
    leads = [_lead(value, role) for value, role in zip(values, roles, strict=True)]
    lead = _common(leads)
    rank = len(lead)
    _check_linears(body, values)
    shapes, found = _stored_shapes(body, values), []
    for place, (value, role) in enumerate(zip(values, roles, strict=True)):
        if role in STORED and not is_stored[place]:
            raise Unsuitable(f"x{place}, a weight or its scale, is known only at run time")
        given = _input(f"x{place}", value, role, leads[place], lead)
        found.append(given._replace(shape=shapes.get(place, given.shape)))
    if not any(given.role in ("rows", "indices") for given in found):
        raise Unsuitable("no input has rows")
    _check_results(body, found)
    return tuple(found), rank


def _roles(body: Body) -> list[str]:
    roles: list[set[str]] = [set() for _ in range(body.inputs)]
    for statement in body.statements:
        special = ROLES.get(statement.op, {})
        for place, arg in enumerate(statement.args):
            if isinstance(arg, Name) and arg.is_input:
                roles[arg.index].add(special.get(place, "value"))
            elif isinstance(arg, Name) and place in special:
                raise Unsuitable(f"{special[place]} of {statement.op} are computed")
    for place, found in enumerate(roles):
        if len(found) != 1:
            raise Unsuitable(f"x{place} is read as {' and as '.join(sorted(found)) or 'nothing'}")
    return [next(iter(found)) for found in roles]


def _stored_shapes(body: Body, values: Sequence[Any]) -> dict[int, tuple[int, ...]]:
    """Outputs and inputs of each packed weight, and how long what is padded has to be."""
    shapes: dict[int, tuple[int, ...]] = {}
    for statement in body.statements:
        if statement.op == "binary_linear":
            weight, *columns = (arg.index for arg in statement.args[1:4] if arg is not None)
            outputs = values[weight].shape[0]
            shapes[weight] = (outputs, statement.args[4])
            for place in columns:
                shapes[place] = (max(outputs, *shapes.get(place, (0,))),)
    return shapes


def _lead(value: Any, role: str) -> Lead:
    """The leading axes of an input whose rows are the program's; a symbol stands for itself."""
    if role not in ("value", "indices") or (role == "value" and value.ndim < 2):
        return ()
    sizes = value.shape if role == "indices" else value.shape[:-1]
    return tuple(str(size) if known_size(size) is None else known_size(size) for size in sizes)


def known_size(size: Any) -> int | None:
    """A size that the run can't change, also where capture keeps it as a symbol."""
    if isinstance(size, int):
        return size
    return int(str(size)) if str(size).isdecimal() else None


def _common(leads: Sequence[Lead]) -> Lead:
    """The leading axes that all inputs broadcast to."""
    rank = max(map(len, leads), default=0)
    lead: list[Any] = [1] * rank
    for one in leads:
        for place, size in enumerate(one, rank - len(one)):
            if size != 1 and lead[place] not in (1, size):
                raise Unsuitable(f"rows of different shapes, {lead[place]} and {size}")
            lead[place] = size if lead[place] == 1 else lead[place]
    return tuple(lead)


def _input(name: str, value: Any, role: str, own: Lead, lead: Lead) -> Input:
    if role in ("value", "indices"):
        role = _repeats(name, role, value, own, lead)
    wanted = {"panels": (torch.uint8,), "bits": (torch.uint8,), "indices": tuple(_INDICES),
              "index_period": tuple(_INDICES)}.get(role, (torch.float32,))
    if role == "padded":
        wanted = (torch.float32, torch.float16, torch.bfloat16)
    if value.dtype not in wanted:
        raise Unsuitable(f"{name} of {value.dtype}")
    sizes = [known_size(size) for size in value.shape]
    if role in ("indices", "index_period") and not sizes:
        raise Unsuitable(f"{name} is a single index")
    if role in ROWS:
        leading = [None] * (len(sizes) - (role in WIDE))
        sizes = [*leading, *sizes[len(leading):]]
    elif role in ("table", "bits", "scales"):
        if sizes[0] in (0, None):
            raise Unsuitable(f"{name}, a table of {value.shape[0]} rows")
        sizes[0] = None
    if role == "weights" and (len(sizes) != 2 or None in sizes or 0 in sizes):
        raise Unsuitable(f"{name}, a weight of shape {tuple(value.shape)}")
    if None in sizes[-1:] and role in (*WIDE, "columns", "table", "bits"):
        raise Unsuitable(f"{name} has a last axis of a size that is known only at run time")
    if 0 in sizes[-1:]:
        raise Unsuitable(f"{name} has no columns")
    return Input(role, tuple(sizes) or (1,), str(value.dtype).removeprefix("torch.")
                 if role not in STORED else "uint32" if role == "panels" else "float32")


def _repeats(name: str, role: str, value: Any, own: Lead, lead: Lead) -> str:
    """Whether an input has a row for each of the program's, or how it makes do with fewer."""
    if role == "value" and value.ndim < 2:
        return "columns"
    if own == lead:
        return "rows" if role == "value" else role
    bare = own
    while bare and bare[0] == 1:
        bare = bare[1:]
    if bare == lead[len(lead) - len(bare):]:
        return "period" if role == "value" else "index_period"
    while own and own[-1] == 1:
        own = own[:-1]
    if role == "value" and own == lead[:len(own)]:
        return "repeat"
    raise Unsuitable(f"{name} of shape {tuple(value.shape)} repeats inside the rows {lead}")


def _check_statements(body: Body) -> None:
    truths: set[str] = set()
    for index, statement in enumerate(body.statements):
        reason = _statement_reason(statement, truths)
        if reason:
            raise Unsuitable(f"t{index} = {statement}: {reason}")
        if statement.op in TRUTHS:
            truths.add(f"t{index}")
    if any(name.text in truths for name in body.results):
        raise Unsuitable("a result that is true or false")


def _statement_reason(statement: Statement, truths: set[str]) -> str | None:
    op, args = statement.op, statement.args
    if op not in ROW_OPS or not statement.reads:
        return "no step of a row program"
    if op == "pow" and args[1] not in POWERS:
        return f"an exponent that is not one of {', '.join(map(str, POWERS))}"
    if op == "where" and not any(isinstance(arg, Name | float) for arg in args[1:]):
        return "a choice between integers"
    if op == "binary_linear" and args[5] != "binary":
        return f"activations that are {args[5]}"
    read = [isinstance(arg, Name) and arg.text in truths for arg in args]
    if (op not in _KEEPS_TRUTH and any(read)) or (op == "where" and any(read[1:])):
        return "truths taken for numbers"
    if (op == "where" and not read[0]) or (op.startswith("logical_") and not all(read)):
        return "numbers taken for truths"
    return None


def _check_results(body: Body, inputs: Sequence[Input]) -> None:
    """Raise unless each result has a row for every row of the program."""
    full = [any(_is_full(inputs, name) for name in statement.reads)
            for statement in body.statements]
    for index, statement in enumerate(body.statements):
        full[index] = full[index] or any(
            full[name.index] for name in statement.reads if not name.is_input)
    if short := [name for name in body.results if not full[name.index]]:
        raise Unsuitable(f"the result {short[0]} has fewer rows than the program")


def _is_full(inputs: Sequence[Input], name: Name) -> bool:
    return name.is_input and inputs[name.index].role in ("rows", "indices")


def _check_linears(body: Body, values: Sequence[Any]) -> None:
    """Raise unless weights, scales and tables have the shapes that their operators ask for."""
    for statement in body.statements:
        for reason in _shape_reasons(statement, values):
            raise Unsuitable(f"{statement}: {reason}")


def _shape_reasons(statement: Statement, values: Sequence[Any]) -> Iterator[str]:
    def size(place: int) -> tuple[int, ...] | None:
        arg = statement.args[place]
        return None if arg is None else tuple(values[arg.index].shape)

    if statement.op == "binary_linear":
        weight, features = size(1) or (), statement.args[4]
        outputs = weight[0]
        if outputs == 0 or tuple(weight) != (outputs, bits.packed_width(features)):
            yield f"a packed weight of shape {weight}"
        if size(2) not in ((1,), (outputs,)) or size(3) not in (None, (outputs,)):
            yield f"a scale of shape {size(2)}, a bias of shape {size(3)}"
        if size(6) not in (None, (), (1,)) or size(7) not in (None, (features,)):
            yield f"an activation scale of shape {size(6)}, a shift of shape {size(7)}"
    if statement.op == "linear" and statement.args[0].is_input and len(size(0) or ()) < 2:
        yield f"an input of shape {size(0)}"
    if statement.op == "binary_embedding":
        scale, width = size(2) or (), bits.packed_width(statement.args[3])
        bases = 1 if len(scale) == 1 else scale[1]
        if (size(1) or ())[1:] != (bases * width,):
            yield f"a packed table of shape {size(1)}"
