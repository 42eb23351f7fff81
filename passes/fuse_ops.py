"""Which nodes act on every row alike, and the statements of a body that say the same.

A rule reads the arguments of a node and gives statements; each `Step` names its operation and its
arguments, which are nodes, plain literals, or steps before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from bincompile.ops.binary_embedding import binary_embedding
from bincompile.ops.binary_linear import binary_linear
from bincompile.ops.embedding import embedding
from bincompile.passes.graph import arguments, aten, is_tensor, shape_of, value_of
from bincompile.passes.sizes import equal, product

Arguments = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One operation; an argument is a node, a literal or another step."""

    op: str
    args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a target becomes steps.

    Args:
        write: the step that gives the node's value, or None where the arguments are of no use.
        heavy: whether the operation costs more than passing over its rows once.
    """

    write: Callable[[Arguments, fx.Node], Step | None]
    heavy: bool = False


def _plain(op: str, *names: str) -> Rule:
    return Rule(lambda given, node: Step(op, tuple(given[name] for name in names)))


def _scaled(op: str) -> Rule:
    """add or sub, with a factor on the second argument."""
    def write(given: Arguments, node: fx.Node) -> Step:
        other, alpha = given["other"], given.get("alpha", 1)
        return Step(op, (given["self"], other if alpha == 1 else Step("mul", (other, alpha))))

    return Rule(write)


def _turned(given: Arguments, node: fx.Node) -> Step | None:
    return Step("sub", (given["other"], given["self"])) if given["alpha"] == 1 else None


def _between(low: str | float | None, high: str | float | None) -> Rule:
    def write(given: Arguments, node: fx.Node) -> Step:
        limits = (given[limit] if isinstance(limit, str) else limit for limit in (low, high))
        return Step("clamp", (given["self"], *limits))

    return Rule(write)


def _last(axes: Any, node: fx.Node) -> bool:
    """Whether these axes are the last one of what a node reads."""
    rank = len(shape_of(node.args[0]))
    return [axes] in ([-1], [rank - 1]) if isinstance(axes, int) \
        else list(axes or ()) in ([-1], [rank - 1])


def _reduced(op: str) -> Rule:
    def write(given: Arguments, node: fx.Node) -> Step | None:
        if not given["keepdim"] or not _last(given["dim"], node) or given.get("dtype"):
            return None
        return Step(op, (given["self"],))

    return Rule(write)


def _variance(given: Arguments, node: fx.Node) -> Step | None:
    size, correction = fixed(shape_of(node.args[0])[-1]), given["correction"]
    correction = 1 if correction is None else correction
    if not given["keepdim"] or not _last(given["dim"], node) or size is None \
            or size <= correction:
        return None
    middle = Step("sub", (given["self"], Step("mean", (given["self"],))))
    return Step("mul", (Step("mean", (Step("mul", (middle, middle)),)),
                        size / (size - correction)))


def _softmax(given: Arguments, node: fx.Node) -> Step | None:
    plain = _last(given["dim"], node) and not given.get("dtype") and not given.get("half_to_float")
    return Step("softmax", (given["self"],)) if plain else None


def _layer_norm(given: Arguments, node: fx.Node) -> Step | None:
    if [*map(fixed, given["normalized_shape"])] != [fixed(shape_of(node)[-1])]:
        return None
    return Step("layer_norm", (given["input"], given["weight"], given["bias"], given["eps"]))


def _rms_norm(given: Arguments, node: fx.Node) -> Step | None:
    plain = [*map(fixed, given["normalized_shape"])] == [fixed(shape_of(node)[-1])]
    if not plain or given["eps"] is None:
        return None
    return Step("rms_norm", (given["input"], given["weight"], given["eps"]))


def _square(given: Arguments, node: fx.Node) -> Step:
    return Step("mul", (given["self"], given["self"]))


# Powers that torch computes in other ways than as exp(y log(x)).
POWERS: Mapping[float, Callable[[Any], Step]] = {
    2: lambda x: Step("mul", (x, x)), 3: lambda x: Step("mul", (Step("mul", (x, x)), x)),
    0.5: lambda x: Step("sqrt", (x,)), -0.5: lambda x: Step("rsqrt", (x,)),
    -1: lambda x: Step("reciprocal", (x,))}


def _power(given: Arguments, node: fx.Node) -> Step:
    known = POWERS.get(given["exponent"])
    return known(given["self"]) if known else Step("pow", (given["self"], given["exponent"]))


def _masked_fill(given: Arguments, node: fx.Node) -> Step:
    return Step("where", (given["mask"], given["value"], given["self"]))


def _leaky_relu(given: Arguments, node: fx.Node) -> Step:
    x = given["self"]
    return Step("where", (Step("gt", (x, 0)), x, Step("mul", (x, given["negative_slope"]))))


def _ours(op: str, *names: str) -> Rule:
    return Rule(lambda given, node: Step(op, tuple(given[name] for name in names)), heavy=True)


def _linear(given: Arguments, node: fx.Node) -> Step | None:
    names = ("x", "weight", "weight_scale", "bias", "in_features", "activation",
             "activation_scale", "shift")
    return Step("binary_linear", tuple(given[n] for n in names)) \
        if given["activation"] == "binary" else None


def _embedding(given: Arguments, node: fx.Node) -> Step | None:
    return None if given["wrap"] else Step("embedding", (given["table"], given["indices"]))


_UNARY = ("neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "relu", "sigmoid", "tanh",
          "erf", "silu", "logical_not")
_BINARY = ("mul", "div", "eq", "ne", "lt", "le", "gt", "ge")

RULES: Mapping[Any, Rule] = {
    **{getattr(aten, name).default: _plain(name, "self") for name in _UNARY},
    **{getattr(getattr(aten, name), kind): _plain(name, "self", "other")
       for name in _BINARY for kind in ("Tensor", "Scalar")},
    **{getattr(aten, name).default: _plain(name, "self", "other")
       for name in ("maximum", "minimum", "logical_and", "logical_or")},
    **{getattr(getattr(aten, name), kind): _scaled(name)
       for name in ("add", "sub") for kind in ("Tensor", "Scalar")},
    aten.rsub.Tensor: Rule(_turned), aten.rsub.Scalar: Rule(_turned),
    aten.gelu.default: _plain("gelu", "self", "approximate"),
    aten.clamp.default: _between("min", "max"), aten.clamp_min.default: _between("min", None),
    aten.clamp_max.default: _between(None, "max"),
    aten.hardtanh.default: _between("min_val", "max_val"),
    aten.relu6.default: _between(0.0, 6.0),
    aten.pow.Tensor_Scalar: Rule(_power), aten.square.default: Rule(_square),
    aten.where.self: _plain("where", "condition", "self", "other"),
    aten.where.ScalarOther: _plain("where", "condition", "self", "other"),
    aten.where.ScalarSelf: _plain("where", "condition", "self", "other"),
    aten.masked_fill.Scalar: Rule(_masked_fill),
    aten.leaky_relu.default: Rule(_leaky_relu),
    aten.mean.dim: _reduced("mean"), aten.sum.dim_IntList: _reduced("sum"),
    aten.amax.default: _reduced("amax"), aten.amin.default: _reduced("amin"),
    aten.var.correction: Rule(_variance),
    aten.softmax.int: Rule(_softmax), aten._softmax.default: Rule(_softmax),
    aten.layer_norm.default: Rule(_layer_norm), aten.rms_norm.default: Rule(_rms_norm),
    binary_linear.overload: Rule(_linear, heavy=True),
    embedding.overload: Rule(_embedding, heavy=True),
    binary_embedding.overload: _ours("binary_embedding", "indices", "table", "row_scale",
                                     "embedding_dim"),
}
# Where there are few rows, as in a step, products with float weights are bound by reading those.
OF_FEW_ROWS: Mapping[Any, Rule] = {
    aten.linear.default: Rule(_plain("linear", "input", "weight", "bias").write, heavy=True)}
# Which arguments are no rows: tables and weights, read whole.
WHOLE: Mapping[str, tuple[int, ...]] = {
    "linear": (1, 2),
    "binary_linear": (1, 2, 3, 6, 7), "embedding": (0,), "binary_embedding": (1, 2),
    "layer_norm": (1, 2), "rms_norm": (1,)}
INDICES: Mapping[str, int] = {"embedding": 1, "binary_embedding": 0}
LOGICAL = ("logical_and", "logical_or", "logical_not")
# What leaves the order of elements as it is, where it keeps the last axis.
SAME_ROWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default,
             aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
             aten.flatten.using_ints, aten.unflatten.int, aten.clone.default,
             aten.contiguous.default, aten.alias.default, aten.detach.default)


def rules_of(few: bool) -> Mapping[Any, Rule]:
    """The rules of programs with any number of rows, or with few."""
    return {**RULES, **OF_FEW_ROWS} if few else RULES


def step_of(node: fx.Node, rules: Mapping[Any, Rule] | None = None) -> Step | None:
    """What a node does to every row, or None where it does another thing."""
    known = node.op == "call_function" and is_tensor(node)
    rule = (rules or RULES).get(node.target) if known else None
    if rule is None or len(shape_of(node)) < 2 or fixed(shape_of(node)[-1]) is None:
        return None
    step = rule.write(arguments(node), node)
    return step if step is not None and _fits(step, node) else None


def fixed(size: Any) -> int | None:
    """A size that is the same in every call, also one that was tried as a symbol; else None."""
    if isinstance(size, torch.SymInt):
        return int(size.node.expr) if size.node.expr.is_number else None
    return int(size)


def keeps_rows(node: fx.Node) -> bool:
    """Whether a node passes on its rows in their order, in other leading axes at most."""
    if node.op != "call_function" or not (node.target in SAME_ROWS or _moves_only_ones(node)):
        return False
    before, after = value_of(node.args[0]), value_of(node)
    return before.dtype == after.dtype == torch.float32 and after.ndim > 1 and before.ndim > 1 \
        and fixed(after.shape[-1]) is not None and equal(before.shape[-1], after.shape[-1]) \
        and equal(rows_of(node.args[0]), rows_of(node))


def _moves_only_ones(node: fx.Node) -> bool:
    """Whether a node moves no axes but those of size 1, so that elements keep their order."""
    if node.target is aten.permute.default:
        order = [axis % len(shape_of(node)) for axis in node.args[1]]
    elif node.target is aten.transpose.int:
        order = list(range(len(shape_of(node))))
        first, second = (axis % len(order) for axis in node.args[1:3])
        order[first], order[second] = second, first
    else:
        return False
    wide = [axis for axis in order if not equal(shape_of(node.args[0])[axis], 1)]
    return wide == sorted(wide)


def rows_of(node: fx.Node) -> Any:
    """How many rows a value has."""
    return product(shape_of(node)[:-1])


def _fits(step: Step, node: fx.Node) -> bool:
    """Whether all that the step reads is float32, a flag or an index, and no nan is a literal."""
    logical = step.op in LOGICAL
    for place, arg in enumerate(step.args):
        if isinstance(arg, Step):
            if not _fits(arg, node):
                return False
        elif isinstance(arg, fx.Node):
            if not is_tensor(arg) or not _readable(step.op, place, value_of(arg), logical):
                return False
        elif arg is not None and not isinstance(arg, bool | int | float | str):
            return False
        elif isinstance(arg, float) and math.isnan(arg):
            return False
    return value_of(node).dtype in (torch.float32, torch.bool)


def _readable(op: str, place: int, value: torch.Tensor, logical: bool) -> bool:
    if value.device.type != "cpu":
        return False
    if INDICES.get(op) == place:
        return value.dtype in (torch.int32, torch.int64)
    if (op == "binary_linear" and place == 1) or (op == "binary_embedding" and place == 1):
        return value.dtype == torch.uint8
    flag = logical or (op == "where" and place == 0)
    return value.dtype == (torch.bool if flag else torch.float32)
