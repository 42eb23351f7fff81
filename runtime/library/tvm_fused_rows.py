"""Row programs compiled by TVM: all operations of a body in one walk over blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from bincompile.body import Body
from bincompile.ops.embedding import check_indices
from bincompile.runtime.bound import Bound, Size
from bincompile.runtime.kernels import Call, Dynamic, Kernel, host_reason, parts_of
from bincompile.runtime.panels import pad, shared_panels
from bincompile.runtime.row_inputs import Unsuitable, inputs_of
from bincompile.runtime.schedules import rows_loops
from bincompile.runtime.schedules.rows_body import Input, steps_of
from bincompile.runtime.tvm import Recipe, load, obstacle

# Rows of a block: few, so that what is kept between products stays in the nearest cache; more
# where the weights, read once for each block, are too many for the second-level cache.
BLOCK, FEW, CACHE = 32, 16, 1 << 20
WORTH_THREADS = 20_000  # nanoseconds of work, below which a second thread costs more than it brings
# What one core does in a nanosecond: about what decides on threads.
SIGNS, PRODUCTS, NUMBERS = 1000, 20, 20


def _known(call: Call) -> tuple[Body, tuple[Input, ...], int]:
    """The body, how its inputs are read, and the rank of what its results have rows over."""
    if not call.is_stored("body"):
        raise Unsuitable("the body is known only at run time")
    body = Body.parse(call.value("body"))
    parts = parts_of(call.arguments["inputs"])
    stored = [not isinstance(part, Dynamic) for part in parts]
    if all(stored):
        raise Unsuitable("all inputs are stored")
    return body, *inputs_of(body, call.value("inputs"), stored)


def _recipe(call: Call) -> Recipe:
    body, inputs, rank = _known(call)
    return Recipe("rows", {
        "body": str(body), "inputs": tuple(map(tuple, inputs)), "rank": rank, "block": BLOCK,
        "modes": _modes(inputs)})


def _modes(inputs: tuple[Input, ...]) -> tuple[str, ...]:
    """The functions to compile: threads share rows, or the outputs of large float weights."""
    large = any(given.role == "weights" and math.prod(size or 0 for size in given.shape)
                >= rows_loops.WORTH_THREADS for given in inputs)
    return ("serial", "panels" if large else "rows")


def _supports(call: Call) -> str | None:
    try:
        recipe = _recipe(call)
    except Unsuitable as reason:
        return str(reason)
    return host_reason(call) or obstacle(recipe, call.target)


def _stored(value: torch.Tensor, given: Input) -> torch.Tensor:
    """A stored input as the compiled functions read it."""
    if given.role == "panels":
        return shared_panels(value, int(given.shape[1] or 0))
    if given.role == "padded":
        return pad(value, int(given.shape[0] or 0))
    return _plain(value.detach())


def _plain(value: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor with an axis at least."""
    return (value if value.is_contiguous() else value.contiguous()) if value.ndim else value.view(1)


def _cost(recipe: Recipe) -> float:
    """About how many nanoseconds one row takes."""
    steps, _, widths = steps_of(
        recipe.parameters["body"], tuple(Input(*given) for given in recipe.parameters["inputs"]))
    signs, products = (sum(step.width * step.args[-1] for step in steps if step.op == op)
                       for op in ("linear", "product"))
    numbers = sum(widths[name] for step in steps for name in (step.target, *step.reads[:1]))
    return signs / SIGNS + products / PRODUCTS + numbers / NUMBERS


def _shape_of(body: Body, inputs: tuple[Input, ...], places: list[int],
              ) -> Callable[..., tuple[Size, ...]]:
    """The sizes of the results, from the run-time values."""
    _, results, widths = steps_of(str(body), inputs)
    columns = [widths[name] for name in results]
    main = next(place for place, given in enumerate(inputs) if given.role in ("rows", "indices"))
    at, end = places.index(main), -1 if inputs[main].role == "rows" else None

    def shape(*values: torch.Tensor) -> tuple[Size, ...]:
        lead = tuple(values[at].shape[:end])
        return tuple(((*lead, width), torch.float32) for width in columns)

    return shape


def _bind(call: Call) -> Bound:
    from tvm_ffi import from_dlpack

    body, inputs, _ = _known(call)
    recipe, parts = _recipe(call), parts_of(call.arguments["inputs"])
    module = load(recipe, call.target)
    mode = recipe.parameters["modes"][1]
    serial, parallel = module["serial"], module[mode]
    template = [None if isinstance(part, Dynamic) else from_dlpack(_stored(part, given))
                for part, given in zip(parts, inputs, strict=True)]
    places = [place for place, part in enumerate(parts) if isinstance(part, Dynamic)]
    shape = _shape_of(body, inputs, places)
    weights = sum(math.prod(size or 0 for size in given.shape) // 8
                  for given in inputs if given.role == "panels")
    most = FEW if weights <= CACHE else BLOCK
    few = WORTH_THREADS / max(_cost(recipe), 1e-3)
    look_ups = [statement for statement in body.statements if "embedding" in statement.op]
    known = [_without_numbers(part) if look_ups else None for part in parts]

    def into(*values: torch.Tensor) -> None:
        arguments = template.copy()
        for place, value in zip(places, values, strict=False):
            arguments[place] = value if value.ndim and value.is_contiguous() else _plain(value)
        rows = values[-1].numel() // values[-1].shape[-1]
        if not rows:
            return
        threads = torch.get_num_threads() if rows > few else 1
        block = -(-rows // (2 * threads)) if threads > 1 and mode == "rows" else most
        bad = (serial if threads == 1 else parallel)(
            min(most, block), *arguments, *values[len(places):])
        if bad:
            _raise_index_error(look_ups, known, places, values)

    return Bound(shape, into, several=True)


def _without_numbers(part: Any) -> Any:
    """Stored indices, and of what else is stored the shape alone: a kernel has its own copy."""
    if isinstance(part, Dynamic) or part.dtype in (torch.int32, torch.int64):
        return part
    return part.new_empty(()).expand(part.shape)


def _raise_index_error(look_ups: list[Any], known: list[Any], places: list[int],
                       values: tuple[torch.Tensor, ...]) -> None:
    inputs = list(known)
    for place, value in zip(places, values, strict=False):
        inputs[place] = value
    for statement in look_ups:
        table, indices = statement.args[:2] if statement.op == "embedding" else (
            statement.args[1], statement.args[0])
        check_indices(inputs[indices.index], inputs[table.index].shape[0])


KERNEL = Kernel("tvm-rows", "fused_rows", _supports, _bind, priority=20, recipe=_recipe)
